"""Steps: how often clients and server synchronize.

More local steps between two rounds save bytes and, on clients that differ,
cost accuracy. How many to take is a choice for all (`adaptive`) or for each
(`within`).

Wang and Joshi, Adaptive Communication Strategies (AdaComm), 2019,
https://arxiv.org/abs/1810.08313
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from fedjax_peft import validate


def adaptive(first: int, start: float, now: float) -> int:
  """Fewer steps as the loss falls (AdaComm).

  Args:
    first: steps of the first rounds, H_0 >= 1.
    start: loss at the start, F_0 > 0.
    now: loss now, F_t >= 0.

  Returns:
    H_t = ceil(sqrt(F_t / F_0) H_0), at least 1.

  Raises:
    ValueError: if an argument is out of range.

  Example:
    >>> [adaptive(8, 2.0, loss) for loss in (2.0, 1.0, 0.5, 0.01)]
    [8, 6, 4, 1]
  """
  validate.at_least(1, first=first)
  validate.positive(start=start)
  if not 0 <= now < math.inf:
    raise ValueError(f"now must be a loss of at least 0, got now={now}")
  return max(1, math.ceil(math.sqrt(now / start) * first))


def within(
  deadline: float,
  seconds: ArrayLike,
  *,
  overhead: ArrayLike = 0.0,
  least: int = 1,
  most: int,
) -> np.ndarray:
  """As many steps as fit into the deadline, for each client.

  Args:
    deadline: seconds, > 0.
    seconds: float64 [C], of one step, > 0.
    overhead: seconds of all else (links), a number or [C], >= 0.
    least: steps of those who cannot make it, >= 0; they will be late.
    most: steps of the fastest, >= `least`.

  Returns:
    int64 [C], in least..most.

  Raises:
    ValueError: if an argument is out of range.

  Example:
    >>> within(10.0, [1.0, 2.5, 30.0], overhead=2.0, most=6)
    array([6, 3, 1])
  """
  validate.positive(deadline=deadline)
  validate.at_least(0, least=least)
  validate.at_least(max(least, 1), most=most)
  seconds = np.asarray(seconds, np.float64)
  overhead = np.asarray(overhead, np.float64)
  if not (seconds > 0).all():
    raise ValueError(f"seconds of a step must be above 0, got {seconds.min()}")
  if not (overhead >= 0).all():
    raise ValueError(f"overhead must be at least 0, got {overhead.min()}")
  fit = np.floor((deadline - overhead) / seconds)
  return np.clip(fit, least, most).astype(np.int64)
