"""Sub-channels to clients: matchings against all permutations."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import allocation_world as world
from fedjax_peft.network import channel
from fedjax_peft.split import matching, outcome
from tolerance import tol

NEAR = tol("float64", 64)


def brute(cost):
  """(least maximum, least sum) of all ways to give each client a channel."""
  clients, channels = cost.shape
  ways = itertools.permutations(range(channels), clients)
  taken = [cost[np.arange(clients), list(way)] for way in ways]
  return min(t.max() for t in taken), min(t.sum() for t in taken)


@hypothesis.given(
  st.integers(0, 10**6), st.integers(1, 6), st.integers(0, 2), st.booleans()
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_no_permutation_is_better(seed, clients, spare, rounded):
  rng = np.random.default_rng(seed)
  cost = rng.lognormal(size=(clients, min(clients + spare, 6)))
  cost = np.ceil(3 * cost) if rounded else cost  # ties
  hypothesis.assume(cost.shape[1] >= clients)
  most, total = brute(cost)
  row = np.arange(clients)
  found = matching.assign(cost, "max")
  assert len(set(found.tolist())) == clients
  assert cost[row, found].max() == most
  other = matching.assign(cost, "sum")
  np.testing.assert_allclose(cost[row, other].sum(), total, rtol=NEAR)
  # Within the least maximum the sum is the least that there is.
  within = np.where(cost <= most, cost, 1e9)
  np.testing.assert_allclose(
    cost[row, found].sum(), brute(within)[1], rtol=NEAR
  )


def test_the_two_aims_differ_where_one_client_would_pay_for_the_sum():
  cost = np.array([[0.0, 6.0], [6.0, 10.0]])
  assert matching.assign(cost, "sum").tolist() == [0, 1]
  assert matching.assign(cost, "max").tolist() == [1, 0]


def test_what_cannot_be_matched_is_said():
  with pytest.raises(ValueError, match="got 2 for 3 clients; divide the band"):
    matching.assign(np.ones((3, 2)))
  dead = np.ones((3, 3))
  dead[1] = np.inf
  with pytest.raises(ValueError, match="no matching is possible: client 1"):
    matching.assign(dead)
  narrow = np.full((3, 3), np.inf)
  narrow[:, 0] = 1
  with pytest.raises(ValueError, match="no matching is possible: one client"):
    matching.assign(narrow, "sum")
  with pytest.raises(ValueError, match=r"aim must be one of .*'max', 'sum'"):
    matching.assign(np.ones((1, 1)), "mean")


@pytest.mark.parametrize("aim", ["max", "sum"])
@pytest.mark.parametrize("seed", range(4))
def test_spare_channels_help_one_after_another_until_none_does(aim, seed):
  rng = np.random.default_rng(seed)
  gains = world.links(rng, 4, 10)
  bits = 1e6 * rng.lognormal(size=(4, 1))

  def cost(count, gains):
    return bits / channel.rate(1e5 * count, 0.2, gains)

  first = matching.assign(cost(np.ones((4, 10)), gains), aim)
  owner = np.full(10, -1)
  owner[first] = np.arange(4)
  full = matching.extend(owner, gains, cost, aim)
  kept = owner >= 0
  np.testing.assert_array_equal(full[kept], owner[kept])

  def score(owner):
    mine = owner == np.arange(4)[:, None]
    count = mine.sum(1, keepdims=True)
    mean = (np.log(gains) * mine).sum(1, keepdims=True) / count
    each = cost(count, np.exp(mean))
    return each.max() if aim == "max" else each.sum()

  assert score(full) < 0.9 * score(owner)
  # Nothing that is left over would help anybody (the last, for "max").
  for free in np.flatnonzero(full < 0):
    for client in range(4):
      other = full.copy()
      other[free] = client
      assert score(other) >= score(full) * (1 - NEAR)


def test_the_rate_over_several_channels_is_at_least_what_is_reckoned_with():
  # log2(1 + e^x) is convex: the geometric mean of gains is a lower bound.
  problem = world.drawn(0, 3, 1, 1, channels=9)
  owner = np.repeat([0, 1, 2], 3)
  width, gains = outcome.radio(problem, owner)
  one = problem.bandwidth / 9
  np.testing.assert_allclose(width, 3 * one)
  for watts in (1e-3, 0.2, 1e6):
    mine = np.stack([problem.gains[c, owner == c] for c in range(3)])
    each = channel.rate(one, watts / 3, mine).sum(-1)
    reckoned = channel.rate(width, watts, gains)
    assert np.all(reckoned <= each * (1 + NEAR))
  # At a strong signal nothing is lost: x dominates log(1 + e^x).
  np.testing.assert_allclose(reckoned, each, rtol=1e-2)
