"""Tails: what a random sum does not exceed, but with a stated probability.

Each function returns a bound on the absolute value of all coordinates of a
vector together: a union over the coordinates is inside.

Suresh et al., Distributed Mean Estimation with Limited Communication, 2017,
https://arxiv.org/abs/1611.00429; Canonne, Kamath and Steinke, The Discrete
Gaussian for Differential Privacy, 2020, https://arxiv.org/abs/2004.00010;
Agarwal et al., The Skellam Mechanism, 2021, https://arxiv.org/abs/2110.04995
"""

import math


def rotated(block: int, failure: float) -> float:
  """Largest coordinate of a randomly rotated vector / its norm, at most 1.

  A coordinate of H diag(s) x, with b values x_j in a block and random signs
  s_j, is sum_j s_j x_j / sqrt(b) up to fixed signs. By Hoeffding it exceeds t
  in absolute value with probability 2 exp(-t^2 b / (2 |x|^2)) at most. The
  union is over the b coordinates of one block, not over all of them: for
  u <= a, exp(-a / u) / u grows with u, so energy shared among blocks is less
  likely to exceed t in any than all of it in one.

  Args:
    block: b, values that are rotated together.
    failure: in (0, 1), probability that some coordinate is larger, whatever
      the dimension, for a vector that does not depend on the signs.

  Returns:
    sqrt(2 ln(2 b / failure) / b), or 1, which is certain, where it is smaller.
  """
  return min(1.0, math.sqrt(2 * math.log(2 * block / failure) / block))


def discrete_gaussian(variance: float, dimension: int, failure: float) -> float:
  """What sums of independent discrete Gaussians do not exceed.

  A discrete Gaussian of parameter sigma has E exp(s X) <= exp(s^2 sigma^2 / 2),
  as the Gaussian itself, so a sum of them has Gaussian tails at most.

  Args:
    variance: sum of all sigma^2.
    dimension: coordinates.
    failure: in (0, 1), probability that some coordinate is larger.
  """
  return math.sqrt(2 * variance * math.log(2 * dimension / failure))


def skellam(variance: float, dimension: int, failure: float) -> float:
  """What sums of independent Skellam variables do not exceed.

  A Skellam variable of variance v has ln E exp(s X) = v (cosh s - 1); the best
  s of Chernoff's bound at t is asinh(t / v). The tails are heavier than the
  Gaussian's, the more so the smaller v.

  Args:
    variance: sum of all variances.
    dimension: coordinates.
    failure: in (0, 1), probability that some coordinate is larger.
  """
  budget = math.log(2 * dimension / failure)
  if variance == 0:
    return 0.0

  def exponent(t):
    s = math.asinh(t / variance)
    return t * s - variance * 2 * math.sinh(s / 2) ** 2

  low = math.sqrt(2 * variance * budget)
  high = 2 * low + 2 * budget  # enough by Bernstein's inequality
  while high - low > 1e-12 * high:
    middle = (low + high) / 2
    low, high = (low, middle) if exponent(middle) >= budget else (middle, high)
  return high
