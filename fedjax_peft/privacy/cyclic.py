"""Cyclic sampling: a client can take part once in so many rounds.

Clients are dealt out to `period` groups by their id, and the groups take
turns; within its turn each client flips a coin of its own. So two rounds of one
client are at least `period` apart, whoever else there is: what noise that is
correlated over rounds needs to know.

Choquette-Choo et al., (Amplified) Banded Matrix Factorization, 2023,
https://arxiv.org/abs/2306.08153
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from fedjax_peft import sampling, validate


class Cycle(NamedTuple):
  """How a cyclic sampler draws.

  Attributes:
    period: rounds between two turns of a client.
    rate: probability that it takes part in its turn.
  """

  period: int
  rate: float


def cyclic(period: int, rate: float = 1.0) -> sampling.Sampler:
  """Client i may take part in the rounds t with t = i modulo `period`.

  Args:
    period: rounds between two turns of a client, >= 1; 1 is `poisson(rate)`.
    rate: probability that a client takes part in its turn, in (0, 1].

  Raises:
    ValueError: if an argument is out of its range.

  Example:
    >>> cyclic(4, 0.5).name
    'cyclic(4, 0.5)'
  """
  validate.at_least(1, period=period)
  if not 0 < rate <= 1:
    raise ValueError(f"rate must be a probability above 0: got {rate=}")
  cycle = Cycle(period, float(rate))
  return sampling.Sampler(
    f"cyclic({period}, {rate})",
    functools.partial(_draw, cycle),
    functools.partial(_most, cycle),
  )


def of_size(size: int, period: int, clients: int) -> sampling.Sampler:
  """A cyclic sampler that draws `size` clients on average.

  Args:
    size: clients of a round, on average.
    period: see `cyclic`.
    clients: that there are to train on.

  Raises:
    ValueError: if a turn has fewer clients than that.
  """
  if size * period > clients:
    raise ValueError(
      f"{clients} clients in {period} groups are fewer than {size} a turn: got "
      f"{size=} {period=}; use size={clients // period} or less, or a shorter "
      "period"
    )
  return cyclic(period, size * period / clients)


def cycle_of(sampler: sampling.Sampler) -> Cycle | None:
  """How a cyclic sampler draws; None for any other sampler."""
  draw = sampler.draw
  if isinstance(draw, functools.partial) and draw.func is _draw:
    return draw.args[0]
  return None


def check(sampler: sampling.Sampler, bands: int) -> Cycle:
  """Checks that no client takes part twice within so many rounds.

  Args:
    sampler: who takes part.
    bands: of the noise: a round's noise is correlated with that of `bands` - 1
      rounds before it, by what is added up.

  Returns:
    How it draws.

  Raises:
    ValueError: if the sampler promises no such thing: where cohorts are drawn
      anew in each round, or by what clients have.
  """
  validate.at_least(1, bands=bands)
  cycle = cycle_of(sampler)
  if cycle is None or cycle.period < bands:
    raise ValueError(
      f"noise of {bands} bands hides a client that takes part once in {bands} "
      f"rounds at most: got sampler {sampler.name}; use cyclic({bands}, "
      "rate=...), or independent noise"
    )
  return cycle


def _turn(cycle: Cycle, round: int, data) -> np.ndarray:
  """Clients whose turn it is."""
  seen = np.flatnonzero(data.seen)
  return seen[seen % cycle.period == round % cycle.period]


def _draw(cycle, rng, round, data):
  """Those of them whose coin says so."""
  ids = _turn(cycle, round, data)
  return ids[rng.random(ids.size) < cycle.rate]


def _most(cycle, data):
  """Of the largest group: ten standard deviations above the mean, or all."""
  n = max(_turn(cycle, t, data).size for t in range(cycle.period))
  spread = 10 * math.sqrt(n * cycle.rate * (1 - cycle.rate)) + 1
  return min(n, math.ceil(n * cycle.rate + spread))
