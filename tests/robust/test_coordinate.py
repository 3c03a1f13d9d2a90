"""Order statistics of each value, against NumPy and SciPy."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

import crowd
from fedjax_peft import robust
from fedjax_peft.robust import coordinate

PLACES, WIDTH = 13, 6
MEDIAN = robust.median()
TRIMMED = {cut: robust.trimmed_mean(cut) for cut in (2, 3, 0.1, 0.3)}


def messages(n, seed=0, size=1.0):
  rng = np.random.default_rng(seed)
  return (size * rng.normal(size=(n, WIDTH))).astype(np.float32)


@pytest.mark.parametrize("rows", range(1, 13))
def test_the_network_sorts_all_zeros_and_ones_and_so_everything(rows):
  # The zero-one principle (Knuth, The Art of Computer Programming 3, 5.3.4).
  every = np.array(list(itertools.product([0, 1], repeat=rows)), np.float32).T
  found = coordinate.ascending(jnp.asarray(every), jnp.ones(rows, bool))
  np.testing.assert_array_equal(found, np.sort(every, axis=0))


@pytest.mark.parametrize("n", range(1, PLACES + 1))
def test_the_median_is_that_of_numpy_bit_for_bit(n):
  x = messages(n)
  found = crowd.combine(MEDIAN, *crowd.padded(x, PLACES))
  np.testing.assert_array_equal(found, np.median(x, axis=0))


@pytest.mark.parametrize("trim", [0.1, 0.3])
@pytest.mark.parametrize("n", range(1, PLACES + 1))
def test_the_trimmed_mean_is_that_of_scipy(n, trim, tol):
  x = messages(n)
  found = crowd.combine(TRIMMED[trim], *crowd.padded(x, PLACES))
  wanted = scipy.stats.trim_mean(x.astype(np.float64), trim, axis=0)
  np.testing.assert_allclose(found, wanted, atol=tol(jnp.float32, n))


@pytest.mark.parametrize("n", [30, 70, 90])
def test_a_fraction_is_rounded_as_in_double_precision(n):
  # In single precision 0.1 * 70 is above 7, and 0.3 * 90 below 27.
  x = np.arange(n, dtype=np.float32)[:, None] ** 3 * np.ones((1, WIDTH))
  for trim in (0.1, 0.3):
    found = crowd.combine(TRIMMED[trim], *crowd.padded(x, 90))
    wanted = scipy.stats.trim_mean(x, trim, axis=0)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("n", range(1, 7))
def test_a_trim_that_leaves_none_leaves_the_median(n):
  x = messages(n)
  found = crowd.combine(TRIMMED[3], *crowd.padded(x, PLACES))
  np.testing.assert_array_equal(found, np.median(x, axis=0))


@settings(max_examples=60, deadline=None)
@given(
  n=st.integers(5, PLACES),
  hostile=st.integers(0, 6),
  size=st.sampled_from([1e-30, 1.0, 1e30, 3e38]),
  seed=st.integers(0, 2**16),
)
def test_every_value_stays_in_the_range_of_the_honest(n, hostile, size, seed):
  honest = max(n - hostile, n // 2 + 1)
  x = messages(n, seed)
  rng = np.random.default_rng(seed)
  attack = np.float32(size) * rng.choice([-1.0, 1.0], (n - honest, WIDTH))
  x[honest:] = attack
  low, high = x[:honest].min(0), x[:honest].max(0)
  rows, present = crowd.padded(x, PLACES, seed)
  reductions = [MEDIAN]
  if n - honest <= 2:
    reductions.append(TRIMMED[2])
  for reduce in reductions:
    found = crowd.combine(reduce, rows, present)
    assert np.all((low <= found) & (found <= high))


def test_one_hostile_message_more_breaks_the_trimmed_mean_out():
  # The bound is tight: three against a trim of two.
  x = messages(9)
  x[:3] = 1e6
  rows, present = crowd.padded(x, PLACES)
  assert crowd.combine(TRIMMED[2], rows, present).min() > x[3:].max()
  assert crowd.combine(MEDIAN, rows, present).max() <= x[3:].max()
