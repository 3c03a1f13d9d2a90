"""Blocks: the moves by which an allocation gets better.

A block looks at a part of an allocation, with the rest as it is, and returns
the allocation that it would rather have, or None where it would change
nothing. T, powers and shares are settled anew (`outcome.settle`), so that what
it returns is complete; whoever calls compares objectives. Arguments are

  problem: of C clients that work at once,
  now: the allocation as it is,
  number: of passes before this one.
"""

import numpy as np

from fedjax_peft.network import channel as channel_lib
from fedjax_peft.split import choices, matching, outcome
from fedjax_peft.split.outcome import Allocation
from fedjax_peft.split.problem import Problem, load

_AHEAD = np.array([0.0, -0.7, 0.7])  # log of T's change, where it may go
_PARTS = 7  # halvings of those who move
_SMALL = 5_000  # numbers in all problems of single changes


def own(problem: Problem, now: Allocation, number: int) -> Allocation | None:
  """Every client's best cut, bits and power with T and its own shares."""
  width, gains = _radio(problem, now)
  table = choices.at_shares(problem, float(now.finish), width, gains, now.speed)
  cut, bits, _ = _least(table, now)
  if not _differs(cut, bits, now):
    return None
  return outcome.settle(problem, cut, bits, now.channel)


def prices(problem: Problem, now: Allocation, number: int) -> Allocation | None:
  """The cuts and bits that all would choose at the prices.

  With T as it is, later and sooner; with every pass less so.
  """
  cuts, bits = [], []
  for ahead in np.exp(_AHEAD * 0.6**number):
    table = _priced(problem, now, float(now.finish) * ahead)
    cut, width, _ = _least(table, now)
    if np.isfinite(table.min((1, 2))).all() and _differs(cut, width, now):
      cuts.append(cut)
      bits.append(width)
  if not cuts:
    return None
  tried = outcome.settle(problem, np.stack(cuts), np.stack(bits), now.channel)
  return _best(tried)


def some(problem: Problem, now: Allocation, number: int) -> Allocation | None:
  """As `prices`, but only those move who would gain most.

  Where all move at once the prices move too, and they may have gone too far.
  """
  table = _priced(problem, now, float(now.finish))
  cut, bits, gained = _least(table, now)
  movers = np.flatnonzero((cut != now.cut) | (bits != now.bits))
  parts = movers.size // 2 ** np.arange(1, _PARTS)
  parts = parts[parts > 0]
  if not parts.size:
    return None
  rank = np.empty(len(problem), int)
  rank[np.argsort(-gained, kind="stable")] = np.arange(len(problem))
  moves = rank < parts[:, None]
  cuts = np.where(moves, cut, now.cut)
  widths = np.where(moves, bits, now.bits)
  return _best(outcome.settle(problem, cuts, widths, now.channel))


def channels(problem: Problem, now: Allocation, number: int):
  """Sub-channels anew: the least energy with T, or the soonest finish."""
  if now.channel is None:
    return None
  found = []
  for aim in ("sum", "max"):
    channel = divide(problem, now, aim)
    found.append(outcome.settle(problem, now.cut, now.bits, channel))
  return min(found, key=lambda x: x.objective)


def single(problem: Problem, now: Allocation, number: int) -> Allocation | None:
  """The best of all other choices of one client; None if they are many."""
  shape = (len(problem), *problem.up_bits.shape[1:])
  if shape[0] * np.prod(shape) > _SMALL:
    return None
  client, cut, bits = np.nonzero(
    np.broadcast_to(problem.allowed[:, :, None], shape)
  )
  other = (cut != now.cut[client]) | (bits != now.bits[client])
  client, cut, bits = client[other], cut[other], bits[other]
  if not client.size:
    return None
  row = np.arange(client.size)
  cuts, widths = (np.tile(x, (client.size, 1)) for x in (now.cut, now.bits))
  cuts[row, client], widths[row, client] = cut, bits
  return _best(outcome.settle(problem, cuts, widths, now.channel))


def divide(problem: Problem, now: Allocation, aim: matching.Aim) -> np.ndarray:
  """Who should have which sub-channel, int [H].

  Args:
    problem: with gains [C, H].
    now: whose T, cuts, bits and speeds stay.
    aim: "sum" for the least energy with that T, "max" for the soonest finish.
  """
  asks = load(problem, now.cut, now.bits)
  served = np.divide(
    asks.flops, now.speed, out=np.zeros_like(asks.flops), where=asks.flops > 0
  )
  before = (asks.seconds + served)[:, None]
  bits, most = asks.bits[:, None], problem.power_max[:, None]
  one = problem.bandwidth / problem.gains.shape[1]
  left = np.maximum(now.finish - before, 1e-12 * now.finish)

  def cost(count, gains):
    noise = problem.noise
    if aim == "max":
      rate = channel_lib.rate(count * one, most, gains, noise=noise)
      return before + bits / rate
    watts = channel_lib.power_for(
      left, bits / 8, count * one, gains, noise=noise
    )
    # More than the limit is refused in the end; until then it is dear.
    return np.minimum(left * watts * np.where(watts > most, 1e6, 1), 1e100)

  own = matching.assign(cost(np.ones(problem.gains.shape), problem.gains), aim)
  owner = np.full(problem.gains.shape[1], -1)
  owner[own] = np.arange(len(problem))
  return matching.extend(owner, problem.gains, cost, aim)


def _radio(problem: Problem, now: Allocation):
  """(Hz, gain) of each client, float64 [C]."""
  if now.channel is None:
    return now.width, problem.gains
  return outcome.radio(problem, now.channel)


def _priced(problem: Problem, now: Allocation, finish: float) -> np.ndarray:
  """What choices cost at the prices of now, float64 [C, L, Q]."""
  width, gains = _radio(problem, now)
  # What nobody wants now must not be free, or everybody would want it.
  least = 1e-6 * float(now.objective)
  return choices.at_prices(
    problem,
    finish,
    gains,
    max(float(now.hertz_price), least / problem.bandwidth),
    max(float(now.flops_price), least / problem.server_speed),
    None if now.channel is None else width,
  )


def _least(table: np.ndarray, now: Allocation):
  """(cut, bits, what it gains [C]) of least cost; nobody moves for nothing."""
  clients = np.arange(len(table))
  flat = table.reshape(len(table), -1)
  place, present = np.argmin(flat, -1), table[clients, now.cut, now.bits]
  best = flat[clients, place]
  # Rounding may say that what is, cannot be: it stays then, if nothing can.
  gained = np.subtract(
    present, best, out=np.zeros(len(table)), where=np.isfinite(best)
  )
  known = np.where(np.isfinite(present), present, 0.0)
  stay = ~(gained > 1e-12 * np.abs(known))
  cut, bits = np.divmod(place, table.shape[-1])
  cut, bits = np.where(stay, now.cut, cut), np.where(stay, now.bits, bits)
  return cut, bits, np.where(stay, 0.0, gained)


def _differs(cut: np.ndarray, bits: np.ndarray, now: Allocation) -> bool:
  """Whether anybody would change its choice."""
  return bool(np.any(cut != now.cut) or np.any(bits != now.bits))


def _best(several: Allocation) -> Allocation:
  """The one with the least objective."""
  return several.row(int(np.argmin(several.objective)))
