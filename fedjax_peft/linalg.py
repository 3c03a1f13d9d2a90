"""Decompositions that are safe inside a round, one matrix after another.

On CPUs a batch of matrices is decomposed by the threads of a stream together.
Where two such batches of one program meet, and a stream has few threads (the
command gives each one), they wait for each other for ever (jaxlib 0.10). So a
batch is a loop here, under `vmap` too.
"""

import jax
import jax.numpy as jnp
from jax import custom_batching


def _one_by_one(fun):
  """Maps a function of a matrix over leading axes, in a loop."""
  alone = custom_batching.sequential_vmap(fun)

  def mapped(x):
    if x.ndim == 2:
      return alone(x)
    lead = x.shape[:-2]
    out = jax.lax.map(alone, x.reshape(-1, *x.shape[-2:]))
    return jax.tree.map(lambda y: y.reshape(*lead, *y.shape[1:]), out)

  return mapped


_svd = _one_by_one(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)))
_values = _one_by_one(lambda x: jnp.linalg.svd(x, compute_uv=False))
_eigh = _one_by_one(lambda x: tuple(jnp.linalg.eigh(x)))
_cholesky = _one_by_one(jnp.linalg.cholesky)


def svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """u, s, v^T of x [..., M, N], with min(M, N) singular values."""
  return _svd(x)


def singular_values(x: jax.Array) -> jax.Array:
  """Singular values [..., min(M, N)] of x [..., M, N], largest first."""
  return _values(x)


def eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues, ascending, and vectors of symmetric x [..., N, N]."""
  return _eigh(x)


def cholesky(x: jax.Array) -> jax.Array:
  """Lower triangular c with c c^T = x, for positive definite x [..., N, N]."""
  return _cholesky(x)


def inverse(x: jax.Array, rtol: float = 1e-6) -> jax.Array:
  """Pseudo-inverse of symmetric, positive semidefinite x [..., N, N].

  Args:
    x: the matrix.
    rtol: eigenvalues below this part of the largest count as zero.
  """
  values, vectors = eigh(x)
  keep = values > rtol * values[..., -1:]
  inverted = jnp.where(keep, 1 / jnp.where(keep, values, 1), 0)
  scaled = vectors * inverted[..., None, :]
  return jnp.matmul(scaled, jnp.swapaxes(vectors, -1, -2), precision="highest")


def basis(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Factors x = q r with orthonormal columns in q.

  Args:
    x: float32 [..., N, R], of any rank.

  Returns:
    (q [..., N, min(N, R)], r [..., min(N, R), R]); r is not triangular.
  """
  q, values, turn = svd(x)
  return q, values[..., None] * turn
