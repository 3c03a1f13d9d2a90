"""Center: points in the middle that no message need be equal to.

Pillutla et al., Robust Aggregation for Federated Learning, 2019,
https://arxiv.org/abs/1912.13445 (RFA); Karimireddy et al., Learning from
History for Byzantine Robust Optimization, 2021,
https://arxiv.org/abs/2012.10333 (centered clipping)
"""

import jax
import jax.numpy as jnp

from fedjax_peft import reduce as reduce_lib
from fedjax_peft import validate
from fedjax_peft.robust import distance, matrix

_TINY = 1e-30  # its inverse, times any cohort, is a float32


def geometric_median(steps: int = 32, eps: float = 1e-6) -> reduce_lib.Reduce:
  """The point with the smallest sum of distances to all messages.

  By Weiszfeld's iteration, smoothed as in RFA: each step is a mean in which a
  message counts 1 / max(eps, its distance from the last point). It starts at
  the coordinatewise median, so that even endlessly far messages cost no steps.

  Guarantees:
    if most messages are equal, the result is that message up to rounding. It
    moves with the messages: that of `a x + b` is `a` times that of `x`, plus
    `b`, up to rounding.

  Args:
    steps: >= 1, of the iteration.
    eps: > 0, the smoothing, as a fraction of the median distance from the
      coordinatewise median.

  Raises:
    ValueError: if `steps` is below 1 or `eps` not positive.

  Example:
    >>> r = geometric_median()
    >>> acc = r.init(jax.ShapeDtypeStruct((2,), jnp.float32), 3)
    >>> x = jnp.array([[1.0, 1.0], [1.0, 1.0], [9e9, -9e9]])
    >>> jax.jit(r.finalize)(r.update(acc, x, jnp.array([True, True, True])))
    Array([1., 1.], dtype=float32)
  """
  validate.at_least(1, steps=steps)
  validate.positive(eps=eps)

  def finish(x, present):
    seen = distance.deviations(x, present)
    nearest = jnp.maximum(eps * seen.spread, _TINY)

    def step(_, point):
      apart = _norms(seen.rows - point[None])
      weight = jnp.where(present, 1 / jnp.maximum(apart, nearest), 0)
      share = weight / jnp.maximum(jnp.sum(weight), _TINY)
      return jnp.matmul(share, seen.rows, precision="highest")

    point = jax.lax.fori_loop(0, steps, step, jnp.zeros_like(seen.origin))
    return seen.origin + seen.scale * point

  return matrix.collect("geometric_median", finish)


def centered_clip(radius: float, steps: int = 3) -> reduce_lib.Reduce:
  """A mean in which nobody pulls further than a radius.

  Each step moves a point by the mean over the messages of what leads to them,
  cut to length `radius`. It starts at the coordinatewise median, where the
  paper starts at the last round's result.

  Guarantees:
    one message moves the result by at most 2 steps radius / n, beside what it
    does to the coordinatewise median.

  Args:
    radius: > 0, in the unit of the message. A radius above all distances gives
      the mean.
    steps: >= 1.

  Raises:
    ValueError: if `radius` is not positive or `steps` below 1.
  """
  validate.positive(radius=radius)
  validate.at_least(1, steps=steps)

  def finish(x, present):
    seen = distance.deviations(x, present)
    limit = radius / seen.scale
    n = jnp.maximum(matrix.count(present), 1).astype(jnp.float32)

    def step(_, point):
      away = seen.rows - point[None]
      apart = _norms(away)
      factor = jnp.where(apart > limit, limit / apart, 1)
      factor = jnp.where(present, factor, 0) / n
      return point + jnp.matmul(factor, away, precision="highest")

    point = jax.lax.fori_loop(0, steps, step, jnp.zeros_like(seen.origin))
    return seen.origin + seen.scale * point

  return matrix.collect("centered_clip", finish)


def _norms(rows):
  """Norms of rows whose squares are float32 numbers."""
  return jnp.sqrt(jnp.sum(jnp.square(rows), axis=1))
