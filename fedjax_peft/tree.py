"""Arithmetic on pytrees of arrays, and on products that are never expanded.

A message is a pytree. Its leaves are arrays, or `Factored(left, right)` for a
matrix that is known as a product: a link that understands factors can bound or
scale the product without ever writing the matrix down.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


class Factored(NamedTuple):
  """The matrix left^T right, kept as its factors.

  Attributes:
    left: float [K, D], one row for each of the K terms of the sum.
    right: float [K, F].
  """

  left: jax.Array
  right: jax.Array

  def expand(self) -> jax.Array:
    """Returns the matrix, float [..., D, F]."""
    return jnp.einsum("...kd,...kf->...df", self.left, self.right)


def is_factored(x: Any) -> bool:
  """True for a `Factored` leaf."""
  return isinstance(x, Factored)


def is_float(x: Any) -> bool:
  """True for an array or spec of a floating dtype."""
  return jnp.issubdtype(x.dtype, jnp.floating)


def leaves(tree: PyTree) -> list:
  """Leaves, where a `Factored` counts as one."""
  return jax.tree.leaves(tree, is_leaf=is_factored)


def map_leaves(fun, tree: PyTree, *rest: PyTree) -> PyTree:
  """`jax.tree.map` that hands `Factored` leaves to `fun` whole."""
  return jax.tree.map(fun, tree, *rest, is_leaf=is_factored)


def map_float(fun, tree: PyTree) -> PyTree:
  """Applies `fun` to the float leaves and leaves integers as they are."""
  return jax.tree.map(lambda x: fun(x) if is_float(x) else x, tree)


def scale(tree: PyTree, factor: jax.Array) -> PyTree:
  """Multiplies every leaf by a scalar, in the leaf's dtype.

  Args:
    tree: message; of a `Factored` leaf only the right factor is multiplied.
    factor: scalar.
  """

  def one(x):
    if is_factored(x):
      return Factored(x.left, one(x.right))
    return x * jnp.asarray(factor).astype(x.dtype)

  return map_leaves(one, tree)


def norm(tree: PyTree) -> jax.Array:
  """L2 norm over all float leaves together, accumulated in float32.

  Leaves are divided by about their largest value before they are squared, so
  that neither huge nor tiny messages overflow or vanish. Of a `Factored` leaf
  the norm is that of the product, from above: what its two Gram matrices may
  lose where terms cancel is added.
  """
  squares, peaks = [], []
  for x in leaves(tree):
    if is_factored(x):
      left, a = _scaled(x.left)
      right, b = _scaled(x.right)
      gram = (left @ left.T) * (right @ right.T)
      lost = 2 * jnp.finfo(jnp.float32).eps * math.sqrt(left.size + right.size)
      squares.append(jnp.sum(gram + lost * jnp.abs(gram)))
      peaks.append(a * b)
    elif is_float(x):
      x, peak = _scaled(x)
      squares.append(jnp.sum(jnp.square(x)))
      peaks.append(peak)
  if not squares:
    return jnp.zeros((), jnp.float32)
  peak = jnp.stack(peaks)
  top = jnp.maximum(jnp.max(peak), jnp.finfo(jnp.float32).tiny)
  return top * jnp.sqrt(jnp.sum(jnp.stack(squares) * jnp.square(peak / top)))


def _scaled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(x / s, s) in float32, s being about the largest |x|."""
  x = x.astype(jnp.float32)
  peak = jnp.max(jnp.abs(x), initial=0)
  # A compiler may multiply by 1 / peak, which of a huge peak is zero.
  peak = jnp.where(peak > 1, peak / 16, peak)
  return x / jnp.where(peak == 0, 1, peak), peak


def is_finite(tree: PyTree) -> jax.Array:
  """Scalar bool: every float leaf is finite everywhere."""
  # A maximum keeps nan, and is found twice as fast as `all(isfinite(x))`.
  checks = [
    jnp.max(jnp.abs(x), initial=0) < jnp.inf
    for x in jax.tree.leaves(tree)
    if is_float(x)
  ]
  return jnp.all(jnp.stack(checks)) if checks else jnp.array(True)


def where(condition: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
  """Leafwise select; `condition` [...] picks along the leading axes."""

  def pick(a, b):
    shape = condition.shape + (1,) * (jnp.ndim(a) - condition.ndim)
    return jnp.where(condition.reshape(shape), a, b)

  return jax.tree.map(pick, yes, no)


def zeros_like(tree: PyTree) -> PyTree:
  """Zeros of the shapes and dtypes of arrays or specs."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def spec(tree: PyTree) -> PyTree:
  """Shapes and dtypes of a pytree as `jax.ShapeDtypeStruct`s."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree
  )


def nbytes(tree: PyTree) -> int:
  """Bytes of all leaves, from their shapes and dtypes."""
  return sum(
    math.prod(x.shape) * np.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(tree)
  )


def size(tree: PyTree) -> int:
  """Number of values in all leaves."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
