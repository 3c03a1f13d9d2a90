"""Traffic: bytes that cross each boundary, counted on the arrays that cross."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import executor, tailoring, work

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
  low, names = algorithm.tiers[0].name, _kinds_of(algorithm.work)

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


def _kinds_of(job: work.Work) -> tuple[str, ...]:
  """Traits that say how much crosses at a time; a link's absence does not."""
  return tuple(k for k in job.traits if k != tailoring.ONLINE)


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
    batch holds, and is counted as that. Where clients have a link in the first
    steps only (the trait `online`), the device alone computes in the others.
  """
  names, batch = (*_kinds_of(job), "rows"), job.local.batch
  is_gated = tailoring.ONLINE in job.traits

  @functools.cache
  def of_kind(kind):
    traits = dict(zip(names, kind, strict=True))
    rows = int(traits.pop("rows"))
    return (*job.split.bytes(rows, traits), *job.split.flops(rows, traits))

  def of(sizes, steps, traits):
    taken = _batches(job.local, sizes, steps)
    most = traits.get(tailoring.ONLINE) if is_gated else None
    linked = _batches(job.local, sizes, steps, most)
    rest = np.where(taken[1] > 0, sizes % batch, batch)
    total = np.zeros((len(Stream._fields), len(sizes)))
    rows_of = (np.full_like(rest, batch), rest)
    for rows, count, here in zip(rows_of, taken, linked, strict=True):
      some, which = kinds(names, {**traits, "rows": rows})
      each = np.array([of_kind(kind) for kind in some], np.float64)
      counts = Stream(up=here, down=here, device=count, server=here)
      total += each.reshape(-1, len(total))[which].T * np.array(counts)
    return Stream(*total)

  return of


def before(
  job: work.Work, sizes: np.ndarray, traits: Mapping[str, np.ndarray]
) -> np.ndarray | None:
  """Bytes that clients send up once in the whole run; see `Split.before`.

  Args:
    job: what they do.
    sizes: int [C], examples of each.
    traits: {name: [C]} of those that the work reads.

  Returns:
    float64 [C]; None where nothing is sent once for all.
  """
  if job.split is None or job.split.before is None:
    return None
  names = _kinds_of(job)
  some, which = kinds(names, {**traits, "examples": sizes})
  named = [dict(zip(names, kind, strict=True)) for kind in some]
  each = np.array([job.split.before(x) for x in named], np.float64)
  return each[which] * sizes


def _batches(how, sizes, steps, most=None):
  """(full batches, those that hold fewer examples) of clients, int [C].

  As `schedule.batches` cuts them: a pass is full batches and then the rest. Of
  the first `most` steps, where that is said.
  """
  full, rest = np.divmod(sizes, how.batch)
  short = (rest > 0) & ~(how.drop_remainder & (full > 0))
  one = full + short  # batches of a pass
  if steps is None:
    steps = one * how.epochs if how.steps is None else how.steps
  total = np.where(sizes > 0, steps, 0)
  if most is not None:
    total = np.minimum(total, most)
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
  first: int = 0,
) -> dict[str, float]:
  """Bytes that crossed each boundary in a round, up and down.

  Args:
    algorithm: of the run.
    client: from `sizes`.
    node: from `between`.
    cohort: of the round.
    record: of the round, for the tiers that have synchronized.
    number: of the round.
    first: bytes that crossed a cut up in this round, once in the whole run.

  Returns:
    {name: bytes}; those of `cut/...` crossed in the midst of steps, and are
    part of a client's. Who is lost gets the model, and reports nothing.
  """
  present, slots = np.asarray(cohort.weights) > 0, cohort.schedule.slots
  works = np.zeros_like(present)
  for own, of_device in zip(works, slots, strict=True):
    own[of_device[of_device >= 0]] = True
  crossed = _in_steps(algorithm.work, cohort)
  if crossed:
    crossed["cut/up_bytes"] += first
  traits = {k: np.asarray(v)[present] for k, v in cohort.traits.items()}
  traits["present"] = np.ones(int(present.sum()))
  each = client(traits, number)
  found: dict[str, float] = {}
  crossing = {"up_bytes": works[present], "down_bytes": present[present]}
  for way, here in crossing.items():
    total = int(each[way][here].sum())
    sent = total + crossed.get(f"cut/{way}", 0)
    found[f"{way}_client"] = sent / max(int(here.sum()), 1)
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
  names = _kinds_of(job)
  facts = {k: np.asarray(cohort.traits[k])[at] for k in names}
  facts["rows"] = (np.asarray(plan.rows)[here] >= 0).sum(axis=-1)
  if tailoring.ONLINE in job.traits:
    online = np.asarray(cohort.traits[tailoring.ONLINE])
    linked = _earlier(at, online.shape) < online[at]
    facts = {k: v[linked] for k, v in facts.items()}
  some, which = kinds((*names, "rows"), facts)
  counts = np.bincount(which, minlength=len(some))
  up = down = 0
  for (*values, rows), count in zip(some, counts, strict=True):
    named = dict(zip(names, values, strict=True))
    sizes = job.split.bytes(int(rows), named)
    up, down = up + sizes[0] * int(count), down + sizes[1] * int(count)
  return {"cut/up_bytes": up, "cut/down_bytes": down}


def _earlier(at, shape):
  """How often each entry's place has come before it, int [steps].

  Args:
    at: (device, slot) of steps, those of a client in order.
    shape: of devices and slots.
  """
  place = np.ravel_multi_index(at, shape)
  order = np.argsort(place, kind="stable")
  _, start, count = np.unique(
    place[order], return_index=True, return_counts=True
  )
  earlier = np.empty(place.size, np.int64)
  earlier[order] = np.arange(place.size) - np.repeat(start, count)
  return earlier
