"""Calibration: the least noise by which a run keeps to a target epsilon.

The answer is on the private side of the target, to a precision that no
training notices.
"""

import math
from collections.abc import Callable

from scipy import optimize

from fedjax_peft import validate
from fedjax_peft.privacy import accounting, events

_LARGEST = 2.0**20  # multiplier that is tried


def calibrate(
  target_epsilon: float,
  delta_dp: float,
  rate: float,
  rounds: int,
  *,
  accountant: accounting.Accountant = "pld",
) -> float:
  """The least noise of Poisson-sampled rounds that keeps to a target epsilon.

  Args:
    target_epsilon: of the whole run, > 0.
    delta_dp: in (0, 1).
    rate: probability that a client takes part in a round.
    rounds: of the whole run.
    accountant: as in `epsilon`, by which the run is to be reported.

  Returns:
    The multiplier: never too small, and at most 1e-5 of itself too large.

  Raises:
    ValueError: if an argument is out of its range, or no noise is enough.
  """
  events.poisson(1.0, rate)
  return least(
    lambda z: events.poisson(z, rate),
    target_epsilon,
    delta_dp,
    rounds,
    accountant,
  )


def calibrate_fixed_size(
  target_epsilon: float,
  delta_dp: float,
  cohort: int,
  population: int,
  rounds: int,
) -> float:
  """As `calibrate`, for cohorts of fixed size, by Renyi accounting."""
  events.fixed_size(1.0, cohort, population)
  return least(
    lambda z: events.fixed_size(z, cohort, population),
    target_epsilon,
    delta_dp,
    rounds,
    "rdp",
  )


def least(
  make: Callable[[float], events.Event],
  target: float,
  delta_dp: float,
  rounds: int,
  accountant: accounting.Accountant,
) -> float:
  """The least multiplier, to 1e-5 of itself, and on the private side.

  Args:
    make: multiplier -> what a round releases.
    target: epsilon of the whole run, > 0.
    delta_dp: in (0, 1).
    rounds: of the whole run.
    accountant: as in `epsilon`.

  Raises:
    ValueError: if an argument is out of its range, or no noise is enough.
  """
  validate.positive(target_epsilon=target)
  validate.at_least(1, rounds=rounds)
  accounting.check_delta(delta_dp)

  def excess(log_z, by):
    event = make(math.exp(log_z))
    return (
      accounting.epsilon(event, delta_dp, rounds=rounds, accountant=by) - target
    )

  def search(low, high, by, precision):
    # Small multipliers cost the most, so come down to them.
    while excess(high, by) > 0:
      low, high = high, high + math.log(2)
      if high > math.log(_LARGEST):
        raise ValueError(
          f"no multiplier up to {_LARGEST:.0f} gives epsilon {target} at "
          f"{delta_dp=} over {rounds=}; use a larger target_epsilon"
        )
    while excess(low, by) <= 0:
      low, high = 2 * low - high, low
    root = optimize.brentq(excess, low, high, (by,), xtol=precision)
    while excess(root, by) > 0:
      root += precision
    return root

  root = search(-1.0, 0.0, "rdp", 3e-6)
  if accountant == "pld":
    root = search(root - 0.15, root, "pld", 3e-6)
  return math.exp(root)
