"""Sequence: clients take turns, each with the whole band and server.

Nothing is shared, and the finish is a sum: every client minimizes its own

  a t + b E + error,  over its cut, bits and power,

for itself, the power in closed form (`power.trade`). That is the optimum. A
deadline raises a, what a second costs, until the sum is in time.
"""

import math

import numpy as np

from fedjax_peft.network import channel
from fedjax_peft.split import outcome
from fedjax_peft.split import power as power_lib
from fedjax_peft.split import problem as problem_lib

_HALVINGS = 60


def optimum(problem: problem_lib.Problem) -> outcome.Allocation:
  """The best choices and powers of clients that take turns.

  With a deadline that binds the powers are the best for the choices, and
  these are the best at the price of a second at which they are in time.

  Args:
    problem: with `in_turn`.

  Raises:
    ValueError: if the deadline cannot be met.
  """
  cheap = problem.seconds_weight
  if cheap > 0:
    found = _at(problem, cheap)
    if found.finish <= problem.deadline:
      return found
  # A second so dear that nothing else counts, and one that hardly does.
  scale = problem.joules_weight * float(problem.power_max.max()) + cheap
  scale += problem.error_weight
  low, high = max(cheap, 1e-12 * scale), 1e15 * max(scale, 1.0)
  found = _at(problem, high)
  if found.finish > problem.deadline:
    raise ValueError(
      f"clients that take turns need {found.finish:.4g} s at least, and the "
      f"deadline is {problem.deadline:.4g} s: give more time, choose fewer "
      "clients, or let them work at once"
    )
  found = _in_time(problem, low, high)
  return _in_time(problem, low, high, found)


def _in_time(problem, low: float, high: float, kept=None) -> outcome.Allocation:
  """The allocation at the least price of a second that is in time."""
  found = None
  for _ in range(_HALVINGS):
    middle = math.sqrt(low * high)
    tried = _at(problem, middle, kept)
    if tried.finish <= problem.deadline:
      high, found = middle, tried
    else:
      low = middle
  return _at(problem, high, kept) if found is None else found


def _at(problem, second: float, kept=None) -> outcome.Allocation:
  """Everybody's best at a price of a second; choices are those kept, if any."""
  gains = problem.gains
  if gains.ndim == 2:
    gains = np.exp(np.log(gains).mean(1))
  width = np.full(len(problem), problem.bandwidth)
  watts = power_lib.trade(
    width,
    gains,
    problem.power_max,
    seconds_weight=second,
    joules_weight=problem.joules_weight,
    noise=problem.noise,
  )
  if kept is None:
    load = problem_lib.load(problem)
    rate = channel.rate(width, watts, gains, noise=problem.noise)
    sent = load.bits / rate[:, None, None]
    joules = load.joules + watts[:, None, None] * sent
    cost = second * (load.seconds + sent) + problem.joules_weight * joules
    cost = np.where(problem.allowed[:, :, None], cost + load.error, np.inf)
    place = np.argmin(cost.reshape(len(problem), -1), -1)
    cut, bits = np.divmod(place, cost.shape[-1])
  else:
    cut, bits = kept.cut, kept.bits
  speed = np.full(len(problem), problem.server_speed)
  return outcome.judge(problem, cut, bits, None, width, watts, speed)
