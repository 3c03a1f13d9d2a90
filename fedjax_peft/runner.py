"""Running: rounds one after another, as a generator of states and records."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import data as data_lib
from fedjax_peft import evaluate as evaluate_lib
from fedjax_peft import launch, objective, sampling, validate
from fedjax_peft import rounds as round_lib
from fedjax_peft import settings as settings_lib


class Record(dict):
  """What one round was like: a flat dict of numbers that prints as a line."""

  def __str__(self) -> str:
    parts = [f"{self['round']}/{self['rounds']}"]
    for key, text in (
      ("train/loss", "loss {:.3f}"),
      ("eval/accuracy", "acc {:.3f}"),
      ("eval/accuracy_worst10", "(worst 10% {:.3f})"),
    ):
      if key in self:
        parts.append(text.format(self[key]))
    if "up_bytes_client" in self:
      parts.append(f"up {self['up_bytes_client'] / 1000:.0f} kB/client")
    parts.append(f"{self['wall/seconds']:.1f} s")
    return "  ".join(parts)


def run(
  algorithm: algorithm_lib.Algorithm,
  model: objective.Model,
  data: data_lib.Population,
  *,
  cohort: sampling.Sampler,
  rounds: int,
  seed: int = 0,
  settings: settings_lib.Settings | None = None,
  state: round_lib.State | None = None,
  evaluate: Callable[[round_lib.State], evaluate_lib.Report] | None = None,
  every: int = 1,
  first: bool = False,
  tables: Callable[[int, dict], Any] | None = None,
) -> Iterator[tuple[round_lib.State, Record]]:
  """Runs rounds and yields (state, record) after each.

  Args:
    algorithm: what happens in a round.
    model: its base is what all clients share.
    data: the population.
    cohort: who takes part.
    rounds: how many rounds the run has, those in `state` included.
    seed: all randomness follows from it.
    settings: how rounds are executed; None asks `settings_lib.choose`.
    state: where to go on; None starts afresh.
    evaluate: measures a state; see `evaluate.evaluation`. None measures
      nothing but the clients' training.
    every: rounds between two evaluations; the last round is always measured.
    first: also measure before the first round, into the first record, under
      `start/`.
    tables: called with (round, per-client columns) after an evaluation.

  Yields:
    (state, record). The rows of a state that live on the clients are updated
    in place by the next round: copy what you want to keep. Keys of a record
    under `wall/` depend on the machine, no others do.

  Raises:
    ValueError: if the cohort, the links or the data do not fit, before any
      round is run.
  """
  validate.at_least(1, rounds=rounds, every=every)
  if algorithm.specialize is not None:
    algorithm, _ = algorithm.specialize(data)
  most = cohort.most(data)
  sampling.cohort_of(cohort, data, seed, 0)
  if state is None:
    state = algorithm.init(clients=len(data), cohort=most)
  if settings is None:
    settings = settings_lib.choose(algorithm, model.base, data.examples, most)
  streamed = settings.executor in ("stream", "debug")
  state = settings_lib.everywhere(state, settings)
  base = settings_lib.everywhere(model.base, settings)
  examples = dict(data.examples)
  if not streamed:
    examples = settings_lib.everywhere(examples, settings)
  step = launch.launcher(algorithm, settings)

  @functools.cache
  def sizes(traits, number):
    named = dict(zip(algorithm.work.traits, traits, strict=True))
    return algorithm.bytes(most, traits=named, round=number)

  key = jax.random.key(seed)
  nodes = algorithm.tiers[0].size

  def seat(number):
    return launch.seat(
      data.train,
      sampling.cohort_of(cohort, data, seed, number),
      algorithm.work,
      settings,
      examples=examples,
      traits=data.traits,
      nodes=nodes,
      seed=seed,
      round=number,
    )

  begin = int(state.round)
  start = {}
  if first and begin == 0 and evaluate is not None:
    start = evaluate(state).record
  seated = seat(begin) if begin < rounds else None
  for number in range(begin, rounds):
    begun = time.perf_counter()
    here = seated
    state, outcome = step.run(state, base, here, key)
    if number + 1 < rounds:  # the host plans while the devices work
      seated = seat(number + 1)
    record = Record(round=number + 1, rounds=rounds)
    record |= {k: float(v) for k, v in outcome.record.items()}
    record |= _traffic(algorithm, sizes, here, record, number)
    if number == 0:
      record |= {f"start/{k}": v for k, v in start.items()}
    trained = time.perf_counter()
    measured = evaluate is not None and (
      (number + 1) % every == 0 or number + 1 == rounds
    )
    if evaluate is not None and measured:
      report = evaluate(state)
      record |= report.record
      if tables is not None:
        tables(number + 1, report.clients)
    done = time.perf_counter()
    record["wall/seconds"] = trained - begun
    record["wall/programs"] = step.programs()
    if measured:
      record["wall/evaluate_seconds"] = done - trained
    yield state, record


def _traffic(algorithm, sizes, cohort, record, number):
  """Bytes that crossed each boundary in a round, up and down."""
  low, names = algorithm.tiers[0].name, algorithm.work.traits
  ways = ("up_bytes", "down_bytes")
  present = cohort.weights > 0
  # Clients that differ in what they are may differ in what they send.
  kinds = np.zeros((int(present.sum()), len(names)))
  for i, name in enumerate(names):
    kinds[:, i] = cohort.traits[name][present]
  kinds, counts = np.unique(kinds, axis=0, return_counts=True)
  when = number % algorithm.work.cycle
  of_kind = [sizes(tuple(kind.tolist()), when) for kind in kinds]
  found: dict[str, float] = {}
  for way in ways:
    total = sum(
      int(n) * size[f"{low}/{way}"]
      for n, size in zip(counts, of_kind, strict=True)
    )
    found[f"{way}_client"] = total / max(int(counts.sum()), 1)
    found[f"{low}/{way}"] = total
  for below, tier in zip(algorithm.tiers, algorithm.tiers[1:], strict=False):
    synced = record[f"{tier.name}/synced"] * below.size
    for way in ways:
      one = sizes((0.0,) * len(names), when)[f"{tier.name}/{way}"]
      found[f"{tier.name}/{way}"] = int(one * synced)
  return found
