"""Equal finish: shares such that all clients are done at the same time.

A client that has t seconds to send D bits with power P over a gain g needs

  w = D ln 2 / (x t),  with (e^x - 1) / x = P g t / (N0 D ln 2),

where x is the rate in nats per second and hertz: x = -1/k - W(-e^(-1/k) / k)
on the branch W_-1 of Lambert's function, k being the right side. The rate
saturates at P g / (N0 ln 2) bits per second however wide the band, so that
k > 1 or it cannot be done. The finish T is where the widths add up to the band;
any other division lets somebody finish later.

Corless et al., On the Lambert W Function, 1996,
https://doi.org/10.1007/BF02124750
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.special

from fedjax_peft.network import channel


class Equal(NamedTuple):
  """Shares with which all finish together.

  Attributes:
    share: float64 [C], Hz or FLOP/s; 0 for clients that need none.
    finish: seconds at which all are done that take a share.
  """

  share: np.ndarray
  finish: float


def least_width(
  seconds: npt.ArrayLike,
  bits: npt.ArrayLike,
  power: npt.ArrayLike,
  gains: npt.ArrayLike,
  *,
  noise: float = channel.NOISE,
) -> np.ndarray:
  """The least bandwidth that sends a message in time; all of any shape.

  Args:
    seconds: until the deadline.
    bits: of the message; 0 needs no band.
    power: watts.
    gains: linear.
    noise: W/Hz.

  Returns:
    float64 Hz; inf where no bandwidth suffices.

  Example:
    >>> width = least_width(2.0, 1e7, 0.2, 1e-12)
    >>> float(np.round(2.0 * channel.rate(width, 0.2, 1e-12)))
    10000000.0
  """
  given = np.broadcast_arrays(seconds, bits, power, gains)
  left, d, p, g = (np.asarray(x, np.float64) for x in given)
  nats = d * math.log(2)
  energy = p * g * np.maximum(left, 0) / noise  # nats that could be sent
  able = energy > nats
  sends = able & (nats > 0)
  k = np.divide(energy, nats, out=np.full_like(d, 2.0), where=sends)
  x = efficiency(k)
  width = np.divide(nats, x * left, out=np.zeros_like(d), where=sends)
  return np.where(sends | (nats == 0), width, np.inf)


def efficiency(k: np.ndarray) -> np.ndarray:
  """The rate in nats per second and hertz of who can send k times its message.

  Args:
    k: > 1, of any shape: the nats that the energy could carry over a band
      without end, over those of the message.

  Returns:
    x > 0 with (e^x - 1) / x = k.
  """
  x = -1 / k - scipy.special.lambertw(-np.exp(-1 / k) / k, -1).real
  # Near k = 1 the branch point costs half of the digits.
  x = np.where(k < 1.01, 2 * (k - 1), x)
  for _ in range(3):
    x = x - (np.expm1(x) - k * x) / (np.expm1(x) - (k - 1))
  return x


def band(
  seconds: npt.ArrayLike,
  bits: npt.ArrayLike,
  power: npt.ArrayLike,
  gains: npt.ArrayLike,
  bandwidth: float,
  *,
  noise: float = channel.NOISE,
) -> Equal:
  """Divides a band so that all are done at once, as soon as can be.

  Args:
    seconds: [C], before a client sends or after it has; what is not sending.
    bits: [C] to send; 0 = takes no part.
    power: [C] watts.
    gains: [C] linear.
    bandwidth: Hz, W.
    noise: W/Hz.

  Raises:
    ValueError: if a client that has bits to send has no power or no gain.

  Example:
    >>> shares = band([0.0, 1.0], [1e7, 1e7], 0.2, [1e-11, 1e-12], 1e6)
    >>> rates = channel.rate(shares.share, 0.2, np.array([1e-11, 1e-12]))
    >>> np.allclose(np.array([0.0, 1.0]) + 1e7 / rates, shares.finish)
    True
  """
  given = np.broadcast_arrays(seconds, bits, power, gains)
  c, d, p, g = (np.asarray(x, np.float64) for x in given)
  on = d > 0
  if not on.any():
    return Equal(np.zeros(c.shape), float(c.max(initial=0)))
  _reaches(on, p * g)
  c, d, p, g = c[on], d[on], p[on], g[on]
  even = bandwidth / d.size
  late = float((c + d / channel.rate(even, p, g, noise=noise)).max())
  # However wide the band, nobody is done before this.
  soon = float((c + d * math.log(2) * noise / (p * g)).max())

  def excess(log):
    widths = least_width(soon + math.exp(log) - c, d, p, g, noise=noise)
    return math.log(widths.sum() / bandwidth)

  share = np.zeros(on.shape)
  finish = soon + math.exp(_root(excess, math.log(late - soon)))
  width = least_width(finish - c, d, p, g, noise=noise)
  share[on] = width * (bandwidth / width.sum())
  return Equal(share, finish)


def server(seconds: npt.ArrayLike, flops: npt.ArrayLike, speed: float) -> Equal:
  """Divides a server so that all are done at once, as soon as can be.

  Args:
    seconds: [C], all that is not computing at the server.
    flops: [C] at the server; 0 = takes no part.
    speed: FLOP/s, F.

  Example:
    >>> server([0.0, 1.0], [1e12, 1e12], 1e12)
    Equal(share=array([3.81966011e+11, 6.18033989e+11]), finish=2.618...)
  """
  c, s = np.broadcast_arrays(np.asarray(seconds, np.float64), flops)
  on = s > 0
  if not on.any():
    return Equal(np.zeros(c.shape), float(c.max(initial=0)))
  c, s = c[on], s[on] / speed
  late, soon = float((c + s * c.size).max()), float((c + s).max())
  if c.size == 1:
    return Equal(np.where(on, speed, 0.0), soon)

  def excess(log):
    return math.log((s / (soon + math.exp(log) - c)).sum())

  share = np.zeros(on.shape)
  finish = soon + math.exp(_root(excess, math.log(late - soon)))
  part = s / (finish - c)
  share[on] = part * (speed / part.sum())
  return Equal(share, finish)


def _root(excess, top: float) -> float:
  """Where a falling function is zero, at or below `top`."""
  low = top - 1.0
  while excess(low) <= 0:
    low -= 2 * (top - low)
    if low < top - 80:  # closer to its bound than numbers are
      return low
  high = top + 1e-9  # where it is as good as zero, rounding may say more
  if excess(high) >= 0:
    return top
  return scipy.optimize.brentq(excess, low, high, xtol=1e-14, rtol=1e-14)


def _reaches(on: np.ndarray, received: np.ndarray) -> None:
  """Raises ValueError unless all who send can be heard."""
  if not np.all(received[on] > 0):
    bad = int(np.argmax(on & ~(received > 0)))
    raise ValueError(
      f"client {bad} has bits to send but no power or no gain: leave it out, "
      "or give it no bits"
    )
