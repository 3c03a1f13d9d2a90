"""Timelines: a world and a clock make a plan of rounds.

Closed rounds begin together, or clients take turns in them; in open ones they
are at work while the model moves. What is planned depends on the seed and on
what clients told, not on lanes, devices or how the run was interrupted.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedjax_peft import plan as plan_lib
from fedjax_peft.network import adaptation, flight, ledger, together
from fedjax_peft.network import clock as clock_lib
from fedjax_peft.network import world as world_lib


def plan(
  world: world_lib.World,
  clock: clock_lib.Clock,
  wanted: int,
  *,
  hears: frozenset[str] = frozenset(),
) -> plan_lib.Plan:
  """Who takes part in every round, when, and what it costs.

  Args:
    world: where clients are and what happens to them.
    clock: when rounds end.
    wanted: clients of a closed round; open ones go by their concurrency.
    hears: notes that the world's functions read, beside those that its
      selection reads.

  Returns:
    The plan. Its record has `round/seconds`, `spent/joules` and so on, its
    table a row for each client that spent anything.

  Raises:
    ValueError: if fewer clients than that could ever take part.
  """
  able = int((world.seen & world.fits).sum())
  most = clock.concurrency or clock.asked(wanted)
  if able < most:
    unfit = np.flatnonzero(world.seen & ~world.fits)
    raise ValueError(
      f"{most} clients are to work at a time, but {able} can: of "
      f"{int(world.seen.sum())}, {unfit.size} have too little memory (such as "
      f"clients {unfit[:3].tolist()}: {int(world.needs.max()):,} bytes are "
      "needed); choose a smaller cohort, a smaller model or other devices"
    )
  hears = hears | ({"loss"} & world.select.reads)
  if clock.is_open:
    if world.server is not None:  # who is at work at one time shares it
      world = world._replace(server=world.server.among(clock.concurrency))
    turn, pool = flight.turns(world, clock), clock.concurrency + 1
    init = flight.start(world, clock)
  else:
    turn, pool = _closed(world, clock, wanted), 0
    init = world_lib.start(world)
  made = plan_lib.Plan(
    name=f"{clock.name}, {world.select.name}, {world.fault.name}",
    init=lambda: {k: np.array(v) for k, v in init.items()},
    turn=turn,
    most=_most(world, clock, wanted),
    hears=hears,
    pool=pool,
  )
  return together.together(made, clock.together)


def _most(world, clock, wanted):
  """The most reports of a round."""
  if clock.is_open:  # where time alone ends a round, everybody may report
    return clock.buffer or int((world.seen & world.fits).sum())
  asked = clock.asked(wanted)
  most = world.select.most(int(world.seen.sum()), asked)
  return min(most, wanted) if clock.over else most


def _closed(world, clock, wanted):
  """Rounds that begin together, or in which clients take turns."""
  happen = _in_turn if clock.serial else _at_once

  def turn(memory: dict, number: int, told: Mapping[str, Any]):
    memory = world_lib.moved(world, world_lib.heard(memory, told), number)
    waited, some = world_lib.waiting(world, memory, number, told)
    asked = clock.asked(wanted)
    ids = np.asarray(
      world.select.choose(
        world_lib.rng(world.seed, number), some, asked, number
      )
    )
    later = memory | {"now": np.asarray(memory["now"] + waited)}
    what, began = happen(world, later, ids, number)
    used, seconds = clock_lib.close(
      clock, what.happened.seconds, what.happened.arrived, wanted
    )
    if not ids.size:  # nobody was asked, and the server looks again later
      seconds = min(world.patience, clock.seconds)
    costs = ledger.charge(
      ids,
      what.load,
      what.planned,
      what.happened,
      what.machines,
      world.prices,
      used=used,
      began=began,
      parts=what.parts,
    )
    memory, record = world_lib.settle(
      world, memory, costs, number, seconds + waited
    )
    chosen = ids[used].astype(np.int32)
    decided = {k: v[used] for k, v in what.traits.items()}
    return plan_lib.Turn(
      clients=chosen,
      nodes=memory["nodes"][chosen] if "nodes" in memory else None,
      steps=None if what.steps is None else what.steps[used],
      traits=world.fault.traits(chosen, number, world.seed) | decided,
      record=record | adaptation.record(decided, what.band),
      table=costs.table(),
    ), memory

  return turn


def _at_once(world, memory, ids, number):
  """What happens to clients that begin together, and when they do."""
  return world_lib.happen(world, memory, ids, number), float(memory["now"])


def _in_turn(world, memory, ids, number):
  """What happens to clients that take turns, and when each begins [C].

  Each is alone with the band and the server, and meets the links of its time.
  """
  if not ids.size:
    return _at_once(world, memory, ids, number)
  now, found, began = float(memory["now"]), [], []
  for at in range(ids.size):
    then = memory | {"now": np.asarray(now)}
    what = world_lib.happen(world, then, ids[at : at + 1], number)
    found.append(what)
    began.append(now)
    took = float(what.happened.seconds[0])
    now += took if np.isfinite(took) else 0.0
  names = world_lib.Happened._fields[1:]
  rows = (_rows([getattr(what, name) for what in found]) for name in names)
  send = _rows([what.machines.send for what in found])
  machines = dataclasses.replace(world.fleet.take(ids), send=send)
  return world_lib.Happened(machines, *rows), np.array(began)


def _rows(each):
  """Arrays, tuples or tables of arrays, or nothing, one after another."""
  if each[0] is None:
    return None
  if isinstance(each[0], np.ndarray):
    return np.concatenate(each)
  if isinstance(each[0], Mapping):
    return {k: _rows([table[k] for table in each]) for k in each[0]}
  # In a load, a number stands for an array of it.
  return type(each[0])(*map(np.hstack, zip(*each, strict=True)))
