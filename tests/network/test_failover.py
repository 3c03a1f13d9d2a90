"""Laws of failover: nearest, stable, deterministic, and nobody moves idly."""

import numpy as np
import pytest

from fedjax_peft.network import failover


def distances(seed, clients=30, edges=5, ties=False):
  rng = np.random.default_rng(seed)
  if ties:
    return rng.integers(0, 3, (clients, edges)).astype(np.float64)
  return rng.uniform(0, 100, (clients, edges))


def greedy(cost, alive, room):
  """The pairs one after another, the nearest first."""
  found, room = np.full(len(cost), -1), np.array(room)
  pairs = sorted(
    (cost[i, e], i, e) for i in range(len(cost)) for e in range(len(room))
  )
  for far, i, e in pairs:
    if alive[e] and room[e] and found[i] < 0 and np.isfinite(far):
      found[i] = e
      room[e] -= 1
  return found


@pytest.mark.parametrize("seed", range(5))
def test_without_outages_everyone_goes_to_the_nearest(seed):
  cost = distances(seed)
  found = failover.assign(cost)
  assert found.dtype == np.int32
  np.testing.assert_array_equal(found, cost.argmin(axis=1))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_the_death_of_an_edge_moves_its_own_clients_to_the_next_and_nobody_else(
  seed, ties
):
  cost = distances(seed, ties=ties)
  before = failover.assign(cost)
  alive = np.arange(5) != seed % 5
  after = failover.assign(cost, alive)
  moved = before == seed % 5
  np.testing.assert_array_equal(after[~moved], before[~moved])
  rest = np.where(alive, cost, np.inf)
  np.testing.assert_array_equal(after, rest.argmin(axis=1))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ties", [False, True])
def test_with_capacities_the_nearest_pairs_come_first(seed, ties):
  cost = distances(seed, ties=ties)
  cost[3] = np.inf  # out of every reach
  rng = np.random.default_rng(seed)
  room = rng.integers(0, 9, 5)
  alive = rng.random(5) < 0.8
  found = failover.assign(cost, alive, room)
  np.testing.assert_array_equal(found, greedy(cost, alive, room))
  counts = np.bincount(found[found >= 0], minlength=5)
  assert (counts <= room * alive).all()


@pytest.mark.parametrize("seed", range(4))
def test_no_client_and_edge_would_both_rather_have_each_other(seed):
  cost, room = distances(seed), 7
  found = failover.assign(cost, capacity=room)
  assert (np.bincount(found, minlength=5) <= room).all()
  assert (found >= 0).all()
  mine = cost[np.arange(30), found]
  for edge in range(5):
    taken = mine[found == edge]
    envious = cost[:, edge] < mine
    if envious.any():
      assert taken.size == room
      assert taken.max() < cost[envious, edge].min()


def test_where_no_edge_lives_or_has_room_there_is_none():
  cost = distances(0)
  assert (failover.assign(cost, np.zeros(5, bool)) == -1).all()
  assert (failover.assign(cost, capacity=0) == -1).all()
  few = failover.assign(cost, capacity=2)
  assert np.sum(few >= 0) == 10


def test_nobody_goes_nowhere():
  empty = np.zeros((0, 3))
  assert failover.assign(empty, capacity=1).shape == (0,)
  assert failover.handover(np.zeros(0, int), empty).shape == (0,)


@pytest.mark.parametrize("seed", range(4))
def test_a_handover_without_a_margin_goes_to_the_nearest(seed):
  cost = distances(seed)
  before = np.random.default_rng(seed).integers(-1, 5, 30)
  found = failover.handover(before, cost)
  np.testing.assert_array_equal(found, cost.argmin(axis=1))


@pytest.mark.parametrize("seed", range(4))
def test_a_client_moves_only_for_an_edge_nearer_by_the_margin(seed):
  cost, margin = distances(seed), 20.0
  before = np.random.default_rng(seed).integers(0, 5, 30)
  found = failover.handover(before, cost, margin)
  gain = cost[np.arange(30), before] - cost.min(axis=1)
  np.testing.assert_array_equal(found != before, gain > margin)
  moved = found != before
  assert moved.any()
  assert not moved.all()
  np.testing.assert_array_equal(found[moved], cost.argmin(axis=1)[moved])


def test_walking_to_and_fro_across_a_border_hands_over_once():
  walk = np.array([-30.0, -1, 1, -1, 1, -1, 30, 1, -1, 1])
  edges = np.array([-50.0, 50.0])

  def handovers(hysteresis):
    at, count = np.array([0]), 0
    for place in walk:
      new = failover.handover(at, np.abs(place - edges)[None], hysteresis)
      count += int(new[0] != at[0])
      at = new
    return count

  assert handovers(0.0) == 7
  assert handovers(10.0) == 1


def test_clients_of_a_dead_edge_move_whatever_the_margin():
  cost = distances(1)
  before = failover.assign(cost)
  alive = np.arange(5) != 2
  after = failover.handover(before, cost, 1e9, alive)
  np.testing.assert_array_equal(after, failover.assign(cost, alive))
  back = failover.handover(after, cost, 1e9)
  np.testing.assert_array_equal(back, after)
  none = failover.handover(before, cost, 0.0, np.zeros(5, bool))
  assert (none == -1).all()


def test_edges_are_dead_in_their_windows_and_alive_outside():
  alive = failover.outages(3, {"0": [2, 4], 2: [(0, 1), (3, 5)]})
  found = np.array([alive(r) for r in range(6)])
  wanted = np.array(
    [
      [1, 1, 0],
      [1, 1, 1],
      [0, 1, 1],
      [0, 1, 0],
      [1, 1, 0],
      [1, 1, 1],
    ],
    bool,
  )
  np.testing.assert_array_equal(found, wanted)
  assert failover.outages(2)(7).all()


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: failover.assign(np.zeros(3)), r"numbers \[N, E\]"),
    (lambda: failover.assign(np.full((2, 2), np.nan)), "none of them nan"),
    (lambda: failover.assign(np.zeros((2, 2)), [True]), "each of 2 edges"),
    (lambda: failover.assign(np.zeros((2, 2)), None, -1), "whole numbers"),
    (lambda: failover.assign(np.zeros((2, 2)), None, 1.5), "whole numbers"),
    (lambda: failover.handover([0], np.zeros((2, 2))), "each of 2 clients"),
    (lambda: failover.handover([0, 2], np.zeros((2, 2))), r"in 0\.\.1"),
    (lambda: failover.handover([0], np.zeros((1, 2)), -1.0), "at least 0"),
    (lambda: failover.outages(2, {2: (0, 1)}), r"in 0\.\.1: got 2"),
    (lambda: failover.outages(2, {"left": (0, 1)}), "got 'left'"),
    (lambda: failover.outages(2, {0: (3, 3)}), r"got \(3, 3\) for edge 0"),
  ],
)
def test_what_does_not_fit_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
