"""Products: a sum of low-rank matrices, in the smaller of two forms.

What clients make of an adapter is sum_i p_i A_i B_i. Its factors side by side
are a product of two thin matrices; with many clients the matrix itself [K, F]
is smaller. Both forms answer the same questions, and neither writes down what
the other would.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import linalg


class Stack(NamedTuple):
  """The matrix left^T diag(weights) right.

  Attributes:
    left: float32 [..., Q, K].
    right: float32 [..., Q, F].
    weights: float32 [Q]. Kept apart, so that nothing as large as the factors
      is written to weigh them.
  """

  left: jax.Array
  right: jax.Array
  weights: jax.Array

  def inner(self) -> tuple[jax.Array, jax.Array]:
    """Gram matrices [..., Q, Q] of the left factors, and of the weighted right.

    left left^T, and diag(w) right right^T diag(w).
    """
    w = self.weights
    both = (w[:, None] * w[None]).reshape(
      (1,) * (self.right.ndim - 2) + (w.size,) * 2
    )
    outer = matmul(self.right, _t(self.right)) * both
    return matmul(self.left, _t(self.left)), outer

  def weighted(self, x: jax.Array) -> jax.Array:
    """diag(weights) x for x [..., Q, N]."""
    return x * self.weights.reshape((1,) * (x.ndim - 2) + (-1, 1))


def stack(left: jax.Array, right: jax.Array) -> Stack:
  """The product of left [..., K, Q] and right [..., Q, F]."""
  return Stack(_t(left), right, jnp.ones(right.shape[-2]))


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
  return matmul(_t(product.left), product.weighted(product.right))


def add(a: Product, b: Product) -> Product:
  """Returns the sum of two matrices, in the form of the first."""
  if isinstance(a, Dense):
    return Dense(a.matrix + expand(b))
  if isinstance(b, Dense):
    return Dense(expand(a) + b.matrix)
  return Stack(
    jnp.concatenate([a.left, b.left], -2),
    jnp.concatenate([a.right, b.right], -2),
    jnp.concatenate([a.weights, b.weights]),
  )


def norm(product: Product) -> jax.Array:
  """Frobenius norm [...], from Gram matrices where there are factors."""
  if isinstance(product, Dense):
    return jnp.sqrt(jnp.sum(jnp.square(product.matrix), (-2, -1)))
  left, right = product.inner()
  # What cancels may come out below zero by a rounding.
  return jnp.sqrt(jnp.maximum(jnp.sum(left * right, (-2, -1)), 0))


def svd(product: Product, rank: int) -> Svd:
  """The best approximation of a given rank (Eckart and Young).

  Of a stack only a core [Q, Q] is decomposed: with left^T = Q1 R1 and
  right^T = Q2 R2, left^T right = Q1 (R1 R2^T) Q2^T. A large core is not worth
  its Q^3 where few triples are wanted: see `_leading`.

  Args:
    product: of Q terms, or dense.
    rank: R; singular values beyond min(Q, K, F) are zero.
  """
  core = _core(product)
  if core > _SMALL and 4 * rank <= core:
    found = _leading(product, rank)
  elif isinstance(product, Dense):
    found = linalg.svd(product.matrix)
  else:
    q1, r1 = linalg.basis(_t(product.left))
    q2, r2 = linalg.basis(_t(product.weighted(product.right)))
    left, values, right = linalg.svd(matmul(r1, _t(r2)))
    found = (
      matmul(q1, left[..., :rank]),
      values,
      matmul(right[..., :rank, :], _t(q2)),
    )
  left, values, right = (
    _fit(x, rank, axis) for x, axis in zip(found, (-1, -1, -2), strict=True)
  )
  top = jnp.argmax(jnp.abs(left), axis=-2, keepdims=True)
  sign = jnp.where(jnp.take_along_axis(left, top, -2) < 0, -1.0, 1.0)
  return Svd(left * sign, values, right * _t(sign))


_SMALL = 64  # cores up to this size are decomposed as they are


def _core(product):
  """Size of the matrix that has the product's singular values."""
  if isinstance(product, Dense):
    return min(product.matrix.shape[-2:])
  return product.left.shape[-2]


def _leading(product, rank):
  """The first singular triples, from Gram matrices and steps that repair them.

  A Gram matrix squares what is small, so its leading vectors are only a start;
  two steps of subspace iteration with the product itself, and a decomposition
  of what it makes of them (Rayleigh and Ritz), give the triples to float32's
  accuracy relative to the largest. No orthonormal basis of the stack is formed.
  """
  if isinstance(product, Dense):
    m = product.matrix
    flip = m.shape[-2] < m.shape[-1]
    gram = matmul(m, _t(m)) if flip else matmul(_t(m), m)
    found = linalg.eigh(gram)[1][..., ::-1][..., :rank]
    start = matmul(_t(m), found) if flip else found
  else:
    # With left left^T = C C^T, C^T right has the product's right singular
    # vectors: its Gram matrix is right^T left left^T right.
    gram, outer = product.inner()
    scale = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    c = linalg.cholesky(gram + 1e-6 * scale * eye_like(gram))
    inner = matmul(matmul(_t(c), outer), c)
    found = linalg.eigh(inner)[1][..., ::-1][..., :rank]
    start = matmul(_t(product.right), product.weighted(matmul(c, found)))
  for _ in range(2):
    start, _ = linalg.basis(start)
    start = _apply_t(product, _apply(product, start))
  right, _ = linalg.basis(start)  # [..., F, R]
  made = _apply(product, right)  # [..., K, R]
  left, values, turn = linalg.svd(made)
  return left, values, matmul(turn, _t(right))


def _apply(product, x):
  """The product times x [..., F, R]."""
  if isinstance(product, Dense):
    return matmul(product.matrix, x)
  inner = product.weighted(matmul(product.right, x))
  return matmul(_t(product.left), inner)


def _apply_t(product, x):
  """The product's transpose times x [..., K, R]."""
  if isinstance(product, Dense):
    return matmul(_t(product.matrix), x)
  inner = product.weighted(matmul(product.left, x))
  return matmul(_t(product.right), inner)


def length(x: jax.Array) -> jax.Array:
  """Frobenius norm [...] of matrices, with a gradient of zero at zero."""
  square = jnp.sum(jnp.square(x), (-2, -1))
  safe = jnp.where(square > 0, square, 1)
  return jnp.where(square > 0, jnp.sqrt(safe), 0)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """A product in full float32, whatever the platform's default."""
  return jnp.matmul(a, b, precision="highest")


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


def values(product: Product) -> jax.Array:
  """Singular values [..., Q], largest first, from Gram matrices.

  Cheaper than `svd`; those below about 3e-4 of the largest are noise, as a
  Gram matrix squares them.
  """
  if isinstance(product, Dense):
    m = product.matrix
    wide = m.shape[-2] < m.shape[-1]
    gram = matmul(m, _t(m)) if wide else matmul(_t(m), m)
  else:
    # left^T right has the singular values of S right if left left^T = S S.
    gram, outer = product.inner()
    root = _root(gram)
    gram = matmul(matmul(root, outer), root)
  square = linalg.eigh(gram)[0][..., ::-1]
  return jnp.sqrt(jnp.maximum(square, 0))


def _root(gram):
  """The symmetric square root of a Gram matrix."""
  square, vectors = linalg.eigh(gram)
  root = jnp.sqrt(jnp.maximum(square, 0))
  return matmul(vectors * root[..., None, :], _t(vectors))


def turn(a, b, to_a, to_b) -> jax.Array:
  """The rotation Q [..., R, R] that turns factors towards others.

  It minimizes |a Q - to_a|^2 + |Q^T b - to_b|^2 (orthogonal Procrustes).
  """
  return nearest_rotation(matmul(_t(a), to_a) + matmul(b, _t(to_b)))


def nearest_rotation(matrix: jax.Array) -> jax.Array:
  """The orthogonal matrix that is nearest to one [..., R, R] (Procrustes)."""
  left, _, right = linalg.svd(matrix)
  return matmul(left, right)


def eye_like(x: jax.Array) -> jax.Array:
  """The identity, of the rank of square matrices [..., R, R]."""
  return jnp.eye(x.shape[-1]).reshape((1,) * (x.ndim - 2) + x.shape[-2:])


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
