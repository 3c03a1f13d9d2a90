"""Decompositions against NumPy, and side by side in streams of one thread."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import linalg
from tolerance import tol

# Several at once on two streams: with batches this would wait for ever.
_SIDE_BY_SIDE = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from fedjax_peft import linalg

def work(xs):
  return [
    jax.vmap(lambda x: (linalg.basis(x[..., :8])[0], linalg.eigh(x)[1]))(x)
    for x in xs
  ]

mesh = jax.make_mesh(
  (2,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,)
)
step = jax.jit(
  jax.shard_map(
    work, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
  )
)
x = np.random.default_rng(0).normal(size=(1, 4, 256, 256)).astype(np.float32)
x = x + np.swapaxes(x, -1, -2)
for _ in range(4):
  jax.block_until_ready(step([x, 2 * x, 3 * x]))
print("done")
"""


def matrices(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_each_matrix_of_a_batch_is_decomposed():
  x = matrices(2, 3, 6, 4)
  for fun in (linalg.svd, jax.vmap(linalg.svd), jax.jit(linalg.svd)):
    u, s, v = fun(x)
    made = np.einsum("...ik,...k,...kj->...ij", u, s, v)
    np.testing.assert_allclose(made, x, atol=4 * tol(jnp.float32, 24))
  np.testing.assert_allclose(
    linalg.singular_values(x),
    np.linalg.svd(x, compute_uv=False),
    rtol=1e-5,
    atol=1e-6,
  )


def test_symmetric_matrices_are_taken_apart_and_inverted():
  a = matrices(3, 5, 9)
  x = a @ np.swapaxes(a, -1, -2)
  values, vectors = linalg.eigh(x)
  made = np.einsum("...ik,...k,...jk->...ij", vectors, values, vectors)
  size = np.abs(x).max()
  np.testing.assert_allclose(made, x, atol=4 * tol(jnp.float32, 25) * size)
  c = np.asarray(linalg.cholesky(x))
  np.testing.assert_allclose(
    c @ np.swapaxes(c, -1, -2), x, atol=4 * tol(jnp.float32, 25) * size
  )
  np.testing.assert_allclose(
    linalg.inverse(x), np.linalg.inv(x.astype(np.float64)), rtol=2e-3, atol=1e-3
  )


def test_the_inverse_of_a_singular_matrix_is_the_least_one():
  a = matrices(4, 2)
  x = a @ a.T
  np.testing.assert_allclose(
    linalg.inverse(x), np.linalg.pinv(x, rcond=1e-5), rtol=2e-3, atol=1e-4
  )


def test_a_basis_is_orthonormal_even_where_columns_repeat():
  x = np.repeat(matrices(7, 2), 2, axis=-1)
  q, r = linalg.basis(x)
  np.testing.assert_allclose(q.T @ q, np.eye(4), atol=tol(jnp.float32, 28))
  np.testing.assert_allclose(q @ r, x, atol=4 * tol(jnp.float32, 28))


def test_decompositions_side_by_side_do_not_wait_for_each_other():
  environment = os.environ | {
    "NPROC": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
  }
  done = subprocess.run(
    [sys.executable, "-c", _SIDE_BY_SIDE],
    capture_output=True,
    text=True,
    timeout=120,
    env=environment,
    check=False,
  )
  assert done.stdout == "done\n", done.stderr
