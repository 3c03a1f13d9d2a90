"""Topologies: who is whose neighbour, and how neighbours average.

A graph is its adjacency, bool [N, N], symmetric and without loops. A mixing
matrix says with which weights neighbours average; where it is symmetric and
doubly stochastic the mean over all stays what it is, and the distance to it
shrinks by `second_eigenvalue` a round or faster.

Xiao and Boyd, Fast linear iterations for distributed averaging, 2004,
https://doi.org/10.1016/j.sysconle.2004.02.022; Boyd et al., Randomized gossip
algorithms, 2006, https://doi.org/10.1109/TIT.2006.874516
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import scipy.sparse.csgraph

from fedjax_peft import validate
from fedjax_peft.network import draw


def ring(nodes: int) -> np.ndarray:
  """Everyone has two neighbours, on a circle.

  Args:
    nodes: N, at least 2.

  Returns:
    bool [N, N].

  Example:
    >>> ring(4).astype(int)
    array([[0, 1, 0, 1],
           [1, 0, 1, 0],
           [0, 1, 0, 1],
           [1, 0, 1, 0]])
  """
  return _circulant(nodes, [1])


def exponential(nodes: int) -> np.ndarray:
  """Neighbours at distances 1, 2, 4, ... on a circle, in both directions.

  Some 2 log2(N) neighbours each, and a spectral gap of about 1 / log2(N) (Ying
  et al., Exponential graph is provably efficient for decentralized deep
  training, 2021, https://arxiv.org/abs/2110.13363, there directed).

  Args:
    nodes: N, at least 2.
  """
  validate.at_least(2, nodes=nodes)
  return _circulant(nodes, [2**i for i in range((nodes - 1).bit_length())])


def torus(nodes: int, *, rows: int | None = None) -> np.ndarray:
  """A grid whose opposite borders touch: four neighbours each.

  Args:
    nodes: N, at least 2; node i is in row i // columns.
    rows: a divisor of N; None takes the one nearest to a square from below.

  Raises:
    ValueError: if the rows do not divide the nodes.
  """
  validate.at_least(2, nodes=nodes)
  divisors = [d for d in range(1, nodes + 1) if nodes % d == 0]
  if rows is None:
    rows = max(d for d in divisors if d * d <= nodes)
  if rows not in divisors:
    raise ValueError(
      f"the rows of a torus must divide its nodes: got {nodes=} and {rows=}; "
      f"use rows in {divisors}"
    )
  columns = nodes // rows
  down, along = np.divmod(np.arange(nodes), columns)
  graph = np.zeros((nodes, nodes), bool)
  for row, column in ((down + 1, along), (down, along + 1)):
    graph[np.arange(nodes), row % rows * columns + column % columns] = True
  return _undirected(graph)


def complete(nodes: int) -> np.ndarray:
  """Everyone is everyone's neighbour."""
  validate.at_least(2, nodes=nodes)
  return ~np.eye(nodes, dtype=bool)


def star(nodes: int) -> np.ndarray:
  """Node 0 is everyone's only neighbour."""
  validate.at_least(2, nodes=nodes)
  graph = np.zeros((nodes, nodes), bool)
  graph[0, 1:] = True
  return _undirected(graph)


def hypercube(nodes: int) -> np.ndarray:
  """Neighbours differ in one binary digit of their number.

  Args:
    nodes: N, a power of two.
  """
  validate.at_least(2, nodes=nodes)
  if nodes & (nodes - 1):
    below = 1 << (nodes.bit_length() - 1)
    raise ValueError(
      f"a hypercube has a power of two of nodes: got {nodes=}; use {below} or "
      f"{2 * below}"
    )
  bits = np.arange(nodes)
  differ = bits[:, None] ^ bits
  return (differ > 0) & (differ & (differ - 1) == 0)


def geometric(nodes: int, *, radius: float, seed: int = 0) -> np.ndarray:
  """Nodes at random in the unit square, neighbours if they are near.

  Args:
    nodes: N, at least 2.
    radius: greatest distance of neighbours. The graph is likely connected
      above sqrt(log(N) / (pi N)) (Penrose, 1997,
      https://doi.org/10.1214/aoap/1034625335).
    seed: of the places. A node's place depends on the seed and its number.

  Raises:
    ValueError: if the graph is not connected.
  """
  validate.at_least(2, nodes=nodes)
  validate.positive(radius=radius)
  ids = np.arange(nodes)
  places = np.stack(
    [draw.uniform(seed, f"geometric/{axis}", 0, ids) for axis in "xy"], axis=1
  )
  graph = near(places, radius)
  threshold = math.sqrt(math.log(nodes) / (math.pi * nodes))
  return _connected(
    graph, f"a geometric graph of {radius=}", f"radius above {threshold:.3f}"
  )


def near(places: np.ndarray, radius: float) -> np.ndarray:
  """Whoever is at most `radius` apart are neighbours.

  Args:
    places: [N, 2] or [N, 3], where they are.
    radius: in the same unit.

  Returns:
    bool [N, N], connected or not.
  """
  places = np.asarray(places, np.float64)
  apart = np.linalg.norm(places[:, None] - places, axis=-1)
  return (apart <= radius) & ~np.eye(len(places), dtype=bool)


def erdos_renyi(nodes: int, *, probability: float, seed: int = 0) -> np.ndarray:
  """Every pair are neighbours with the same probability.

  Args:
    nodes: N, at least 2.
    probability: in (0, 1]. The graph is likely connected above log(N) / N
      (Erdos and Renyi, 1960).
    seed: of the pairs. A pair's fate depends on the seed and the two numbers,
      so a larger graph holds the smaller one.

  Raises:
    ValueError: if the graph is not connected.
  """
  validate.at_least(2, nodes=nodes)
  if not 0 < probability <= 1:
    raise ValueError(
      f"probability must be in (0, 1], got probability={probability}"
    )
  high, low = np.tril_indices(nodes, -1)
  pair = high * (high - 1) // 2 + low
  graph = np.zeros((nodes, nodes), bool)
  graph[high, low] = draw.uniform(seed, "erdos_renyi", 0, pair) < probability
  return _connected(
    _undirected(graph),
    f"a random graph of {probability=}",
    f"probability above {math.log(nodes) / nodes:.3f}",
  )


def degrees(adjacency: np.ndarray) -> np.ndarray:
  """Neighbours of every node, int64 [N]."""
  return np.asarray(adjacency, bool).sum(axis=1).astype(np.int64)


def is_connected(
  adjacency: np.ndarray, present: npt.ArrayLike | None = None
) -> bool:
  """Whether there is a way between any two nodes.

  Args:
    adjacency: bool [N, N].
    present: bool [N], look at these nodes only; None looks at all.
  """
  graph = np.asarray(adjacency, bool)
  if present is not None:
    here = np.flatnonzero(np.asarray(present, bool))
    graph = graph[np.ix_(here, here)]
  if not len(graph):
    return True
  parts, _ = scipy.sparse.csgraph.connected_components(graph, directed=False)
  return int(parts) == 1


def metropolis(
  adjacency: np.ndarray, present: npt.ArrayLike | None = None
) -> np.ndarray:
  """Metropolis weights: a mixing matrix that nodes find out by themselves.

  w[i, j] = 1 / (1 + max(degree i, degree j)) for neighbours, and w[i, i] is
  what is left to 1.

  Args:
    adjacency: bool [N, N], symmetric.
    present: bool [N]. The weights are then those of the graph of these nodes,
      and whoever is absent keeps what it has. None takes all.

  Returns:
    float64 [N, N], symmetric and doubly stochastic, with a positive diagonal:
    on a connected graph repeated mixing ends at the mean.

  Raises:
    ValueError: if the adjacency is not that of an undirected graph.

  Example:
    >>> metropolis(star(3)).round(2)
    array([[0.33, 0.33, 0.33],
           [0.33, 0.67, 0.  ],
           [0.33, 0.  , 0.67]])
  """
  graph = _graph(adjacency)
  if present is not None:
    here = np.asarray(present, bool)
    graph = graph & here & here[:, None]
  degree = degrees(graph)
  weights = np.where(graph, 1 / (1 + np.maximum(degree, degree[:, None])), 0.0)
  np.fill_diagonal(weights, 1 - weights.sum(axis=1))
  return weights


def second_eigenvalue(mixing: np.ndarray) -> float:
  """The factor by which mixing shrinks the distance to the mean at least.

  That is the second largest of the absolute values of the eigenvalues, in
  [0, 1].

  Args:
    mixing: float [N, N], symmetric and doubly stochastic.
  """
  check(mixing)
  # The first eigenvector is known, so it can be taken away.
  rest = np.asarray(mixing, np.float64) - 1 / len(mixing)
  return float(np.abs(np.linalg.eigvalsh(rest)).max())


def spectral_gap(mixing: np.ndarray) -> float:
  """One minus the second eigenvalue: 0 never agrees, 1 agrees at once."""
  return 1 - second_eigenvalue(mixing)


def check(mixing: np.ndarray) -> None:
  """Raises ValueError unless a matrix is symmetric and doubly stochastic."""
  w = np.asarray(mixing)
  if w.ndim != 2 or w.shape[0] != w.shape[1] or w.dtype.kind != "f":
    raise ValueError(
      "a mixing matrix must be float [N, N]: got "
      f"{w.dtype} {list(w.shape)}; write topology.metropolis(adjacency)"
    )
  slack = 4 * float(np.finfo(w.dtype).eps) * math.sqrt(len(w))
  for fault, size in {
    "an asymmetry": np.abs(w - w.T).max(initial=0),
    "a negative weight": -w.min(initial=0),
    "a row sum apart from 1": np.abs(w.sum(axis=1) - 1).max(initial=0),
  }.items():
    if not size <= slack:
      raise ValueError(
        "a mixing matrix must be symmetric, nowhere negative, and its rows "
        f"must sum to 1: got {fault} by {size:.3g}; write "
        "topology.metropolis(adjacency)"
      )


def _graph(adjacency: np.ndarray) -> np.ndarray:
  """The adjacency as bool [N, N], checked."""
  graph = np.asarray(adjacency)
  if (
    graph.ndim != 2
    or not np.array_equal(graph, graph.T)
    or graph.dtype != bool
    or np.any(np.diag(graph))
  ):
    raise ValueError(
      "an adjacency must be bool [N, N], symmetric and False on the diagonal: "
      f"got {graph.dtype} {list(graph.shape)}; write topology.ring(nodes)"
    )
  return graph


def _circulant(nodes: int, steps: list[int]) -> np.ndarray:
  """Neighbours at given distances on a circle."""
  validate.at_least(2, nodes=nodes)
  apart = (np.arange(nodes)[:, None] - np.arange(nodes)) % nodes
  return np.isin(apart, steps) | np.isin(nodes - apart, steps)


def _undirected(graph: np.ndarray) -> np.ndarray:
  """Both directions of every edge, and no loops."""
  return (graph | graph.T) & ~np.eye(len(graph), dtype=bool)


def _connected(graph: np.ndarray, what: str, advice: str) -> np.ndarray:
  """The graph, if it is connected."""
  if not is_connected(graph):
    lonely = int(np.sum(degrees(graph) == 0))
    raise ValueError(
      f"{what} on {len(graph)} nodes is not connected ({lonely} nodes have no "
      f"neighbour), so its nodes never agree; use a {advice} or another seed"
    )
  return graph


GRAPHS: dict[str, Callable[..., np.ndarray]] = {
  "complete": complete,
  "erdos_renyi": erdos_renyi,
  "exponential": exponential,
  "geometric": geometric,
  "hypercube": hypercube,
  "ring": ring,
  "star": star,
  "torus": torus,
}
