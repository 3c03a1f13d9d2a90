"""Scores: how well an attack does, and how sure that is.

Hanley and McNeil, The meaning and use of the area under a ROC curve, 1982;
Clopper and Pearson, The use of confidence or fiducial limits, 1934
"""

from typing import NamedTuple

import numpy as np
from scipy import stats


class Estimate(NamedTuple):
  """A number and where it is with some confidence.

  Attributes:
    value: the estimate.
    low: lower end of the interval.
    high: upper end.
  """

  value: float
  low: float
  high: float


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
  """The chance that a positive scores above a negative, ties counting half.

  That is the area under the ROC curve, by the ranks of Mann and Whitney.

  Args:
    positive: scores, any shape.
    negative: scores, any shape.

  Returns:
    0..1; 0.5 is chance.

  Raises:
    ValueError: if there is no score on one side, or one is not a number.

  Example:
    >>> auc([2.0, 3.0], [1.0, 2.0])
    0.875
  """
  above, below = np.ravel(positive), np.ravel(negative)
  if not above.size or not below.size:
    raise ValueError(
      f"an AUC needs scores on both sides: got {above.size} positive and "
      f"{below.size} negative ones"
    )
  both = np.concatenate([above, below])
  if np.isnan(both).any():
    raise ValueError("scores must be numbers to be ranked: got nan")
  ranks = stats.rankdata(both)[: above.size].sum()
  pairs = above.size * below.size
  return float((ranks - above.size * (above.size + 1) / 2) / pairs)


def auc_interval(
  positive: np.ndarray,
  negative: np.ndarray,
  *,
  seed: int,
  resamples: int = 500,
  confidence: float = 0.95,
) -> Estimate:
  """The AUC with a bootstrap interval.

  Args:
    positive: [M, ...], row m from trial m, whose scores depend on each other:
      trials are resampled, not scores.
    negative: [M, ...], from the same trials.
    seed: of the resampling.
    resamples: how many.
    confidence: of the interval between percentiles, in (0, 1).

  Raises:
    ValueError: if the two do not have as many trials.
  """
  positive, negative = np.asarray(positive), np.asarray(negative)
  count = len(positive)
  if len(negative) != count:
    raise ValueError(
      "both sides must be of the same trials: got "
      f"{count} and {len(negative)} rows; give every trial a row of each"
    )
  rng = np.random.default_rng(seed)
  drawn = rng.integers(0, count, (resamples, count))
  found = [auc(positive[rows], negative[rows]) for rows in drawn]
  tail = (1 - confidence) / 2
  low, high = np.quantile(found, [tail, 1 - tail])
  return Estimate(auc(positive, negative), float(low), float(high))


def accuracy(hits: int, total: int, confidence: float = 0.95) -> Estimate:
  """A rate with the exact interval of Clopper and Pearson.

  Args:
    hits: how often it was right.
    total: of how many.
    confidence: of the interval.

  Example:
    >>> round(accuracy(0, 20).high, 4)
    0.1684
  """
  found = stats.binomtest(int(hits), int(total)).proportion_ci(confidence)
  return Estimate(hits / total, float(found.low), float(found.high))


def psnr(found: np.ndarray, true: np.ndarray) -> np.ndarray:
  """Peak signal-to-noise ratio of images in [0, 1].

  Args:
    found: [M, ...].
    true: [M, ...].

  Returns:
    Decibels [M]; 120 where they are equal to that precision.

  Example:
    >>> psnr(np.full((1, 4), 0.5), np.full((1, 4), 0.6)).round(6)
    array([20.])
  """
  off = np.asarray(found, np.float64) - np.asarray(true, np.float64)
  error = np.square(off).reshape(len(off), -1).mean(1)
  return -10 * np.log10(np.maximum(error, 1e-12))
