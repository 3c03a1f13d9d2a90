"""Selection: rules that choose whom to believe.

Blanchard et al., Machine Learning with Adversaries, 2017,
https://arxiv.org/abs/1703.02757 (Krum, Multi-Krum); El Mhamdi et al., The
Hidden Vulnerability of Distributed Learning in Byzantium, 2018,
https://arxiv.org/abs/1802.07927 (Bulyan)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import reduce as reduce_lib
from fedjax_peft import validate
from fedjax_peft.robust import coordinate, distance, matrix


def krum(byzantine: int) -> reduce_lib.Reduce:
  """The one message that is nearest to its n - f - 2 nearest others.

  Nearest: the sum of squared distances is smallest. A tie goes to who is
  nearest to one neighbour more, then to a fixed order of contents, never to a
  place in the cohort.

  Guarantees:
    with n >= 2 f + 3 present the result is one of the messages. With fewer it
    is the coordinatewise median.

  Args:
    byzantine: f >= 0, how many hostile ones are withstood.

  Raises:
    ValueError: if `byzantine` is below 0.

  Example:
    >>> r = krum(1)
    >>> acc = r.init(jax.ShapeDtypeStruct((), jnp.float32), 5)
    >>> x = jnp.array([1.0, 1.25, 9e9, 1.5, 4.0])
    >>> jax.jit(r.finalize)(r.update(acc, x, jnp.ones(5, bool)))
    Array(1.25, dtype=float32)
  """
  return multi_krum(byzantine, 1)._replace(name="krum")


def multi_krum(byzantine: int, keep: int | None = None) -> reduce_lib.Reduce:
  """The mean of those messages that are best in the sense of `krum`.

  Args:
    byzantine: f >= 0, how many hostile ones are withstood.
    keep: how many are averaged; 1 is `krum`. Never more than n - f - 2, the
      most for which there is a proof, which None keeps.

  Returns:
    A Reduce. With fewer than 2 f + 3 present its result is the coordinatewise
    median.

  Raises:
    ValueError: if `byzantine` is below 0 or `keep` below 1.
  """
  validate.at_least(0, byzantine=byzantine)
  if keep is not None:
    validate.at_least(1, keep=keep)

  def finish(x, present):
    n, seen = matrix.count(present), distance.deviations(x, present)
    most = n - byzantine - 2
    kept = most if keep is None else jnp.minimum(keep, most)
    order = _ranking(_neighbours(seen.rows), present, most)
    place = jnp.arange(present.size, dtype=jnp.int32)
    chosen = jnp.zeros_like(present).at[order].set(place < kept)
    found = matrix.mean(x, chosen)
    return jnp.where(n >= 2 * byzantine + 3, found, seen.origin)

  return matrix.collect("multi_krum", finish)


def bulyan(byzantine: int) -> reduce_lib.Reduce:
  """Krum chooses n - 2 f messages; of each value the middle ones are averaged.

  Krum is run again and again on those that it has not chosen yet. Of the
  values chosen, the n - 4 f that are nearest to their median are averaged (of
  two equally near ones the smaller), so that no hostile message that is near
  as a whole can be far in one value.

  Guarantees:
    with n >= 4 f + 3 present every value of the result is at most as far from
    the range of the honest ones as that range is wide. With fewer it is the
    coordinatewise median.

  Args:
    byzantine: f >= 0, how many hostile ones are withstood.

  Raises:
    ValueError: if `byzantine` is below 0.
  """
  validate.at_least(0, byzantine=byzantine)
  f = byzantine

  def finish(x, present):
    n, places = matrix.count(present), present.size
    if places < 4 * f + 3:
      return coordinate.middle(coordinate.ascending(x, present), n)
    seen = distance.deviations(x, present)
    near, place = _neighbours(seen.rows), jnp.arange(places)
    is_enough = n >= 4 * f + 3
    theta = jnp.where(is_enough, n - 2 * f, 0)

    def choose(k, left):
      # The last runs have so few left that n - f - 2 would be none.
      best = _ranking(near, left, jnp.maximum(n - k - f - 2, 1))[0]
      return left & (place != best)

    left = jax.lax.fori_loop(0, theta, choose, present)
    ordered = coordinate.ascending(x, present & ~left)
    # The nearest to the median are neighbours in order: one of 2 f + 1
    # windows, that whose further end is nearest.
    size = jnp.where(is_enough, n - 4 * f, 1)
    middle = coordinate.middle(ordered, theta)[None]
    low = ordered[: 2 * f + 1]
    high = jax.lax.dynamic_slice_in_dim(ordered, size - 1, 2 * f + 1)
    further = jnp.maximum(middle - low, high - middle)  # [2 f + 1, D]
    start = jnp.argmin(further, axis=0).astype(jnp.int32)
    found = coordinate.window_mean(ordered, start, size)
    return jnp.where(is_enough, found, seen.origin)

  return matrix.collect("bulyan", finish)


def norm_filter(factor: float = 2.0) -> reduce_lib.Reduce:
  """The mean of the messages that are not much longer than most.

  Guarantees:
    the norm of the result is at most `factor` times the median norm, up to
    rounding, and at least half of the messages count. Hostile messages of an
    ordinary norm are not withstood.

  Args:
    factor: >= 1; messages whose norm is above this times the median norm of
      those present are left out.

  Raises:
    ValueError: if `factor` is below 1 or not finite.
  """
  validate.positive(factor=factor)
  if factor < 1:
    raise ValueError(
      f"factor must be at least 1, got factor={factor}; below that most "
      "messages would be left out"
    )

  def finish(x, present):
    length = distance.norms(x)
    limit = factor * distance.middle_norm(length, present)
    return matrix.mean(x, present & (length <= limit))

  return matrix.collect("norm_filter", finish)


class _Neighbours(NamedTuple):
  """Who is near whom, sorted once for all rankings.

  Attributes:
    order: int32 [C, C], for each all by their distance.
    squared: float32 [C, C], those distances.
    content: float32 [C], a number for the message itself.
  """

  order: jax.Array
  squared: jax.Array
  content: jax.Array


def _neighbours(rows):
  """Sorts the distances between rows [C, D]."""
  squared = distance.squared(rows)
  order = jnp.argsort(squared, axis=1).astype(jnp.int32)
  # A product with fixed numbers that look random (Knuth's hash).
  number = jnp.arange(1, rows.shape[1] + 1, dtype=jnp.uint32)
  number = (number * jnp.uint32(2654435761) >> 16).astype(jnp.float32)
  content = jnp.matmul(rows, number, precision="highest")
  squared = jnp.take_along_axis(squared, order, axis=1)
  return _Neighbours(order, squared, content)


def _ranking(near: _Neighbours, left: jax.Array, neighbours: jax.Array):
  """Places [C] from the best to the worst; who is not left comes last.

  Args:
    near: who is near whom.
    left: bool [C], among whom.
    neighbours: int32 scalar, how many of the nearest others count.
  """
  itself = jnp.arange(left.size, dtype=jnp.int32)[:, None]
  other = left[near.order] & (near.order != itself)
  rank = jnp.cumsum(other.astype(jnp.int32), axis=1)

  def score(most):
    counted = other & (rank <= most)
    total = jnp.sum(jnp.where(counted, near.squared, 0), axis=1)
    return jnp.where(left, total, jnp.inf)

  keys = (near.content, score(neighbours + 1), score(neighbours))
  return jnp.lexsort(keys)
