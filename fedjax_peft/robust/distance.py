"""Distance: how far messages are from each other, whatever they hold.

Distances come from one Gram matrix, D C^2 operations in a single product, in
which close points far from the origin cancel. So messages are first looked at
from their coordinatewise median: honest ones are then near the origin, where
nothing cancels, and no hostile one can move it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import tree
from fedjax_peft.robust import coordinate, matrix

_FAR = 1e15  # in units of the median deviation; its square is a float32
_HUGE = 1e33  # of one value; the norm of 1e9 such values is a float32


class Deviations(NamedTuple):
  """Messages as seen from their coordinatewise median.

  Attributes:
    origin: float32 [D], the coordinatewise median.
    rows: float32 [C, D], (message - origin) / scale; who is further away than
      1e15 stands in the same direction at that distance. Zero for the absent.
    scale: float32 scalar, a power of two.
    spread: float32 scalar, the median length of the rows; 0, or in [1, 2).
  """

  origin: jax.Array
  rows: jax.Array
  scale: jax.Array
  spread: jax.Array


def deviations(x: jax.Array, present: jax.Array) -> Deviations:
  """Looks at messages [C, D] from their middle, in units of their spread."""
  n = matrix.count(present)
  origin = coordinate.middle(coordinate.ascending(x, present), n)
  off = jnp.clip(x - origin[None], -_HUGE, _HUGE)
  off = jnp.where(present[:, None], off, 0)
  length = norms(off)
  typical = middle_norm(length, present)
  # If most messages are one and the same, the others give the unit.
  scale = _power_of_two(jnp.where(typical > 0, typical, jnp.max(length)))
  unit = off / jnp.where(length > 0, length, 1)[:, None]
  is_far = length / scale > _FAR
  rows = jnp.where(is_far[:, None], unit * _FAR, off / scale)
  return Deviations(origin, rows, scale, typical / scale)


def norms(x: jax.Array) -> jax.Array:
  """Euclidean norm of every row of [C, D], float32 [C]."""
  return jax.vmap(tree.norm)(x)


def middle_norm(length: jax.Array, present: jax.Array) -> jax.Array:
  """Median of those norms [C] that are present; zero if nobody is."""
  ordered = jnp.sort(jnp.where(present, length, jnp.inf))
  return coordinate.middle(ordered, matrix.count(present))


def squared(rows: jax.Array) -> jax.Array:
  """Squared distances [C, C] between rows [C, D]: exactly symmetric."""
  gram = jnp.matmul(rows, rows.T, precision="highest")
  own = jnp.diagonal(gram)
  found = own[:, None] + own[None] - 2 * gram
  # Rounding may leave the two halves different, and either below zero.
  found = jnp.maximum(jnp.maximum(found, found.T), 0)
  return jnp.where(jnp.eye(own.size, dtype=bool), 0, found)


def _power_of_two(x):
  """The largest power of two that is at most x, and at least 2^-126.

  Divisions by it are exact, so that what is tied stays tied.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7F800000
  power = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return jnp.maximum(power, jnp.finfo(jnp.float32).tiny)
