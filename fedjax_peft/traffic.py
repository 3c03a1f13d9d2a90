"""Traffic: bytes that cross each boundary, counted on the arrays that cross."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import executor, work

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
    some, which = kinds(names, traits)
    when = number % algorithm.work.cycle
    found = [of_kind(kind, when) for kind in some]
    return {
      way: np.array([f[f"{low}/{way}"] for f in found], np.int64)[which]
      for way in WAYS
    }

  return of


def kinds(
  names: tuple[str, ...], traits: Mapping[str, np.ndarray]
) -> tuple[list[tuple[float, ...]], np.ndarray]:
  """Clients by what they are.

  Args:
    names: of the traits that matter.
    traits: {name: [C]} of these and maybe others.

  Returns:
    (values of the named traits, for each kind that there is; int [C], the kind
    of each client).
  """
  length = next((len(v) for v in traits.values()), 0)
  first, which = np.zeros(min(length, 1), int), np.zeros(length, int)
  for name in names:  # one after another, since sorting rows is slow
    values, code = np.unique(traits[name], return_inverse=True)
    _, first, which = np.unique(
      which * values.size + code, return_index=True, return_inverse=True
    )
  found = zip(*(np.asarray(traits[k], float)[first].tolist() for k in names))
  return list(found) if names else [()], which


class Stream(NamedTuple):
  """What all steps of clients take where a server has a part; axis C.

  Attributes:
    up: float64 [C], bytes that cross to the server.
    down: float64 [C], bytes that come back.
    device: float64 [C], FLOPs of the device.
    server: float64 [C], FLOPs of the server.
  """

  up: np.ndarray
  down: np.ndarray
  device: np.ndarray
  server: np.ndarray


def stream(job: work.Work) -> Callable[..., Stream]:
  """What clients' steps take, of a work whose `split` says it for one step.

  Returns:
    (sizes, steps, traits) -> Stream: int [C] examples of each client; int [C]
    batches of each, or None for what the work says; {trait: [C]} of those that
    the work reads. A pass ends with what is left, maybe fewer examples than a
    batch holds, and is counted as that.
  """
  names, batch = (*job.traits, "rows"), job.local.batch

  @functools.cache
  def of_kind(kind):
    traits = dict(zip(names, kind, strict=True))
    rows = int(traits.pop("rows"))
    return (*job.split.bytes(rows, traits), *job.split.flops(rows, traits))

  def of(sizes, steps, traits):
    full, short = _batches(job.local, sizes, steps)
    rest = np.where(short > 0, sizes % batch, batch)
    total = np.zeros((len(Stream._fields), len(sizes)))
    for rows, count in ((np.full_like(rest, batch), full), (rest, short)):
      some, which = kinds(names, {**traits, "rows": rows})
      each = np.array([of_kind(kind) for kind in some], np.float64)
      total += each.reshape(-1, len(total))[which].T * count
    return Stream(*total)

  return of


def _batches(how, sizes, steps):
  """(full batches, those that hold fewer examples) of clients, int [C].

  As `schedule.batches` cuts them: a pass is full batches and then the rest.
  """
  full, rest = np.divmod(sizes, how.batch)
  short = (rest > 0) & ~(how.drop_remainder & (full > 0))
  one = full + short  # batches of a pass
  if steps is None:
    steps = one * how.epochs if how.steps is None else how.steps
  total = np.where(sizes > 0, steps, 0)
  ended = np.where(short, total // np.maximum(one, 1), 0)
  return total - ended, ended


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

  Returns:
    {name: bytes}; those of `cut/...` crossed in the midst of steps, and are
    part of a client's.
  """
  present = np.asarray(cohort.weights) > 0
  crossed = _in_steps(algorithm.work, cohort)
  traits = {k: np.asarray(v)[present] for k, v in cohort.traits.items()}
  traits["present"] = np.ones(int(present.sum()))
  each = client(traits, number)
  found: dict[str, float] = {}
  for way in WAYS:
    total = int(each[way].sum())
    sent = total + crossed.get(f"cut/{way}", 0)
    found[f"{way}_client"] = sent / max(each[way].size, 1)
    found[f"{algorithm.tiers[0].name}/{way}"] = total
  for below, tier in itertools.pairwise(algorithm.tiers):
    synced = record[f"{tier.name}/synced"] * below.size
    for way in WAYS:
      found[f"{tier.name}/{way}"] = int(node[tier.name][way] * synced)
  return found | crossed


def _in_steps(job: work.Work, cohort: executor.Cohort) -> dict[str, int]:
  """Bytes that crossed a cut in the steps of a round, both ways."""
  if job.split is None:
    return {}
  plan = cohort.schedule
  here = np.nonzero(np.asarray(plan.slot) >= 0)
  at = here[0], np.asarray(plan.slot)[here]
  facts = {k: np.asarray(cohort.traits[k])[at] for k in job.traits}
  facts["rows"] = (np.asarray(plan.rows)[here] >= 0).sum(axis=-1)
  some, which = kinds((*job.traits, "rows"), facts)
  counts = np.bincount(which, minlength=len(some))
  up = down = 0
  for (*values, rows), count in zip(some, counts, strict=True):
    named = dict(zip(job.traits, values, strict=True))
    sizes = job.split.bytes(int(rows), named)
    up, down = up + sizes[0] * int(count), down + sizes[1] * int(count)
  return {"cut/up_bytes": up, "cut/down_bytes": down}
