"""What XLA does around a search for the threshold on accelerators."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BITS = 4  # of the threshold, found in one pass over the entries
SHIFTS = tuple(range(28, -1, -BITS))
INFINITY = np.int32(0x7F800000)


def order(x: jax.Array) -> jax.Array:
  """Magnitudes as integers: 0 is nan, 1 is zero, and so on up to infinity.

  Args:
    x: float32 [D].

  Returns:
    int32 [D].
  """
  bits = lax.bitcast_convert_type(x, jnp.int32) & np.int32(0x7FFFFFFF)
  return jnp.where(bits > INFINITY, np.int32(0), bits + np.int32(1))


def candidates(threshold: jax.Array, shift: jax.Array) -> list[jax.Array]:
  """Thresholds with one more digit than is known, in ascending order.

  Those of the first digit that do not fit into an int32 come out negative.
  """
  digits = [np.int32(j) for j in range(1, 2**BITS)]
  return [threshold + (digit << shift) for digit in digits]


def take(
  x: jax.Array, order: jax.Array, threshold: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
  """Collects what is above the threshold, and the first ones at it.

  Args:
    x: float32 [D].
    order: int32 [D], of x.
    threshold: int32 scalar, the k-th largest of `order`.
    k: how many.

  Returns:
    values float32 [k], indices int32 [k], ascending.
  """
  above, equal = order > threshold, order == threshold
  room = k - jnp.sum(above, dtype=jnp.int32)
  kept = above | (equal & (jnp.cumsum(equal, dtype=jnp.int32) <= room))
  place = jnp.cumsum(kept, dtype=jnp.int32)
  indices = jnp.searchsorted(place, jnp.arange(1, k + 1, dtype=jnp.int32))
  indices = indices.astype(jnp.int32)
  return x[indices], indices
