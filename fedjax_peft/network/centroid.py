"""Centroids: clients around means, by what their devices are like.

For few features whose scale means something, such as compute and latency;
directions of updates are what `clustering` is for.
"""

from typing import NamedTuple

import numpy as np

from fedjax_peft import validate
from fedjax_peft.network import clustering, draw


def standardize(features: np.ndarray) -> np.ndarray:
  """Features [C, F] of mean 0 and variance 1; a constant one becomes 0."""
  x = clustering.points_of(features)
  spread = x.std(axis=0)
  return (x - x.mean(axis=0)) / np.where(spread > 0, spread, 1)


class Means(NamedTuple):
  """Clusters around means.

  Attributes:
    labels: int32 [C].
    centers: float64 [K, F].
    inertia: sum of squared distances to the own center.
  """

  labels: np.ndarray
  centers: np.ndarray
  inertia: float


def kmeans(
  features: np.ndarray,
  clusters: int,
  *,
  seed: int = 0,
  restarts: int = 8,
  steps: int = 100,
) -> Means:
  """Lloyd's algorithm from k-means++ starts, the best of several.

  Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, 2007.

  Args:
    features: [C, F], such as compute and latency; see `standardize` for
      features of different units.
    clusters: K, at most the number of clients.
    seed: of the starts; the result is a function of the arguments.
    restarts: how many starts.
    steps: most steps of a start.

  Returns:
    The means, clusters numbered in the order of their first members.
  """
  x = clustering.points_of(features)
  clustering.check_number(clusters, len(x))
  validate.at_least(1, restarts=restarts, steps=steps)
  runs = (
    _lloyd(x, _plus_plus(x, clusters, seed, r), steps) for r in range(restarts)
  )
  best = min(runs, key=lambda run: run.inertia)  # the first of equals
  order = np.unique(best.labels, return_index=True)[1].argsort()
  rank = np.argsort(order).astype(np.int32)
  return Means(rank[best.labels], best.centers[order], best.inertia)


def _plus_plus(x, clusters, seed, restart):
  """Centers [K, F] drawn in proportion to squared distances to the others."""
  coins = draw.uniform(seed, f"kmeans/{restart}", 0, np.arange(clusters))
  first = min(int(coins[0] * len(x)), len(x) - 1)
  centers = [x[first]]
  near = np.sum((x - centers[0]) ** 2, axis=1)
  for coin in coins[1:]:
    ladder = np.cumsum(near)
    pick = int(np.searchsorted(ladder, coin * ladder[-1], side="right"))
    centers.append(x[min(pick, len(x) - 1)])
    near = np.minimum(near, np.sum((x - centers[-1]) ** 2, axis=1))
  return np.stack(centers)


def _lloyd(x, centers, steps):
  """Assigns and averages until nothing changes; no cluster stays empty."""
  clusters, labels = len(centers), np.full(len(x), -1)
  for _ in range(steps):
    far = np.sum((x[:, None] - centers) ** 2, axis=-1)  # [C, K]
    new = far.argmin(axis=1)
    for k in np.flatnonzero(np.bincount(new, minlength=clusters) == 0):
      # The farthest point of a cluster that can spare one.
      spare = np.bincount(new, minlength=clusters)[new] > 1
      lone = np.where(spare, far[np.arange(len(x)), new], -1).argmax()
      new[lone], far[lone] = k, 0
    if np.array_equal(new, labels):
      break
    labels = new
    centers = np.stack([x[labels == k].mean(axis=0) for k in range(clusters)])
  inertia = float(np.sum((x - centers[labels]) ** 2))
  return Means(labels, centers, inertia)
