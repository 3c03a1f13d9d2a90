"""Traffic: bytes that cross each boundary, counted on the arrays that cross."""

import functools
import itertools
from collections.abc import Callable, Mapping

import numpy as np

from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import executor

WAYS = ("up_bytes", "down_bytes")
Sizes = Callable[[Mapping[str, np.ndarray], int], dict[str, np.ndarray]]


def sizes(algorithm: algorithm_lib.Algorithm, most: int) -> Sizes:
  """Bytes of clients' messages, by what they are.

  Args:
    algorithm: whose messages.
    most: senders at most.

  Returns:
    ({trait: [C]}, round) -> {"up_bytes": int64 [C], "down_bytes": int64 [C]},
    one entry for each client; the traits are those that the work reads.
  """
  low, names = algorithm.tiers[0].name, algorithm.work.traits

  @functools.cache
  def of_kind(kind, when):
    named = dict(zip(names, kind, strict=True))
    return algorithm.bytes(most, traits=named, round=when)

  def of(traits, number):
    length = next((len(v) for v in traits.values()), 0)
    first, which = np.zeros(min(length, 1), int), np.zeros(length, int)
    for name in names:  # one after another, since sorting rows is slow
      values, code = np.unique(traits[name], return_inverse=True)
      _, first, which = np.unique(
        which * values.size + code, return_index=True, return_inverse=True
      )
    kinds = zip(*(np.asarray(traits[k], float)[first].tolist() for k in names))
    when = number % algorithm.work.cycle
    found = [of_kind(kind, when) for kind in (kinds if names else [()])]
    return {
      way: np.array([f[f"{low}/{way}"] for f in found], np.int64)[which]
      for way in WAYS
    }

  return of


def between(
  algorithm: algorithm_lib.Algorithm, most: int
) -> dict[str, dict[str, int]]:
  """Bytes of one message into each tier above the lowest, up and down."""
  traits = dict.fromkeys(algorithm.work.traits, 0.0)
  found = algorithm.bytes(most, traits=traits, round=0)
  return {
    tier.name: {way: int(found[f"{tier.name}/{way}"]) for way in WAYS}
    for tier in algorithm.tiers[1:]
  }


def of_round(
  algorithm: algorithm_lib.Algorithm,
  client: Sizes,
  node: Mapping[str, Mapping[str, int]],
  cohort: executor.Cohort,
  record: Mapping[str, float],
  number: int,
) -> dict[str, float]:
  """Bytes that crossed each boundary in a round, up and down.

  Args:
    algorithm: of the run.
    client: from `sizes`.
    node: from `between`.
    cohort: of the round.
    record: of the round, for the tiers that have synchronized.
    number: of the round.
  """
  present = np.asarray(cohort.weights) > 0
  traits = {k: np.asarray(v)[present] for k, v in cohort.traits.items()}
  traits["present"] = np.ones(int(present.sum()))
  each = client(traits, number)
  found: dict[str, float] = {}
  for way in WAYS:
    total = int(each[way].sum())
    found[f"{way}_client"] = total / max(each[way].size, 1)
    found[f"{algorithm.tiers[0].name}/{way}"] = total
  for below, tier in itertools.pairwise(algorithm.tiers):
    synced = record[f"{tier.name}/synced"] * below.size
    for way in WAYS:
      found[f"{tier.name}/{way}"] = int(node[tier.name][way] * synced)
  return found
