"""Access: equal finish, hysteresis, and stations shared fairly."""

import itertools

import numpy as np
import pytest

from fedjax_peft.network import access
from tolerance import tol


def drawn(seed=0, shape=(200, 4)):
  rng = np.random.default_rng(seed)
  rates = rng.uniform(1e5, 1e7, shape) * (rng.uniform(size=shape) < 0.8)
  rates[:, 0] = np.maximum(rates[:, 0], 1e5)  # one link works at least
  bytes = rng.integers(1, 10**7, shape[:-1])
  return bytes, rates, rng.uniform(0, 2, shape)


def finishes(shares, rates, latency):
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.where(shares > 0, latency + 8 * shares / rates, 0)


def test_parts_are_in_proportion_to_rates_and_arrive_together():
  bytes, rates, _ = drawn()
  shares, seconds = access.split(bytes, rates)
  assert shares.dtype == np.int64
  np.testing.assert_array_equal(shares.sum(-1), bytes)
  exact = bytes[:, None] * rates / rates.sum(-1, keepdims=True)
  assert np.abs(shares - exact).max() <= 1 + 1e-6  # whole bytes
  np.testing.assert_allclose(
    seconds, 8 * bytes / rates.sum(-1), rtol=tol("float64", 8)
  )


def test_all_links_that_are_used_finish_together_and_no_other_could():
  bytes, rates, latency = drawn()
  shares, seconds = access.split(bytes, rates, latency)
  np.testing.assert_array_equal(shares.sum(-1), bytes)
  assert shares.min() >= 0
  used = shares > 1  # one byte may be rounding
  with np.errstate(divide="ignore"):
    byte = 8 / rates
  late = finishes(shares, rates, latency) - seconds[:, None]
  assert np.all(np.abs(late[used]) <= (2 * byte)[used])
  idle = (shares == 0) & (rates > 0)
  assert np.any(idle)
  assert np.all((latency >= seconds[:, None] - 2 * byte)[idle])


def test_no_split_over_a_grid_is_faster():
  bytes, rates, latency = drawn(1, (40, 3))
  rates = np.maximum(rates, 1e3)
  _, seconds = access.split(bytes, rates, latency)
  best = np.full(40, np.inf)
  for i, j in itertools.product(range(41), repeat=2):
    if i + j <= 40:
      part = np.array([i, j, 40 - i - j]) / 40 * bytes[:, None]
      best = np.minimum(best, finishes(part, rates, latency).max(-1))
  assert np.all(seconds <= best * (1 + tol("float64", 8)))
  # With the rates of twice as fast links this bound fails.
  half = access.split(bytes, rates / 2, latency)[1]
  assert np.any(half > best)


def test_a_link_more_is_never_slower():
  bytes, rates, latency = drawn(2)
  few = access.split(bytes, rates[:, :2], latency[:, :2])[1]
  many = access.split(bytes, rates, latency)[1]
  assert np.all(many <= few * (1 + tol("float64", 8)))
  assert np.any(many < 0.9 * few)


def test_without_a_link_nothing_is_sent_and_it_takes_for_ever():
  shares, seconds = access.split([10, 10], [[0.0, 0.0], [0.0, 8.0]])
  np.testing.assert_array_equal(shares, [[0, 0], [0, 10]])
  np.testing.assert_array_equal(seconds, [np.inf, 10.0])


def test_a_client_switches_when_its_link_degrades_and_not_before():
  rates = np.array([[10.0, 11.0], [10.0, 13.0], [0.0, 1.0], [10.0, 11.0]])
  found = access.switch(np.array([0, 0, 0, -1]), rates, margin=0.2)
  np.testing.assert_array_equal(found, [0, 1, 1, 1])
  assert found.dtype == np.int32


def test_no_client_switches_back_and_forth_between_rates_that_wobble():
  rng = np.random.default_rng(0)
  link, changes = np.full(50, -1), 0
  for _ in range(30):
    rates = rng.uniform(0.9, 1.1, (50, 2))
    new = access.switch(link, rates, margin=0.25)
    changes += int(np.sum((new != link) & (link >= 0)))
    link = new
  assert changes == 0
  greedy = access.switch(link, rng.uniform(0.9, 1.1, (50, 2)), margin=0.0)
  assert np.any(greedy != link)


def brute(times):
  """The least time at which the last station is done: all assignments."""
  options = itertools.product(range(times.shape[1]), repeat=len(times))
  return min(access.station_seconds(np.array(x), times).max() for x in options)


@pytest.mark.parametrize("seed", range(8))
def test_stations_are_shared_nearly_as_well_as_can_be(seed):
  bytes, rates, _ = drawn(seed, (6, 3))
  with np.errstate(divide="ignore"):
    times = 8 * bytes[:, None] / rates
  chosen = access.associate(rates, bytes)
  found = access.station_seconds(chosen, times).max()
  fastest = access.station_seconds(rates.argmax(-1), times).max()
  best = brute(times)
  assert best * (1 - tol("float64", 8)) <= found <= fastest
  # Ibarra and Kim, 1977: greedy is within the number of machines.
  assert found <= 3 * best


def test_load_is_taken_into_account():
  # All hear the first station a little better; half of them should not use it.
  rates = np.tile([1.1e6, 1e6], (20, 1))
  counts = np.bincount(access.associate(rates), minlength=2)
  assert abs(counts[0] - counts[1]) <= 2


def test_a_client_out_of_reach_has_no_station():
  rates = np.array([[0.0, 0.0], [0.0, 1e6]])
  np.testing.assert_array_equal(access.associate(rates), [-1, 1])
