"""Spells: two states that a client is in for a while, without any memory.

A two-state Markov chain (Gilbert, 1960; Elliott, 1963) that can be asked about
any moment: at each step, with the probability `1 - stay`, a client forgets its
state and draws a new one from the stationary distribution, else it stays. The
state at a step is so the one drawn when it last forgot, and to look that up is
to go back a few steps. The chain is exactly Gilbert's where a spell lasts at
least as long as that of independent draws.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from fedjax_peft.network import draw


def inside(
  seed: int,
  purpose: str,
  number: ArrayLike,
  ids: ArrayLike,
  *,
  share: float,
  stay: float,
) -> np.ndarray:
  """Whether clients are inside a spell at a step.

  Args:
    seed: of the run.
    purpose: what the spells are of.
    number: integers >= 0, the step.
    ids: integers, clients; broadcast against `number`.
    share: in [0, 1], the fraction of time inside.
    stay: in [0, 1), the probability to keep the state without a draw; the
      correlation of two steps that follow each other.

  Returns:
    Bool, shaped like the broadcast of `number` and `ids`. A client that is
    inside leaves with probability (1 - stay) (1 - share) at each step.

  Example:
    >>> inside(0, "tunnel", [0, 1, 2, 3, 4, 5], 5, share=0.5, stay=0.7)
    array([False, False, False,  True,  True,  True])
  """
  number, ids = np.broadcast_arrays(number, ids)
  at = number.astype(np.int64).reshape(-1)
  who = ids.reshape(-1)
  looking = np.arange(at.size)  # whose last draw is not found yet
  while looking.size:
    fresh = draw.uniform(seed, f"{purpose}/fresh", at[looking], who[looking])
    # The chain begins at step 0, with a draw.
    looking = looking[(fresh < stay) & (at[looking] > 0)]
    at[looking] -= 1
  state = draw.uniform(seed, f"{purpose}/state", at, who) < share
  return state.reshape(ids.shape)


def staying(share: float, mean: float) -> float:
  """The `stay` with which spells last `mean` steps on average.

  Args:
    share: in [0, 1), the fraction of time inside.
    mean: steps, at least 1 / (1 - share), which is that of independent draws.

  Raises:
    ValueError: if `mean` is shorter.
  """
  least = 1 / (1 - share)
  if not least * (1 - 1e-12) <= mean < math.inf:
    raise ValueError(
      f"spells that fill {share} of the time last at least {least:.3g} steps "
      f"on average, got {mean}; make them longer or rarer"
    )
  return max(0.0, 1 - least / mean)
