"""Grid events: what a sum under noise of whole numbers tells of one client.

Everyone rounds a clipped message to a grid, adds integer noise, and only the
sum is seen. Two things differ from Gaussian noise: rounding moves a message,
so that the sums of neighbours may be further apart than the clip norm; and a
sum of discrete Gaussians is not one, which costs a little more, while a sum of
Skellam numbers is Skellam.

Only noise that is surely in the sum protects: count the clients who neither
drop out nor tell theirs.

Kairouz et al., The Distributed Discrete Gaussian Mechanism for Federated
Learning, 2021, https://arxiv.org/abs/2102.06387; Agarwal et al., The Skellam
Mechanism, 2021, https://arxiv.org/abs/2110.04995
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from fedjax_peft import validate
from fedjax_peft.privacy import events


class Apart(NamedTuple):
  """How far the integer sums of two neighbours are apart; made by `apart`.

  Attributes:
    l1: in steps.
    l2: in steps.
    dimension: values of a message.
    instead: what a neighbour has in place of one client's message.
  """

  l1: float
  l2: float
  dimension: int
  instead: events.Instead


def apart(
  levels: float,
  dimension: int,
  *,
  rounding: Literal["nearest", "either"] = "nearest",
  instead: events.Instead = "zero",
) -> Apart:
  """The sensitivity of a sum of messages that were rounded to a grid.

  Rounded to the nearest integer a value moves by half a step at most, and no
  value more than doubles, as those below half a step vanish: the norm is at
  most min(levels + sqrt(dimension) / 2, 2 levels). Rounded to either neighbour
  it is at most levels + sqrt(dimension). Of integers the L1 norm is at most
  the squared L2 norm.

  Args:
    levels: steps of the grid to the L2 bound of one client's message, its
      weight included, > 0; `Plan.levels * Plan.load.max_weight`.
    dimension: values of a message on the wire, after padding.
    rounding: "nearest", or "either" of the neighbours (at random).
    instead: what a neighbour has in place of one client's message: "zero", or
      "other", which is twice as far.

  Raises:
    ValueError: if an argument is out of its range.

  Example:
    >>> apart(100, 64).l2, apart(3, 10_000).l2
    (104.0, 6.0)
  """
  validate.positive(levels=levels)
  validate.at_least(1, dimension=dimension)
  validate.one_of(["nearest", "either"], rounding=rounding)
  validate.one_of(["zero", "other"], instead=instead)
  root = math.sqrt(dimension)
  if rounding == "nearest":
    l2 = min(levels + root / 2, 2.0 * levels)
  else:
    l2 = levels + root
  # The square of an integer vector's norm is an integer; floats may fall short.
  l2 = min(l2, math.sqrt(math.floor(l2**2 * (1 + 1e-12))))
  l1 = min(root * l2, l2**2)
  far = 2 if instead == "other" else 1
  return Apart(far * l1, far * l2, dimension, instead)


def discrete_gaussian(
  sigma: float, clients: int, apart: Apart
) -> events.Concentrated:
  """A sum to which each client adds discrete Gaussian noise of its own.

  With s = sigma sqrt(clients), the std of the sum, rho is
  ((l2 / s)^2 + 2 t l1 / s + t^2 dimension) / 2, where t tells how far the sum
  is from a discrete Gaussian (Kairouz et al., proposition 14). From sigma = 2
  on t is below 1e-12 for a million clients; at 1/2 it outweighs the rest.

  Args:
    sigma: of each client's noise, in steps, >= 1/2; `grid_noise` samples no
      less.
    clients: whose noise is surely in the sum.
    apart: how far neighbours are apart.

  Raises:
    ValueError: if an argument is out of its range.

  Example:
    >>> discrete_gaussian(10.0, 100, apart(100, 4))
    Concentrated(rho=0.51005, instead='zero')
  """
  _check(sigma, clients)
  if sigma < 0.5:
    raise ValueError(
      "sums of discrete Gaussians are only understood from half a step on: got "
      f"{sigma=}; use a finer grid, on which the noise takes more steps"
    )
  std = sigma * math.sqrt(clients)
  t = not_gaussian(sigma, clients)
  twice = (apart.l2 / std) ** 2 + 2 * t * apart.l1 / std
  rho = (twice + t**2 * apart.dimension) / 2
  return events.concentrated(rho, apart.instead)


def not_gaussian(sigma: float, clients: int) -> float:
  """Bound on how far a sum of discrete Gaussians is from being one.

  Args:
    sigma: of each, in steps.
    clients: how many.

  Returns:
    10 sum over k = 1 .. clients - 1 of exp(-2 pi^2 sigma^2 k / (k + 1)).
  """
  k = np.arange(1, clients)
  decay = 2 * (math.pi * sigma) ** 2
  return float(10 * np.sum(np.exp(-decay * k / (k + 1))))


def skellam_sum(sigma: float, clients: int, apart: Apart) -> events.Skellam:
  """A sum to which each client adds Skellam noise of its own.

  Args:
    sigma: std of each client's noise, in steps, > 0.
    clients: whose noise is surely in the sum.
    apart: how far neighbours are apart.

  Raises:
    ValueError: if an argument is out of its range.
  """
  _check(sigma, clients)
  return skellam(clients * sigma**2, apart.l1, apart.l2, apart.instead)


def skellam(
  variance: float, l1: float, l2: float, instead: events.Instead
) -> events.Skellam:
  """A sum with Skellam noise; the arguments are those of `events.Skellam`.

  Raises:
    ValueError: if an argument is out of its range.
  """
  validate.positive(variance=variance, l1=l1, l2=l2)
  validate.one_of(["zero", "other"], instead=instead)
  return events.Skellam(float(variance), float(l1), float(l2), instead)


def divergences(event: events.Skellam, orders: Sequence[float]) -> np.ndarray:
  """Renyi divergences of one round under Skellam noise, at most.

  With m the variance and a an integer order, a l2^2 / (2 m) plus the smaller
  of ((2 a - 1) l2^2 + 6 l1) / (4 m^2) and 3 l1 / (2 m) (Agarwal et al.). An
  order between integers is bounded by the next one.

  Args:
    event: the round.
    orders: each > 1.

  Returns:
    float64, one an order.
  """
  a = np.ceil(np.asarray(orders, np.float64))
  m, square = event.variance, event.l2**2
  more = np.minimum(
    ((2 * a - 1) * square + 6 * event.l1) / (4 * m**2), 3 * event.l1 / (2 * m)
  )
  return a * square / (2 * m) + more


def _check(sigma: float, clients: int) -> None:
  """Raises ValueError unless there is noise and someone who adds it."""
  validate.positive(sigma=sigma)
  validate.at_least(1, clients=clients)
