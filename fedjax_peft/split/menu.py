"""Menus: the cuts and bits that clients may be told, and what each would cost.

Costs come from the function that charges for the round (`Known.load`), which
counts every kind of step once and remembers it. Axes: c clients with a link,
L cuts, Q numbers of bits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_peft.links import ranging
from fedjax_peft.network import adaptation, channel, ledger
from fedjax_peft.network import radio as radio_lib
from fedjax_peft.split import cost
from fedjax_peft.split.moving import BITS, CUT

_TINY = 1e-30
_LEAST = 1e-6  # watts; a machine that draws no more to send than to idle


class Menu(NamedTuple):
  """What clients may be told.

  Attributes:
    cuts: numbers of stages on the device; empty: as they are.
    bits: of a value; empty: as they are.
    memory: float64 [L], bytes that a device needs; 0 where cuts are as they
      are, since who has no room for its own is not asked.
    error: float64 [L, Q], mean squared error of a value that crosses, at most,
      in squares of the range of a token.
    whole: the cut over which nothing crosses.
  """

  cuts: tuple[int, ...]
  bits: tuple[int, ...]
  memory: np.ndarray
  error: np.ndarray
  whole: int

  @property
  def traits(self) -> tuple[str, ...]:
    """Names of what is told."""
    return (CUT,) * bool(self.cuts) + (BITS,) * bool(self.bits)

  def told(
    self, clients: int, some: np.ndarray, cut: np.ndarray, bits: np.ndarray
  ) -> dict[str, np.ndarray]:
    """{trait: int32 [C]} of places among cuts and bits.

    Args:
      clients: C.
      some: int [c], who has a link; the others are told the last of each, as
        is of bits who sends none.
      cut: int [c].
      bits: int [c].
    """
    found = {}
    if self.cuts:
      found[CUT] = np.full(clients, self.cuts[-1], np.int32)
      found[CUT][some] = np.array(self.cuts)[cut]
    if self.bits:
      found[BITS] = np.full(clients, self.bits[-1], np.int32)
      found[BITS][some] = np.array(self.bits)[bits]
      found[BITS][found[CUT] == self.whole] = self.bits[-1]
    return found


AS_THEY_ARE = Menu((), (), np.zeros(1), np.zeros((1, 1)), 0)


def menu(
  split: cost.Split | None,
  stages: int,
  *,
  cuts: Sequence[int] | None = None,
  bits: Sequence[int] = (),
  least_cut: int = 1,
) -> Menu:
  """What clients of a model may be told, checked.

  Args:
    split: of its work; None: it is not cut.
    stages: that it has, n.
    cuts: stages on the device, 1 to n (nothing crosses); None: all of these.
    bits: of a value on the wire, 1 to 32; none: they do not move.
    least_cut: stages that every device keeps for privacy.

  Raises:
    ValueError: if these are no cuts or no bits, or nothing is left.
  """
  if split is None:
    if cuts is not None or bits or least_cut != 1:
      raise ValueError(
        "cuts and bits are chosen for a model whose cut moves: got "
        f"{cuts=} {bits=} {least_cut=} and none; write split.movable(module), "
        "or leave them out"
      )
    return AS_THEY_ARE
  given = range(1, stages + 1) if cuts is None else cuts
  if not all(1 <= c <= stages for c in (*given, least_cut)):
    raise ValueError(
      f"cuts are 1 to {stages} stages on the device: got {list(given)} and "
      f"{least_cut=}"
    )
  kept = tuple(sorted({c for c in given if c >= least_cut}))
  if not kept:
    raise ValueError(
      f"no cut is left: got {list(given)} with {least_cut=}; allow later cuts"
    )
  if not all(1 <= b <= ranging.FLOATS for b in bits):
    raise ValueError(f"bits of a value are 1 to 32, got {list(bits)}")
  widths = tuple(sorted(set(bits)))
  memory = np.array([split.memory({CUT: c}) for c in kept], np.float64)
  each = np.array([_error(b) for b in widths] or [0.0])
  crosses = np.array(kept) < stages
  return Menu(kept, widths, memory, crosses[:, None] * each, stages)


def _error(bits: int) -> float:
  """Delta^2 / 4 of a range of one, rounded at random; 0 of floats."""
  return 0.0 if bits >= ranging.FLOATS else 0.25 / (2**bits - 1) ** 2


class Costs(NamedTuple):
  """What each choice costs clients with a link.

  Attributes:
    some: int [c], their places among all.
    device_seconds: float64 [c, L], of all steps.
    up_bits: float64 [c, L, Q].
    down_seconds: float64 [c, L, Q].
    server_flops: float64 [c, L].
    compute_joules: float64 [c, L], above idling, as all joules.
    receive_joules: float64 [c, L, Q].
    gains: float64 [c], linear.
    watts: radiated, at most.
    draw: float64 [c], watts that sending with these takes above idling.
    room: int64 [c], bytes of memory.
    noise: W/Hz.
  """

  some: np.ndarray
  device_seconds: np.ndarray
  up_bits: np.ndarray
  down_seconds: np.ndarray
  server_flops: np.ndarray
  compute_joules: np.ndarray
  receive_joules: np.ndarray
  gains: np.ndarray
  watts: float
  draw: np.ndarray
  room: np.ndarray
  noise: float

  def rate(self, width: float) -> np.ndarray:
    """float64 [c], bits per second at full power over so many hertz."""
    return channel.rate(width, self.watts, self.gains, noise=self.noise)

  def usual(self, width: float, speed: float) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, joules), float64 [c], of the first choice with full power.

    Args:
      width: Hz of each.
      speed: FLOP/s of the server for each.
    """
    sent = self.up_bits[:, 0, 0] / self.rate(width)
    seconds = self.device_seconds[:, 0] + self.server_flops[:, 0] / speed
    joules = self.compute_joules[:, 0] + self.receive_joules[:, 0, 0]
    seconds = seconds + sent + self.down_seconds[:, 0, 0]
    # They are units: of nothing at all too.
    return np.maximum(seconds, _TINY), np.maximum(
      joules + self.draw * sent, _TINY
    )


def ask(known: adaptation.Known, menu: Menu = AS_THEY_ARE) -> Costs:
  """What each choice would cost those who have a link.

  A server for whose answer devices do not wait counts with what it needs
  longer than the device: at least as long as clients will wait for it.
  """
  some = np.flatnonzero(known.on)
  machines, load = known.machines.take(some), _load(known, menu, some)
  idle = machines.idle

  def each(x):
    return x[:, None, None]

  device = load.flops / each(machines.flops)
  served = load.server
  if known.server is not None and not known.server.waits:
    speed = known.server.among(some.size).flops
    device = np.maximum(device, served / speed)
    served = np.zeros_like(served)
  down = 8 * load.down / each(known.down[some])
  down = down + 8 * load.stream_down / each(known.back[some])
  busy = load.flops / each(machines.flops)
  compute = np.maximum(machines.compute - idle, 0.0)
  receive = np.maximum(machines.receive - idle, 0.0)
  return Costs(
    some=some,
    device_seconds=device[:, :, 0],
    up_bits=8.0 * (load.up + load.stream_up),
    down_seconds=down,
    server_flops=served[:, :, 0],
    compute_joules=(each(compute) * busy)[:, :, 0],
    receive_joules=each(receive) * down,
    gains=known.gains[some],
    watts=float(channel.watts(known.radio.power)),
    draw=np.maximum(machines.send - idle, _LEAST),
    room=machines.memory,
    noise=radio_lib.noise_of(known.radio),
  )


def _load(known, menu, some):
  """What the round asks with each choice, a Load of float64 [c, L, Q]."""
  given = {CUT: menu.cuts, BITS: menu.bits}
  shape = tuple(max(len(values), 1) for values in given.values())
  places = np.indices(shape).reshape(len(shape), -1)
  choices = {
    name: np.array(values)[at]
    for (name, values), at in zip(given.items(), places, strict=True)
    if values
  }

  def table(x):
    rows = np.asarray(x, np.float64).reshape(*shape, -1)
    return np.moveaxis(rows, -1, 0)[some]

  return ledger.Load(*map(table, known.load(choices)))
