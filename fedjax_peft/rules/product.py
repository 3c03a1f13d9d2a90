"""Products: a sum of low-rank matrices, in the smaller of two forms.

What clients make of an adapter is sum_i p_i A_i B_i. Its factors side by side
are a product of two thin matrices; with many clients the matrix itself [K, F]
is smaller. Both forms answer the same questions, and neither writes down what
the other would.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Stack(NamedTuple):
  """The matrix left @ right.

  Attributes:
    left: float32 [..., K, Q].
    right: float32 [..., Q, F].
  """

  left: jax.Array
  right: jax.Array


class Dense(NamedTuple):
  """The matrix itself.

  Attributes:
    matrix: float32 [..., K, F].
  """

  matrix: jax.Array


class Svd(NamedTuple):
  """The first R singular triples of a matrix, largest first.

  Attributes:
    left: float32 [..., K, R], orthonormal columns; the entry of largest
      magnitude in each is positive.
    values: float32 [..., R].
    right: float32 [..., R, F], orthonormal rows.
  """

  left: jax.Array
  values: jax.Array
  right: jax.Array


Product = Stack | Dense


def pays(terms: int, K: int, F: int) -> bool:
  """Whether `terms` columns and rows are fewer numbers than the matrix."""
  return terms * (K + F) <= K * F


def expand(product: Product) -> jax.Array:
  """Returns the matrix, float32 [..., K, F]."""
  if isinstance(product, Dense):
    return product.matrix
  return _matmul(product.left, product.right)


def add(a: Product, b: Product) -> Product:
  """Returns the sum of two matrices, in the form of the first."""
  if isinstance(a, Dense):
    return Dense(a.matrix + expand(b))
  if isinstance(b, Dense):
    return Dense(expand(a) + b.matrix)
  return Stack(
    jnp.concatenate([a.left, b.left], -1),
    jnp.concatenate([a.right, b.right], -2),
  )


def norm(product: Product) -> jax.Array:
  """Frobenius norm [...], from Gram matrices where there are factors."""
  if isinstance(product, Dense):
    return jnp.sqrt(jnp.sum(jnp.square(product.matrix), (-2, -1)))
  left = _matmul(_t(product.left), product.left)
  right = _matmul(product.right, _t(product.right))
  # What cancels may come out below zero by a rounding.
  return jnp.sqrt(jnp.maximum(jnp.sum(left * right, (-2, -1)), 0))


def svd(product: Product, rank: int) -> Svd:
  """The best approximation of a given rank (Eckart and Young).

  Of a stack only a core [Q, Q] is decomposed: with left = Q1 R1 and
  right^T = Q2 R2, left right = Q1 (R1 R2^T) Q2^T. Costs (K + F) Q^2 + Q^3.

  Args:
    product: of Q terms, or dense.
    rank: R; singular values beyond min(Q, K, F) are zero.
  """
  if isinstance(product, Dense):
    left, values, right = jnp.linalg.svd(product.matrix, full_matrices=False)
  else:
    q1, r1 = jnp.linalg.qr(product.left)
    q2, r2 = jnp.linalg.qr(_t(product.right))
    core = _matmul(r1, _t(r2))
    left, values, right = jnp.linalg.svd(core, full_matrices=False)
    left = _matmul(q1, left[..., :rank])
    right = _matmul(right[..., :rank, :], _t(q2))
  left, values, right = (
    _fit(left, rank, -1),
    _fit(values, rank, -1),
    _fit(right, rank, -2),
  )
  top = jnp.argmax(jnp.abs(left), axis=-2, keepdims=True)
  sign = jnp.where(jnp.take_along_axis(left, top, -2) < 0, -1.0, 1.0)
  return Svd(left * sign, values, right * _t(sign))


def rank_of(values: jax.Array, tolerance: float = 1e-5) -> jax.Array:
  """How many singular values [..., R] are above `tolerance` of the largest."""
  top = jnp.max(values, -1, keepdims=True, initial=0)
  return jnp.sum((values > tolerance * top).astype(jnp.float32), -1)


def effective_rank(values: jax.Array) -> jax.Array:
  """Exponential of the entropy of singular values [..., R] as shares.

  Roy and Vetterli, The effective rank, 2007. Zero of a zero matrix.
  """
  total = jnp.sum(values, -1, keepdims=True)
  p = values / jnp.where(total > 0, total, 1)
  entropy = -jnp.sum(
    jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), -1
  )
  return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0)


def nearest_rotation(matrix: jax.Array) -> jax.Array:
  """The orthogonal matrix that is nearest to one [..., R, R] (Procrustes)."""
  left, _, right = jnp.linalg.svd(matrix, full_matrices=False)
  return _matmul(left, right)


def _matmul(a, b):
  """A product in full float32, whatever the platform's default."""
  return jnp.matmul(a, b, precision="highest")


def _t(x):
  """[..., a, b] -> [..., b, a]."""
  return jnp.swapaxes(x, -1, -2)


def _fit(x, size, axis):
  """Cuts an axis to a size, or fills it up with zeros."""
  x = jax.lax.slice_in_dim(x, 0, min(size, x.shape[axis]), axis=axis % x.ndim)
  missing = size - x.shape[axis]
  if missing:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, missing)
    x = jnp.pad(x, pad)
  return x
