"""Interior points: the method behind `shares`.

Logarithms of shares are the variables (the problem is convex in these too),
since what clients need is orders of magnitude apart. Slacks are variables too
and need not be true on the way (infeasible start), which keeps steps long where
constraints are curved. A step is linear in the number of clients: each one's
two shares and its multiplier are eliminated, and three unknowns remain.

Boyd and Vandenberghe, Convex Optimization, 2004, chapter 11; Nocedal and
Wright, Numerical Optimization, 2006, chapter 19
"""

from typing import NamedTuple

import numpy as np

_GAP = 1e-9  # of the objective, that is left to gain
_MISS = 3e-8  # of it, in residuals: what they cost is of second order
_MOST = 200  # steps; 10 to 60 are taken
_NEAREST = 0.99  # of the way to a bound that a step may go
_LONGEST = 1.5  # of a step, in the logarithm of a share
_LESS = 0.9  # by which a slack may be reset to what it is


class Task(NamedTuple):
  """Minimize a T + b sum E, see `shares`; the band and the server are 1.

  Attributes:
    before: [..., C] seconds that nothing shortens.
    nats: [..., C] seconds that a message takes at 1 nat/s/Hz on the whole band.
    server: [..., C] seconds on the whole server.
    snr: [..., C] of one watt on the whole band.
    power: [..., C] watts at most.
    in_band: bool [..., C], whose width is free; others keep the given one.
    in_server: bool [..., C], whose speed is free.
    time: a [...], of a second of the finish.
    energy: b [...], of a joule.
    fixed: bool [...], whether the finish is given.
  """

  before: np.ndarray
  nats: np.ndarray
  server: np.ndarray
  snr: np.ndarray
  power: np.ndarray
  in_band: np.ndarray
  in_server: np.ndarray
  time: np.ndarray
  energy: np.ndarray
  fixed: np.ndarray


class Point(NamedTuple):
  """Where the method is.

  Attributes:
    width: [..., C] of the band.
    speed: [..., C] of the server.
    finish: [...] seconds.
    spare: [..., C] seconds that a client at full power would be early.
    band: [...] what is left of the band.
    rest: [...] what is left of the server.
    late_price: [..., C] multipliers of `spare`.
    band_price: [...] of `band`.
    rest_price: [...] of `rest`.
  """

  width: np.ndarray
  speed: np.ndarray
  finish: np.ndarray
  spare: np.ndarray
  band: np.ndarray
  rest: np.ndarray
  late_price: np.ndarray
  band_price: np.ndarray
  rest_price: np.ndarray


class _Curves(NamedTuple):
  """Values and derivatives at a point; w, f: by the logarithm of a share."""

  least: np.ndarray  # q(w), seconds of sending at full power
  least_w: np.ndarray
  least_ww: np.ndarray
  served: np.ndarray  # v(f), seconds at the server; -v by f, v by f twice
  left: np.ndarray  # t = T - c - v, seconds for sending
  joules: np.ndarray  # b E(w, t)
  joules_t: np.ndarray
  joules_tt: np.ndarray
  joules_w: np.ndarray
  joules_ww: np.ndarray
  joules_wt: np.ndarray


def start(task: Task, width: np.ndarray, speed: np.ndarray) -> Point:
  """A point with these shares, and a finish that leaves everybody time."""
  least = _least(task, width)
  longest = (task.before + task.server / speed + least).max(-1)
  return at(task, width, speed, 1.5 * longest)


def at(
  task: Task, width: np.ndarray, speed: np.ndarray, finish: np.ndarray
) -> Point:
  """A point with these shares and this finish, multipliers to match."""
  left = finish[..., None] - task.before - task.server / speed
  spare = np.maximum(left - _least(task, width), 0.1 * left)
  band = np.maximum(1 - (width * task.in_band).sum(-1), 0.1)
  rest = np.maximum(1 - (speed * task.in_server).sum(-1), 0.1)
  nats = task.nats / (width * left)
  joules = (left * width / task.snr * np.expm1(np.minimum(nats, 99))).sum(-1)
  objective = task.time * finish + task.energy * joules
  mu = objective / (spare.shape[-1] + 2)
  prices = mu[..., None] / spare, mu / band, mu / rest
  return Point(width, speed, finish, spare, band, rest, *prices)


def _least(task, width):
  """Seconds of sending at full power."""
  snr = task.power * task.snr / width
  return task.nats / (width * np.log1p(snr))


def descend(task: Task, point: Point) -> Point:
  """Goes to the optimum from a point; every problem of the batch at once."""
  went = np.ones(point.finish.shape)
  for _ in range(_MOST):
    curves = _curves(task, point)
    point = _lifted(task, point, curves)
    gap, miss = _errors(task, point, curves)
    objective = task.time * point.finish + curves.joules.sum(-1)
    done = (gap < _GAP * objective) & (miss < _MISS * objective)
    done &= _keeps(task, point, curves)
    if done.all():
      break
    # Aim further ahead after a long step; never far ahead of the residuals.
    aim = np.select([went > 0.9, went > 0.5, went > 0.1], [0.05, 0.2, 0.5], 1.0)
    mu = np.maximum(gap, 0.1 * np.minimum(miss, 10 * gap)) * aim
    mu = mu / (point.spare.shape[-1] + 2)
    step = _direction(task, point, curves, mu)
    went = np.where(done, 0.0, _length(task, point, curves, step))
    point = _moved(point, step, went)
  return point


def _keeps(task: Task, point: Point, c: _Curves) -> np.ndarray:
  """Whether all keep to the finish, the band and the server, bool [...].

  What costs next to nothing counts in residuals for little, but must be true.
  """
  early = (c.left - c.least).min(-1) / point.finish
  _, over, much = _misses(task, point, c)
  least = np.minimum(point.band + over, point.rest + much)
  return np.minimum(early, least) > -_GAP


def _lifted(task: Task, point: Point, c: _Curves) -> Point:
  """The point with slacks as they are, where that is not much less."""
  late, over, much = _misses(task, point, c)
  return point._replace(
    spare=np.where(
      late > -_LESS * point.spare, point.spare + late, point.spare
    ),
    band=np.where(over > -_LESS * point.band, point.band + over, point.band),
    rest=np.where(much > -_LESS * point.rest, point.rest + much, point.rest),
  )


def _curves(task: Task, point: Point) -> _Curves:
  """All derivatives; those by shares that are given are zero."""
  w, free = point.width, task.in_band
  snr = task.power * task.snr / w
  log = np.log1p(snr)
  bent = snr / ((1 + snr) * log)  # 1 - the elasticity of the rate by w
  least = task.nats / (w * log)
  served = task.server / point.speed
  left = point.finish[..., None] - task.before - served
  x = task.nats / (w * left)  # nats per second and hertz
  grown = np.expm1(x)
  psi, xx = x * (grown + 1) - grown, x * x * (grown + 1)
  watt = task.energy[..., None] * w / task.snr
  return _Curves(
    least,
    -least * (1 - bent) * free,
    least * ((1 - bent) ** 2 + bent * (bent - 1 / (1 + snr))) * free,
    served * task.in_server,
    left,
    watt * left * grown,
    -watt * psi,
    watt * xx / left,
    -watt * left * psi * free,
    watt * left * (xx - psi) * free,
    watt * (xx - psi) * free,
  )


def _errors(task: Task, point: Point, c: _Curves):
  """(complementarity gap, residuals weighed by what they multiply)."""
  y, band, rest = point.late_price, point.band_price, point.rest_price
  width, speed = point.width * task.in_band, point.speed * task.in_server
  by_w = c.joules_w + y * c.least_w + band[..., None] * width
  by_f = (c.joules_t - y) * c.served + rest[..., None] * speed
  by_t = np.where(task.fixed, 0, task.time + (c.joules_t - y).sum(-1))
  late, over, much = _misses(task, point, c)
  miss = (abs(by_w) + abs(by_f) + abs(y * late)).sum(-1)
  miss = miss + abs(by_t * point.finish) + abs(band * over) + abs(rest * much)
  return (y * point.spare).sum(-1) + band * point.band + rest * point.rest, miss


def _misses(task: Task, point: Point, c: _Curves):
  """By how much the slacks are not what they stand for."""
  over = 1 - (point.width * task.in_band).sum(-1) - point.band
  much = 1 - (point.speed * task.in_server).sum(-1) - point.rest
  return c.left - c.least - point.spare, over, much


def _direction(task: Task, point: Point, c: _Curves, mu: np.ndarray) -> Point:
  """Newton's step for the conditions of optimality with gap mu."""
  each = _eliminated(task, point, c, mu)
  z = _common(task, point, c, mu, each)
  # Every client's step is linear in (1, T, the prices of band and server).
  one = np.stack([np.ones_like(z[..., 0]), *np.moveaxis(z, -1, 0)])[..., None]
  width, speed, late = ((x * one).sum(0) for x in each[2:])
  y, m = point.late_price, mu[..., None]
  return Point(
    width,
    speed,
    z[..., 0],
    (m - point.spare * late) / y,
    (mu - point.band * z[..., 1]) / point.band_price,
    (mu - point.rest * z[..., 2]) / point.rest_price,
    late - y,
    z[..., 1] - point.band_price,
    z[..., 2] - point.rest_price,
  )


def _eliminated(task: Task, point: Point, c: _Curves, mu: np.ndarray):
  """Each client's steps as functions of (1, T, price of band, of server).

  Returns:
    Five arrays [4, ..., C]: what multiplies these four in the equation of its
    width and in that of its speed; its steps of width and of speed; its
    multiplier.
  """
  y = point.late_price
  w, f = point.width * task.in_band, point.speed * task.in_server
  by_w = np.stack([c.joules_w, c.joules_wt, w, np.zeros_like(w)])
  by_f = np.stack([c.joules_t * c.served, c.joules_tt * c.served, 0 * f, f])
  # The Hessian of its two shares; 1 where a share is given.
  ww = c.joules_ww + y * c.least_ww + point.band_price[..., None] * w
  wf = c.joules_wt * c.served
  ff = c.joules_tt * c.served**2 + (y - c.joules_t) * c.served
  ff = ff + point.rest_price[..., None] * f + ~task.in_server
  ww = ww + ~task.in_band
  a, b, d = (x / (ww * ff - wf * wf) for x in (ff, -wf, ww))  # its inverse
  solved_w, solved_f = a * by_w + b * by_f, b * by_w + d * by_f
  late_w = b * c.served - a * c.least_w
  late_f = d * c.served - b * c.least_w
  late = c.served * solved_f - c.least_w * solved_w
  late[0] += mu[..., None] / y - _misses(task, point, c)[0]
  late[1] -= 1
  late /= c.served * late_f - c.least_w * late_w + point.spare / y
  return by_w, by_f, late_w * late - solved_w, late_f * late - solved_f, late


def _common(task, point: Point, c: _Curves, mu: np.ndarray, each):
  """What the clients have in common, [..., 3]: T and the two prices."""
  by_w, by_f, width, speed, late = each
  _, over, much = _misses(task, point, c)
  rows = np.einsum("i...c,j...c->...ij", by_w[1:], width)
  rows += np.einsum("i...c,j...c->...ij", by_f[1:], speed)
  rows[..., 0, :] -= np.moveaxis(late.sum(-1), 0, -1)
  rows[..., 0, 0] += task.time + c.joules_t.sum(-1)
  rows[..., 0, 1] += c.joules_tt.sum(-1)
  rows[..., 1, 0] -= over - mu / point.band_price
  rows[..., 1, 2] -= point.band / point.band_price
  rows[..., 2, 0] -= much - mu / point.rest_price
  rows[..., 2, 3] -= point.rest / point.rest_price
  keep = np.where(task.fixed[..., None], [0.0, 1.0, 0.0, 0.0], rows[..., 0, :])
  rows[..., 0, :] = keep
  return -np.linalg.solve(rows[..., 1:], rows[..., :1])[..., 0]


def _length(task: Task, point: Point, c: _Curves, step: Point) -> np.ndarray:
  """How far to go: slacks and multipliers stay positive, energy bounded."""
  went = np.ones(point.finish.shape)
  for x, d in zip(point[3:], step[3:], strict=True):
    share = np.divide(-_NEAREST * x, d, out=np.ones_like(x), where=d < 0)
    went = np.minimum(went, share if share.ndim == went.ndim else share.min(-1))
  longest = np.maximum(abs(step.width), abs(step.speed)).max(-1)
  went = np.minimum(went, _LONGEST / np.maximum(longest, 1e-300))
  most = 2 * c.joules.sum(-1) + 0.1 * task.time * point.finish
  for _ in range(60):
    bad = ~_is_sane(task, _moved(point, step, went), c.left, most)
    if not bad.any():
      break
    went = np.where(bad, went / 2, went)
  return went


def _is_sane(task: Task, point: Point, left: np.ndarray, most: np.ndarray):
  """Whether time is left, and energy within bounds; of the batch."""
  after = point.finish[..., None] - task.before - task.server / point.speed
  with np.errstate(divide="ignore"):
    x = task.nats / (point.width * np.maximum(after, 0))
  # At full power x is log(1 + snr): far above it numbers overflow.
  top = 2 * np.log1p(task.power * task.snr / point.width) + 1
  sane = ((after > 0.1 * left) & (x <= top)).all(-1)
  x = np.minimum(x, top)
  joules = point.width * np.maximum(after, 0) / task.snr * np.expm1(x)
  return sane & (task.energy * joules.sum(-1) <= most)


def _moved(point: Point, step: Point, went: np.ndarray) -> Point:
  """The point after a step: shares are multiplied, all else is added to."""
  each = went[..., None]
  return Point(
    point.width * np.exp(each * step.width),
    point.speed * np.exp(each * step.speed),
    point.finish + went * step.finish,
    point.spare + each * step.spare,
    point.band + went * step.band,
    point.rest + went * step.rest,
    point.late_price + each * step.late_price,
    point.band_price + went * step.band_price,
    point.rest_price + went * step.rest_price,
  )
