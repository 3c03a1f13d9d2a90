"""Flight: clients at work while the model moves on.

A number of clients is always at work. When one reports (or is lost) another
takes its place, and starts from the model of that moment; when enough reports
are there, or time is up, the model moves. What happens at one moment happens
in this order: reports, by client id; the model; new starts. So ties are
decided, and with a buffer as large as the cohort and equal delays this is
synchronous averaging.

What happens to a client in a round is one draw, so whoever was lost in a round
is not asked again in it. A round in which nobody is at work and nobody else
can be asked, or in which hopelessly many were lost (a server that is down),
ends with what has come.

The models that clients at work started from are kept in a pool. It has a place
for each client and one more: every model in it has a client at work or one
that reports in this round.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedjax_peft import plan as plan_lib
from fedjax_peft.network import adaptation, ledger, phases
from fedjax_peft.network import clock as clock_lib
from fedjax_peft.network import world as world_lib

Memory = dict[str, np.ndarray]
_FREE = -1
_HOPELESS = 4  # times as many lost in a round as are at work at a time


def start(world: world_lib.World, clock: clock_lib.Clock) -> Memory:
  """Memory with room for the clients at work; axis A.

  `work/client`: -1 = free. `work/version`: the round whose model it started
  from. `work/began`, `work/ends`: seconds. `pool/version`: the round whose
  model each place of the pool holds, -1 = none. `work/send`: watts of the
  machine while it sends, where that is decided.
  """
  size = clock.concurrency
  memory = world_lib.start(world)
  zeros = phases.timed(np.zeros(size), 0.0, 0.0)
  memory |= {
    "work/client": np.full(size, _FREE, np.int64),
    "work/version": np.zeros(size, np.int64),
    "work/began": np.zeros(size),
    "work/ends": np.full(size, np.inf),
    "work/steps": np.zeros(size, np.int64),
    "pool/version": np.full(size + 1, _FREE, np.int64),
  }
  for name in _loads(world):
    kind = "int64" if name in ("up", "down") else "float64"
    memory[f"work/{name}"] = np.zeros(size, kind)
  for name in _parts(world):
    memory[f"work/part/{name}"] = np.zeros(size)
  for kind in ("planned", "happened"):
    for name, value in zeros._asdict().items():
      memory[f"work/{kind}/{name}"] = np.array(value)
  none = np.zeros(0, np.int64)
  for name in (*world.fault.traits(none, 0, world.seed), *_decided(world)):
    memory[f"work/trait/{name}"] = np.zeros(size, np.int32)
  if world.adapt is not None:
    memory["work/send"] = np.zeros(size)
  return memory


def _decided(world: world_lib.World) -> tuple[str, ...]:
  """Traits that are decided when a client starts."""
  return () if world.adapt is None else world.adapt.traits


def _loads(world: world_lib.World) -> tuple[str, ...]:
  """Fields of a load that are remembered."""
  whole = ("flops", "up", "down")
  return whole if world.server is None else ledger.Load._fields


def _parts(world: world_lib.World) -> tuple[str, ...]:
  """Parts of the steps that are remembered."""
  return () if world.server is None else phases.Parts._fields


def turns(world: world_lib.World, clock: clock_lib.Clock):
  """The turns of an open clock; see `plan.Plan.turn`."""

  def turn(memory: Memory, number: int, told: Mapping[str, Any]):
    memory = {k: np.array(v) for k, v in memory.items()}
    memory = world_lib.moved(world, world_lib.heard(memory, told), number)
    begun = float(memory["now"])
    until = begun + clock.seconds
    reports = lost = _rows(memory, np.zeros(0, np.int64))
    for again in itertools.count():
      memory = _fill(
        world, memory, number, told, _joined([reports, lost]), again, until
      )
      first = float(memory["work/ends"].min())
      if not first <= until or math.isinf(first):  # nobody is at work
        now = float(memory["now"])
        if not reports["work/client"].size + lost["work/client"].size:
          now += world.patience
        now = until if math.isfinite(until) else now
        memory["now"] = np.asarray(now)
        break
      memory["now"] = np.asarray(max(first, float(memory["now"])))
      here = np.flatnonzero(memory["work/ends"] <= first)
      here = here[np.argsort(memory["work/client"][here], kind="stable")]
      arrived = _phases(memory, "happened").arrived[here]
      come, gone = here[arrived], here[~arrived]
      if clock.buffer:  # whoever finds it full waits for the next round
        come = come[: clock.buffer - reports["work/client"].size]
      reports = _joined([reports, _rows(memory, come)])
      lost = _joined([lost, _rows(memory, gone)])
      _release(memory, np.concatenate([come, gone]))
      if clock.buffer and (
        reports["work/client"].size == clock.buffer
        or lost["work/client"].size >= _HOPELESS * clock.concurrency
      ):
        break
    memory, keep, version = _pooled(memory, reports, number)
    seconds = float(memory["now"]) - begun
    memory["now"] = np.asarray(begun)
    return _turn(world, memory, number, seconds, reports, lost, keep, version)

  return turn


def _turn(world, memory, number, seconds, reports, lost, keep, version):
  """What a round is, once it has ended."""
  both = _joined([reports, lost])
  ids = both["work/client"]
  used = np.arange(ids.size) < reports["work/client"].size
  parts = [both[f"work/part/{name}"] for name in _parts(world)]
  machines = world.fleet.take(ids)
  if world.adapt is not None:
    machines = dataclasses.replace(machines, send=both["work/send"])
  costs = ledger.charge(
    ids,
    ledger.Load(*(both[f"work/{name}"] for name in _loads(world))),
    _phases(both, "planned"),
    _phases(both, "happened"),
    machines,
    world.prices,
    used=used,
    began=both["work/began"],
    parts=phases.Parts(*parts) if parts else None,
  )
  memory, record = world_lib.settle(world, memory, costs, number, seconds)
  stale = number - reports["work/version"]
  record["clock/stale_mean"] = float(stale.mean()) if stale.size else 0.0
  record["clock/stale_max"] = int(stale.max(initial=0))
  record["clock/working"] = int((memory["work/client"] != _FREE).sum())
  chosen = reports["work/client"].astype(np.int32)
  traits = {"staleness": stale.astype(np.int32)}
  prefix = "work/trait/"
  traits |= {
    k.removeprefix(prefix): v for k, v in reports.items() if prefix in k
  }
  record |= adaptation.record({k: traits[k] for k in _decided(world)})
  turn = plan_lib.Turn(
    clients=chosen,
    nodes=memory["nodes"][chosen] if "nodes" in memory else None,
    version=version,
    keep=(keep,),
    steps=None if world.steps is None else reports["work/steps"],
    traits=traits,
    record=record,
    table=costs.table(),
  )
  return turn, memory


def _fill(world, memory, number, told, tried, again, until):
  """Clients start at every free place; waits while there was nobody yet."""
  free = np.flatnonzero(memory["work/client"] == _FREE)
  if not free.size:
    return memory
  working = memory["work/client"][memory["work/client"] != _FREE]
  busy = np.concatenate([working, tried["work/client"]])
  if busy.size:
    some = world_lib.candidates(world, memory, number, told, busy)
  else:
    waited, some = world_lib.waiting(world, memory, number, told)
    if float(memory["now"]) + waited > until:
      return memory
    memory["now"] = np.asarray(memory["now"] + waited)
  draws = world_lib.rng(world.seed, number, again)
  ids = np.asarray(world.select.choose(draws, some, free.size, number))
  if not ids.size:
    return memory
  what = world_lib.happen(world, memory, ids, number)
  now, took = float(memory["now"]), what.happened.seconds
  # That a client is lost the server finds out only after a while.
  noticed = np.where(what.happened.arrived, 0.0, world.patience)
  at = free[: ids.size]
  new = {
    "work/client": ids,
    "work/version": number,
    "work/began": now,
    "work/ends": now + np.where(np.isfinite(took), took, 0.0) + noticed,
    "work/steps": 0 if what.steps is None else what.steps,
  }
  for name in _loads(world):
    new[f"work/{name}"] = getattr(what.load, name)
  for name in _parts(world):
    new[f"work/part/{name}"] = getattr(what.parts, name)
  for kind in ("planned", "happened"):
    for name, value in getattr(what, kind)._asdict().items():
      new[f"work/{kind}/{name}"] = value
  if world.adapt is not None:
    new["work/send"] = what.machines.send
  traits = world.fault.traits(ids, number, world.seed) | dict(what.traits)
  for name, value in traits.items():
    new[f"work/trait/{name}"] = value
  for name, value in new.items():
    memory[name][at] = value
  return memory


def _pooled(memory, reports, number):
  """Keeps the model of now if a client at work started from it.

  Returns:
    (memory, its place in the pool or -1, int32 version of every report as in
    `executor.Cohort`).
  """
  working = memory["work/client"] != _FREE
  versions = memory["work/version"][working]
  began = reports["work/version"]
  pool, keep = memory["pool/version"], -1
  if (versions == number).any():
    free = ~np.isin(pool, np.concatenate([versions, began]))
    keep = int(np.argmax(free))
    pool[keep] = number
  place = np.zeros(began.size, np.int32)
  for i, version in enumerate(began):
    if version != number:
      place[i] = 1 + int(np.flatnonzero(pool == version)[0])
  return memory, keep, place


def _rows(memory: Memory, places: np.ndarray) -> Memory:
  """What is known of the clients at some places."""
  return {k: v[places] for k, v in memory.items() if k.startswith("work/")}


def _release(memory: Memory, places: np.ndarray) -> None:
  """Frees places."""
  memory["work/client"][places] = _FREE
  memory["work/ends"][places] = np.inf


def _joined(rows: list[Memory]) -> Memory:
  """Rows one after another."""
  return {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}


def _phases(rows: Memory, kind: str) -> phases.Phases:
  """The phases of all rows."""
  return phases.Phases(
    *(rows[f"work/{kind}/{name}"] for name in phases.Phases._fields)
  )
