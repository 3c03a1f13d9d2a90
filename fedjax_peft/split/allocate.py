"""Allocation: cut, bits, power, band and server shares, all together.

  minimize  weight T / T0 + (1 - weight) sum E_k / E0 + error_weight sum error_k

over what a `Problem` describes. Block after block, each kept only if the
objective does not rise:

| block | what it finds | with the rest |
| --- | --- | --- |
| `own` | every client's cut, bits and power | T and shares as they are; exact |
| `prices` | cuts and bits of all at once | prices as they are; tried |
| `channels` | who has which sub-channel | T, cuts and bits as they are; exact |
| `some` | `prices`, of those who gain most | tried, where the others are done |
| `single` | the cut and bits of one client | the others' as they are; exact |

T, powers and shares follow every change, by the solution of a convex problem
(`shares`), so an objective is always that of the best ones. Where no client
would gain by moving, all might gain by moving together: the price of a hertz
and of a FLOP/s tells each what its move does to the others. `single` settles
as many problems as there are other choices, and is left out for many clients.
How far any allocation could be from the best one says `bound`.

SFLAM, https://arxiv.org/abs/2504.09114, alternates over the same variables.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedjax_peft.split import blocks, outcome, sequence
from fedjax_peft.split.outcome import Allocation
from fedjax_peft.split.problem import Problem

_STOP = 1e-4  # fall of the objective, relative, that ends the descent
_PASSES = 50
_FEW = 64  # clients, for whom several starts take no time
_BLOCKS = blocks.own, blocks.prices, blocks.channels
_CLOSER = blocks.some, blocks.single


class Step(NamedTuple):
  """One block's turn: the objective that it found, and whether it was kept."""

  block: str
  objective: float
  kept: bool


class Solution(NamedTuple):
  """An allocation, and the steps that led to it."""

  allocation: Allocation
  steps: tuple[Step, ...]

  @property
  def trace(self) -> list[float]:
    """The objective after every step that was kept; it does not rise."""
    return [step.objective for step in self.steps if step.kept]


class Point(NamedTuple):
  """A point of a trade between time and energy."""

  weight: float
  allocation: Allocation


def optimize(problem: Problem) -> Solution:
  """The best allocation found, from several starts where clients are few.

  Where clients take turns it is the optimum.

  Args:
    problem: what there is to divide.

  Raises:
    ValueError: if the deadline is not met.
  """
  if problem.in_turn:
    found = sequence.optimum(problem)
    return Solution(found, (Step("all", float(found.objective), True),))
  solutions = [descend(problem, *start) for start in _starts(problem)]
  best = min(solutions, key=lambda x: x.allocation.objective)
  if np.isfinite(best.allocation.objective):
    return best
  hurry = dataclasses.replace(
    problem, weight=1.0, error_weight=0.0, deadline=math.inf
  )
  soonest = optimize(hurry).allocation
  if soonest.finish > problem.deadline:
    widest = int(np.argmax(soonest.width))
    raise ValueError(
      f"the deadline is {problem.deadline:.4g} s, and the soonest finish that "
      f"was found is {soonest.finish:.4g} s: give more time or bandwidth, or "
      f"leave clients out (client {widest} takes most of the band)"
    )
  return descend(problem, soonest.cut, soonest.bits, soonest.channel)


def adapt(
  problem: Problem, gains: npt.ArrayLike, previous: Allocation
) -> Solution:
  """Allocates anew where only gains have changed: another round's fading.

  Cuts and bits follow the rates, from what they were. It takes a pass or two,
  and looks less closely than `optimize`.

  Args:
    problem: as it was.
    gains: of this round, as in `Problem`.
    previous: an allocation for other gains.

  Raises:
    ValueError: if the deadline is not met.
  """
  now = dataclasses.replace(problem, gains=np.asarray(gains))
  if now.in_turn:
    return optimize(now)
  start = previous.cut, previous.bits, previous.channel
  found = descend(now, *start, closer=False)
  return found if np.isfinite(found.allocation.objective) else optimize(now)


def pareto(problem: Problem, weights: Iterable[float]) -> list[Point]:
  """The trade between time and energy: what different weights come to.

  What is found for one weight is tried for all, so that no point is worse by
  its own weight than another. Points that another beats in time and energy are
  left out.

  Args:
    problem: its own weight does not count.
    weights: each in [0, 1].

  Returns:
    Points by rising finish; their energy falls.
  """
  problems = [dataclasses.replace(problem, weight=w) for w in weights]
  found = [optimize(p).allocation for p in problems]
  points = []
  for each, best in zip(problems, found, strict=True):
    tried = [best]
    if not problem.in_turn:  # then it is the optimum
      tried += [
        outcome.settle(each, x.cut, x.bits, x.channel)
        for x in found
        if x is not best
      ]
    points.append(Point(each.weight, min(tried, key=lambda x: x.objective)))
  points.sort(key=lambda p: (p.allocation.finish, p.allocation.joules.sum()))
  kept: list[Point] = []
  for point in points:
    joules = point.allocation.joules.sum()
    if not kept or joules < kept[-1].allocation.joules.sum():
      kept.append(point)
  return kept


def descend(
  problem: Problem,
  cut: np.ndarray,
  bits: np.ndarray,
  channel: np.ndarray | None = None,
  *,
  closer: bool = True,
) -> Solution:
  """Goes downhill from a choice, block after block.

  Args:
    problem: of clients that work at once.
    cut: int [C], where to start.
    bits: int [C].
    channel: int [H], where there are sub-channels.
    closer: whether to look at parts of moves and at single clients in the end.

  Returns:
    A Solution; its objective is inf if that of the start is.
  """
  if problem.gains.ndim == 2 and channel is None:
    channel = _first_channels(problem, cut, bits)
  now = outcome.settle(problem, cut, bits, channel)
  steps = [Step("start", float(now.objective), True)]
  for number in range(_PASSES if np.isfinite(now.objective) else 0):
    before = now.objective
    for group in (_BLOCKS, _CLOSER)[: 1 + closer]:
      for block in group:
        tried = block(problem, now, number)
        if tried is None:
          continue
        kept = bool(tried.objective <= now.objective)
        steps.append(Step(block.__name__, float(tried.objective), kept))
        now = tried if kept else now
      if before - now.objective > _STOP * before:
        break
    else:
      break
  return Solution(now, tuple(steps))


def _starts(problem: Problem) -> list[tuple[np.ndarray, np.ndarray]]:
  """Cuts and bits to start from: the best of equal shares; more for few."""
  weights = [problem.weight]
  if len(problem) <= _FEW:
    weights += [1.0, 0.01]
  starts: dict = {}
  for weight in weights:
    even = outcome.equal(dataclasses.replace(problem, weight=weight))
    starts[even.cut.tobytes(), even.bits.tobytes()] = (even.cut, even.bits)
  return list(starts.values())


def _first_channels(problem: Problem, cut, bits) -> np.ndarray:
  """Sub-channels with which the last would be done soonest, int [H]."""
  even = outcome.equal(problem)
  return blocks.divide(problem, even._replace(cut=cut, bits=bits), "max")
