"""Clustering: which clients are of one kind, and whether there are kinds.

Clients are points: sketches of their updates, whose angles say whose data are
alike, or features of their devices. Groups are found by merging the nearest
(`agglomerate`) or by splitting what does not agree (`divide`); `structure` says
how many there are, `centroid` finds groups around means.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.cluster.hierarchy
import scipy.spatial.distance

from fedjax_peft import validate
from fedjax_peft.network import draw

Linkage = Literal["single", "complete", "average"]
LINKAGES = ("single", "complete", "average")
METRICS = ("cosine", "euclidean")


def sketch(
  updates: Mapping[str, Any], *, size: int = 256, seed: int = 0
) -> np.ndarray:
  """Folds updates into few numbers that keep their inner products.

  A count sketch (Charikar et al., 2002, https://doi.org/10.1007/3-540-45465-9_59):
  every entry gets a random sign and is added to a random place. The inner
  product of two sketches is unbiased, with a variance of at most
  (|x|^2 |y|^2 + <x, y>^2) / size.

  Args:
    updates: {name: [C, ...]}, what C clients would send, such as the messages
      of `for_each_client`.
    size: entries of a sketch.
    seed: of places and signs, the same for all clients and rounds. They depend
      on the seed, the leaf's name and the entry.

  Returns:
    float64 [C, size].
  """
  validate.at_least(1, size=size)
  if not updates:
    raise ValueError("there is nothing to sketch: got updates without a leaf")
  flat = {
    k: np.asarray(v, np.float64).reshape(len(v), -1) for k, v in updates.items()
  }
  total = np.zeros((len(next(iter(flat.values()))), size))
  for name, x in flat.items():
    entries = np.arange(x.shape[1])
    place = draw.uniform(seed, f"sketch/place/{name}", 0, entries) * size
    sign = np.where(
      draw.uniform(seed, f"sketch/sign/{name}", 0, entries) < 0.5, -1.0, 1.0
    )
    for row, mine in zip(total, x * sign, strict=True):
      row += np.bincount(place.astype(int), weights=mine, minlength=size)
  return total


def cosine(points: np.ndarray) -> np.ndarray:
  """Cosine similarity of every pair, float64 [C, C], in [-1, 1].

  A point at the origin has no direction: it is like itself (1) and unlike all
  others (0).

  Args:
    points: [C, D].
  """
  x = unit(points)
  similarity = np.clip(x @ x.T, -1, 1)
  np.fill_diagonal(similarity, 1)
  return similarity


def unit(points: np.ndarray) -> np.ndarray:
  """Points [C, D] brought to length 1; the origin stays where it is."""
  x = points_of(points)
  norm = np.linalg.norm(x, axis=1, keepdims=True)
  return np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)


def distances(
  points: np.ndarray, metric: Literal["cosine", "euclidean"] = "cosine"
) -> np.ndarray:
  """Distance of every pair, float64 [C, C]; for cosine, 1 - similarity."""
  validate.one_of(METRICS, metric=metric)
  if metric == "cosine":
    return 1 - cosine(points)
  x = points_of(points)
  return scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(x))


def agglomerate(
  distance: np.ndarray,
  *,
  clusters: int | None = None,
  threshold: float | None = None,
  linkage: Linkage = "average",
) -> np.ndarray:
  """Merges the two nearest groups until few enough, or far enough, are left.

  Args:
    distance: [C, C], symmetric, 0 on the diagonal.
    clusters: how many groups are left, or
    threshold: groups nearer than this are merged.
    linkage: distance of two groups: of their nearest members, their farthest,
      or the mean over all pairs.

  Returns:
    int32 [C], groups numbered in the order of their first members.

  Raises:
    ValueError: unless one of `clusters` and `threshold` is given, and for a
      distance that is none.

  Example:
    >>> line = np.array([0.0, 5.0, 0.5, 5.2])
    >>> agglomerate(abs(line[:, None] - line), clusters=2)
    array([0, 1, 0, 1], dtype=int32)
  """
  validate.one_of(LINKAGES, linkage=linkage)
  if (clusters is None) == (threshold is None):
    raise ValueError(
      "agglomerate stops at a number or at a distance: got "
      f"{clusters=} and {threshold=}; give one of the two"
    )
  far = _distance(distance)
  if clusters is not None:
    check_number(clusters, len(far))
  if len(far) < 2:
    return np.zeros(len(far), np.int32)
  steps = merges(far, linkage)
  if clusters is not None:
    return cut(steps, clusters)
  found = scipy.cluster.hierarchy.fcluster(steps, threshold, "distance")
  return in_order(found)


def bipartition(
  similarity: np.ndarray, *, linkage: Linkage = "single"
) -> np.ndarray:
  """Splits clients in two, such that the parts are as unlike as can be.

  With "single" the greatest similarity of two clients of different parts is
  the least that there is: the optimal bipartition of Sattler et al.,
  Clustered federated learning, 2020, https://arxiv.org/abs/1910.01991,
  algorithm 1. Their published code merges by "complete" linkage instead, whose
  parts are rounder, and never a chain.

  Args:
    similarity: [C, C], symmetric, at most 1; C at least 2.
    linkage: see `agglomerate`.

  Returns:
    int32 [C] of 0 and 1; client 0 is in part 0.
  """
  far = 1 - np.asarray(similarity, np.float64)
  np.fill_diagonal(far, 0)
  return agglomerate(far, clusters=2, linkage=linkage)


class Division(NamedTuple):
  """Clusters after some were split.

  Attributes:
    labels: int32 [C], the cluster of every client.
    parents: int32 [E], the cluster each was part of before; itself, for those
      that were there.
  """

  labels: np.ndarray
  parents: np.ndarray


def divide(
  updates: np.ndarray,
  labels: npt.ArrayLike | None = None,
  *,
  eps1: float,
  eps2: float,
  linkage: Linkage = "single",
) -> Division:
  """Splits every cluster that is done as a whole, but not for each member.

  A cluster is split by `bipartition` when the mean update of its members is
  shorter than `eps1`, so that their common model stands still, while the
  longest is longer than `eps2`, so that some of them still want to go
  elsewhere. Parts are looked at again, until nothing is split (Sattler et al.,
  2020, https://arxiv.org/abs/1910.01991).

  Args:
    updates: [C, D], what clients would change (or sketches of it).
    labels: int [C], clusters 0..E-1 that there are; None is one.
    eps1: a mean update below this has converged, > 0.
    eps2: an update above this has not, > eps1.
    linkage: see `bipartition`.

  Returns:
    The clusters. The part of a cluster with its first member keeps its number;
    the other gets the next that is free, in the order of splitting.
  """
  validate.positive(eps1=eps1, eps2=eps2)
  if eps1 >= eps2:
    raise ValueError(f"eps1 must be below eps2: got {eps1=} and {eps2=}")
  x = points_of(updates)
  start = np.zeros(len(x), np.int32) if labels is None else labels
  now = _labels(start, len(x))
  parents = list(range(int(now.max(initial=0)) + 1))
  queue = list(parents)
  while queue:
    cluster = queue.pop(0)
    members = np.flatnonzero(now == cluster)
    if members.size < 2 or not is_split(x[members], eps1=eps1, eps2=eps2):
      continue
    part = bipartition(cosine(x[members]), linkage=linkage)
    new = len(parents)
    now[members[part == 1]] = new
    parents.append(parents[cluster])
    queue += [cluster, new]
  return Division(now, np.array(parents, np.int32))


def is_split(updates: np.ndarray, *, eps1: float, eps2: float) -> bool:
  """Whether |mean update| < eps1 and the longest update > eps2."""
  x = points_of(updates)
  mean = np.linalg.norm(x.mean(axis=0))
  return bool(mean < eps1 and np.linalg.norm(x, axis=1).max() > eps2)


def in_order(labels: npt.ArrayLike) -> np.ndarray:
  """Numbers clusters 0, 1, ... in the order of their first members.

  Args:
    labels: [C], any names.

  Returns:
    int32 [C].
  """
  _, first, mine = np.unique(
    np.asarray(labels), return_index=True, return_inverse=True
  )
  return np.argsort(np.argsort(first)).astype(np.int32)[mine]


def merges(distance: np.ndarray, linkage: Linkage = "average") -> np.ndarray:
  """The merges of `agglomerate` one after another, for `cut`.

  Args:
    distance: [C, C], C at least 2.
    linkage: see `agglomerate`.

  Returns:
    float64 [C - 1, 4], as `scipy.cluster.hierarchy.linkage` describes it.
  """
  flat = scipy.spatial.distance.squareform(distance, checks=False)
  return scipy.cluster.hierarchy.linkage(flat, linkage)


def cut(merges: np.ndarray, clusters: int) -> np.ndarray:
  """The clusters, int32 [C], when so many are left; ties do not merge more."""
  found = scipy.cluster.hierarchy.cut_tree(merges, n_clusters=clusters)
  return in_order(found[:, 0])


def points_of(points: npt.ArrayLike) -> np.ndarray:
  """Points as float64 [C, D], checked."""
  x = np.asarray(points, np.float64)
  if x.ndim != 2 or not np.isfinite(x).all():
    raise ValueError(
      f"points must be finite numbers [C, D]: got {list(x.shape)}, "
      f"{int(np.sum(~np.isfinite(x)))} of them not finite"
    )
  return x


def _distance(distance: npt.ArrayLike) -> np.ndarray:
  """A distance matrix as float64 [C, C], checked."""
  far = np.asarray(distance, np.float64)
  if (
    far.ndim != 2
    or not np.array_equal(far, far.T)
    or not np.isfinite(far).all()
    or np.diag(far).any()
  ):
    raise ValueError(
      "a distance must be finite [C, C], symmetric and 0 on the diagonal: got "
      f"{list(far.shape)}; write clustering.distances(points)"
    )
  return far


def check_number(clusters: int, clients: int) -> None:
  """Raises ValueError unless so many clients can form so many clusters."""
  validate.at_least(1, clusters=clusters)
  if clusters > clients:
    raise ValueError(
      f"there can be no more clusters than clients: got {clusters=} and "
      f"{clients} clients"
    )


def _labels(labels: npt.ArrayLike, count: int) -> np.ndarray:
  """A copy of labels as int32 [C], checked."""
  given = np.array(labels)
  if (
    given.shape != (count,)
    or given.dtype.kind not in "iu"
    or given.min(initial=0) < 0
  ):
    raise ValueError(
      f"labels must be a cluster from 0 on for each of {count} clients: got "
      f"{given.dtype} {list(given.shape)}"
    )
  return given.astype(np.int32)
