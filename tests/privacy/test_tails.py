"""Tail bounds: true of the exact distributions, and not by much."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from fedjax_peft.privacy import tails


def all_rotations(block):
  """H diag(s) / sqrt(b) for all 2^b signs s, applied to the rows of x."""
  signs = 1 - 2 * (
    np.arange(2**block)[:, None] >> np.arange(block)[None] & 1
  ).astype(np.float32)
  matrix = scipy.linalg.hadamard(block).astype(np.float32) / math.sqrt(block)
  return lambda x: np.abs((signs * x) @ matrix).max(axis=1)


def vectors(block):
  geometric = 0.7 ** np.arange(block)
  some = np.arange(block) % 3 == 0
  for x in np.ones(block), geometric, some, np.eye(block)[2]:
    yield (x / np.linalg.norm(x)).astype(np.float32)


def test_no_rotated_coordinate_exceeds_the_bound_but_with_its_probability():
  # Exactly: over all signs of a block.
  for block in 8, 16:
    largest = all_rotations(block)
    for x in vectors(block):
      y = largest(x)
      for failure in 0.5, 0.1, 1e-3:
        bound = tails.rotated(block, failure)
        assert np.mean(y > bound * (1 + 1e-6)) <= failure
        if x.min() == x.max():  # spread evenly, half the bound is none
          assert np.mean(y > bound / 2) > failure


def test_energy_shared_among_blocks_is_no_worse_than_in_one():
  block, failure = 8, 0.5
  bound = tails.rotated(block, failure)
  assert bound < 1
  largest = all_rotations(block)
  for shares in [1.0], [0.5, 0.5], [0.9, 0.1], [0.25] * 4, [0.05] * 20:
    kept = 1.0
    for share in shares:
      p = max(
        np.mean(math.sqrt(share) * largest(x) > bound * (1 + 1e-6))
        for x in vectors(block)
      )
      kept *= 1 - p
    assert 1 - kept <= failure


def sum_of_discrete_gaussians(sigma, count):
  """Exact probabilities of the sum, and its values."""
  reach = math.ceil(12 * sigma) + 4
  one = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
  one /= one.sum()
  total = one
  for _ in range(count - 1):
    total = np.convolve(total, one)
  return total, np.abs(np.arange(total.size) - total.size // 2)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 7.0])
@pytest.mark.parametrize(("count", "dimension"), [(1, 1), (6, 1), (6, 5000)])
def test_sums_of_discrete_gaussians_stay_below_the_bound(
  sigma, count, dimension
):
  failure = 1e-3
  p, size = sum_of_discrete_gaussians(sigma, count)
  bound = tails.discrete_gaussian(count * sigma**2, dimension, failure)
  assert p[size > bound].sum() * dimension <= failure
  if sigma * math.sqrt(count) > 2:  # else the next integer is far
    assert p[size > 0.75 * bound].sum() * dimension > failure


@pytest.mark.parametrize("variance", [0.05, 1.0, 30.0, 4000.0])
@pytest.mark.parametrize("dimension", [1, 5000])
def test_skellam_sums_stay_below_the_bound(variance, dimension):
  failure = 1e-3
  exact = scipy.stats.skellam(variance / 2, variance / 2)
  bound = tails.skellam(variance, dimension, failure)
  assert 2 * exact.sf(math.floor(bound)) * dimension <= failure
  if variance > 2:
    assert 2 * exact.sf(math.floor(0.75 * bound)) * dimension > failure
  gaussian = tails.discrete_gaussian(variance, dimension, failure)
  assert bound > gaussian
  if variance > 1000:
    assert bound < 1.01 * gaussian


def test_a_gaussian_bound_is_too_small_for_skellam_noise():
  # Tails of a sparse Skellam are those of a Poisson: what is true of discrete
  # Gaussians is wrong here.
  exact = scipy.stats.skellam(0.025, 0.025)
  gaussian = tails.discrete_gaussian(0.05, 5000, 1e-3)
  assert 2 * exact.sf(math.floor(gaussian)) * 5000 > 10 * 1e-3


def test_bounds_grow_with_the_dimension_and_fall_with_the_failure():
  for tail in tails.discrete_gaussian, tails.skellam:
    assert tail(3.0, 10, 1e-3) < tail(3.0, 11, 1e-3)
    assert tail(3.0, 10, 1e-3) < tail(3.0, 10, 1e-4)
    assert tail(3.0, 10, 1e-3) < tail(3.1, 10, 1e-3)
    assert tail(0.0, 10, 1e-3) == 0
  assert tails.rotated(256, 1e-3) < tails.rotated(256, 1e-6) < 1
  assert tails.rotated(512, 1e-3) < tails.rotated(256, 1e-3)
  assert tails.rotated(2, 1e-9) == 1
