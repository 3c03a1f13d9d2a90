"""On and off: links that disconnect for a while (Gilbert and Elliott).

A link is good or bad. From one round to the next a good one turns bad with
probability `p_gb`, a bad one good with `p_bg`, so it is bad for 1 / p_bg rounds
on average and in p_gb / (p_gb + p_bg) of all rounds.

The chain is made of renewals: in a round it either forgets what it was, or
stays as it was (turns over, where p_gb + p_bg > 1). So its state in a round is
known by looking back to the last renewal, without stepping through all rounds,
and stepping gives the same state.

Gilbert, Capacity of a Burst-Noise Channel, 1960; Elliott, 1963.
"""

import numpy as np
import numpy.typing as npt

from fedjax_peft.network import draw


def stationary(p_gb: float, p_bg: float) -> float:
  """Fraction of rounds in which a link is bad; 0 if it never turns bad."""
  return p_gb / (p_gb + p_bg) if p_gb else 0.0


def transition(p_gb: float, p_bg: float, rounds: int = 1) -> np.ndarray:
  """Probabilities of going from state i to state j, 0 = good, in k rounds.

  In closed form: P^k = 1 pi + (1 - p_gb - p_bg)^k (I - 1 pi).

  Returns:
    float64 [2, 2]; rows sum to one.
  """
  bad = stationary(p_gb, p_bg)
  limit = np.array([[1 - bad, bad]] * 2)
  return limit + (1 - p_gb - p_bg) ** rounds * (np.eye(2) - limit)


def advance(
  bad: np.ndarray, u: np.ndarray, p_gb: float, p_bg: float, rounds: int = 1
) -> np.ndarray:
  """The states after k rounds, from those now and one draw for each client.

  Args:
    bad: bool [C], the states now.
    u: float64 [C], uniform on (0, 1).
    p_gb: probability of good to bad.
    p_bg: probability of bad to good.
    rounds: k.

  Returns:
    bool [C].
  """
  return u < transition(p_gb, p_bg, rounds)[:, 1][bad.astype(np.int64)]


def step(
  bad: np.ndarray,
  seed: int,
  number: int,
  ids: npt.ArrayLike,
  p_gb: float,
  p_bg: float,
) -> np.ndarray:
  """The states in round `number`, from those in the round before.

  Returns:
    bool [C], as `is_bad` says.
  """
  u = draw.uniform(seed, "onoff", number, ids)
  renewal, fresh, turns = _renewal(p_gb, p_bg)
  return np.where(u < renewal, u < renewal * fresh, bad ^ turns)


def is_bad(
  seed: int, number: int, ids: npt.ArrayLike, p_gb: float, p_bg: float
) -> np.ndarray:
  """Whether links are bad in a round, as a function of (seed, round, client).

  Looks back one round after another, 1 / min(s, 2 - s) rounds on average with
  s = p_gb + p_bg; where that is many, carry the state and `step`.

  Args:
    seed: of the run.
    number: the round, >= 0; in round 0 the chain is stationary.
    ids: integers [C].
    p_gb: probability of good to bad, in [0, 1].
    p_bg: probability of bad to good, in [0, 1].

  Returns:
    bool [C].
  """
  ids = np.asarray(ids)
  bad = np.zeros(ids.shape, bool)
  if p_gb == 0:
    return bad
  renewal, fresh, turns = _renewal(p_gb, p_bg)
  rest = np.arange(ids.size)  # places whose last renewal is not yet known
  for now in range(number, -1, -1):
    u = draw.uniform(seed, "onoff", now, ids[rest])
    if now == 0:
      renewal, fresh = 1.0, stationary(p_gb, p_bg)
    known = u < renewal
    odd = turns and (number - now) % 2 == 1
    bad[rest[known]] = (u[known] < renewal * fresh) ^ odd
    rest = rest[~known]
    if not rest.size:
      break
  return bad


def _renewal(p_gb: float, p_bg: float) -> tuple[float, float, bool]:
  """(P(renewal), P(bad after one), whether it turns over otherwise)."""
  both = p_gb + p_bg
  if both <= 1:
    return both, stationary(p_gb, p_bg), False
  # good to bad: (s - 1) + (2 - s) fresh = p_gb
  return 2 - both, (1 - p_bg) / (2 - both) if both < 2 else 0.0, True
