"""Hashing: integers that look random, as a function of integers.

What is drawn from a counter depends on what it is drawn for, and on nothing
that was drawn before it.

Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014,
https://doi.org/10.1145/2660193.2660195
"""

import numpy as np
import numpy.typing as npt


def mix(*words: npt.ArrayLike) -> np.ndarray:
  """Mixes integers into uint64s, one for each row of the broadcast words.

  The finalizer of SplitMix64 after each word. Scalars are mixed once, so put
  them before the arrays.

  Args:
    *words: integers of at most 64 bits, of shapes that broadcast.

  Returns:
    uint64, shaped like the broadcast words.
  """
  state = np.zeros((), np.uint64)
  with np.errstate(over="ignore"):
    for word in words:
      state = state + np.asarray(word).astype(np.int64).view(np.uint64)
      state = state + np.uint64(0x9E3779B97F4A7C15)
      state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
      state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
      state = state ^ (state >> np.uint64(31))
  return state
