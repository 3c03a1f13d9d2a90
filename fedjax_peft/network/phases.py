"""Phases: how long each part of a client's round takes, and where it ends.

A client downloads the model, computes, uploads its message. A message that is
lost ends in one of these phases, and later ones do not happen. Faults change
phases, a clock orders them, a ledger charges for them; all on the host, in
float64, for all clients of a cohort at once.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

ARRIVES, DOWN, COMPUTE, UP = range(4)  # values of `Phases.lost`
PHASES = {"download": DOWN, "compute": COMPUTE, "upload": UP}


class Spent(NamedTuple):
  """Seconds that clients really spend in each phase; axis C.

  Attributes:
    down: float64 [C], downloading.
    compute: float64 [C], computing.
    up: float64 [C], uploading.
  """

  down: np.ndarray
  compute: np.ndarray
  up: np.ndarray


class Parts(NamedTuple):
  """What the compute phase is made of where a server has a part; axis C.

  A client computes its part of a step, sends activations up, waits for the
  server, and gets gradients down; here all steps are taken together.

  Attributes:
    device: float64 [C], seconds in which it computes itself.
    up: float64 [C], sends what its part hands on.
    server: float64 [C], waits while the server computes for it.
    down: float64 [C], gets what comes back.
  """

  device: np.ndarray
  up: np.ndarray
  server: np.ndarray
  down: np.ndarray

  @property
  def seconds(self) -> np.ndarray:
    """Of the whole phase, float64 [C]: one part after another."""
    return self.device + self.up + self.server + self.down

  def within(self, seconds: np.ndarray) -> "Parts":
    """The parts of a phase that took another time: all as much longer."""
    whole = self.seconds
    some = (whole > 0) & np.isfinite(whole)
    scale = seconds / np.where(some, whole, 1.0)
    parts = [np.where(some, x, 0.0) * scale for x in self]
    # A phase of which nothing is known is the device's own.
    return Parts(np.where(some, parts[0], seconds), *parts[1:])


class Phases(NamedTuple):
  """One round of the clients of a cohort; axis C.

  Attributes:
    down: float64 [C], seconds to download. Where the message is lost in a
      phase, seconds until it is lost; what is said of later phases is void.
    compute: float64 [C], seconds to compute.
    up: float64 [C], seconds to upload. A phase may be infinite (a link
      without a rate): such a message does not arrive.
    delay: float64 [C], seconds between the upload and the server's receipt.
    lost: int8 [C], 0 = not lost, 1 = while it downloads, 2 = while it
      computes, 3 = while it uploads.
    copies: int64 [C], how often the message arrives; the server keeps one.
  """

  down: np.ndarray
  compute: np.ndarray
  up: np.ndarray
  delay: np.ndarray
  lost: np.ndarray
  copies: np.ndarray

  @property
  def spent(self) -> Spent:
    """Seconds of the phases that happen, in part or whole."""
    return Spent(
      self.down,
      np.where(self.reaches(COMPUTE), self.compute, 0.0),
      np.where(self.reaches(UP), self.up, 0.0),
    )

  @property
  def seconds(self) -> np.ndarray:
    """Until the message is at the server, or is lost: float64 [C]."""
    spent = sum(self.spent)
    return spent + np.where(self.lost == ARRIVES, self.delay, 0.0)

  @property
  def arrived(self) -> np.ndarray:
    """Bool [C], whether the message comes to the server at some time."""
    return (self.lost == ARRIVES) & np.isfinite(self.seconds)

  def reaches(self, phase: int) -> np.ndarray:
    """Bool [C], whether the client begins a phase (DOWN, COMPUTE or UP)."""
    return (self.lost == ARRIVES) | (self.lost >= phase)

  def rows(self, index: ArrayLike) -> "Phases":
    """The phases of some of the clients, by place or mask."""
    return Phases(*(x[np.asarray(index)] for x in self))


def timed(
  down: ArrayLike,
  compute: ArrayLike,
  up: ArrayLike,
  *,
  delay: ArrayLike = 0.0,
) -> Phases:
  """Rounds in which nothing is lost.

  Args:
    down: seconds to download, a number or [C].
    compute: seconds to compute, likewise.
    up: seconds to upload, likewise.
    delay: seconds between the upload and the receipt, likewise.

  Returns:
    The Phases, all arguments broadcast to one [C].

  Raises:
    ValueError: if a time is negative or nan, or shapes do not fit.

  Example:
    >>> round = timed([1.0, 2.0], 3.0, [0.5, 0.25])
    >>> lose(round, [0, COMPUTE], 0.5).seconds
    array([4.5, 3.5])
  """
  given = {"down": down, "compute": compute, "up": up, "delay": delay}
  times = {k: np.asarray(x, np.float64) for k, x in given.items()}
  for name, x in times.items():
    if not (x >= 0).all():
      worst = float(x.min())
      raise ValueError(
        f"{name} must be seconds of at least 0, got {name}={worst}"
      )
  try:
    shape = np.broadcast_shapes((1,), *(x.shape for x in times.values()))
  except ValueError:
    shape = ()
  if len(shape) != 1:
    shapes = {k: list(x.shape) for k, x in times.items()}
    raise ValueError(
      f"phases must be numbers or arrays of one length, got shapes {shapes}"
    )
  full = {k: np.broadcast_to(x, shape) for k, x in times.items()}
  return Phases(
    **full, lost=np.zeros(shape, np.int8), copies=np.ones(shape, np.int64)
  )


def transfer(size: ArrayLike, rate: ArrayLike) -> np.ndarray:
  """Float64 [C], seconds that bytes take at bits per second.

  Nothing takes no time, even on a link without a rate; all else takes for ever
  there.
  """
  size, rate = np.asarray(size, np.float64), np.asarray(rate, np.float64)
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.where(size > 0, size * 8.0 / rate, 0.0)


def lose(round: Phases, where: ArrayLike, moment: ArrayLike) -> Phases:
  """Messages are lost on their way.

  A message that is lost already stays where it was lost, unless it would now
  be lost in an earlier phase.

  Args:
    round: what would happen.
    where: [C] or a number, the phase in which it is lost; 0 = nowhere.
    moment: [C] or a number in [0, 1], the fraction of that phase that passes
      before.

  Returns:
    The Phases, cut short.
  """
  where = np.broadcast_to(np.asarray(where, np.int8), round.lost.shape)
  first = (where != ARRIVES) & ((round.lost == ARRIVES) | (where < round.lost))

  def cut(seconds, phase):
    # `where`, since 0 * inf is nan: a link without a rate, lost at once.
    part = np.where(np.equal(moment, 0), 0.0, np.multiply(seconds, moment))
    return np.where(first & (where == phase), part, seconds)

  with np.errstate(invalid="ignore"):
    return round._replace(
      down=cut(round.down, DOWN),
      compute=cut(round.compute, COMPUTE),
      up=cut(round.up, UP),
      lost=np.where(first, where, round.lost),
    )
