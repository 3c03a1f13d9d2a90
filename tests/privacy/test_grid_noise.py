"""Noise on the grid: the exact laws, and variances that wrong ones fail."""

import math

import numpy as np
import pytest
import scipy.stats

from fedjax_peft.privacy import grid_noise

DRAWS = 20000


def gaussian_law(sigma):
  """Values and exact probabilities of the discrete Gaussian."""
  reach = math.ceil(15 * sigma) + 5
  x = np.arange(-reach, reach + 1)
  p = np.exp(-(x**2) / (2 * float(grid_noise.rounded_variance(sigma))))
  return x, p / p.sum()


def skellam_law(sigma):
  reach = math.ceil(15 * sigma) + 15
  x = np.arange(-reach, reach + 1)
  return x, scipy.stats.skellam(sigma**2 / 2, sigma**2 / 2).pmf(x)


LAWS = {
  "discrete_gaussian": (grid_noise.discrete_gaussian, gaussian_law),
  "skellam": (grid_noise.skellam, skellam_law),
}


def p_value(drawn, x, p):
  """Of a chi-square test, over cells of at least ten expected draws."""
  wide = p * drawn.size >= 10
  want = np.append(p[wide], p[~wide].sum()) * drawn.size
  got = np.array([np.sum(drawn == v) for v in x[wide]])
  got = np.append(got, drawn.size - got.sum())
  return scipy.stats.chisquare(got, want * drawn.size / want.sum()).pvalue


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.3])
def test_draws_follow_the_exact_law(name, sigma):
  # Fixed seed; p > 0.01, and < 1e-6 where sigma is a tenth larger.
  draw, law = LAWS[name]
  drawn = draw(np.random.default_rng(7), sigma, DRAWS)
  assert p_value(drawn, *law(sigma)) > 0.01
  assert p_value(drawn, *law(1.1 * sigma)) < 1e-6


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("sigma", [0.7, 5.0, 800.0])
def test_the_variance_is_the_stated_one_and_not_two_thirds_of_it(name, sigma):
  # By the chi-square law of a sample variance, two-sided, p > 0.001 as stated
  # and < 1e-9 at 2/3 and 3/2 of it; the number of draws allows for kurtosis.
  draw, law = LAWS[name]
  drawn = draw(np.random.default_rng(3), sigma, 4000)
  x, p = law(sigma)
  variance = np.sum(p * x**2)
  spread = math.sqrt((np.sum(p * x**4) - variance**2) / drawn.size)

  def p_of(stated):
    score = abs(np.mean(drawn**2.0) - stated) / (spread * stated / variance)
    return 2 * scipy.stats.norm.sf(score)

  assert p_of(variance) > 0.001
  assert p_of(variance * 2 / 3) < 1e-9
  assert p_of(variance * 3 / 2) < 1e-9
  assert variance == pytest.approx(sigma**2, rel=0.01)
  if name == "discrete_gaussian":
    assert variance <= float(grid_noise.rounded_variance(sigma)) * (1 + 1e-9)


@pytest.mark.parametrize("name", LAWS)
def test_the_sum_of_all_clients_has_the_sum_of_their_variances(name):
  draw, law = LAWS[name]
  rng = np.random.default_rng(1)
  total = sum(draw(rng, 2.0, 4000) for _ in range(10))
  x, p = law(2.0)
  stated = 10 * np.sum(p * x**2)
  # Four standard errors of a variance of nearly normal numbers: p = 6e-5.
  assert abs(total.var() / stated - 1) < 4 * math.sqrt(2 / 4000)
  assert abs(total.var() / (stated / 10) - 1) > 1  # one client's alone
  assert abs(total.mean()) < 4 * math.sqrt(stated / 4000)


def test_the_variance_is_rounded_up_and_by_little():
  for sigma in 0.01, 0.4, 1.0, math.pi, 77.7, 4096.0:
    variance = grid_noise.rounded_variance(sigma)
    assert sigma**2 <= variance < sigma**2 + 2**-10 + 2e-3 * sigma**2
    # The largest squares and products are 64-bit integers.
    scale = math.isqrt(math.floor(variance)) + 1
    far = 42 * scale * scale * variance.denominator
    assert far**2 < 2**63
    top = 2 * variance.numerator * variance.denominator * scale**2
    assert 40 * top < 2**63


def test_shapes_and_seeds():
  for draw, _ in LAWS.values():
    one = draw(np.random.default_rng(5), 2.0, (3, 4))
    two = draw(np.random.default_rng(5), 2.0, (3, 4))
    assert one.shape == (3, 4)
    assert one.dtype == np.int64
    np.testing.assert_array_equal(one, two)
    assert draw(np.random.default_rng(5), 2.0, 0).shape == (0,)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, 5000.0])
def test_a_std_that_cannot_be_sampled_is_refused(sigma):
  for draw, _ in LAWS.values():
    with pytest.raises(ValueError, match="coarser grid"):
      draw(np.random.default_rng(0), sigma, 3)
