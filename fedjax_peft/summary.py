"""Summaries: what a run reached, for what it spent.

All from the records of a run, a list of flat dicts, of which not each need
have the metric. Costs are running totals: `spent/bytes`, `spent/seconds`, or
`round`. Whether more of a metric is better is known by its name.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fedjax_peft import validate

Records = Sequence[Mapping[str, Any]]

_LOWER = frozenset(
  [
    "loss",
    "error",
    "perplexity",
    "nonfinite",
    "bytes",
    "seconds",
    "joules",
    "dollars",
    "grams",
    "epsilon",
    "std",
    "gap",
    "rmse",
    "mse",
    "mae",
  ]
)


def is_higher_better(metric: str) -> bool:
  """Whether more of it is better, by the words of its name.

  Example:
    >>> is_higher_better("eval/accuracy_worst10"), is_higher_better("eval/loss")
    (True, False)
  """
  return _LOWER.isdisjoint(re.split(r"[/_\W]+", metric.lower()))


class Curve(NamedTuple):
  """Quality over cost.

  Attributes:
    cost: float64 [M], not falling.
    quality: float64 [M].
  """

  cost: np.ndarray
  quality: np.ndarray


def curve(records: Records, metric: str, key: str) -> Curve:
  """The metric over the cost, of the records that have both.

  Raises:
    ValueError: if no record has both, or the cost falls.
  """
  points = [
    (float(r[key]), float(r[metric]))
    for r in records
    if r.get(key) is not None and r.get(metric) is not None
  ]
  if not points:
    names = sorted({name for r in records for name in r})
    near = validate.near(metric, names) or validate.near(key, names)
    raise ValueError(
      f"records must have '{metric}' and '{key}', got {len(records)} records "
      f"without both{near}"
    )
  cost, quality = np.array(points).T
  if (np.diff(cost) < 0).any():
    raise ValueError(
      f"'{key}' must be a running total, got {cost[1:][np.diff(cost) < 0][0]} "
      "after more; take a key such as 'spent/bytes' or 'round'"
    )
  return Curve(cost, quality)


def final_quality(records: Records, metric: str) -> float:
  """The metric's last value."""
  return float(_every(records, metric)[-1])


def quality_under_budget(
  records: Records, metric: str, key: str, budget: float
) -> float | None:
  """The best value of the metric for at most this cost.

  Args:
    records: of a run.
    metric: what counts.
    key: of the cost.
    budget: in the cost's unit.

  Returns:
    The best of the records that cost at most the budget; nothing is
    interpolated. None if there is none.
  """
  cost, quality = curve(records, metric, key)
  within = quality[cost <= budget]
  if not within.size:
    return None
  return float(within.max() if is_higher_better(metric) else within.min())


def cost_to_target(
  records: Records, metric: str, target: float, key: str
) -> float | None:
  """What it cost until the metric was at the target for the first time.

  Between the first record that is there and the one before it the metric is
  taken as a straight line over the cost.

  Args:
    records: of a run.
    metric: what counts.
    target: as good as this or better.
    key: of the cost.

  Returns:
    The cost, or None if it never was.
  """
  cost, quality = curve(records, metric, key)
  sign = 1.0 if is_higher_better(metric) else -1.0
  there = np.flatnonzero(sign * quality >= sign * target)
  if not there.size:
    return None
  i = int(there[0])
  if i == 0:
    return float(cost[0])
  part = (target - quality[i - 1]) / (quality[i] - quality[i - 1])
  return float(cost[i - 1] + part * (cost[i] - cost[i - 1]))


def mean_quality(
  records: Records, metric: str, key: str, *, until: float | None = None
) -> float:
  """Area under the metric over the cost, divided by the cost.

  The mean quality of a run that may be stopped at any cost. Trapezoids; from
  the first record on; after the last its value is held.

  Args:
    records: of a run.
    metric: what counts.
    key: of the cost.
    until: the cost up to which it is taken, so that runs compare; None is
      the last record's.

  Raises:
    ValueError: if `until` is not beyond the first record.
  """
  cost, quality = curve(records, metric, key)
  if until is None:
    until = float(cost[-1])
  if len(cost) == 1 and until == cost[0]:
    return float(quality[0])
  if not until > cost[0]:
    raise ValueError(
      f"until must be beyond the first record's '{key}', {cost[0]}, got "
      f"until={until}"
    )
  # `interp` holds the last value, and takes the last of several at one cost.
  end = np.interp(until, cost, quality)
  inside = cost < until
  x = np.append(cost[inside], until)
  y = np.append(quality[inside], end)
  return float(np.trapezoid(y, x) / (until - cost[0]))


class Robustness(NamedTuple):
  """How a run with faults compares with one without.

  Attributes:
    drop: final quality lost to the faults, >= 0 where they do harm.
    ratio: final quality with faults by that without (for a loss the other
      way round), 1 = unharmed, less = worse; nan where both are 0.
    extra: cost to the target with faults less that without; None if one of
      them never came there, or there is no target.
    slowdown: the same as a ratio, 1 = unharmed.
  """

  drop: float
  ratio: float
  extra: float | None
  slowdown: float | None


def robustness(
  clean: Records,
  faulty: Records,
  metric: str,
  *,
  target: float | None = None,
  key: str = "round",
) -> Robustness:
  """Compares a run with faults with the same run without.

  Args:
    clean: records without faults.
    faulty: records with them.
    metric: what counts.
    target: quality whose cost is compared, None = no cost is.
    key: of the cost.
  """
  without, with_ = (final_quality(r, metric) for r in (clean, faulty))
  higher = is_higher_better(metric)
  top, bottom = (with_, without) if higher else (without, with_)
  drop = without - with_ if higher else with_ - without
  extra = slowdown = None
  if target is not None:
    before, after = (
      cost_to_target(r, metric, target, key) for r in (clean, faulty)
    )
    if before is not None and after is not None:
      extra, slowdown = after - before, _ratio(after, before)
  return Robustness(drop, _ratio(top, bottom), extra, slowdown)


def pareto_front(
  points: ArrayLike, higher: Sequence[bool] | None = None
) -> np.ndarray:
  """The points than which no other is better.

  A point beats another if it is as good in all columns and better in one.
  Equal points are all kept.

  Args:
    points: [P, K], finite.
    higher: for each column whether more is better; None = less is, in all.

  Returns:
    int64, places of the points, from the best in the first column on.

  Raises:
    ValueError: if the shapes do not fit or a value is not finite.

  Example:
    >>> pareto_front([[1, 0.7], [2, 0.9], [3, 0.8]], higher=[False, True])
    array([0, 1])
  """
  points = np.asarray(points, np.float64)
  if points.ndim != 2 or not np.isfinite(points).all():
    raise ValueError(
      "points must be finite numbers [P, K], got an array of shape "
      f"{list(points.shape)}"
    )
  up = np.zeros(points.shape[1], bool) if higher is None else np.array(higher)
  if up.shape != points.shape[1:]:
    raise ValueError(
      f"higher must say for each of {points.shape[1]} columns whether more is "
      f"better, got {higher}"
    )
  costs = np.where(up, -points, points)
  order = np.lexsort(costs.T[::-1])  # whatever beats a point stands before it
  kept: list[int] = []
  for i in order:
    front = costs[kept]
    beaten = (front <= costs[i]).all(1) & (front < costs[i]).any(1)
    if not beaten.any():
      kept.append(int(i))
  return np.array(kept, np.int64)


def jain(values: ArrayLike) -> float:
  """Jain's index of fairness: 1 = all alike, 1 / n = one has everything.

  Args:
    values: [n], >= 0; all zero counts as alike.

  Raises:
    ValueError: if there is no value or one is negative.
  """
  x = np.asarray(values, np.float64)
  if x.ndim != 1 or not x.size or not (x >= 0).all():
    raise ValueError(
      f"jain takes one or more numbers of at least 0, got {values!r}"
    )
  if not x.any():
    return 1.0
  x = x / x.max()  # so that squares neither overflow nor vanish
  return float(x.sum() ** 2 / (x.size * np.square(x).sum()))


def _every(records, metric):
  """All values of a metric, at least one."""
  found = [float(r[metric]) for r in records if r.get(metric) is not None]
  if not found:
    names = sorted({name for r in records for name in r})
    raise ValueError(
      f"records must have '{metric}', got {len(records)} without it"
      f"{validate.near(metric, names)}"
    )
  return found


def _ratio(top, bottom):
  """A ratio that may be infinite, or nan."""
  if bottom == 0:
    return math.nan if top == 0 else math.inf
  return top / bottom
