"""Canaries: a lower bound on epsilon, from telling two worlds apart.

A mechanism is run many times with a client whose message is known, and many
times without. How well an attacker tells the two apart bounds epsilon from
below, with confidence: a bound above the accounted epsilon is a proof that the
mechanism is not what was accounted.

The attacker knows everything but the noise, as differential privacy supposes:
the model, the canary and everybody else's message.

Jagielski et al., Auditing Differentially Private Machine Learning, 2020,
https://arxiv.org/abs/2006.07709; Nasr et al., Tight Auditing of Differentially
Private Machine Learning, 2023, https://arxiv.org/abs/2302.07956
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import dp_accounting
import jax
import numpy as np
from jax_privacy import auditing
from scipy import optimize, stats

from fedjax_peft import validate
from fedjax_peft.audit import boundaries
from fedjax_peft.audit import voice as voice_lib


class Scores(NamedTuple):
  """How much each run looks like one with the canary.

  Attributes:
    present: float64 [runs].
    absent: float64 [runs].
  """

  present: np.ndarray
  absent: np.ndarray


def scores(
  seen: boundaries.Boundary,
  canary: Mapping[str, Any],
  other: Mapping[str, Any],
  key: jax.Array,
  runs: int,
) -> Scores:
  """Runs a boundary with a canary and without.

  Without means that the client takes no part, where its absence is to be
  hidden, and else that it holds other examples.

  Args:
    seen: the boundary.
    canary: {feature: [n, ...]}.
    other: {feature: [n, ...]}, what it holds instead.
    key: of cohort and runs; the cohort is the same in all.
    runs: of each kind.

  Raises:
    ValueError: if `runs` is below 1.
  """
  validate.at_least(1, runs=runs)
  seat, *keys = jax.random.split(key, 3)
  others = np.tile(boundaries.seats(seen, seat[None]), (runs, 1))
  mine, else_ = _pair(seen.voice, canary, other)
  way = _unit(mine)
  if not seen.absence:
    way = [a - b for a, b in zip(way, _unit(else_))]

  def run(message, here, key):
    many = jax.tree.map(lambda x: np.broadcast_to(x, (runs, *x.shape)), message)
    every = np.full(runs, here)
    rows = (many, others, every, jax.random.split(key, runs))
    got = jax.tree.leaves(boundaries.cross_many(seen, *rows))
    return sum(
      x.reshape(runs, -1).astype(np.float64) @ w for x, w in zip(got, way)
    )

  without = (mine, False) if seen.absence else (else_, True)
  return Scores(run(mine, True, keys[0]), run(*without, keys[1]))


def _pair(voice, canary, other):
  """What a client says of either."""
  both = jax.tree.map(lambda *x: np.stack(x), dict(canary), dict(other))
  said = voice_lib.of_many(voice, both)
  return [jax.tree.map(lambda x, i=i: x[i], said) for i in range(2)]


def _unit(message):
  """A message of length one, as flat float64 leaves."""
  leaves = [np.ravel(x).astype(np.float64) for x in jax.tree.leaves(message)]
  norm = math.sqrt(sum(x @ x for x in leaves))
  return [x / (norm or 1) for x in leaves]


def lower_bound(
  found: Scores, delta_dp: float, *, confidence: float = 0.95
) -> float:
  """A lower bound on epsilon at a delta, whatever the mechanism.

  By the exact intervals of both rates of error, over all thresholds. It cannot
  exceed about log(runs), and is loose where delta is small.

  Args:
    found: of runs that are independent of each other.
    delta_dp: in (0, 1).
    confidence: that the bound is below the true epsilon, in (0.5, 1).

  Raises:
    ValueError: if an argument is out of its range.
  """
  _check(delta_dp, confidence)
  auditor = auditing.CanaryScoreAuditor(found.present, found.absent)
  return float(auditor.epsilon_clopper_pearson(1 - confidence, delta_dp))


def gaussian_lower_bound(
  found: Scores, delta_dp: float, *, confidence: float = 0.95
) -> float:
  """The same of a mechanism whose noise is normal, of unknown width.

  Scores of the two worlds are normal with one variance then, and the distance
  of their means in standard deviations, of which the statistic of a t-test has
  a noncentral law, is all that matters. Much tighter than `lower_bound`.

  Args:
    found: two runs or more of either kind.
    delta_dp: in (0, 1).
    confidence: that the bound is below the true epsilon, in (0.5, 1).

  Returns:
    Epsilon >= 0; infinity where the scores differ and there is no noise.

  Raises:
    ValueError: if an argument is out of its range.
  """
  _check(delta_dp, confidence)
  mu = separation(found, confidence)
  if mu == 0 or math.isinf(mu):
    return mu
  # From dp-accounting, with noise of 1 / mu for a sensitivity of 1.
  return float(dp_accounting.get_epsilon_gaussian(1 / mu, delta_dp))


def separation(found: Scores, confidence: float = 0.95) -> float:
  """A lower bound on the distance of two normal laws of one variance.

  jax-privacy 2.0 has such a bound by thresholds (`epsilon_from_gdp`), which is
  several units above zero where both laws are the same.

  Returns:
    Standard deviations, >= 0; infinity where there is no variance.
  """
  sizes = len(found.present), len(found.absent)
  gap = found.present.mean() - found.absent.mean()
  squares = sum(np.square(x - x.mean()).sum() for x in found)
  free = sum(sizes) - 2
  if not squares:
    return math.inf if gap > 0 else 0.0
  width = math.sqrt(1 / sizes[0] + 1 / sizes[1])
  t = gap / math.sqrt(squares / free) / width
  if t <= stats.t.ppf(confidence, free):
    return 0.0

  def excess(centre):
    return stats.nct.sf(t, free, centre) - (1 - confidence)

  return optimize.brentq(excess, 0.0, t, xtol=1e-9) * width


def _check(delta_dp: float, confidence: float) -> None:
  """Raises ValueError unless both are in their range."""
  if not 0 < delta_dp < 1 or not 0.5 < confidence < 1:
    raise ValueError(
      "a bound needs delta_dp in (0, 1) and confidence in (0.5, 1): got "
      f"{delta_dp=} {confidence=}"
    )
