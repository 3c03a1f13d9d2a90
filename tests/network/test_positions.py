"""Positions: on the disc, at a walking pace, nearest to something."""

import numpy as np
import pytest
import scipy.spatial
import scipy.stats

from fedjax_peft.network import positions
from tolerance import tol

IDS = np.arange(20_000)
P = 1e-4
APART = 128 / (45 * np.pi)  # mean distance of two points of a unit disc
LEG = APART * 500.0 / 1.5  # seconds


def test_places_are_uniform_on_the_disc():
  point = positions.disc(IDS, 0, radius=300.0, center=(50.0, -20.0))
  x, y = (point - [50.0, -20.0]).T
  # The area within r is r^2 / R^2; the angle is uniform.
  inside, angle = (x**2 + y**2) / 300.0**2, np.arctan2(y, x) / (2 * np.pi) + 0.5
  for u in (inside, angle):
    assert scipy.stats.kstest(u, "uniform").pvalue > P
  assert scipy.stats.kstest(np.sqrt(inside), "uniform").pvalue < P
  assert scipy.stats.spearmanr(inside, angle).pvalue > P


def test_every_client_may_have_a_disc_of_its_own():
  centers = np.stack([IDS[:50] * 1000.0, np.zeros(50)], -1)
  point = positions.disc(IDS[:50], 0, radius=10.0, center=centers)
  assert np.all(np.hypot(*(point - centers).T) <= 10)


@pytest.mark.parametrize("stations", [1, 2, 5, 9])
def test_stations_are_different_points_a_spacing_apart(stations):
  point = positions.grid(stations, 200.0)
  assert point.shape == (stations, 2)
  np.testing.assert_allclose(point.max(0) + point.min(0), 0, atol=1e-12)
  if stations > 1:
    assert scipy.spatial.distance.pdist(point).min() == 200.0


def test_the_nearest_station_is_that_of_a_kd_tree():
  point = positions.disc(IDS, 0, radius=500.0)
  stations = positions.disc(np.arange(17), 1, radius=500.0)
  found, metres = positions.nearest(point, stations)
  wanted, index = scipy.spatial.cKDTree(stations).query(point)
  np.testing.assert_array_equal(found, index)
  np.testing.assert_allclose(metres, wanted, rtol=tol("float64", 4))
  assert found.dtype == np.int32
  every = positions.distances(point, stations)
  np.testing.assert_array_equal(every.min(-1), metres)


def test_of_stations_alike_the_first_is_nearest():
  found, _ = positions.nearest([[0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]])
  assert found[0] == 0


def walk(time, ids=IDS, **options):
  options = {"radius": 500.0, "speed": 1.5, **options}
  return positions.waypoint(ids, time, 0, **options)


def test_walkers_move_at_their_speed_on_average_and_stay_on_the_disc():
  for time in (0.0, 777.0, 1e5):
    before, after = walk(time), walk(time + 0.5)
    assert np.hypot(*before.T).max() <= 500.0
    speed = np.hypot(*(after - before).T) / 0.5
    error = speed.std() / np.sqrt(speed.size)
    assert abs(speed.mean() - 1.5) < 4 * error + 1.5 * 1e-3  # turns in between
    assert abs(speed.mean() - 1.45) > 4 * error
    # Nobody jumps: a leg of at most 2 R in the mean leg's time.
    assert speed.max() <= 1.5 * 2 / APART + 1e-6


def test_paths_are_continuous_at_every_turn():
  times = np.arange(0, 3 * LEG, LEG / 400)
  path = np.stack([walk(t, IDS[:20]) for t in times])
  jump = np.hypot(*np.moveaxis(np.diff(path, axis=0), -1, 0))
  assert jump.max() <= LEG / 400 * 1.5 * 2 / APART + 1e-6
  assert np.hypot(*(path[0] - path[-1]).T).mean() > 100


def test_walkers_rest_for_the_pause():
  still = np.hypot(*(walk(1e4 + 1, pause=LEG) - walk(1e4, pause=LEG)).T) == 0
  # Half of the time, but for those who turn within the second.
  assert scipy.stats.binomtest(int(still.sum()), IDS.size, 0.5).pvalue > P
  assert scipy.stats.binomtest(int(still.sum()), IDS.size, 0.53).pvalue < P


def test_without_speed_clients_stay():
  np.testing.assert_array_equal(walk(0.0, speed=0.0), walk(9e9, speed=0.0))


def test_where_a_client_is_does_not_depend_on_the_others():
  order = np.random.default_rng(0).permutation(IDS.size)[:100]
  np.testing.assert_array_equal(walk(50.0, IDS[order]), walk(50.0)[order])


@pytest.mark.parametrize(
  ("build", "match"),
  [
    (lambda: positions.disc(IDS, 0, radius=0.0), "radius must be"),
    (lambda: positions.grid(0, 1.0), "stations must be"),
    (lambda: positions.grid(1, -1.0), "spacing must be"),
    (lambda: walk(0.0, speed=-1.0), "speed must be at least 0"),
    (lambda: positions.nearest([[0.0, 0.0]], np.zeros((0, 2))), "got none"),
  ],
)
def test_bad_arguments_are_refused(build, match):
  with pytest.raises(ValueError, match=match):
    build()
