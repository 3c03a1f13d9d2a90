"""Events: what a round releases about one client, and how it was sampled.

A round releases the sum of a cohort's clipped messages with noise on it. How
the cohort was drawn decides what that says about one client, so an event
states it, and is accounted as what it is:

* `poisson`: each client takes part by a coin of its own. Neighbours differ by
  one client more or less.
* `fixed_size`: as many as planned, drawn without replacement. The size of the
  population is no secret then, and neighbours differ in what one client holds.
* `Concentrated`, `Skellam`: everyone takes part, nothing is gained by chance;
  `grid_events` makes them of noise of whole numbers. Neighbours differ in one
  client's message, in place of which one has "zero" or any "other".

Mironov et al., Renyi Differential Privacy of the Sampled Gaussian Mechanism,
2019, https://arxiv.org/abs/1908.10530; Wang et al., Subsampled Renyi
Differential Privacy, 2019, https://arxiv.org/abs/1808.00087
"""

import math
from typing import Literal, NamedTuple

import dp_accounting

from fedjax_peft import validate


class Poisson(NamedTuple):
  """A round whose clients each flipped a coin; made by `poisson`.

  Attributes:
    multiplier: std of the noise on the sum / L2 bound of one client's message.
    rate: probability that a client takes part.
  """

  multiplier: float
  rate: float


class FixedSize(NamedTuple):
  """A round of a cohort of known size; made by `fixed_size`.

  Attributes:
    multiplier: std of the noise on the sum / L2 bound of one client's message.
    cohort: clients of the round.
    population: clients that it was drawn from, without replacement.
  """

  multiplier: float
  cohort: int
  population: int


Instead = Literal["zero", "other"]


class Concentrated(NamedTuple):
  """A round of everyone, of bounded divergence; made by `concentrated`.

  Attributes:
    rho: the Renyi divergence of order a is at most a rho.
    instead: what a neighbour has in place of one client's message.
  """

  rho: float
  instead: Instead


class Skellam(NamedTuple):
  """A round of everyone under Skellam noise; made by `grid_events.skellam`.

  Attributes:
    variance: of the noise on each value of the sum, in squared steps.
    l1: how far the sums of neighbours are apart, in steps.
    l2: the same, by the L2 norm.
    instead: what a neighbour has in place of one client's message.
  """

  variance: float
  l1: float
  l2: float
  instead: Instead


Event = Poisson | FixedSize | Concentrated | Skellam


def poisson(multiplier: float, rate: float) -> Poisson:
  """A round in which each client takes part with probability `rate`.

  Args:
    multiplier: std of the noise on the sum / L2 bound of one client's message,
      its weight included, >= 0; 0 is no noise and epsilon infinity.
    rate: in (0, 1]; each client's own coin, whatever the others do. A cohort
      that is padded or cut to a size is not such a sample.

  Raises:
    ValueError: if an argument is out of its range.
  """
  _check_multiplier(multiplier)
  if not 0 < rate <= 1:
    raise ValueError(f"rate must be a probability in (0, 1], got {rate=}")
  return Poisson(float(multiplier), float(rate))


def fixed_size(multiplier: float, cohort: int, population: int) -> FixedSize:
  """A round of `cohort` clients drawn from `population` without replacement.

  Args:
    multiplier: as in `poisson`: std / L2 bound of one client's message. That
      one client's message is replaced moves the sum by up to twice the bound;
      the accounting knows, do not halve it here.
    cohort: clients of the round, at most `population`.
    population: clients that there are.

  Raises:
    ValueError: if an argument is out of its range.
  """
  _check_multiplier(multiplier)
  validate.at_least(1, cohort=cohort, population=population)
  if cohort > population:
    raise ValueError(
      "a cohort is drawn without replacement from the population: got "
      f"{cohort=} {population=}; use cohort={population} or less"
    )
  return FixedSize(float(multiplier), cohort, population)


def concentrated(rho: float, instead: Instead = "zero") -> Concentrated:
  """A round of everyone that satisfies rho-concentrated differential privacy.

  Bun and Steinke, Concentrated Differential Privacy, 2016,
  https://arxiv.org/abs/1605.02065

  Args:
    rho: (sensitivity / std)^2 / 2 for Gaussian noise; >= 0 and finite. The
      sensitivity is how far the sums of two neighbours are apart, which is
      twice as far for "other" as for "zero".
    instead: what a neighbour has in place of one client's message.

  Raises:
    ValueError: if an argument is out of its range.
  """
  if not 0 <= rho < math.inf:
    raise ValueError(
      f"rho must be a finite number >= 0, got {rho=}; without noise there is "
      "no such number"
    )
  validate.one_of(["zero", "other"], instead=instead)
  return Concentrated(float(rho), instead)


def joint(*multipliers: float) -> float:
  """The multiplier of several Gaussian releases about one cohort together.

  As 1 / sqrt(sum of 1 / z^2): a sum with noise z1 and a count with noise z2,
  as adaptive clipping releases them, are one release in more dimensions.

  Example:
    >>> round(joint(1.25, 5.0), 4)
    1.2127
  """
  validate.positive(**{f"multiplier_{i}": z for i, z in enumerate(multipliers)})
  return 1 / math.sqrt(math.fsum(z**-2 for z in multipliers))


def neighbours(event: Event) -> str:
  """The two data sets that an event's epsilon keeps apart, in words."""
  if isinstance(event, Poisson):
    return "with and without any one client"
  if isinstance(event, (Concentrated, Skellam)) and event.instead == "zero":
    return (
      "with any one client's message replaced by zero, noise and all else kept"
    )
  return "with any one client's data replaced, their number being public"


def is_noiseless(event: Event) -> bool:
  """Whether a round was released as it is, so that no epsilon is enough."""
  return isinstance(event, (Poisson, FixedSize)) and not event.multiplier


def dp_event(
  event: Poisson | FixedSize | Concentrated,
) -> dp_accounting.DpEvent:
  """An event as dp-accounting's, for the accountant of `relation(event)`."""
  if isinstance(event, Concentrated):
    return dp_accounting.ZCDpEvent(event.rho)
  if isinstance(event, Poisson):
    gaussian = dp_accounting.GaussianDpEvent(event.multiplier)
    return dp_accounting.PoissonSampledDpEvent(event.rate, gaussian)
  # Its Renyi bound takes std / sensitivity, and replacing a message of norm b
  # moves the sum by 2 b: not halved, it would report about half the epsilon.
  gaussian = dp_accounting.GaussianDpEvent(event.multiplier / 2)
  return dp_accounting.SampledWithoutReplacementDpEvent(
    event.population, event.cohort, gaussian
  )


def relation(event: Event) -> dp_accounting.NeighboringRelation:
  """Which data sets are neighbours, as dp-accounting names it."""
  if isinstance(event, Poisson):
    return dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
  if isinstance(event, (Concentrated, Skellam)) and event.instead == "zero":
    return dp_accounting.NeighboringRelation.REPLACE_SPECIAL
  return dp_accounting.NeighboringRelation.REPLACE_ONE


def _check_multiplier(multiplier: float) -> None:
  """Raises ValueError unless it is finite and not negative."""
  if not 0 <= multiplier < math.inf:
    raise ValueError(
      "multiplier must be a finite number >= 0 (noise std / L2 bound of one "
      f"client), got {multiplier=}"
    )
