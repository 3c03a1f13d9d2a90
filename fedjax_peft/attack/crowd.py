"""The crowd: who attacks."""

from collections.abc import Sequence

import numpy as np

from fedjax_peft import data as data_lib
from fedjax_peft.attack import wrap


def attackers(
  data: data_lib.Population, who: float | Sequence[int], *, seed: int = 0
) -> data_lib.Population:
  """The same clients, some of whom attack.

  Args:
    data: the population.
    who: a fraction in [0, 1] of the clients that are trained on, drawn at
      random and rounded to the nearest number of clients; or their ids.
    seed: of the draw.

  Returns:
    The population with the trait `attacker`: 1 for who attacks, else 0.

  Raises:
    ValueError: for a fraction that is out of range or an id that is none.

  Example:
    >>> people = data_lib.population(
    ...   {"x": np.eye(4)}, [0, 1, 2, 3], heldout=0.0
    ... )
    >>> attackers(people, [1, 3]).traits["attacker"]
    array([0, 1, 0, 1], dtype=int32)
  """
  trait = np.zeros(len(data), np.int32)
  trait[_ids(data, who, seed)] = 1
  return data.with_traits(**{wrap.TRAIT: trait})


def _ids(data, who, seed):
  """Ids of the attackers."""
  if isinstance(who, float):
    if not 0 <= who <= 1:
      raise ValueError(
        f"the fraction of attackers must be in [0, 1], got {who}"
      )
    seen = np.flatnonzero(data.seen)
    drawn = np.random.default_rng(seed).permutation(seen)
    return drawn[: round(who * seen.size)]
  ids = np.asarray(who)
  if ids.size == 0:
    return np.zeros(0, np.int64)
  if (
    ids.ndim != 1
    or ids.dtype.kind not in "iu"
    or ids.min() < 0
    or ids.max() >= len(data)
  ):
    raise ValueError(
      "attackers must be a fraction such as 0.2 or a list of ids in "
      f"0..{len(data) - 1}, got {who!r}"
    )
  return ids
