"""Ranging: codes that count steps from the least value of a group.

The arithmetic of `links.affine`, for a width that may be traced. What a value
becomes has the same bits in every program around it: a compiler may fuse a
product with a sum that follows it, and round once where others round twice, so
a minimum or a maximum stands between the two.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft.kernels.quantization import reference as random

Per = Literal["tensor", "channel", "token"]
FLOATS = 32  # from so many bits on, floats travel as they are

# Ranges and steps stay where float32 has all its digits, and an inverse.
_HUGE = np.float32(2.0**125)
_SMALLEST = np.float32(2.0**-100)
_TOP = np.int32(2**31 - 1)
# The largest code by its width: above 24 bits the float32 below 2^bits - 1.
_LEVELS = np.array(
  [1, *(2**b - 2 ** max(b - 24, 0) for b in range(1, FLOATS))], np.float32
)
# A table, since a compiler may replace a division by a constant.
_INVERSES = np.float32(1) / _LEVELS


def levels(bits: int) -> float:
  """The largest code of so many bits, 1 to 31."""
  return float(_LEVELS[bits])


def matrix(shape: tuple[int, ...], per: Per) -> tuple[int, int]:
  """The matrix [R, W] as which a leaf is taken: one row, or its last axis."""
  size = math.prod(shape)
  if per == "tensor" or len(shape) < 2:
    return 1, size
  return size // shape[-1], shape[-1]


def groups(shape: tuple[int, ...], per: Per) -> int:
  """How many groups a leaf has: rows, or columns if per channel."""
  rows, columns = matrix(shape, per)
  return columns if per == "channel" and len(shape) > 1 else rows


def encode(
  x: jax.Array, bits: int | jax.Array, key: jax.Array | None, per: Per
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Codes of values, and where those of each group lie.

  Args:
    x: float, any shape but an empty one.
    bits: int32 scalar, 1 to 31.
    key: random key; None rounds to the nearest.
    per: see `links.affine`.

  Returns:
    codes, float32 integers [R, W] of `matrix`; low and step, float32 [R, 1],
    or [1, W] if per channel.
  """
  axis = 0 if per == "channel" and x.ndim > 1 else 1
  x = x.astype(jnp.float32).reshape(matrix(x.shape, per))
  low, high = _range(x, axis)
  step = (high - low) * jnp.asarray(_INVERSES)[bits]
  usable = step >= _SMALLEST
  step = jnp.where(usable, step, np.float32(0))
  scale = jnp.where(usable, np.float32(1) / step, np.float32(0))
  x = jnp.clip(jnp.where(x == x, x, np.float32(0)), low, high)
  t = jnp.minimum((x - low) * scale, jnp.asarray(_LEVELS)[bits])
  if key is None:
    return jnp.round(t), low, step
  below = jnp.floor(t)
  up = _uniform(key, x.shape) < t - below
  return below + up.astype(jnp.float32), low, step


def decode(codes: jax.Array, low: jax.Array, step: jax.Array) -> jax.Array:
  """The values that codes stand for; all float32."""
  return low + jnp.maximum(codes * step, np.float32(0))


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Multiples of 2^-24 in [0, 1), each a function of key and place."""
  row, column = (jax.lax.broadcasted_iota(jnp.uint32, shape, i) for i in (0, 1))
  index = row * np.uint32(shape[1]) + column
  words = random.words(index, *random.seeds(jax.random.key_data(key)))
  draw = (words >> np.uint32(8)).astype(jnp.int32).astype(jnp.float32)
  return draw * np.float32(2.0**-24)


def _range(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
  """The least and the largest value along an axis; zeros if there is none."""
  counts, zero = jnp.abs(x) < _HUGE, np.float32(0)
  if axis == 0:
    low = jnp.min(jnp.where(counts, x, jnp.inf), axis, keepdims=True)
    high = jnp.max(jnp.where(counts, x, -jnp.inf), axis, keepdims=True)
    found = low <= high
    return jnp.where(found, low, zero), jnp.where(found, high, zero)
  # Along a row XLA vectorizes minima of integers on CPUs, but not of floats.
  order, top = _order(jax.lax.bitcast_convert_type(x, jnp.int32)), _TOP
  first, last = jax.lax.reduce(
    (jnp.where(counts, order, top), jnp.where(counts, order, -top)),
    (top, -top),
    lambda a, b: (jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])),
    (axis,),
  )
  low, high = (
    jax.lax.bitcast_convert_type(_order(i), jnp.float32) for i in (first, last)
  )
  found = first <= last
  low, high = jnp.where(found, low, zero), jnp.where(found, high, zero)
  return low[:, None], high[:, None]


def _order(i: jax.Array) -> jax.Array:
  """Bits of floats to integers in the same order, and back; int32."""
  return i ^ ((i >> np.int32(31)) & _TOP)
