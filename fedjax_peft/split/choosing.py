"""Choosing: what is best on a menu, for clients together or each alone.

Of clients that share a band at one time

  weight T / T0 + (1 - weight) sum E / E0 + error_weight mean error

is to be least, where T0 and E0 are the seconds and joules of the same round if
nothing is chosen, so that it is 1 then (but for the error). Who is alone with a
band has such a sum of its own.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from fedjax_peft.network import channel
from fedjax_peft.network.adaptation import Known
from fedjax_peft.split import allocate, outcome, power
from fedjax_peft.split import menu as menu_lib
from fedjax_peft.split.menu import Costs, Menu
from fedjax_peft.split.problem import Problem

_FREE = 1e-9  # of two weights: one that small does not count


class Goal(NamedTuple):
  """What a choice is worth.

  Attributes:
    weight: of time against energy.
    error_weight: of the mean squared error of a value, as in `Menu`.
    deadline: seconds.
  """

  weight: float
  error_weight: float
  deadline: float = math.inf


class Choice(NamedTuple):
  """What c clients do.

  Attributes:
    cut: int [c], places on the menu.
    bits: int [c], places on the menu.
    watts: float64 [c], radiated.
    width: float64 [c] Hz.
    speed: float64 [c] FLOP/s of the server.
  """

  cut: np.ndarray
  bits: np.ndarray
  watts: np.ndarray
  width: np.ndarray
  speed: np.ndarray


def goal(
  weight: float, error_weight: float, deadline: float | None = None
) -> Goal:
  """A goal, checked.

  Args:
    weight: in [0, 1]; 0 only with a deadline.
    error_weight: at least 0.
    deadline: seconds; None: there is none.

  Raises:
    ValueError: if a number is out of its range.
  """
  if not 0 <= weight <= 1:
    raise ValueError(f"weight must be in [0, 1], got {weight=}")
  if not 0 <= error_weight < math.inf:
    raise ValueError(f"error_weight must be at least 0, got {error_weight=}")
  if deadline is not None and not deadline > 0:
    raise ValueError(f"deadline must be above 0 seconds, got {deadline=}")
  if weight == 0 and deadline is None:
    raise ValueError(
      "weight=0 leaves time out, and energy falls with it without end: give a "
      "deadline in seconds, or weight=0.01"
    )
  return Goal(weight, error_weight, math.inf if deadline is None else deadline)


def server_of(known: Known, clients: int) -> float:
  """FLOP/s of the server for each of so many; inf where there is none."""
  return math.inf if known.server is None else known.server.among(clients).flops


def problem(known: Known, costs: Costs, menu: Menu, goal: Goal) -> Problem:
  """The choices of clients that share a band.

  A watt of the problem is one that is drawn above idling, not one that is
  radiated: rates are the same if gains are divided by what one takes.
  """
  clients, server = costs.some.size, known.server
  before = menu_lib.ask(known).usual(
    known.radio.bandwidth / clients, server_of(known, clients)
  )
  seconds, joules = float(before[0].max()), float(before[1].sum())
  # Receiving takes energy by the choice too: for that there is no other place.
  received = (1 - goal.weight) / joules * costs.receive_joules
  rounding = goal.error_weight / clients * menu.error
  return Problem(
    device_seconds=costs.device_seconds,
    compute_joules=costs.compute_joules,
    up_bits=costs.up_bits,
    down_seconds=costs.down_seconds,
    server_flops=costs.server_flops,
    gains=costs.gains * (costs.watts / costs.draw),
    power_max=costs.draw,
    bandwidth=known.radio.bandwidth,
    server_speed=math.inf if server is None else server.flops,
    server_each=server is None or not server.shared,
    memory=menu.memory,
    memory_max=costs.room,
    error=received + rounding,
    error_weight=1.0,
    weight=goal.weight,
    seconds_scale=seconds,
    joules_scale=joules,
    deadline=goal.deadline,
    noise=costs.noise,
    cuts=menu.cuts,
    bits=menu.bits,
  )


def evenly(known: Known, costs: Costs, menu: Menu, goal: Goal) -> Choice:
  """The best with equal shares and full power; exact."""
  task = problem(known, costs, menu, goal)
  return _choice(costs, outcome.equal(task))


def together(known: Known, costs: Costs, menu: Menu, goal: Goal) -> Choice:
  """A good allocation; the soonest, where none makes the deadline."""
  task = problem(known, costs, menu, goal)
  found = _descend(task)
  if np.isfinite(found.objective):
    return _choice(costs, found)
  soonest = _descend(
    dataclasses.replace(task, weight=1.0, error_weight=0.0, deadline=math.inf)
  )
  if soonest.finish > task.deadline:
    return _choice(costs, soonest)
  found = allocate.descend(task, soonest.cut, soonest.bits).allocation
  return _choice(costs, found)


def _descend(task: Problem) -> outcome.Allocation:
  """Downhill from the best with equal shares."""
  even = outcome.equal(task)
  return allocate.descend(task, even.cut, even.bits).allocation


def _choice(costs: Costs, found: outcome.Allocation) -> Choice:
  """An allocation, with watts that are radiated."""
  drawn = np.where(found.watts > 0, found.watts, costs.draw)
  watts = drawn * (costs.watts / costs.draw)
  return Choice(found.cut, found.bits, watts, found.width, found.speed)


def alone(
  known: Known, costs: Costs, menu: Menu, goal: Goal, *, full: bool
) -> Choice:
  """The best choices of clients who share nothing; exact.

  All of the menu is looked at. The best power does not depend on what is sent,
  unless there is a deadline.

  Args:
    known: of clients with a band each.
    costs: of what is on the menu.
    menu: of cuts and bits.
    goal: of each client.
    full: whether all send with full power.
  """
  width, clients = known.radio.bandwidth, costs.some.size
  each = server_of(known, clients)
  before = menu_lib.ask(known).usual(width, each)
  a, b = goal.weight / before[0], (1 - goal.weight) / before[1]
  a, b, gains, draw = (_each(x) for x in (a, b, costs.gains, costs.draw))
  seconds = costs.device_seconds + costs.server_flops / each
  seconds = seconds[:, :, None] + costs.down_seconds
  joules = costs.compute_joules[:, :, None] + costs.receive_joules
  least = power.for_deadline(
    goal.deadline - seconds,
    costs.up_bits,
    width,
    gains,
    costs.watts,
    noise=costs.noise,
  )
  watts = np.full(seconds.shape, costs.watts)
  if not full:
    best = _power(width, gains * costs.watts, b * draw, a, costs.noise)
    watts = np.maximum(best * costs.watts, least.watts)
  sent = costs.up_bits / channel.rate(width, watts, gains, noise=costs.noise)
  cost = b * (joules + draw * (watts / costs.watts) * sent)
  cost = a * (seconds + sent) + cost + goal.error_weight * menu.error
  fits = (menu.memory <= costs.room[:, None])[:, :, None]
  in_time = fits & least.feasible & (seconds <= goal.deadline)
  some = in_time.any((1, 2), keepdims=True)
  cost = np.where(some, np.where(in_time, cost, np.inf), seconds + sent)
  place = np.argmin(
    np.where(fits, cost, np.inf).reshape(-1, menu.error.size), -1
  )
  cut, bits = np.divmod(place, menu.error.shape[1])
  watts = watts[np.arange(clients), cut, bits]
  ones = np.ones(clients)
  return Choice(cut, bits, watts, ones * width, ones * each)


def _each(x: np.ndarray) -> np.ndarray:
  """[c] as [c, 1, 1]."""
  return x[:, None, None]


def _power(width, received, draws, waits, noise) -> np.ndarray:
  """The best part of full power.

  Least is (waits + draws part) / rate(part), so in parts of waits / draws both
  weigh the same.
  """
  price = np.maximum(draws, _FREE * waits) / np.maximum(waits, _FREE * draws)
  best = power.trade(
    width,
    received / price,
    price,
    seconds_weight=1.0,
    joules_weight=1.0,
    noise=noise,
  )
  return best / price
