"""The table: every attack on one boundary, beside what the accountant says."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_peft.audit import (
  boundaries,
  canary,
  deal,
  inversion,
  membership,
  properties,
  score,
  voice,
)
from fedjax_peft.privacy import accounting, events

DELTA = 1e-5


class Sizes(NamedTuple):
  """How much is tried.

  Attributes:
    targets: images that are searched for, each the one example of a client.
    search: how hard.
    trials: clients whose members are looked for.
    examples: n of a client of which members or a property are looked for.
    fitted: clients that a probe of properties is fitted to.
    probed: clients that it is tried on.
    runs: of a canary, with and without.
  """

  targets: int = 16
  search: inversion.Search = inversion.Search()
  trials: int = 100
  examples: int = 4
  fitted: int = 300
  probed: int = 200
  runs: int = 2000


QUICK = Sizes(
  targets=4,
  search=inversion.Search(steps=150, restarts=1),
  trials=32,
  fitted=96,
  probed=64,
  runs=160,
)


def audit(
  seen: boundaries.Boundary, pool: deal.Pool, sizes: Sizes, seed: int = 0
) -> dict[str, Any]:
  """All attacks on a boundary.

  Args:
    seen: the boundary.
    pool: whose images clients hold.
    sizes: how much is tried.
    seed: of clients and of the boundary's randomness; boundaries with one seed
      are attacked with the same clients.

  Returns:
    A row of the table, for JSON: {"inversion", "membership", "property"} as
    the functions below return them, "epsilon_lower", "epsilon_accounted" (None
    where nothing is promised) and "told".
  """
  return {
    "inversion": inverted(seen, pool, sizes, seed),
    "membership": members(seen, pool, sizes, seed),
    "property": property_of(seen, pool, sizes, seed),
    "epsilon_lower": epsilon_lower(seen, pool, sizes, seed),
    "epsilon_accounted": epsilon_accounted(seen),
    "told": seen.told,
  }


def inverted(seen, pool, sizes, seed) -> dict[str, float]:
  """Decibels of what a search finds, and of the mean image of the class.

  The second is what an attacker guesses that saw nothing but the label.
  """
  rng = np.random.default_rng((seed, 0))
  rows = rng.choice(len(pool.label), (sizes.targets, 1), replace=False)
  true = deal.examples(pool, rows)
  key, start = jax.random.split(jax.random.key(seed))
  found = inversion.invert(
    seen.voice,
    boundaries.observe(seen, true, key),
    true[voice.LABEL],
    pool.image.shape[1:],
    start,
    sizes.search,
  )
  rest = np.setdiff1d(np.arange(len(pool.label)), rows)
  means = [
    pool.image[rest][pool.label[rest] == c].mean(0) for c in range(pool.classes)
  ]
  guess = np.stack(means)[true[voice.LABEL]]
  truth = true[voice.IMAGE]
  decibels, guessed = score.psnr(found, truth), score.psnr(guess, truth)
  return {
    "psnr": float(np.mean(decibels)),
    "psnr_guess": float(np.mean(guessed)),
    "better_than_guess": float(np.mean(decibels > guessed)),
  }


def members(seen, pool, sizes, seed) -> dict[str, Any]:
  """AUC of members against examples of the same classes that took no part."""
  rng = np.random.default_rng((seed, 1))
  majority = rng.integers(0, pool.classes, sizes.trials)
  n = sizes.examples
  rows = deal.rows(pool, majority, 2 * n, rng)
  key = jax.random.fold_in(jax.random.key(seed), 1)
  observed = boundaries.observe(seen, deal.examples(pool, rows[:, :n]), key)
  candidates = deal.examples(pool, rows)
  scores = {"alignment": membership.alignment(seen, observed, candidates)}
  if not seen.rows:
    model, base = seen.voice.model, seen.voice.weights[1]
    before, after = (
      membership.lower_loss(
        model, membership.after_update(seen, observed, length), base, candidates
      )
      for length in (0.0, 0.1)
    )
    scores["loss"] = after - before
  return {
    name: score.auc_interval(x[:, :n], x[:, n:], seed=seed)._asdict()
    for name, x in scores.items()
  }


def property_of(seen, pool, sizes, seed) -> dict[str, float]:
  """Accuracy of a probe that guesses of which class most examples are."""
  rng = np.random.default_rng((seed, 2))
  majority = rng.integers(0, pool.classes, sizes.fitted + sizes.probed)
  rows = deal.rows(pool, majority, sizes.examples, rng)
  key = jax.random.fold_in(jax.random.key(seed), 2)
  observed = boundaries.observe(seen, deal.examples(pool, rows), key)
  x = properties.features(observed, seen.rows)
  hits = properties.hits(x, majority, pool.classes, sizes.fitted)
  return {**score.accuracy(*hits)._asdict(), "chance": 1 / pool.classes}


def epsilon_lower(seen, pool, sizes, seed) -> float:
  """What a canary proves about epsilon, with a confidence of 0.95."""
  rng = np.random.default_rng((seed, 3))
  rows = rng.choice(len(pool.label), (2, sizes.examples), replace=False)
  mine, other = (deal.examples(pool, r) for r in rows)
  key = jax.random.fold_in(jax.random.key(seed), 3)
  found = canary.scores(seen, mine, other, key, sizes.runs)
  if seen.multiplier is None:
    return canary.lower_bound(found, DELTA)
  return canary.gaussian_lower_bound(found, DELTA)


def epsilon_accounted(seen) -> float | None:
  """Epsilon of one message, by the accountant; None: nothing is promised."""
  if seen.multiplier is None:
    return None
  if seen.event is None:
    found = accounting.epsilon(events.poisson(seen.multiplier, 1.0), DELTA)
  else:
    found = accounting.epsilon(seen.event, DELTA, accountant="rdp")
  return None if math.isinf(found) else found
