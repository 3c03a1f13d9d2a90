"""The world: where clients are, what they have, and what happens to them.

It answers what a clock needs to know, as functions of (seed, round, client):
whom can be asked, how long they take and where their messages end, what it
costs. `timeline.plan` turns it and a clock into a plan
of rounds.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_peft import first, tailoring
from fedjax_peft.network import (
  adaptation,
  availability,
  cells,
  ledger,
  multi,
  phases,
  profile,
  selection,
  serving,
)
from fedjax_peft.network import fault as fault_lib
from fedjax_peft.network import radio as radio_lib

Memory = dict[str, np.ndarray]

_YEAR = 365 * 24 * 3600.0


class Hop(NamedTuple):
  """What crosses between two tiers when the upper one synchronizes.

  Attributes:
    name: of the upper tier.
    span: rounds between two synchronizations.
    nodes: senders.
    up: bytes that each sends.
    down: bytes that each is sent.
    wire: each one's line; all send at the same time.
  """

  name: str
  span: int
  nodes: int
  up: int
  down: int
  wire: radio_lib.Wire

  def seconds(self) -> float:
    """Until all are heard and answered."""
    return float(self.wire.seconds(self.up) + self.wire.seconds(self.down))


class World(NamedTuple):
  """Where clients are and what they have; N clients, E nodes hear them.

  Attributes:
    seed: of the run.
    examples: int64 [N], how many each trains on.
    seen: bool [N], who may be asked at all.
    fleet: their machines.
    radio: their links: of one radio, of several, or recorded.
    distance: (seconds) -> float64 [N, E], metres to each node at that time.
    load: (ids, round, steps [C] or None) -> what a round asks of them; to
      adapt also ({trait: [C]}), which hold in place of theirs.
    needs: bytes [N] that training takes on each.
    hops: the tiers above the lowest.
    home: (distance [N, E], round, nodes [N] before) -> int32 [N], the node
      that each talks to; None where there is one.
    fault: what goes wrong.
    available: who can be reached.
    select: whom of them the server asks.
    prices: of traffic and requests.
    steps: (ids, round, Memory, seconds of one step [C], of both links [C]) ->
      int64 [C]; None is what the local work says.
    server: what computes a part of clients' steps; None where their machines
      do it all.
    before: float64 [N], bytes that each sends up once in the whole run, in the
      midst of its first steps; None: nobody does.
    adapt: what is decided for clients when their round begins; None: nothing.
    recharge: watts that flow into a battery at all times.
    patience: seconds, > 0, after which the server looks again when nobody is
      there or was asked, and notices that a client at work is lost.
  """

  seed: int
  examples: np.ndarray
  seen: np.ndarray
  fleet: profile.Fleet
  radio: multi.Links
  distance: Callable[[float], np.ndarray]
  load: Callable[..., ledger.Load]
  needs: np.ndarray
  hops: Sequence[Hop] = ()
  home: Callable[..., np.ndarray] | None = None
  fault: fault_lib.Fault = fault_lib.compose()
  available: availability.Availability = availability.always()
  select: selection.Selection = selection.uniform()
  prices: ledger.Prices = ledger.Prices()
  steps: Callable[..., np.ndarray] | None = None
  server: serving.Server | None = None
  before: np.ndarray | None = None
  adapt: adaptation.Adaptation | None = None
  recharge: float = 0.0
  patience: float = 60.0

  @property
  def fits(self) -> np.ndarray:
    """Bool [N], on whose machine training fits."""
    return self.needs <= self.fleet.memory


def start(world: World) -> Memory:
  """What is remembered before the first round.

  `now`: seconds; `spent`: totals of `ledger.SPENT`; `battery`: joules left
  [N]; `last`: round in which each took part, -1 = never [N]; `nodes` [N].
  """
  clients = len(world.fleet)
  memory = {
    "now": np.zeros(()),
    "spent": np.zeros(len(ledger.SPENT)),
    "battery": world.fleet.battery.copy(),
    "last": np.full(clients, -1, np.int64),
    "loss": np.zeros(2),  # mean of the first that were heard, and the last
  }
  memory |= first.start(world.before)
  if world.home is not None:
    nodes = np.full(clients, -1, np.int32)
    memory["nodes"] = world.home(world.distance(0.0), 0, nodes)
  return memory


def moved(world: World, memory: Memory, number: int) -> Memory:
  """Clients go where they are, and find the node that hears them."""
  if world.home is None:
    return memory
  distance = world.distance(float(memory["now"]))
  nodes = world.home(distance, number, memory["nodes"])
  return memory | {"nodes": nodes.astype(np.int32)}


def heard(memory: Memory, told: Mapping[str, np.ndarray]) -> Memory:
  """Notes the mean loss of those who took part last."""
  if "loss" not in told:
    return memory
  last = memory["last"]
  here = (last >= 0) & (last == last.max()) & np.isfinite(told["loss"])
  if not here.any():
    return memory
  now = float(np.mean(told["loss"][here], dtype=np.float64))
  first = memory["loss"][0]
  return memory | {"loss": np.array([first if first else now, now])}


def candidates(
  world: World,
  memory: Memory,
  number: int,
  told: Mapping[str, np.ndarray],
  busy: np.ndarray | None = None,
) -> selection.Candidates:
  """Whom the server could ask now, sorted by id.

  Those whose machine is too small, whose battery is empty, who cannot be
  reached, or who are at work already, are none of them.
  """
  now = float(memory["now"])
  here = world.seen & world.fits & (memory["battery"] > 0)
  if busy is not None:
    here[busy] = False
  ids = np.flatnonzero(here)
  ids = ids[world.available.at(world.seed, ids, now)]
  seconds = np.zeros(ids.size)
  if "seconds" in world.select.reads and ids.size:
    plain = expected(world, memory, ids, number)
    seconds = plain.seconds
  loss = told.get("loss")
  full = world.fleet.battery[ids]
  with np.errstate(invalid="ignore"):
    left = memory["battery"][ids] / full
  return selection.Candidates(
    ids=ids.astype(np.int32),
    examples=world.examples[ids],
    seconds=seconds,
    loss=np.full(ids.size, np.nan)
    if loss is None
    else np.asarray(loss[ids], np.float64),
    last=memory["last"][ids],
    battery=np.where(np.isfinite(full), left, 1.0),
  )


def expected(
  world: World, memory: Memory, ids: np.ndarray, number: int
) -> phases.Phases:
  """How long clients would take: no faults, no fading, nothing shared."""
  quiet = world._replace(
    radio=multi.calm(world.radio),
    fault=fault_lib.compose(),
    server=world.server and world.server._replace(shared=False),
  )
  return happen(quiet, memory, ids, number).happened


class Happened(NamedTuple):
  """A round of some clients; axis C.

  Attributes:
    machines: theirs; their `send` is that of the power they send with.
    load: what it asked of them.
    planned: how long it takes where nothing is lost.
    happened: how long it took, and where messages were lost.
    steps: int64 [C], local steps of each; None is what the work says.
    parts: what the planned steps are made of, where a server has a part.
    traits: {name: int32 [C]}, decided for this round.
    band: float64 [C], shares of the band if they were decided.
  """

  machines: profile.Fleet
  load: ledger.Load
  planned: phases.Phases
  happened: phases.Phases
  steps: np.ndarray | None
  parts: phases.Parts | None = None
  traits: Mapping[str, np.ndarray] = {}
  band: np.ndarray | None = None


def happen(
  world: World, memory: Memory, ids: np.ndarray, number: int
) -> Happened:
  """What happens to clients that start a round now.

  Args:
    world: where they are.
    memory: the time, and whom they talk to.
    ids: int [C].
    number: of the round, which the draws depend on.
  """
  machines, moment = world.fleet.take(ids), _moment(world, memory, ids, number)
  signal = cells.signals(world.radio, moment)
  back, left = signal.down, first.left(world.before, memory, ids)
  if world.server is not None and not world.server.common:
    # What comes back to one is not for the others.
    back = cells.signals(multi.unicast(world.radio), moment).down

  def timed(load, speed=None):
    return serving.timed(load, machines, signal, world.server, back, speed)

  def load(places, traits):
    count = None if steps is None else steps[places]
    decided = (traits,) if traits else ()
    found = world.load(ids[places], number, count, *decided)
    return found._replace(stream_up=found.stream_up + left[places])

  steps = None
  if world.steps is not None and ids.size:
    once, _ = timed(world.load(ids, number, np.ones(ids.size, np.int64)))
    links = once.down + once.up + phases.transfer(left, signal.up)
    steps = world.steps(ids, number, memory, once.compute, links)
  chosen = adaptation.UNCHANGED
  if world.adapt is not None and ids.size:
    facts = (machines, signal, back, world.server, load)
    chosen = cells.decide(world.adapt, world.radio, moment, *facts)
    signal = cells.signals(world.radio, moment, chosen)
    machines = adaptation.drawing(machines, world.radio, chosen.watts)
  asked = load(slice(None), _linked(world, ids, number) | dict(chosen.traits))
  planned, parts = timed(asked, chosen.speed)
  real = planned
  if signal.lost.any():
    real = phases.lose(real, np.where(signal.lost, phases.UP, 0), 1.0)
  off = ~(signal.on & np.isfinite(planned.seconds))
  real = phases.lose(real, off * phases.DOWN, 0.0)
  real = world.fault.phases(real, ids, number, world.seed)
  planned = _slowed(world, planned, real.lost > 0, ids, number)
  return Happened(
    machines, asked, planned, real, steps, parts, chosen.traits, chosen.band
  )


def _linked(world, ids, number):
  """{trait: [C]}, for how many steps clients have a link; {} where for all."""
  drawn = world.fault.traits(ids, number, world.seed)
  return {k: v for k, v in drawn.items() if k == tailoring.ONLINE}


def _moment(world, memory, ids, number):
  """A round of some clients that begins now, each in its cell."""
  now = float(memory["now"])
  nodes = None if world.home is None else memory["nodes"][ids]
  found = cells.cells(world.distance(now)[ids], nodes)
  return cells.Moment(found, ids, number, world.seed, now)


def _slowed(world, planned, lost, ids, number):
  """What is planned for clients that are lost, with what slows them down.

  Faults cut nobody's round short who is lost before all else, so what they
  return for such a client is how long its phases would have taken.
  """
  at = np.flatnonzero(lost)
  if not at.size:
    return planned
  gone = planned.rows(at)._replace(lost=np.full(at.size, phases.DOWN, np.int8))
  slow = world.fault.phases(gone, ids[at], number, world.seed)
  new = {k: getattr(planned, k).copy() for k in ("down", "compute", "up")}
  for name, seconds in new.items():
    seconds[at] = getattr(slow, name)
  return planned._replace(**new)


def settle(
  world: World, memory: Memory, costs: ledger.Costs, number: int, seconds: float
) -> tuple[Memory, dict[str, float]]:
  """Closes the books of a round.

  Args:
    world: whose hops synchronize in this round.
    memory: before.
    costs: of all clients whose time was charged in this round.
    number: of the round.
    seconds: from the end of the round before to when the lowest tier heard.

  Returns:
    (memory, the round's part of the record).
  """
  seconds += world.fault.pause(number, world.seed)
  record = ledger.total(costs)
  crossed, dollars = 0, record["device/dollars"]
  for hop in world.hops:
    due = (number + 1) % hop.span == 0
    size = hop.nodes * (hop.up + hop.down) if due else 0
    record[f"{hop.name}/seconds"] = hop.seconds() if due else 0.0
    record[f"{hop.name}/dollars"] = world.prices.backhaul * size / 1e9
    crossed += size
    seconds += record[f"{hop.name}/seconds"]
    dollars += record[f"{hop.name}/dollars"]
  record |= {
    "round/bytes": record["device/up_bytes"]
    + record["device/down_bytes"]
    + crossed,
    "round/joules": record["device/joules"],
    "round/dollars": dollars,
    "round/grams": record["device/grams"],
    "round/seconds": seconds,
  }
  spent = ledger.spend(memory["spent"], record)
  record |= {
    f"spent/{name}": float(x)
    for name, x in zip(ledger.SPENT, spent, strict=True)
  }
  record["device/excluded"] = int((world.seen & ~world.fits).sum())
  battery = memory["battery"].copy()
  np.subtract.at(battery, costs.client, costs.joules)
  battery = battery + world.recharge * seconds
  last = memory["last"].copy()
  last[costs.client[costs.used]] = number
  through = np.isin(costs.lost, (phases.ARRIVES, phases.UP))
  sent, once = first.done(world.before, memory, costs.client[through])
  record |= once
  memory = memory | sent
  memory |= {
    "now": np.asarray(memory["now"] + seconds),
    "spent": spent,
    "battery": np.clip(battery, 0.0, world.fleet.battery),
    "last": last,
  }
  return memory, record


def waiting(
  world: World,
  memory: Memory,
  number: int,
  told: Mapping[str, np.ndarray],
  busy: np.ndarray | None = None,
) -> tuple[float, selection.Candidates]:
  """Waits until anybody can be asked, looking ever more seldom.

  Returns:
    (seconds waited, candidates then).

  Raises:
    ValueError: if nobody could be asked for a year.
  """
  waited, pause = 0.0, world.patience
  while waited <= _YEAR:
    later = memory | {
      "now": np.asarray(memory["now"] + waited),
      "battery": np.minimum(
        memory["battery"] + world.recharge * waited, world.fleet.battery
      ),
    }
    some = candidates(world, later, number, told, busy)
    if some.ids.size:
      return waited, some
    waited += pause
    pause = min(1.1 * pause, max(world.patience, 3600.0))
  raise ValueError(
    f"nobody can be asked in round {number}, nor for a year after: of "
    f"{int(world.seen.sum())} clients, {int(world.fits.sum())} have the memory "
    f"and {int((memory['battery'] > 0).sum())} a charged battery; change the "
    "availability or the devices, or recharge"
  )


def rng(seed: int, number: int, again: int = 0) -> np.random.Generator:
  """The generator of a round's draws, that of samplers for the first."""
  counter = [0, 0, 0, again]
  return np.random.Generator(
    np.random.Philox(key=[seed, number], counter=counter)
  )
