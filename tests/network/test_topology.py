"""Laws of graphs and of mixing: symmetric, connected, doubly stochastic."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from fedjax_peft.network import topology

OPTIONS = {
  "erdos_renyi": {"probability": 0.4, "seed": 3},
  "geometric": {"radius": 0.5, "seed": 3},
}
GRAPHS = sorted(topology.GRAPHS)


def graph(name, nodes=16):
  return topology.GRAPHS[name](nodes, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("nodes", [2, 4, 16])
def test_a_graph_is_undirected_connected_and_without_loops(name, nodes):
  options = {"radius": 1.5} if name == "geometric" else {}
  options |= {"probability": 1.0} if name == "erdos_renyi" else {}
  found = topology.GRAPHS[name](nodes, **options)
  assert found.dtype == bool
  assert found.shape == (nodes, nodes)
  assert np.array_equal(found, found.T)
  assert not found.diagonal().any()
  # Some power of (graph + identity) has no zero: there is a way to everyone.
  ways = np.linalg.matrix_power(found + np.eye(nodes), nodes)
  assert (ways > 0).all()
  assert topology.is_connected(found)


@pytest.mark.parametrize(
  ("name", "degree"),
  [("ring", 2), ("torus", 4), ("complete", 15), ("hypercube", 4)],
)
def test_everyone_has_as_many_neighbours_as_the_shape_says(name, degree):
  assert set(topology.degrees(graph(name)).tolist()) == {degree}


def test_rows_of_a_torus_can_be_given_and_one_row_is_a_ring():
  wide = topology.torus(12, rows=2)
  assert wide[0, 6]
  assert wide[0, 5]
  assert not wide[0, 4]
  np.testing.assert_array_equal(topology.torus(7), topology.ring(7))


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("share", [1.0, 0.6, 0.0])
def test_metropolis_is_symmetric_and_doubly_stochastic(name, share, tol):
  adjacency = graph(name)
  present = np.random.default_rng(1).random(16) < share
  mixing = topology.metropolis(adjacency, present)
  topology.check(mixing)
  off = ~np.eye(16, dtype=bool)
  assert ((mixing > 0) <= (adjacency | ~off)).all()
  np.testing.assert_array_equal(mixing[~present], np.eye(16)[~present])
  here = np.ix_(present, present)
  alone = topology.metropolis(adjacency[here])
  np.testing.assert_allclose(mixing[here], alone, atol=tol(jnp.float64, 16))


@pytest.mark.parametrize("n", [5, 8, 13])
def test_second_eigenvalues_are_those_of_closed_forms(n, tol):
  closed = {
    "complete": 0.0,
    "ring": (1 + 2 * np.cos(2 * np.pi / n)) / 3,
    "star": 1 - 1 / n,
  }
  for name, wanted in closed.items():
    mixing = topology.metropolis(topology.GRAPHS[name](n))
    found = topology.second_eigenvalue(mixing)
    assert found == pytest.approx(wanted, abs=tol(jnp.float64, n * n))
    assert topology.spectral_gap(mixing) == 1 - found


@pytest.mark.parametrize("digits", [1, 2, 3, 4])
def test_a_hypercube_shrinks_by_one_minus_two_over_digits_plus_one(digits, tol):
  mixing = topology.metropolis(topology.hypercube(2**digits))
  wanted = max(abs(1 - 2 / (digits + 1)), abs(1 - 2 * digits / (digits + 1)))
  eps = tol(jnp.float64, 4**digits)
  assert topology.second_eigenvalue(mixing) == pytest.approx(wanted, abs=eps)


@pytest.mark.parametrize("name", GRAPHS)
def test_repeated_mixing_is_as_far_from_the_mean_as_the_second_eigenvalue_says(
  name, tol
):
  mixing = topology.metropolis(graph(name))
  factor = topology.second_eigenvalue(mixing)
  far = np.linalg.matrix_power(mixing, 7) - 1 / 16
  eps = tol(jnp.float64, 7 * 16)
  assert scipy.linalg.norm(far, 2) == pytest.approx(factor**7, abs=eps)


def test_an_exponential_graph_mixes_faster_than_a_ring_and_a_torus():
  gaps = {
    name: topology.spectral_gap(topology.metropolis(graph(name, 64)))
    for name in ("ring", "torus", "exponential", "complete")
  }
  assert gaps["ring"] < gaps["torus"] < gaps["exponential"] < gaps["complete"]
  assert gaps["complete"] == pytest.approx(1)


def test_two_parts_never_agree():
  halves = np.kron(np.eye(2, dtype=bool), topology.ring(4)).astype(bool)
  assert not topology.is_connected(halves)
  assert topology.is_connected(halves, np.arange(8) < 4)
  assert topology.is_connected(halves, np.zeros(8, bool))
  mixing = topology.metropolis(halves)
  assert topology.second_eigenvalue(mixing) == pytest.approx(1)


def test_a_larger_random_graph_holds_the_smaller_one_and_seeds_differ():
  small = topology.erdos_renyi(12, probability=0.6, seed=1)
  large = topology.erdos_renyi(30, probability=0.6, seed=1)
  other = topology.erdos_renyi(12, probability=0.6, seed=2)
  np.testing.assert_array_equal(large[:12, :12], small)
  assert np.any(other != small)


def test_pairs_are_neighbours_as_often_as_asked():
  n, p = 200, 0.3
  found = topology.degrees(topology.erdos_renyi(n, probability=p)).sum() / 2
  pairs = n * (n - 1) / 2
  spread = np.sqrt(pairs * p * (1 - p))
  assert abs(found - pairs * p) < 4 * spread  # p-value 6e-5
  assert abs(found - pairs * (p + 0.02)) > 4 * spread


def test_neighbours_in_space_are_those_that_are_near():
  places = np.array([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]])
  found = topology.near(places, 5.0)
  wanted = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], bool)
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: topology.ring(1), "nodes must be an integer of at least 2"),
    (lambda: topology.torus(6, rows=4), r"use rows in \[1, 2, 3, 6\]"),
    (lambda: topology.hypercube(6), "use 4 or 8"),
    (lambda: topology.geometric(30, radius=0.01), "use a radius above 0.190"),
    (
      lambda: topology.erdos_renyi(30, probability=0.01),
      "use a probability above 0.113",
    ),
    (lambda: topology.erdos_renyi(3, probability=0.0), r"in \(0, 1\]"),
    (lambda: topology.metropolis(np.eye(3, dtype=bool)), "on the diagonal"),
    (lambda: topology.check(np.eye(3) * 2), "row sum apart from 1 by 1"),
    (lambda: topology.check(np.eye(3)[:2]), r"float \[N, N\]"),
    (
      lambda: topology.check(np.array([[2.0, -1.0], [-1.0, 2.0]])),
      "a negative weight by 1",
    ),
  ],
)
def test_what_is_no_graph_or_no_mixing_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
