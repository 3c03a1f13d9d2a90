"""Noise tables: laws of whole numbers, in a form that is quick to draw from.

Probabilities are computed with 60 digits and rounded to multiples of 2^-64,
values beyond what then is left are never drawn. An alias table makes a number
of 64 uniform bits by one comparison, whatever the law: the first bits choose a
column, the rest one of the two values that share it.

Walker, An Efficient Method for Generating Discrete Random Variables with
General Distributions, 1977, https://doi.org/10.1145/355744.355749
"""

import decimal
import functools
import math
from typing import NamedTuple

import numpy as np

from fedjax_peft import validate
from fedjax_peft.privacy import grid_noise

KINDS = ("discrete_gaussian", "skellam")
BITS = 64
_DIGITS = decimal.Context(prec=60)
_NOTHING = decimal.Decimal("1e-40")  # beside the largest probability


class Table(NamedTuple):
  """A law of whole numbers; K columns, a power of two.

  Attributes:
    value: int32 [K], what a column holds below its threshold.
    other: int32 [K], and from there on.
    high: uint32 [K], the threshold without its last 32 bits.
    low: uint32 [K], these.
    distance: total variation between what is drawn and the law, at most.
  """

  value: np.ndarray
  other: np.ndarray
  high: np.ndarray
  low: np.ndarray
  distance: float


@functools.lru_cache(maxsize=8)
def table(kind: str, sigma: float) -> Table:
  """The table of a law.

  Args:
    kind: "discrete_gaussian", with the variance parameter
      `grid_noise.rounded_variance(sigma)`, or "skellam", of variance sigma^2.
    sigma: std in steps of the grid, > 0 and at most `grid_noise.LARGEST`.

  Raises:
    ValueError: if one of them is none of these.

  Example:
    >>> made = table("skellam", 10.0)
    >>> made.value.size, made.distance < 1e-17
    (256, True)
  """
  validate.one_of(KINDS, kind=kind)
  chances = law(kind, sigma)
  counts, distance = _rounded(chances)
  reach = len(counts) - 1
  both = np.array([*counts[:0:-1], *counts], object)  # of -reach..reach
  columns = max(2, 1 << (both.size - 1).bit_length())
  value, other, threshold = _alias(both, columns)
  mask = 2**32 - 1
  return Table(
    np.array(value, np.int32) - np.int32(reach),
    np.array(other, np.int32) - np.int32(reach),
    np.array([t >> 32 for t in threshold], np.uint32),
    np.array([t & mask for t in threshold], np.uint32),
    distance,
  )


def law(kind: str, sigma: float) -> list[decimal.Decimal]:
  """Probabilities of 0, 1, 2, ..., each also that of its negative.

  Args:
    kind: as in `table`.
    sigma: as in `table`.

  Returns:
    To 50 digits, as far as they are above 1e-40 of the largest.
  """
  variance = grid_noise.rounded_variance(sigma)
  with decimal.localcontext(_DIGITS):
    if kind == "skellam":
      weights = _bessel(decimal.Decimal(sigma) ** 2, sigma)
    else:
      top, bottom = variance.numerator, variance.denominator
      weights = _gaussian(decimal.Decimal(top) / decimal.Decimal(bottom))
    total = 2 * sum(weights) - weights[0]
    return [w / total for w in weights]


def _gaussian(variance):
  """exp(-x^2 / (2 variance)), one product after another."""
  step = (decimal.Decimal(-1) / (2 * variance)).exp()
  weights, factor = [decimal.Decimal(1)], step
  while weights[-1] > _NOTHING:
    weights.append(weights[-1] * factor)
    factor *= step * step
  return weights


def _bessel(z, sigma):
  """Modified Bessel functions I_0(z), I_1(z), ... but for a factor.

  Downwards from where they are nothing: there the recurrence is stable
  (Miller's algorithm, https://dlmf.nist.gov/3.6).
  """
  above, here = decimal.Decimal(0), decimal.Decimal("1e-200")
  found = []
  for n in range(math.ceil(18 * sigma) + 80, -1, -1):
    found.append(here)
    above, here = here, above + 2 * n * here / z
  weights = found[::-1]
  return [w for w in weights if w > _NOTHING * weights[0]]


def _rounded(chances):
  """(counts of 2^-64 of 0, 1, ..., reach; the total variation of that)."""
  whole = 2**BITS
  with decimal.localcontext(_DIGITS):
    counts = [int((p * whole).to_integral_value()) for p in chances]
    while counts[-1] == 0:
      counts.pop()
    counts[0] = whole - 2 * sum(counts[1:])
    left = chances[len(counts) :]
    off = [abs(p - decimal.Decimal(c) / whole) for p, c in zip(chances, counts)]
    distance = (off[0] + 2 * sum(off[1:]) + 2 * sum(left)) / 2
    # What the law itself leaves out, and its digits.
    return counts, float(distance) + 1e-30


def _alias(counts, columns):
  """Pairs of values that fill every column to the same height."""
  height = 2**BITS // columns
  left = [*counts, *[0] * (columns - len(counts))]
  value, other = list(range(columns)), list(range(columns))
  threshold = [height] * columns
  low = [i for i, c in enumerate(left) if c < height]
  high = [i for i, c in enumerate(left) if c > height]
  while low:
    i, j = low.pop(), high[-1]
    threshold[i], other[i] = left[i], j
    left[j] -= height - left[i]
    if left[j] <= height:
      high.pop()
      if left[j] < height:
        low.append(j)
  for i, full in enumerate(threshold):
    if full == height:  # never reached, and one bit too long for its word
      threshold[i], other[i] = 0, value[i]
  return value, other, threshold
