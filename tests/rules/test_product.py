"""Products of factors against the matrices they stand for, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_peft.rules import product
from tolerance import tol

# (layers, K, Q, F): small cores, large ones, wide, tall, more terms than rows.
SHAPES = [
  (1, 12, 4, 9),
  (2, 30, 40, 20),
  (1, 150, 100, 130),
  (2, 90, 128, 200),
]


def stack(shape, seed=0, decay=0.0):
  layers, k, q, f = shape
  rng = np.random.default_rng(seed)
  left = rng.normal(size=(layers, k, q)) * np.exp(-decay * np.arange(q))
  right = rng.normal(size=(layers, q, f))
  return product.stack(
    jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32)
  )


svd = jax.jit(product.svd, static_argnums=1)


def exact(p):
  left = np.swapaxes(np.asarray(p.left, np.float64), -1, -2)
  return left * np.asarray(p.weights) @ np.asarray(p.right, np.float64)


def forms(shape, **options):
  p = stack(shape, **options)
  return p, product.Dense(jnp.asarray(exact(p), jnp.float32))


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_leading_triples_are_the_best_approximation(shape, rank, decay):
  whole = exact(stack(shape, decay=decay))
  values = np.linalg.svd(whole, compute_uv=False)
  near = 8 * tol(jnp.float32, shape[2] * shape[1])
  for form in forms(shape, decay=decay):
    u, s, v = svd(form, rank)
    assert u.shape[-1] == s.shape[-1] == v.shape[-2] == rank
    made = np.asarray(u, np.float64) * np.asarray(s)[:, None] @ np.asarray(v)
    for layer in range(shape[0]):
      top = values[layer, 0]
      error = np.linalg.norm(made[layer] - whole[layer])
      best = np.sqrt(np.sum(values[layer, rank:] ** 2))
      # Where two values are close, either vector is as good as the other.
      assert error <= best * (1 + 1e-3) + near * top
      short = min(rank, values.shape[1])
      np.testing.assert_allclose(
        np.asarray(s)[layer, :short],
        values[layer, :short],
        atol=near * top,
        rtol=2e-3,
      )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_of_low_rank_is_found_again(shape):
  layers, k, _, f = shape
  rank = 3
  p = stack((layers, k, rank, f))
  copies = 40  # clients that agree: a stack with a singular Gram matrix
  same = product.Stack(
    jnp.concatenate([p.left] * copies, -2),
    jnp.concatenate([p.right] * copies, -2),
    jnp.full((rank * copies,), 1 / copies),
  )
  u, s, v = product.svd(same, rank)
  made = np.asarray(u, np.float64) * np.asarray(s)[:, None] @ np.asarray(v)
  size = np.abs(exact(p)).max()
  np.testing.assert_allclose(
    made, exact(p), atol=8 * tol(jnp.float32, k * f) * size
  )


@pytest.mark.parametrize("shape", SHAPES)
def test_norms_sums_and_values_are_those_of_the_matrix(shape):
  whole = exact(stack(shape))
  norms = np.linalg.norm(whole, axis=(-2, -1))
  for form in forms(shape):
    np.testing.assert_allclose(product.norm(form), norms, rtol=1e-5)
    for other in forms(shape, seed=1):
      both = product.expand(product.add(form, other))
      wanted = whole + exact(stack(shape, seed=1))
      np.testing.assert_allclose(
        both, wanted, atol=tol(jnp.float32, shape[2]) * np.abs(wanted).max()
      )
    found = np.asarray(product.values(form))
    wanted = np.linalg.svd(whole, compute_uv=False)
    size = min(found.shape[-1], wanted.shape[-1])
    np.testing.assert_allclose(
      found[:, :size], wanted[:, :size], atol=1e-3 * wanted.max()
    )


def test_an_effective_rank_counts_equal_directions():
  values = jnp.array([[3.0, 3.0, 3.0, 0.0], [5.0, 0.0, 0.0, 0.0], [0.0] * 4])
  found = product.effective_rank(values)
  np.testing.assert_allclose(found, [3, 1, 0], rtol=1e-6)
  np.testing.assert_array_equal(product.rank_of(values), [3, 1, 0])


def test_a_turn_finds_the_rotation_between_factors():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(9, 3)), rng.normal(size=(3, 5))
  q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
  args = (a @ q.T, q @ b, a, b)
  found = product.turn(*(jnp.asarray(x, jnp.float32) for x in args))
  np.testing.assert_allclose(found, q, atol=8 * tol(jnp.float32, 9))
