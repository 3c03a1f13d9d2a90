"""Trials: what a round comes to if clients train in one way.

Clients begin at once, in cohorts, or one after another; what each does and
has is chosen by the very functions that choose it in a simulated network
(`choosing`), from what the simulation charges. There is no fading, and no
message is lost.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_peft.network import (
  adaptation,
  cells,
  channel,
  ledger,
  multi,
  profile,
  serving,
)
from fedjax_peft.network import radio as radio_lib
from fedjax_peft.split import choosing
from fedjax_peft.split import menu as menu_lib
from fedjax_peft.split.moving import BITS, CUT

FLOATS = 32  # bits of a value that is sent as it is


class Offer(NamedTuple):
  """A way in which a model could be trained.

  Attributes:
    scheme: "federated", "splitfed", "frozen" or "sequential".
    rank: of the adapters.
    stages: names of the model's stages, n.
    cuts: stages on the device that are possible, of 1 to n.
    load: (ids [C], {"cut": [C], "bits": [C]}) -> Load, what a round asks.
    memory: (cut) -> bytes that a device needs.
    trained: (cut) -> values that train, on both sides.
  """

  scheme: str
  rank: int
  stages: tuple[str, ...]
  cuts: tuple[int, ...]
  load: Callable[..., ledger.Load]
  memory: Callable[[int], float]
  trained: Callable[[int], int]

  @property
  def in_turn(self) -> bool:
    """Whether clients work one after another."""
    return self.scheme == "sequential"


class Candidate(NamedTuple):
  """An offer, and what clients may choose from.

  Attributes:
    offer: the way.
    cuts: of one, all clients have it.
    bits: of a value that crosses, likewise.
  """

  offer: Offer
  cuts: tuple[int, ...]
  bits: tuple[int, ...]

  @property
  def before(self) -> dict[str, int]:
    """Cut and bits of those to whom nothing is told."""
    if len(self.cuts) == len(self.bits) == 1:
      return {CUT: self.cuts[0], BITS: self.bits[0]}
    return {CUT: len(self.offer.stages), BITS: FLOATS}

  @property
  def memory(self) -> np.ndarray:
    """Bytes of each cut, float64 [L]."""
    return np.array([self.offer.memory(c) for c in self.cuts], np.float64)

  @property
  def menu(self) -> menu_lib.Menu:
    """The same as a menu."""
    each = np.array([rounding(b) for b in self.bits])
    whole = len(self.offer.stages)
    crosses = np.array(self.cuts)[:, None] < whole
    return menu_lib.Menu(
      self.cuts, self.bits, self.memory, crosses * each, whole
    )


class Place(NamedTuple):
  """Where clients are, and what they have.

  Attributes:
    fleet: machines of N clients.
    radio: their cell.
    metres: float64 [N], to the base station.
    server: what computes for them.
    ids: int [M], who may be asked.
    cohort: clients of a round.
    seed: of cohorts and shadowing.
    rounds: cohorts that are tried, at most.
  """

  fleet: profile.Fleet
  radio: radio_lib.Radio
  metres: np.ndarray
  server: serving.Server
  ids: np.ndarray
  cohort: int
  seed: int = 0
  rounds: int = 8

  def fits(self, candidate: Candidate) -> np.ndarray:
    """Bool [M], who has the memory for one of the cuts."""
    return candidate.memory.min() <= self.fleet.memory[self.ids]

  def cohorts(self, candidate: Candidate | None = None) -> list[np.ndarray]:
    """Cohorts of those who have the memory, each sorted; none of nobody."""
    some = self.ids if candidate is None else self.ids[self.fits(candidate)]
    if some.size <= self.cohort:
      return [np.sort(some)] if some.size else []
    order = np.random.default_rng(self.seed).permutation(some)
    count = min(some.size // self.cohort, self.rounds)
    parts = order[: count * self.cohort].reshape(count, self.cohort)
    return list(np.sort(parts, axis=-1))


class Scale(NamedTuple):
  """Seconds and joules of a round, by which others are measured."""

  seconds: float
  joules: float


class Trial(NamedTuple):
  """What rounds come to; axis c, clients of all cohorts.

  Attributes:
    candidate: what was tried.
    goal: by which clients chose.
    seconds: of a round, a mean over cohorts.
    joules: of all clients in a round, likewise.
    error: mean squared error of a value, in squares of its token's range.
    columns: {name: [c]}, what each client does and spends.
  """

  candidate: Candidate
  goal: choosing.Goal
  seconds: float
  joules: float
  error: float
  columns: dict[str, np.ndarray]


def rounding(bits: int) -> float:
  """Mean squared error of a value that is rounded at random, at most.

  Args:
    bits: of a value; 32 are a float.

  Returns:
    A quarter of a squared step, in squares of the range.

  Example:
    >>> rounding(1), rounding(32)
    (0.25, 0.0)
  """
  return 0.0 if bits >= FLOATS else 0.25 / (2**bits - 1) ** 2


def calm(radio: radio_lib.Radio) -> radio_lib.Radio:
  """The cell without fading, outages and losses."""
  return radio._replace(
    fading="none", p_gb=0.0, packet_m=0.0, loss=0.0, retries=0
  )


def scale(candidate: Candidate, place: Place, cohorts: Sequence) -> Scale:
  """A round with equal shares, full power and nothing told; at least 1e-30.

  Of clients in turn, what one of them takes.
  """
  found = []
  for ids in cohorts:
    known = _known(candidate, place, ids)
    shares = 1 if known.radio.sharing == "own" else ids.size
    each = choosing.server_of(known, ids.size)
    asked = menu_lib.ask(known)
    seconds, joules = asked.usual(known.radio.bandwidth / shares, each)
    one = candidate.offer.in_turn
    found.append(
      (seconds.mean(), joules.mean()) if one else (seconds.max(), joules.sum())
    )
  return Scale(*np.mean(found, axis=0).tolist())


def run(candidate: Candidate, place: Place, goal: choosing.Goal) -> Trial:
  """Rounds of all cohorts, whose clients choose by a goal.

  Raises:
    ValueError: if nobody has the memory.
  """
  cohorts = place.cohorts(candidate)
  if not cohorts:
    raise ValueError(
      f"{candidate.offer.scheme} needs at least {candidate.memory.min():,.0f} "
      "bytes on a device, and nobody has them; allow earlier cuts"
    )
  parts = [_round(candidate, place, goal, ids) for ids in cohorts]
  whole = np.sum if candidate.offer.in_turn else np.max
  columns = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
  return Trial(
    candidate,
    goal,
    float(np.mean([whole(p["seconds"]) for p in parts])),
    float(np.mean([p["joules"].sum() for p in parts])),
    float(columns["error"].mean()),
    columns,
  )


def _known(candidate, place, ids) -> adaptation.Known:
  """What is known of clients who begin, each alone if they take turns."""
  offer, radio, server = candidate.offer, calm(place.radio), place.server
  if offer.in_turn:
    radio = radio._replace(sharing="own", broadcast=False)
    server = server._replace(shared=False)
  metres = place.metres[ids]
  here = [cells.Cell(np.arange(ids.size), metres)]
  moment = cells.Moment(here, ids, 0, place.seed, 0.0)
  signal = cells.signals(radio, moment)

  def load(choices):
    count = max((len(v) for v in choices.values()), default=1)
    told = candidate.before | choices
    facts = {
      k: np.repeat(np.broadcast_to(v, count), ids.size) for k, v in told.items()
    }
    found = offer.load(np.tile(ids, count), facts)
    rows = (np.broadcast_to(x, count * ids.size) for x in found)
    return ledger.Load(*(x.reshape(count, ids.size) for x in rows))

  return adaptation.Known(
    ids,
    0,
    place.fleet.take(ids),
    radio_lib.gains(radio, metres, ids, 0, place.seed)[1],
    signal.on,
    signal.down,
    cells.signals(multi.unicast(radio), moment).down,
    radio,
    server,
    load,
  )


def _round(candidate, place, goal, ids) -> dict[str, np.ndarray]:
  """What clients of a cohort do and spend, {name: [C]}."""
  known, menu = _known(candidate, place, ids), candidate.menu
  costs = menu_lib.ask(known, menu)
  if known.radio.sharing == "own" or ids.size < 2:
    found = choosing.alone(known, costs, menu, goal, full=False)
  else:
    found = choosing.together(known, costs, menu, goal)
  at = np.arange(ids.size), found.cut, found.bits
  rate = channel.rate(found.width, found.watts, costs.gains, noise=costs.noise)
  sent, flops = costs.up_bits[at] / rate, costs.server_flops[at[:2]]
  served = np.divide(
    flops, found.speed, out=np.zeros_like(flops), where=flops > 0
  )
  device = costs.device_seconds[at[:2]]
  told = menu.told(ids.size, np.arange(ids.size), found.cut, found.bits)
  load = candidate.offer.load(ids, told)
  crossed = load.up + load.down + load.stream_up + load.stream_down
  sending = costs.draw * (found.watts / costs.watts) * sent
  received = costs.receive_joules[at]
  return {
    "client": ids,
    **told,
    "rank": np.full(ids.size, candidate.offer.rank),
    "band": found.width / known.radio.bandwidth,
    "watts": found.watts,
    "seconds": device + sent + served + costs.down_seconds[at],
    "joules": costs.compute_joules[at[:2]] + received + sending,
    "bytes": crossed,
    "memory": menu.memory[found.cut],
    "error": menu.error[found.cut, found.bits],
  }
