"""Shares: the band, the server and the powers of clients that work at once.

With cuts and bits given, what is left is one convex problem,

  minimize  a T + b sum_k E(w_k, t_k),  t_k = T - c_k - S_k / f_k,
  where     E(w, t) = t (N0 w / g) (2^(D / (w t)) - 1),
  such that sum_k w_k <= W,  sum_k f_k <= F,  D_k / r(w_k, P_k) <= t_k.

Every client sends with the least power that takes it to T, so power is no
variable of its own. E is convex in (w, t) together and falls in t, t is
concave in (T, f), and 1 / r is convex in w. So nothing has to be approximated
(successively or otherwise) or alternated: bandwidth, server, powers and finish
are found at once (`interior`), and multipliers are prices, of a hertz and of a
FLOP/s.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedjax_peft.network import channel
from fedjax_peft.split import interior


class Shares(NamedTuple):
  """How clients share; leading axes are problems of their own.

  Attributes:
    width: float64 [..., C] Hz; 0 where nothing is sent.
    speed: float64 [..., C] FLOP/s of the server; 0 where it does nothing.
    finish: float64 [...] seconds; inf where the deadline cannot be met.
    hertz_price: float64 [...], by how much one hertz more would lower the
      objective.
    flops_price: float64 [...], by how much one FLOP/s more would.
  """

  width: np.ndarray
  speed: np.ndarray
  finish: np.ndarray
  hertz_price: np.ndarray
  flops_price: np.ndarray


def solve(
  seconds: npt.ArrayLike,
  bits: npt.ArrayLike,
  flops: npt.ArrayLike,
  gains: npt.ArrayLike,
  power_max: npt.ArrayLike,
  *,
  bandwidth: float,
  speed: float,
  seconds_weight: npt.ArrayLike,
  joules_weight: npt.ArrayLike,
  width: npt.ArrayLike | None = None,
  deadline: float = math.inf,
  noise: float = channel.NOISE,
) -> Shares:
  """The best shares and finish of clients whose loads are given.

  Args:
    seconds: c [..., C], what no share shortens: the device's steps, the
      download.
    bits: D [..., C] to send up; 0 = takes no part of the band.
    flops: S [..., C] at the server; 0 = takes no part of it.
    gains: [..., C] linear, > 0.
    power_max: P [..., C] watts, > 0.
    bandwidth: W, Hz.
    speed: F, FLOP/s.
    seconds_weight: a [...], of a second of the finish; 0 only with a deadline.
    joules_weight: b [...], of a joule that is sent.
    width: [..., C] Hz, where the band is not shared but divided already.
    deadline: seconds, T at most.
    noise: W/Hz.

  Returns:
    Shares that add up to the whole. `channel.power_for` the seconds that are
    left says the powers; they keep their limits.

  Example:
    >>> found = solve(
    ...   [1.0, 3.0],
    ...   8e6,
    ...   1e12,
    ...   1e-10,
    ...   0.2,
    ...   bandwidth=1e6,
    ...   speed=1e12,
    ...   seconds_weight=1.0,
    ...   joules_weight=0.0,
    ... )
    >>> sent = 8e6 / channel.rate(found.width, 0.2, 1e-10)
    >>> done = np.array([1.0, 3.0]) + sent + 1e12 / found.speed
    >>> np.allclose(done, found.finish)
    True
  """
  given = (seconds, bits, flops, gains, power_max)
  lead = np.broadcast(np.asarray(seconds_weight), np.asarray(joules_weight))
  arrays = np.broadcast_arrays(*given, np.zeros((*lead.shape, 1)))
  c, d, s, g, p = (np.asarray(x, np.float64) for x in arrays[:5])
  shape = c.shape[:-1]
  sends, computes = d > 0, s > 0
  task = interior.Task(
    before=c,
    nats=d * math.log(2) / bandwidth,
    server=s / speed,
    snr=g / (noise * bandwidth),
    power=p,
    in_band=sends if width is None else np.zeros_like(sends),
    in_server=computes,
    time=np.broadcast_to(np.asarray(seconds_weight, np.float64), shape),
    energy=np.broadcast_to(np.asarray(joules_weight, np.float64), shape),
    fixed=np.zeros(shape, bool),
  )
  own = 1.0 if width is None else np.broadcast_to(width, c.shape) / bandwidth
  begin = _equal(sends) if width is None else np.where(sends, own, 1.0)
  point = _best(task, begin, _equal(computes), deadline)
  return _whole(task, point, bandwidth, speed)


def _equal(active: np.ndarray) -> np.ndarray:
  """Equal shares with one to spare; those who take none have a 1."""
  return np.where(active, 1 / (active.sum(-1, keepdims=True) + 1), 1.0)


def _best(task, width, speed, deadline):
  """The optimum, at the deadline where without one it would be later."""
  late = np.ones(task.time.shape, bool)
  if np.all(task.time > 0):
    point = interior.descend(task, interior.start(task, width, speed))
    late = point.finish > deadline
    if not late.any():
      return point
  one = np.ones(task.time.shape)
  soon = task._replace(time=one, energy=0 * one)
  first = interior.descend(soon, interior.start(soon, width, speed))
  meets = first.finish <= deadline
  # The problem is convex: an optimum that would be later lies at the deadline.
  finish = np.where(meets, deadline, 1.01 * first.finish)
  held = task._replace(fixed=late)
  found = interior.at(held, first.width, first.speed, finish)
  found = interior.descend(held, found)
  found = found._replace(finish=np.where(meets, found.finish, math.inf))
  if late.all():
    return found
  return interior.Point(
    *(
      np.where(late if x.ndim == late.ndim else late[..., None], x, y)
      for x, y in zip(found, point, strict=True)
    )
  )


def _whole(task, point, bandwidth, speed) -> Shares:
  """Shares in their units, of all that there is."""
  width, share = point.width, point.speed
  if task.in_band.any():
    total = (width * task.in_band).sum(-1, keepdims=True)
    width = np.where(task.in_band, width / np.where(total > 0, total, 1), 0)
  total = (share * task.in_server).sum(-1, keepdims=True)
  share = np.where(task.in_server, share / np.where(total > 0, total, 1), 0)
  # The point has less of both, so that all make it; rounding may say not.
  least = task.before + np.divide(
    task.server, share, out=np.zeros_like(share), where=task.in_server
  )
  sent = task.nats > 0
  snr = np.divide(
    task.power * task.snr, width, out=np.ones_like(width), where=sent
  )
  least = least + np.divide(
    task.nats, width * np.log1p(snr), out=np.zeros_like(width), where=sent
  )
  return Shares(
    width * bandwidth,
    share * speed,
    np.maximum(point.finish, least.max(-1)),
    point.band_price / bandwidth,
    point.rest_price / speed,
  )
