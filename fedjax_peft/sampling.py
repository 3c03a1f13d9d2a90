"""Sampling: who takes part in a round.

A draw depends on (seed, round) and the population, on nothing else, so a
resumed run meets the same cohorts.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedjax_peft import data as data_lib
from fedjax_peft import validate


class Sampler(NamedTuple):
  """Who takes part in a round.

  Attributes:
    name: for records and messages.
    draw: (rng, round, data) -> int array of client ids, all different; `rng`
      is a numpy Generator of (seed, round).
    most: (data) -> the most clients that one draw can return.
  """

  name: str
  draw: Callable[[np.random.Generator, int, "data_lib.Population"], np.ndarray]
  most: Callable[["data_lib.Population"], int]


def uniform(size: int) -> Sampler:
  """The same number of clients each round, without replacement.

  Args:
    size: cohort size, at most the number of seen clients.
  """
  validate.at_least(1, size=size)

  def draw(rng, round, data):
    seen = np.flatnonzero(data.seen)
    if size > seen.size:
      raise ValueError(
        f"a cohort cannot be larger than the population: cohort size={size}, "
        f"clients to train on={seen.size}; use size={seen.size} or less"
      )
    return rng.choice(seen, size, replace=False)

  return Sampler(f"uniform({size})", draw, lambda data: size)


def poisson(rate: float) -> Sampler:
  """Every client takes part by itself, with the same probability.

  What privacy accountants call Poisson sampling: the cohort's size is random,
  and may be zero. Compiled shapes are padded, absent places weigh nothing.

  Args:
    rate: probability, 0 < rate <= 1.
  """
  if not 0 < rate <= 1:
    raise ValueError(f"rate must be a probability above 0: got {rate=}")

  def draw(rng, round, data):
    seen = np.flatnonzero(data.seen)
    return seen[rng.random(seen.size) < rate]

  def most(data):
    # Ten standard deviations: beyond that a draw is no longer Poisson's.
    n = int(np.sum(data.seen))
    spread = 10 * math.sqrt(n * rate * (1 - rate)) + 1
    return min(n, math.ceil(n * rate + spread))

  return Sampler(f"poisson({rate})", draw, most)


def cohort_of(
  sampler: Sampler, data: "data_lib.Population", seed: int, round: int
) -> np.ndarray:
  """Draws and checks the cohort of one round.

  Returns:
    int32 [C] client ids.

  Raises:
    ValueError: if the draw is not a set of clients of the population, or is
      larger than the sampler said it could be.
  """
  rng = np.random.Generator(np.random.Philox(key=[seed, round]))
  ids = np.asarray(sampler.draw(rng, round, data))
  n, most = len(data), sampler.most(data)
  if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
    raise ValueError(
      f"sampler {sampler.name} must return a list of client ids: got "
      f"{ids.dtype} {list(ids.shape)}"
    )
  if ids.size and not (ids.min() >= 0 and ids.max() < n):
    raise ValueError(
      f"sampler {sampler.name} must return ids in 0..{n - 1}: got "
      f"{ids.min()}..{ids.max()}"
    )
  if np.unique(ids).size < ids.size:
    raise ValueError(
      f"sampler {sampler.name} drew a client twice in round {round}; draw "
      "without replacement"
    )
  if ids.size > most:
    raise ValueError(
      f"sampler {sampler.name} drew {ids.size} clients in round {round}, more "
      f"than the {most} it said it could; raise what `most` returns"
    )
  return ids.astype(np.int32)
