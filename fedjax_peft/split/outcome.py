"""Outcomes: what an allocation comes to, in seconds, joules and objective.

`settle` gives clients whose cuts and bits are known their best shares, powers
and finish; it is exact. `equal` and `worst` are what to compare with.
"""

import math
from typing import NamedTuple

import numpy as np

from fedjax_peft.network import channel as channel_lib
from fedjax_peft.split import power as power_lib
from fedjax_peft.split import problem as problem_lib
from fedjax_peft.split import shares as shares_lib


class Allocation(NamedTuple):
  """Who does what with which share; leading axes are different allocations.

  Attributes:
    cut: int [..., C], places among the cuts.
    bits: int [..., C], places among the numbers of bits.
    channel: int [H], which client has each sub-channel, -1 = nobody; None
      where the band is divided freely.
    width: float64 [..., C] Hz.
    watts: float64 [..., C].
    speed: float64 [..., C] FLOP/s at the server; 0 where a server that is
      shared does nothing for a client.
    seconds: float64 [..., C], until each is done.
    joules: float64 [..., C], of each.
    error: float64 [..., C], weighed.
    finish: float64 [...] seconds, of all; inf where no shares make it in time.
    objective: float64 [...].
    hertz_price: float64 [...], what one hertz more is worth; 0 where the band
      is not divided.
    flops_price: float64 [...], what one FLOP/s more of the server is worth.
  """

  cut: np.ndarray
  bits: np.ndarray
  channel: np.ndarray | None
  width: np.ndarray
  watts: np.ndarray
  speed: np.ndarray
  seconds: np.ndarray
  joules: np.ndarray
  error: np.ndarray
  finish: np.ndarray
  objective: np.ndarray
  hertz_price: np.ndarray
  flops_price: np.ndarray

  def row(self, index: int) -> "Allocation":
    """One of several allocations."""
    return self._replace(
      **{k: v[index] for k, v in self._asdict().items() if k != "channel"}
    )


def radio(
  problem: problem_lib.Problem, channel: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(Hz, gain) of each client's sub-channels together, float64 [C].

  Several count as one of their widths together and of the geometric mean of
  their gains. With the same power on each the rate is at least that, since
  log(1 + e^x) is convex, and equal where the signal is strong.

  Args:
    problem: with gains [C, H].
    channel: int [H], their clients, -1 = nobody.
  """
  clients, channels = problem.gains.shape
  mine = channel == np.arange(clients)[:, None]  # [C, H]
  count = mine.sum(1)
  log = (np.log(problem.gains) * mine).sum(1) / np.maximum(count, 1)
  return count * (problem.bandwidth / channels), np.exp(log)


def settle(
  problem: problem_lib.Problem,
  cut: np.ndarray,
  bits: np.ndarray,
  channel: np.ndarray | None = None,
) -> Allocation:
  """The best shares, powers and finish of clients that have chosen.

  Args:
    problem: of clients that work at once.
    cut: int [..., C].
    bits: int [..., C].
    channel: int [H], where there are sub-channels.

  Returns:
    An Allocation. Its objective is inf where a cut is not allowed or the
    deadline cannot be met.
  """
  load = problem_lib.load(problem, cut, bits)
  width, gains = None, problem.gains
  if channel is not None:
    width, gains = radio(problem, channel)
  shares = shares_lib.solve(
    load.seconds,
    load.bits,
    load.flops,
    gains,
    problem.power_max,
    bandwidth=problem.bandwidth,
    speed=problem.server_speed if load.flops.any() else 1.0,
    seconds_weight=problem.seconds_weight,
    joules_weight=problem.joules_weight,
    width=width,
    deadline=problem.deadline,
    noise=problem.noise,
  )
  width = shares.width if width is None else np.broadcast_to(width, cut.shape)
  finish = np.where(np.isfinite(shares.finish), shares.finish, 0.0)
  left = finish[..., None] - load.seconds - _over(load.flops, shares.speed)
  watts = power_lib.for_deadline(
    left,
    load.bits,
    np.where(load.bits > 0, width, 1.0),
    gains,
    problem.power_max,
    noise=problem.noise,
  ).watts
  speed = shares.speed
  if problem.server_each or not np.isfinite(problem.server_speed):
    speed = np.full(cut.shape, problem.server_speed)
  found = judge(problem, cut, bits, channel, width, watts, speed)
  fits = problem.allowed[np.arange(len(problem)), cut].all(-1)
  fits &= np.isfinite(shares.finish)
  return found._replace(
    finish=np.where(fits, found.finish, math.inf),
    objective=np.where(fits, found.objective, math.inf),
    hertz_price=shares.hertz_price * (channel is None),
    flops_price=shares.flops_price * load.flops.any(),
  )


def judge(
  problem: problem_lib.Problem,
  cut: np.ndarray,
  bits: np.ndarray,
  channel: np.ndarray | None,
  width: np.ndarray,
  watts: np.ndarray,
  speed: np.ndarray,
) -> Allocation:
  """What any allocation comes to; arguments are fields of `Allocation`."""
  load = problem_lib.load(problem, cut, bits)
  gains = problem.gains
  if channel is not None:
    _, gains = radio(problem, channel)
  elif gains.ndim == 2:
    gains = np.exp(np.log(gains).mean(1))  # all of the band, in turn
  able = (width > 0) & (watts > 0)
  rate = channel_lib.rate(
    np.where(able, width, 1.0), watts * able, gains, noise=problem.noise
  )
  sent = _over(load.bits, rate)
  seconds = load.seconds + sent + _over(load.flops, speed)
  joules = load.joules + np.where(load.bits > 0, watts, 0) * sent
  finish = seconds.sum(-1) if problem.in_turn else seconds.max(-1)
  objective = (
    problem.seconds_weight * finish
    + problem.joules_weight * joules.sum(-1)
    + load.error.sum(-1)
  )
  zero = np.zeros(finish.shape)
  return Allocation(
    cut,
    bits,
    channel,
    width,
    np.where(load.bits > 0, watts, 0.0),
    speed,
    seconds,
    joules,
    load.error,
    finish,
    objective,
    zero,
    zero,
  )


def equal(problem: problem_lib.Problem) -> Allocation:
  """Equal shares and full power; cuts and bits are the best with these."""
  terms = _evenly(problem)
  finish, cost, *_ = terms
  if problem.in_turn:
    return _chosen(problem, terms, problem.seconds_weight * finish + cost)
  # All costs of a client by its finish: the least of those that are in time.
  order = np.argsort(finish, -1)
  times = np.take_along_axis(finish, order, -1)  # [C, L Q]
  least = np.minimum.accumulate(np.take_along_axis(cost, order, -1), -1)
  usable = np.isfinite(times[:, 1:])
  drops = np.where(usable, least[:, :-1] - np.where(usable, least[:, 1:], 0), 0)
  begin = times[:, 0].max()
  at = np.concatenate([[begin], np.maximum(times[:, 1:][usable], begin)])
  saved = np.concatenate([[0.0], drops[usable]])
  rank = np.argsort(at, kind="stable")
  total = problem.seconds_weight * at[rank] - np.cumsum(saved[rank])
  # Of several at the same time only the last has seen all.
  total = np.where(np.append(np.diff(at[rank]) > 0, True), total, np.inf)
  in_time = at[rank] <= max(problem.deadline, begin)
  last = at[rank][np.argmin(np.where(in_time, total, np.inf))]
  return _chosen(problem, terms, np.where(finish <= last, cost, np.inf))


def worst(problem: problem_lib.Problem) -> Allocation:
  """Equal shares and full power; every client has what takes it longest."""
  terms = _evenly(problem)
  finish = terms[0]
  slowest = np.where(np.isfinite(finish), -finish, np.inf)
  return _chosen(problem, terms, slowest)


def _evenly(problem: problem_lib.Problem):
  """(finish, cost [C, L Q] of all choices; channel, width, watts, speed)."""
  clients, channel, watts = len(problem), None, problem.power_max
  gains, shares = problem.gains, 1 if problem.in_turn else clients
  width = np.full(clients, problem.bandwidth / shares)
  if gains.ndim == 2:
    if problem.in_turn:
      gains = np.exp(np.log(gains).mean(1))
    else:
      channel = np.arange(gains.shape[1]) % clients
      width, gains = radio(problem, channel)
  each = 1 if problem.server_each else shares
  speed = np.full(clients, problem.server_speed / each)
  load = problem_lib.load(problem)
  rate = channel_lib.rate(width, watts, gains, noise=problem.noise)
  sent = load.bits / rate[:, None, None]
  finish = load.seconds + sent + load.flops / speed[:, None, None]
  joules = load.joules + watts[:, None, None] * sent
  cost = problem.joules_weight * joules + load.error
  finish = np.where(problem.allowed[:, :, None], finish, np.inf)
  shape = (clients, -1)
  return (
    finish.reshape(shape),
    cost.reshape(shape),
    channel,
    width,
    watts,
    speed,
  )


def _chosen(problem, terms, cost: np.ndarray) -> Allocation:
  """The allocation in which all take the choice of least cost [C, L Q]."""
  _, _, channel, width, watts, speed = terms
  place = np.argmin(cost, -1)
  cut, bits = np.divmod(place, problem.up_bits.shape[2])
  return judge(problem, cut, bits, channel, width, watts, speed)


def _over(amount: np.ndarray, rate: np.ndarray) -> np.ndarray:
  """The time for an amount at a rate; inf for what never ends."""
  none = np.where(amount > 0, np.inf, 0.0)
  return np.divide(amount, rate, out=none, where=(amount > 0) & (rate > 0))
