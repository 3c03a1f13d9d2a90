"""Structure: whether clients form clusters, and how many.

Every clustering finds clusters; clients whose data are alike have none, and
splitting them only leaves fewer data to each part. So a number of clusters is
believed against what chance would show.
"""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.cluster.hierarchy

from fedjax_peft import validate
from fedjax_peft.network import clustering, draw


class Choice(NamedTuple):
  """How many clusters there are.

  Attributes:
    labels: int32 [C]; all 0 where no structure was found.
    p_value: how often points without clusters look as clustered as these.
    silhouettes: {number of clusters: mean silhouette}.
  """

  labels: np.ndarray
  p_value: float
  silhouettes: dict[int, float]


def choose(
  points: np.ndarray,
  *,
  metric: Literal["cosine", "euclidean"] = "euclidean",
  most: int = 8,
  least: int = 2,
  level: float = 0.01,
  draws: int = 99,
  seed: int = 0,
  linkage: clustering.Linkage = "average",
) -> Choice:
  """Finds clusters if there are any, and their number.

  The number is that of the best mean silhouette. It is believed only if points
  of one Gaussian with the mean and covariance of these seldom reach as much
  (a parametric bootstrap, after SigClust, Liu et al., 2008,
  https://doi.org/10.1198/016214508000000454). With fewer points than
  dimensions the test is conservative: a sample's covariance lies in fewer
  dimensions than the points do, and there chance looks more like structure.

  Args:
    points: [C, D].
    metric: of the distance. For "cosine" points are first brought to length 1,
      where the distance is sqrt(2 - 2 cosine): for updates whose lengths say
      how many steps a client made. It takes the two ends of an axis that
      dominates for clusters where updates have no common direction.
    most: greatest number of clusters.
    least: fewest clients of a cluster. Fewer, such as one client that is like
      no other, join the cluster nearest to them.
    level: largest p-value at which there are clusters, in (0, 1).
    draws: of the bootstrap, at least 1 / level - 1. C^2 memory, C^3 time each.
    seed: of the bootstrap.
    linkage: see `agglomerate`.

  Returns:
    The choice; one cluster where the p-value is above `level`.
  """
  x = clustering.points_of(points)
  validate.one_of(clustering.METRICS, metric=metric)
  validate.at_least(2, most=most)
  validate.at_least(1, least=least, draws=draws)
  if not 0 < level < 1 or (draws + 1) * level < 1:
    raise ValueError(
      "level must be in (0, 1), and reachable by the p-values k / (draws + 1): "
      f"got {level=} and {draws=}"
    )
  x = clustering.unit(x) if metric == "cosine" else x
  found = _scan(x, most, least, linkage)
  one = np.zeros(len(x), np.int32)
  if not found:
    return Choice(one, 1.0, {})
  best = max(found.values(), key=lambda cut: cut.silhouette)
  mean = x.mean(axis=0)
  shape = (x - mean) / np.sqrt(len(x) - 1)
  above = 1
  for i in range(draws):
    z = draw.normal(seed, "clusters/null", i, np.arange(len(x) ** 2))
    null = mean + z.reshape(len(x), -1) @ shape
    cuts = _scan(null, most, least, linkage).values()
    above += any(cut.silhouette >= best.silhouette for cut in cuts)
  p_value = above / (draws + 1)
  scores = {k: cut.silhouette for k, cut in sorted(found.items())}
  return Choice(best.labels if p_value <= level else one, p_value, scores)


class _Cut(NamedTuple):
  """A clustering and how good it is."""

  silhouette: float
  labels: np.ndarray


def _scan(x, most, least, linkage) -> dict[int, _Cut]:
  """The best clustering for every number of clusters that there can be."""
  found: dict[int, _Cut] = {}
  if len(x) < 3:
    return found
  far = clustering.distances(x, "euclidean")
  steps = clustering.merges(far, linkage)
  # Twice as many, since some pieces are too small to be clusters.
  pieces = range(2, min(2 * most, len(x) - 1) + 1)
  for labels in scipy.cluster.hierarchy.cut_tree(steps, pieces).T:
    labels = _joined(far, labels, least)
    number = int(labels.max()) + 1
    if 2 <= number <= most:
      cut = _Cut(silhouette(far, labels), labels)
      if number not in found or cut.silhouette > found[number].silhouette:
        found[number] = cut
  return found


def _joined(far, labels, least) -> np.ndarray:
  """Clients of clusters below a size, in the nearest cluster above it."""
  size = np.bincount(labels)
  large = np.flatnonzero(size >= least)
  if not large.size:
    return np.zeros(len(far), np.int32)
  mean = far @ (labels[:, None] == large) / size[large]
  nearest = large[mean.argmin(axis=1)]
  return clustering.in_order(np.where(size[labels] < least, nearest, labels))


def silhouette(distance: np.ndarray, labels: npt.ArrayLike) -> float:
  """Mean silhouette of a clustering, in [-1, 1].

  (b - a) / max(a, b) of a point, a being its mean distance to the others of its
  cluster, b the least mean distance to another cluster; 0 for a point alone
  (Rousseeuw, 1987, https://doi.org/10.1016/0377-0427(87)90125-7).

  Args:
    distance: [C, C].
    labels: int [C].

  Returns:
    The mean, 0 where there is only one cluster.
  """
  far = np.asarray(distance, np.float64)
  names, mine = np.unique(np.asarray(labels), return_inverse=True)
  if names.size < 2:
    return 0.0
  member = np.eye(names.size)[mine]  # [C, K]
  size = member.sum(axis=0)
  total = far @ member
  at = np.arange(len(far))
  inside = total[at, mine] / np.maximum(size[mine] - 1, 1)
  mean = total / size
  mean[at, mine] = np.inf
  outside = mean.min(axis=1)
  top = np.maximum(inside, outside)
  score = np.divide(
    outside - inside, top, out=np.zeros_like(top), where=top > 0
  )
  return float(np.where(size[mine] > 1, score, 0).mean())


def adjusted_rand_index(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
  """How far two clusterings agree: 1 in all pairs, 0 as by chance.

  Hubert and Arabie, Comparing partitions, 1985,
  https://doi.org/10.1007/BF01908075.

  Args:
    a: int [C].
    b: int [C].

  Example:
    >>> adjusted_rand_index([0, 0, 1, 1], [5, 5, 2, 2])
    1.0
  """
  left, right = (
    np.unique(np.asarray(x), return_inverse=True)[1] for x in (a, b)
  )
  if left.shape != right.shape:
    raise ValueError(
      "clusterings must be of the same clients: got "
      f"{left.size} and {right.size} labels"
    )
  table = np.zeros((left.max(initial=0) + 1, right.max(initial=0) + 1))
  np.add.at(table, (left, right), 1)

  def pairs(counts):
    return float(np.sum(counts * (counts - 1)) / 2)

  both = pairs(table)
  first, second = pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
  chance = first * second / max(left.size * (left.size - 1) / 2, 1)
  most = (first + second) / 2
  return 1.0 if most == chance else (both - chance) / (most - chance)
