"""Matching: which sub-channel goes to which client.

Every client gets one. For the least sum that is the assignment problem; for
the least maximum a threshold is searched, up to which a matching exists, and
of the matchings within it the one with the least sum is taken. Sub-channels
that are left over go, one after another, where they help most.

Kuhn, The Hungarian Method for the Assignment Problem, 1955,
https://doi.org/10.1002/nav.3800020109; Burkard, Dell'Amico and Martello,
Assignment Problems, 2009, section 6.2 (bottleneck assignment)
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.sparse
import scipy.sparse.csgraph

from fedjax_peft import validate

Aim = Literal["max", "sum"]


def assign(cost: npt.ArrayLike, aim: Aim = "max") -> np.ndarray:
  """Gives each client a sub-channel of its own.

  Args:
    cost: [C, H] of each client with each sub-channel, say the seconds until it
      is done; inf = not possible.
    aim: "max", the client that is worst off is as well off as can be, and the
      sum is the least that allows; "sum", the sum is least.

  Returns:
    int [C], their sub-channels, all different.

  Raises:
    ValueError: if there are fewer sub-channels than clients, or no matching is
      possible.

  Example:
    >>> cost = [[1.0, 5.0, 9.0], [2.0, 9.0, 9.0]]
    >>> assign(cost, "max"), assign(cost, "sum")
    (array([1, 0]), array([1, 0]))
  """
  validate.one_of(["max", "sum"], aim=aim)
  table = np.asarray(cost, np.float64)
  clients, channels = table.shape
  if channels < clients:
    raise ValueError(
      f"every client needs a sub-channel of its own, got {channels} for "
      f"{clients} clients; divide the band more finely, or choose fewer clients"
    )
  if not clients:
    return np.zeros(0, np.int64)
  if not _matches(np.isfinite(table)):
    bad = np.flatnonzero(~np.isfinite(table).any(1))
    who = f"client {bad[0]}" if bad.size else "one client"
    raise ValueError(
      f"no matching is possible: {who} or more can use no sub-channel that is "
      "left to it; give them more time or power"
    )
  if aim == "max":
    levels = np.unique(table[np.isfinite(table)])
    low, high = 0, levels.size - 1
    while low < high:
      middle = (low + high) // 2
      if _matches(table <= levels[middle]):
        high = middle
      else:
        low = middle + 1
    table = np.where(table <= levels[low], table, np.inf)
  return scipy.optimize.linear_sum_assignment(table)[1]


def extend(
  owner: npt.ArrayLike,
  gains: npt.ArrayLike,
  cost: Callable[[np.ndarray, np.ndarray], np.ndarray],
  aim: Aim = "max",
) -> np.ndarray:
  """Gives away the sub-channels that nobody has, as long as that helps.

  Args:
    owner: int [H], whose each is; -1 = nobody's.
    gains: [C, H] linear.
    cost: (how many sub-channels [C, n], geometric mean of their gains [C, n])
      -> cost [C, n] of every client.
    aim: "max", the client that is worst off is served first; "sum", whoever
      gains most.

  Returns:
    int [H]; what would help nobody stays -1.
  """
  validate.one_of(["max", "sum"], aim=aim)
  owner, log = np.array(owner), np.log(np.asarray(gains, np.float64))
  mine = owner == np.arange(len(log))[:, None]
  count, total = mine.sum(1), (log * mine).sum(1)
  while (free := np.flatnonzero(owner < 0)).size:
    held = np.maximum(count, 1)[:, None]
    now = cost(count[:, None], np.exp(total[:, None] / held))  # [C, 1]
    more = count[:, None] + np.ones(free.size, np.int64)
    then = cost(more, np.exp((total[:, None] + log[:, free]) / more))
    gained = now - then  # [C, n]
    if aim == "max":
      gained = gained[[worst := int(np.argmax(now))]]
    row, place = np.unravel_index(np.argmax(gained), gained.shape)
    if not gained[row, place] > 0:
      break
    client = worst if aim == "max" else int(row)
    owner[free[place]] = client
    count[client] += 1
    total[client] += log[client, free[place]]
  return owner


def _matches(possible: np.ndarray) -> bool:
  """Whether all rows can have different columns, where that is possible."""
  graph = scipy.sparse.csr_matrix(possible)
  found = scipy.sparse.csgraph.maximum_bipartite_matching(graph, "column")
  return bool(np.all(found >= 0))
