"""Draws: what happens to a client in a round, as a function of its name.

A draw depends on (seed, purpose, number, id) and on nothing else: not on who
else takes part, on the order of clients or on what was drawn before. So a run
that goes on after a stop, another cohort or another policy sees the same
network.
"""

import zlib

import numpy as np
import numpy.typing as npt
import scipy.special

from fedjax_peft.data import hashing


def uniform(
  seed: int, purpose: str, number: npt.ArrayLike, ids: npt.ArrayLike
) -> np.ndarray:
  """Draws from the uniform distribution on (0, 1), both ends left out.

  Args:
    seed: of the run.
    purpose: what the draw is for; different purposes are independent.
    number: integers, usually the round.
    ids: integers, usually clients; broadcast against `number`.

  Returns:
    float64, shaped like the broadcast of `number` and `ids`.

  Example:
    >>> a, b = uniform(0, "fading", 3, [7, 9])
    >>> bool(uniform(0, "fading", 3, 9) == b), bool(a == b)
    (True, False)
  """
  bits = hashing.mix(seed, zlib.crc32(purpose.encode()), number, ids)
  # 52 bits and a half: with 53 the largest would round to 1.
  return ((bits >> np.uint64(12)) + 0.5) * 2.0**-52


def normal(
  seed: int, purpose: str, number: npt.ArrayLike, ids: npt.ArrayLike
) -> np.ndarray:
  """Draws from the normal distribution of mean 0 and variance 1.

  By the inverse of its distribution function, which costs one draw. See
  `uniform` for the arguments and the shape.
  """
  return scipy.special.ndtri(uniform(seed, purpose, number, ids))


def exponential(
  seed: int, purpose: str, number: npt.ArrayLike, ids: npt.ArrayLike
) -> np.ndarray:
  """Draws from the exponential distribution of mean 1; see `uniform`."""
  return -np.log(uniform(seed, purpose, number, ids))
