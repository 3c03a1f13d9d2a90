"""Stations: where edges stand, and which of them hears each client."""

import numpy as np
import pytest

from fedjax_peft.network import station

CLIENTS, EDGES, RADIUS = 40, 4, 100.0


def metres(seconds=0.0, **options):
  how = station.stations(**options)
  return station.distance(how, CLIENTS, EDGES, RADIUS, 0)(seconds)


def test_clients_stay_where_they_are_unless_they_walk():
  np.testing.assert_array_equal(metres(0.0), metres(1e5))
  still, moved = metres(0.0, speed=2.0), metres(60.0, speed=2.0)
  assert np.any(still != moved)
  # A leg across the whole disc takes as long as a mean one, 128 / (45 pi) of
  # the radius: nobody is faster, seen from any edge.
  assert np.abs(still - moved).max() <= 120.0 * 2 / (128 / (45 * np.pi))
  assert metres().min() >= 1.0


def test_edges_stand_as_far_apart_as_is_said():
  near, far = metres(spacing=10.0), metres(spacing=1000.0)
  assert near.max() < far.max()
  # By the triangle inequality: two edges, seen from one client.
  for found, spacing in ((near, 10.0), (far, 1000.0)):
    apart = np.abs(found[:, :1] - found).max()
    assert apart <= spacing * np.sqrt(2) + 2.0


def test_each_client_talks_to_the_nearest_edge_that_is_alive():
  found, nobody = metres(), np.full(CLIENTS, -1, np.int32)
  home = station.home(station.stations(outages={"2": [5, 7]}), EDGES)
  np.testing.assert_array_equal(home(found, 0, nobody), found.argmin(1))
  without = np.where(np.arange(EDGES) == 2, np.inf, found)
  np.testing.assert_array_equal(home(found, 5, nobody), without.argmin(1))
  np.testing.assert_array_equal(home(found, 7, nobody), found.argmin(1))


def test_hysteresis_keeps_clients_where_they_are():
  found = metres()
  second = np.argsort(found, axis=1)[:, 1].astype(np.int32)
  for metres_more in (0.0, 30.0, 1e6):
    home = station.home(station.stations(hysteresis=metres_more), EDGES)
    now = home(found, 0, second)
    better = found[np.arange(CLIENTS), second] - found.min(1)
    stays = better <= metres_more
    np.testing.assert_array_equal(now[stays], second[stays])
    np.testing.assert_array_equal(now[~stays], found.argmin(1)[~stays])


def test_no_edge_hears_more_than_it_has_room_for():
  nobody = np.full(CLIENTS, -1, np.int32)
  home = station.home(station.stations(capacity=10), EDGES)
  count = np.bincount(home(metres(), 0, nobody), minlength=EDGES)
  np.testing.assert_array_equal(count, [10] * EDGES)
  with pytest.raises(ValueError, match="raise capacity=9"):
    station.home(station.stations(capacity=9), EDGES)(metres(), 0, nobody)


def test_one_edge_is_nobodys_choice():
  assert station.home(station.stations(), 1) is None


def test_some_edge_must_be_alive():
  outages = {e: [1, 2] for e in range(EDGES)}
  home = station.home(station.stations(outages=outages), EDGES)
  with pytest.raises(ValueError, match="no edge alive in round 1; keep one"):
    home(metres(), 1, np.zeros(CLIENTS, np.int32))


@pytest.mark.parametrize(
  ("options", "sentence"),
  [
    ({"spacing": 0.0}, "spacing must be a positive number"),
    ({"speed": -1.0}, "speed must be a number of at least 0"),
    ({"pause": float("nan")}, "pause must be a number of at least 0"),
    ({"hysteresis": float("inf")}, "hysteresis must be a number"),
    ({"capacity": 0}, "capacity must be an integer of at least 1"),
  ],
)
def test_stations_that_cannot_be_are_refused(options, sentence):
  with pytest.raises(ValueError, match=sentence):
    station.stations(**options)
