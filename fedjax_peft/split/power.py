"""Power: how hard a device sends, for a deadline or for a trade.

For a deadline the least power is known (`channel.power_for`), and energy falls
the more time there is. Without one, a sum of time and energy,

  minimize  (a + b p) D / r(p),  r(p) = w log2(1 + p g / (N0 w)),

has its optimum where x = 1 + p g / (N0 w) solves x (ln x - 1) = a g / (b N0 w)
- 1, which is x = e^(1 + W((a g / (b N0 w) - 1) / e)) with Lambert's function W.
It depends on the message in no way. Both are exact, so that no successive
convex approximation is needed.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.special

from fedjax_peft.network import channel


class Power(NamedTuple):
  """Powers, and who can do with them.

  Attributes:
    watts: float64, at most the limit; the limit where that is not enough.
    feasible: bool, whether the message arrives in time.
  """

  watts: np.ndarray
  feasible: np.ndarray

  @property
  def why_not(self) -> str:
    """One sentence about the clients that cannot do it; "" if all can."""
    bad = np.flatnonzero(~np.atleast_1d(self.feasible))
    if not bad.size:
      return ""
    rest = f" and {bad.size - 1} more" if bad.size > 1 else ""
    return (
      f"client {bad[0]}{rest} cannot send in time with at most "
      f"{np.atleast_1d(self.watts).flat[bad[0]]:.3g} W: give more time or "
      "bandwidth, or fewer bits to send"
    )


def for_deadline(
  seconds: npt.ArrayLike,
  bits: npt.ArrayLike,
  width: npt.ArrayLike,
  gains: npt.ArrayLike,
  power_max: npt.ArrayLike,
  *,
  noise: float = channel.NOISE,
) -> Power:
  """The least power that sends a message in time; all of any shape.

  Args:
    seconds: until the deadline.
    bits: of the message.
    width: Hz.
    gains: linear.
    power_max: watts.
    noise: W/Hz.

  Example:
    >>> some = for_deadline([2.0, 0.1], 1e7, 1e6, 1e-11, 0.2)
    >>> some.feasible
    array([ True, False])
    >>> some.why_not[:28]
    'client 1 cannot send in time'
  """
  given = np.broadcast_arrays(seconds, bits, width, gains, power_max)
  left, d, w, g, most = (np.asarray(x, np.float64) for x in given)
  sends = d > 0
  w = np.where(sends, w, 1.0)
  with np.errstate(divide="ignore", invalid="ignore"):
    need = channel.power_for(left, d / 8, w, g, noise=noise)
  need = np.where(sends, need, 0.0)
  # What takes the limit is not refused for rounding.
  feasible = need <= most * (1 + 1e-9)
  return Power(np.minimum(need, most), feasible)


def trade(
  width: npt.ArrayLike,
  gains: npt.ArrayLike,
  power_max: npt.ArrayLike,
  *,
  seconds_weight: float,
  joules_weight: float,
  noise: float = channel.NOISE,
) -> np.ndarray:
  """The power at which a weighted sum of time and energy is least.

  Args:
    width: Hz.
    gains: linear.
    power_max: watts; the optimum is cut to it.
    seconds_weight: a > 0, of a second of sending.
    joules_weight: b >= 0, of a joule; at 0 the limit is best.
    noise: W/Hz.

  Returns:
    float64 watts, of the arguments' shape.

  Example:
    >>> best = trade(1e6, 1e-12, 9.0, seconds_weight=1.0, joules_weight=1.0)
    >>> around = best * np.array([0.9, 1.0, 1.1])
    >>> cost = (1 + around) / channel.rate(1e6, around, 1e-12)
    >>> int(np.argmin(cost))
    1
  """
  given = np.broadcast_arrays(width, gains, power_max)
  w, g, most = (np.asarray(x, np.float64) for x in given)
  snr = g / (noise * w)  # of a watt
  if joules_weight == 0:
    return most.copy()
  c = seconds_weight / joules_weight * snr
  over = np.expm1(1 + scipy.special.lambertw((c - 1) / math.e).real)
  # Near its branch point Lambert's function has half of the digits: d^2 = 2 c.
  d = np.where(c < 1e-3, np.sqrt(2 * c), over)
  for _ in range(3):
    log = np.log1p(d)
    d = d - ((1 + d) * log - d - c) / log
  return np.minimum(d / snr, most)
