"""The problem of allocation: what each choice of a cut and of bits would cost.

  T_k = C_k + D_k / r_k + S_k / f_k + G_k    E_k = e_k + p_k D_k / r_k

are the seconds and joules of client k in a round. All of C (device), D (bits
up), S (FLOPs of the server), G (download), e (computing) depend on the cut and
on the bits of a value; the rate r_k on width, power and gain. An allocation
has the objective

  weight T / T0 + (1 - weight) sum_k E_k / E0 + error_weight sum_k error_k

with T the last T_k of clients that work at once, or the sum where they take
turns. Axes: C clients, L cuts, Q numbers of bits, H sub-channels.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedjax_peft import validate
from fedjax_peft.network import channel

_TABLES = {
  "device_seconds": 2,
  "compute_joules": 2,
  "up_bits": 3,
  "down_seconds": 3,
  "server_flops": 2,
  "memory": 2,
  "error": 3,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
  """What is to be allocated, and what it is worth.

  Arrays may be given as anything that broadcasts to their shapes.

  Attributes:
    device_seconds: [C, L], of all the steps of a round on the device.
    compute_joules: [C, L], of the device for them.
    up_bits: [C, L, Q], of all that it sends in a round.
    down_seconds: [C, L, Q], until it has received all.
    server_flops: [C, L], of the server for it in a round.
    gains: [C], linear, of a band that is divided freely; or [C, H], of
      sub-channels of equal width, each of which goes to one client.
    power_max: [C] watts that a client can send with.
    bandwidth: Hz of all together.
    server_speed: FLOP/s of the server, inf takes no time.
    memory: [C, L] bytes that the device needs.
    memory_max: [C] bytes that it has.
    least_cut: int [C], place among the L cuts of the first that is private
      enough.
    error: [C, L, Q], [L, Q] or [Q], what rounding does to training, in any
      unit (n Delta^2 / 4 of a quantizer, say).
    weight: of time against energy, in [0, 1].
    seconds_scale: T0.
    joules_scale: E0.
    error_weight: of the error, >= 0.
    deadline: seconds, T at most.
    in_turn: whether clients take turns, each with the whole band and server.
    server_each: whether each client has a server of its own speed, instead of
      a share of one.
    noise: W/Hz.
    cuts: names of the cuts, for explanations.
    bits: names of the numbers of bits.

  Raises:
    ValueError: if a shape or a number is wrong, no cut is left to a client, or
      time has no weight and there is no deadline.
  """

  device_seconds: np.ndarray
  compute_joules: np.ndarray
  up_bits: np.ndarray
  down_seconds: np.ndarray
  server_flops: np.ndarray
  gains: np.ndarray
  power_max: np.ndarray
  bandwidth: float
  server_speed: float = math.inf
  memory: np.ndarray = dataclasses.field(default_factory=lambda: np.array(0.0))
  memory_max: np.ndarray = dataclasses.field(
    default_factory=lambda: np.array(math.inf)
  )
  least_cut: np.ndarray = dataclasses.field(default_factory=lambda: np.array(0))
  error: np.ndarray = dataclasses.field(default_factory=lambda: np.array(0.0))
  weight: float = 0.5
  seconds_scale: float = 1.0
  joules_scale: float = 1.0
  error_weight: float = 0.0
  deadline: float = math.inf
  in_turn: bool = False
  server_each: bool = False
  noise: float = channel.NOISE
  cuts: Sequence[str | int] = ()
  bits: Sequence[str | int] = ()

  def __post_init__(self):
    shape = np.shape(self.up_bits)
    if len(shape) != 3 or 0 in shape:
      raise ValueError(
        f"up_bits must be [clients, cuts, bits], got the shape {list(shape)}"
      )
    for name, rank in _TABLES.items():
      table = _table(name, getattr(self, name), shape[:rank])
      object.__setattr__(self, name, table)
    gains = np.asarray(self.gains, np.float64)
    if gains.ndim not in (1, 2) or len(gains) != shape[0]:
      raise ValueError(
        f"gains must be [{shape[0]}] or [{shape[0]}, sub-channels], got the "
        f"shape {list(gains.shape)}"
      )
    object.__setattr__(self, "gains", gains)
    for name in ("power_max", "memory_max"):
      given = np.asarray(getattr(self, name), np.float64)
      object.__setattr__(self, name, np.broadcast_to(given, shape[:1]))
    least = np.broadcast_to(np.asarray(self.least_cut), shape[:1])
    object.__setattr__(self, "least_cut", least)
    object.__setattr__(self, "cuts", tuple(self.cuts) or (*range(shape[1]),))
    object.__setattr__(self, "bits", tuple(self.bits) or (*range(shape[2]),))
    _check(self)

  def __len__(self) -> int:
    return len(self.device_seconds)

  @property
  def allowed(self) -> np.ndarray:
    """Whether a cut fits the memory and is private enough, bool [C, L]."""
    deep = np.arange(self.memory.shape[1]) >= self.least_cut[:, None]
    return deep & (self.memory <= self.memory_max[:, None])

  @property
  def seconds_weight(self) -> float:
    """Of a second of T in the objective."""
    return self.weight / self.seconds_scale

  @property
  def joules_weight(self) -> float:
    """Of a joule in the objective."""
    return (1 - self.weight) / self.joules_scale

  def take(self, rows: np.ndarray) -> "Problem":
    """The problem of some of the clients."""
    fields = [*_TABLES, "gains", "power_max", "memory_max", "least_cut"]
    return dataclasses.replace(
      self, **{name: getattr(self, name)[rows] for name in fields}
    )


class Load(NamedTuple):
  """What a choice asks, of any shape: see `Problem`.

  Attributes:
    seconds: of device, download, and of a server of one's own.
    bits: to send up.
    flops: of a server that is shared.
    joules: of computing.
    error: weighed.
  """

  seconds: np.ndarray
  bits: np.ndarray
  flops: np.ndarray
  joules: np.ndarray
  error: np.ndarray


def load(
  problem: Problem,
  cut: np.ndarray | None = None,
  bits: np.ndarray | None = None,
) -> Load:
  """What clients ask with their choices [..., C]; of all, without any.

  Args:
    problem: of C clients.
    cut: int [..., C], places among the cuts.
    bits: int [..., C], places among the numbers of bits.

  Returns:
    A Load of arrays [..., C], or [C, L, Q].
  """
  served = problem.server_flops / problem.server_speed
  alone = problem.server_each or problem.in_turn
  seconds = problem.device_seconds + (served if alone else 0.0)
  flops = problem.server_flops * (not alone and served.any())
  whole = Load(
    seconds[:, :, None] + problem.down_seconds,
    problem.up_bits,
    np.broadcast_to(flops[:, :, None], problem.up_bits.shape),
    np.broadcast_to(problem.compute_joules[:, :, None], problem.up_bits.shape),
    problem.error * problem.error_weight,
  )
  if cut is None:
    return whole
  client = np.arange(len(problem))
  return Load(*(x[client, cut, bits] for x in whole))


def _table(name: str, value: npt.ArrayLike, shape: tuple) -> np.ndarray:
  """A table of its shape, after a check."""
  table = np.asarray(value, np.float64)
  try:
    table = np.broadcast_to(table, shape)
  except ValueError:
    raise ValueError(
      f"{name} must be {list(shape)} or broadcast to it, as up_bits has "
      f"clients, cuts and bits: got the shape {list(table.shape)}"
    ) from None
  if not np.all((table >= 0) & (table < np.inf)):
    raise ValueError(f"{name} must be at least 0 and finite, got {table.min()}")
  return table


def _check(problem: Problem) -> None:
  """Raises ValueError unless numbers are in their ranges."""
  validate.positive(
    bandwidth=problem.bandwidth,
    seconds_scale=problem.seconds_scale,
    joules_scale=problem.joules_scale,
    noise=problem.noise,
  )
  for name in ("server_speed", "deadline"):
    if not (value := getattr(problem, name)) > 0:
      raise ValueError(f"{name} must be above 0, got {name}={value}")
  if not 0 <= problem.weight <= 1:
    raise ValueError(f"weight must be in [0, 1], got {problem.weight}")
  if not 0 <= problem.error_weight < np.inf:
    raise ValueError(
      f"error_weight must be at least 0, got {problem.error_weight}"
    )
  if problem.weight == 0 and problem.deadline == np.inf:
    raise ValueError(
      "weight=0 leaves time out, and energy falls with it without end: give a "
      "deadline in seconds, or weight=0.01"
    )
  _check_clients(problem)


def _check_clients(problem: Problem) -> None:
  """Raises ValueError unless every client has a link and a cut to choose."""
  for name in ("gains", "power_max"):
    value = getattr(problem, name)
    fine = (value > 0) & (value < np.inf)
    if not fine.all():
      bad = int(np.argmin(fine.reshape(len(value), -1).all(1)))
      raise ValueError(
        f"{name} must be above 0 and finite, got {value[bad]} for client "
        f"{bad}; leave out clients that have no link"
      )
  clients, channels = len(problem), problem.gains.shape[-1]
  if problem.gains.ndim == 2 and channels < clients and not problem.in_turn:
    raise ValueError(
      f"every client needs a sub-channel of its own, got {channels} for "
      f"{clients} clients; divide the band more finely, or choose fewer clients"
    )
  lacking = ~problem.allowed.any(-1)
  if lacking.any():
    bad = int(np.argmax(lacking))
    deep = problem.memory[bad, problem.least_cut[bad] :]
    raise ValueError(
      f"client {bad} has no cut to choose: from place "
      f"{problem.least_cut[bad]} on, of {len(problem.cuts)}, the device needs "
      f"at least {deep.min(initial=np.inf):.3g} bytes, and it has "
      f"{problem.memory_max[bad]:.3g}"
    )
