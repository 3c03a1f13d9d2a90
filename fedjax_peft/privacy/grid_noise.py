"""Grid noise: integers, added before a mask, whose sum has a known law.

Noise of real numbers cannot be added on a grid, and rounded floats leak what
they round away. The discrete Gaussian is sampled exactly: every decision is a
comparison of integers. Skellam noise is the difference of two Poisson numbers,
and stays Skellam when clients add theirs up.

On the host, by NumPy: one client's noise of a protocol round.

Canonne, Kamath and Steinke, The Discrete Gaussian for Differential Privacy,
2020, https://arxiv.org/abs/2004.00010; Agarwal et al., The Skellam Mechanism,
2021, https://arxiv.org/abs/2110.04995
"""

import fractions
import math

import numpy as np

LARGEST = 4096.0  # std in steps; beyond, squares leave 64 bits
_FARTHEST = 40  # in units of the proposal; accepted with less than 1e-300


def rounded_variance(sigma: float) -> fractions.Fraction:
  """The parameter sigma^2 as it is sampled: rational, and never below.

  Args:
    sigma: std in steps of the grid, > 0 and at most `LARGEST`.

  Returns:
    sigma^2 rounded up to a multiple of a power of two, from 1 / 1024 for small
    sigma to 1, by less than 0.2 % from sigma = 1 on.

  Raises:
    ValueError: if `sigma` is out of its range.
  """
  if not 0 < sigma <= LARGEST:
    raise ValueError(
      f"sigma must be in (0, {LARGEST:g}] steps of the grid, got {sigma=}; "
      "with a coarser grid (fewer bits) the same noise takes fewer steps"
    )
  parts = 2 ** max(0, min(10, 20 - 2 * math.ceil(math.log2(sigma + 1))))
  square = fractions.Fraction(sigma) ** 2
  return fractions.Fraction(math.ceil(square * parts), parts)


def discrete_gaussian(
  rng: np.random.Generator, sigma: float, shape: int | tuple[int, ...]
) -> np.ndarray:
  """Integers x with probability proportional to exp(-x^2 / (2 sigma^2)).

  Its variance is at most sigma^2, and equal to it but for 1e-8 from sigma = 1
  on. It satisfies the same concentrated privacy as a Gaussian of this sigma.

  Guarantees:
    Exact for uniform bits of `rng`, with sigma^2 = `rounded_variance(sigma)`,
    up to a total variation of 1e-300.

  Args:
    rng: source of the bits, `np.random.default_rng(seed)`; seed it from the
      system's entropy where privacy is real.
    sigma: std in steps of the grid, > 0 and at most `LARGEST`.
    shape: of the result.

  Returns:
    int64 of that shape.

  Raises:
    ValueError: if `sigma` is out of its range.
  """
  variance = rounded_variance(sigma)
  scale = math.isqrt(math.floor(variance)) + 1
  out = np.zeros(math.prod(np.atleast_1d(shape)), np.int64)
  missing = np.arange(out.size)
  while missing.size:
    drawn, ok = _laplace(rng, scale, missing.size)
    # Accepted with exp(-(|y| - sigma^2 / scale)^2 / (2 sigma^2)).
    n, d = variance.numerator, variance.denominator
    far = np.abs(np.abs(drawn) * (d * scale) - n)
    ok[ok] = _decays(rng, far[ok] ** 2, 2 * n * d * scale**2)
    out[missing[ok]] = drawn[ok]
    missing = missing[~ok]
  return out.reshape(shape)


def skellam(
  rng: np.random.Generator, sigma: float, shape: int | tuple[int, ...]
) -> np.ndarray:
  """Differences of two Poisson numbers, of variance sigma^2.

  Sums of them are Skellam too, whatever their variances.

  Args:
    rng: source of the bits. Its Poisson numbers are exact up to floats.
    sigma: std in steps of the grid, > 0 and at most `LARGEST`.
    shape: of the result.

  Returns:
    int64 of that shape.

  Raises:
    ValueError: if `sigma` is out of its range.
  """
  rounded_variance(sigma)
  half = sigma**2 / 2
  return rng.poisson(half, shape) - rng.poisson(half, shape)


def _laplace(rng, scale: int, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Integers with probability ~ exp(-|x| / scale), and which are valid."""
  low = rng.integers(0, scale, size)
  ok = _decays(rng, low, scale)
  tens = np.zeros(size, np.int64)  # how often exp(-1) says yes in a row
  going = np.arange(size)
  while going.size:
    going = going[_decays(rng, np.ones(going.size, np.int64), 1)]
    tens[going] += 1
  negative = rng.integers(0, 2, size).astype(bool)
  size_of = low + scale * tens
  ok &= ~(negative & (size_of == 0)) & (tens <= _FARTHEST)
  return np.where(negative, -size_of, size_of), ok


def _decays(rng, above: np.ndarray, below: int) -> np.ndarray:
  """True with probability exp(-above / below), by integers alone."""
  whole, part = np.divmod(above, below)
  yes = _decays_once(rng, part, below)
  going = np.flatnonzero(yes & (whole > 0))
  while going.size:
    # Each unit of the exponent must say yes too.
    yes[going] = _decays_once(rng, np.ones(going.size, np.int64), 1)
    whole[going] -= 1
    going = going[yes[going] & (whole[going] > 0)]
  return yes


def _decays_once(rng, above: np.ndarray, below: int) -> np.ndarray:
  """The same for above <= below, by the series of the exponential.

  The number of draws in a row of which the k-th succeeds with
  above / (below k) is even with probability exp(-above / below).
  """
  even = np.ones(above.size, bool)
  going, k = np.arange(above.size), 1
  while going.size:
    going = going[rng.integers(0, below * k, going.size) < above[going]]
    even[going] = ~even[going]
    k += 1
  return even
