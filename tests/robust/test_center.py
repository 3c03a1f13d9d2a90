"""Geometric median and centered clipping, against SciPy and their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import crowd
from fedjax_peft import robust

PLACES, WIDTH = 13, 6
MEDIAN = robust.geometric_median(steps=64)
CLIP = {radius: robust.centered_clip(radius) for radius in (0.1, 1.5)}


def messages(n, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, WIDTH)).astype(np.float32)


def cost(x, point):
  return np.linalg.norm(x.astype(np.float64) - point, axis=1).sum()


@pytest.mark.parametrize("n", [5, 8, 13])
def test_the_geometric_median_is_the_minimum_that_scipy_finds(n, tol):
  # Near its minimum a sum of distances is flat: its value agrees to rounding,
  # its place to the root of that.
  x = messages(n, n)
  found = crowd.combine(MEDIAN, *crowd.padded(x, PLACES))
  start = x.mean(0, dtype=np.float64)
  best = scipy.optimize.minimize(lambda p: cost(x, p), start, method="BFGS")
  eps = tol(jnp.float32, n)
  assert abs(cost(x, found) - best.fun) <= eps * best.fun
  np.testing.assert_allclose(found, best.x, atol=np.sqrt(eps))
  assert cost(x, np.median(x, 0)) > best.fun * (1 + eps)


def test_thirty_two_steps_are_enough_and_few_are_not():
  x = messages(9)
  far = crowd.combine(robust.geometric_median(1), x)
  near, nearer = (
    crowd.combine(r, x) for r in (robust.geometric_median(), MEDIAN)
  )
  assert np.linalg.norm(near - nearer) < 1e-4 * np.linalg.norm(far - nearer)


@pytest.mark.parametrize(("size", "move"), [(1e-20, 0.0), (-3.0, 2.0)])
def test_the_geometric_median_moves_with_the_messages(size, move, tol):
  x = messages(9)
  found = crowd.combine(MEDIAN, np.float32(size) * x + np.float32(move))
  wanted = size * crowd.combine(MEDIAN, x).astype(np.float64) + move
  eps = tol(jnp.float32, 9) * (abs(size) * np.abs(x).max() + abs(move))
  np.testing.assert_allclose(found, wanted, rtol=0, atol=eps)


def test_the_geometric_median_turns_with_the_messages(tol):
  # The coordinatewise median does not.
  x = messages(9)
  turn = np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)))[0]
  turned = crowd.combine(MEDIAN, x @ turn.astype(np.float32))
  wanted = crowd.combine(MEDIAN, x) @ turn
  # It starts elsewhere: 64 steps leave the square root of rounding.
  close = np.sqrt(tol(jnp.float32, 9))
  np.testing.assert_allclose(turned, wanted, atol=close)
  plain = crowd.combine(robust.median(), x @ turn.astype(np.float32))
  assert np.abs(plain - np.median(x, 0) @ turn).max() > 10 * close


def test_a_majority_of_equal_messages_is_the_geometric_median():
  x = np.concatenate([np.full((5, WIDTH), 0.1), 1e9 * messages(4)])
  np.testing.assert_array_equal(crowd.combine(MEDIAN, x), np.float32(0.1))


def test_few_hostile_messages_cannot_move_the_geometric_median_far():
  # Theorem: with f of n hostile, by at most 2 (n - f) / (n - 2 f) times the
  # largest honest distance (Minsker, 2015, Lemma 2.1, as in RFA).
  x = messages(9)
  centre = x.mean(0)
  reach = np.linalg.norm(x - centre, axis=1).max()
  for f in (1, 2, 3, 4):
    for size in (10, 1e10, 1e38):
      hostile = x.copy()
      hostile[:f] = np.float32(size)
      moved = np.linalg.norm(crowd.combine(MEDIAN, hostile) - centre)
      assert moved <= 2 * (9 - f) / (9 - 2 * f) * reach


def clipped(x, radius, steps):
  """Karimireddy et al., 2021, equation (CC), from the median."""
  x = x.astype(np.float64)
  point = np.median(x, 0)
  for _ in range(steps):
    away = x - point
    norm = np.linalg.norm(away, axis=1, keepdims=True)
    point = point + (away * np.minimum(1, radius / norm)).mean(0)
  return point


@pytest.mark.parametrize("radius", [0.1, 1.5])
@pytest.mark.parametrize("n", [4, 9, 13])
def test_centered_clipping_is_that_of_the_paper(n, radius, tol):
  x = messages(n, n)
  x[0] *= 1e6
  found = crowd.combine(CLIP[radius], *crowd.padded(x, PLACES))
  wanted = clipped(x, radius, 3)
  np.testing.assert_allclose(found, wanted, atol=tol(jnp.float32, n))


def test_a_wide_radius_is_the_mean(tol):
  x = messages(9)
  found = crowd.combine(robust.centered_clip(1e3), x)
  np.testing.assert_allclose(found, x.mean(0), atol=tol(jnp.float32, 9))
