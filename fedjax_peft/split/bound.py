"""Bound: how good any allocation could be.

With any prices n of a hertz and h of a FLOP/s, and any finish T, clients that
pay for shares and are free to choose cost no more than in any allocation that
keeps to the band and the server:

  objective >= a T + sum_k least_k(T) - n W - h F.

What a choice costs is convex in T: at two finishes it says a line that it is
never below at any finish before them. The least of some lines is concave, so
the bound of an interval is one of its ends. Intervals are halved where it is
lowest, until nothing is gained by that.

Boyd and Vandenberghe, Convex Optimization, 2004, chapter 5 (weak duality)
"""

import heapq

import numpy as np

from fedjax_peft.split import choices
from fedjax_peft.split import problem as problem_lib
from fedjax_peft.split.outcome import Allocation
from fedjax_peft.split.problem import Problem

_MOST = 100  # halvings
_STEP = 0.01  # of an interval, between the points that say a line


def lower(
  problem: Problem, allocation: Allocation, *, tolerance: float = 1e-4
) -> float:
  """An objective that no allocation at all is below.

  Args:
    problem: of clients that work at once, with a band that is divided freely.
    allocation: whose prices are used. With those of a good allocation the
      bound is close; with others it is true too.
    tolerance: of the finish, relative, at which intervals are short enough.

  Returns:
    The bound; (objective - bound) / bound is what is left to gain at most.

  Raises:
    ValueError: if the problem is of another kind.
  """
  if problem.in_turn or problem.gains.ndim == 2:
    raise ValueError(
      "the bound is for clients that share one band at once, got "
      f"in_turn={problem.in_turn}, gains {list(problem.gains.shape)}; taking "
      "turns has its optimum in closed form"
    )
  objective, a = float(allocation.objective), problem.seconds_weight
  least = 1e-9 * objective  # so that nothing is free
  hertz = max(float(allocation.hertz_price), least / problem.bandwidth)
  flops = max(float(allocation.flops_price), least / problem.server_speed)
  shared = problem_lib.load(problem).flops.any()
  paid = hertz * problem.bandwidth
  paid += flops * problem.server_speed if shared else 0.0
  # Later than that the finish alone costs more than the allocation does.
  top = min(problem.deadline, (objective + paid) / a if a else np.inf)

  def cost(finish):
    return choices.at_prices(problem, finish, problem.gains, hertz, flops)

  def over(low, high):
    step = _STEP * (high - low)
    late, early = cost(high), cost(high - step)
    rise = np.subtract(
      early, late, out=np.full(late.shape, np.inf), where=np.isfinite(late)
    )
    at_low = late + rise * ((high - low) / step)
    ends = (
      a * low + at_low.min((1, 2)).sum(),
      a * (high - step) + late.min((1, 2)).sum(),
    )
    return min(ends) - paid, low, high

  between = min(float(allocation.finish), top)
  heap = [over(0.0, between), over(between, top)][: 1 + (between < top)]
  heapq.heapify(heap)
  for _ in range(_MOST):
    _, low, high = heap[0]
    if high - low <= tolerance * high or heap[0][0] >= objective:
      break
    middle = (low + high) / 2
    heapq.heapreplace(heap, over(middle, high))
    heapq.heappush(heap, over(low, middle))
  return min(float(heap[0][0]), objective)
