"""Running: rounds one after another, as a generator of states and records."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import data as data_lib
from fedjax_peft import evaluate as evaluate_lib
from fedjax_peft import first as first_lib
from fedjax_peft import launch, objective, plan, sampling, traffic, validate
from fedjax_peft import rounds as round_lib
from fedjax_peft import settings as settings_lib
from fedjax_peft.governance import gate as gate_lib
from fedjax_peft.governance import rollback


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
  cohort: sampling.Sampler | plan.Plan,
  rounds: int,
  seed: int = 0,
  settings: settings_lib.Settings | None = None,
  state: round_lib.State | None = None,
  evaluate: Callable[[round_lib.State], evaluate_lib.Report] | None = None,
  every: int = 1,
  first: bool = False,
  tables: Callable[[int, dict], Any] | None = None,
  costs: Callable[[int, Mapping], Any] | None = None,
  stop: Callable[[Mapping], str | None] | None = None,
  group: plan.Grouping | None = None,
  gate: gate_lib.Gate | None = None,
) -> Iterator[tuple[round_lib.State, Record]]:
  """Runs rounds and yields (state, record) after each.

  Args:
    algorithm: what happens in a round.
    model: its base is what all clients share.
    data: the population.
    cohort: who takes part: a sampler, or the plan of a simulated network.
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
    costs: called with (round, per-client columns) after every round whose plan
      counts what clients spend.
    stop: (record) -> why this round is the last, or None; the round is then
      measured and its record says why, under `stopped`.
    group: which node each client talks to; the plan is then one of
      `plan.grouped`.
    gate: which rounds become the model; after the others the state is that
      from before, and the round is recorded as rejected.

  Yields:
    (state, record). The rows of a state that live on the clients are updated
    in place by the next round: copy what you want to keep. Keys of a record
    under `wall/` depend on the machine, no others do.

  Raises:
    ValueError: if the cohort, the links or the data do not fit, before any
      round is run.
    trust.Violation: of what is watched (`trust.watched`), if something crosses
      that must not; the state of that round is not yielded.
  """
  validate.at_least(1, rounds=rounds, every=every)
  if algorithm.specialize is not None:
    algorithm, _ = algorithm.specialize(data)
  if isinstance(cohort, sampling.Sampler):
    before = traffic.before(algorithm.work, data.train.sizes, data.traits)
    cohort = plan.sampled(cohort, data, seed, before=before)
  most = cohort.most
  if settings is not None:
    settings_lib.checked(settings, algorithm.work.lanes, most)
  if cohort.hears or cohort.pool:
    algorithm = plan.prepared(cohort, algorithm)
  waits = bool(cohort.hears) or cohort.waits
  if gate is not None:
    gate_lib.refuse(cohort, group)
  if not waits:  # what cannot be drawn is refused before all else
    cohort.turn(cohort.init(), 0, {})
  if state is None:
    state = algorithm.init(clients=len(data), cohort=most)
    own = {} if gate is None else gate.init()
    state = state._replace(plan=cohort.init() | own)
  memory, watch = gate_lib.taken(gate, state.plan)
  state = state._replace(plan={})
  if settings is None:
    settings = settings_lib.choose(algorithm, model.base, data.examples, most)
  streamed = settings.executor in ("stream", "debug")
  state = settings_lib.everywhere(state, settings)
  base = settings_lib.everywhere(model.base, settings)
  examples = dict(data.examples)
  if not streamed:
    examples = settings_lib.everywhere(examples, settings)
  step = launch.launcher(algorithm, settings)

  client = traffic.sizes(algorithm, most)
  node = traffic.between(algorithm, most)
  key = jax.random.key(seed)
  receivers = algorithm.tiers[0].size

  def seat(number, memory, state):
    told = {k: np.asarray(state.clients.told[k]) for k in sorted(cohort.hears)}
    turn, memory = cohort.turn(memory, number, told)
    if group is not None and group.join is not None:
      turn = turn._replace(nodes=group.join(state, turn.clients))
      now = memory["nodes"].copy()
      now[turn.clients] = turn.nodes
      memory = memory | {"nodes": now}
    return (
      turn,
      memory,
      launch.seat(
        data.train,
        turn,
        algorithm.work,
        settings,
        examples=examples,
        traits=data.traits,
        nodes=receivers,
        updates=cohort.updates,
        seed=seed,
        round=number,
      ),
    )

  begin = int(state.round)
  start = {}
  if first and begin == 0 and evaluate is not None:
    start = evaluate(state._replace(plan=memory)).record
  if gate is not None and begin == 0:
    verdict = gate.start(state, watch)
    watch, start = verdict.memory, start | verdict.record
  ahead = None
  for number in range(begin, rounds):
    begun = time.perf_counter()
    if group is not None:
      state, now = group.before(state, memory["nodes"], number)
      memory = memory | {"nodes": now}
    turn, memory, here = ahead or seat(number, memory, state)
    kept = None if gate is None else rollback.keep(state, here.clients)
    watcher = algorithm.work.watch
    if watcher is not None:
      watcher.before(state, base)
    state, outcome = step.run(state, base, here, key)
    ahead = None
    if number + 1 < rounds and not waits:
      # The host plans while the devices work.
      ahead = seat(number + 1, memory, state)
    record = Record(round=number + 1, rounds=rounds)
    record |= {k: float(v) for k, v in outcome.record.items()}
    if watcher is not None:
      watcher.refuse(state, outcome, here.clients, record)
    once = int(turn.record.get(first_lib.BYTES, 0))
    record |= traffic.of_round(
      algorithm, client, node, here, record, number, once
    )
    record |= turn.record
    why = stop(record) if stop is not None else None
    if gate is not None and kept is not None:
      verdict = gate.judge(state, watch, turn.clients)
      watch, why = verdict.memory, why or verdict.stop
      if not verdict.good:
        back = rollback.take_back(kept, state)
        state = settings_lib.everywhere(back, settings)
        record = Record(gate_lib.finite(record))
      record |= verdict.record
    if costs is not None and turn.table:
      costs(number + 1, turn.table)
    if number == 0:
      record |= {f"start/{k}": v for k, v in start.items()}
    trained = time.perf_counter()
    measured = evaluate is not None and (
      (number + 1) % every == 0 or number + 1 == rounds or why is not None
    )
    if evaluate is not None and measured:
      report = evaluate(state._replace(plan=memory))
      record |= report.record
      if tables is not None:
        tables(number + 1, report.clients)
    done = time.perf_counter()
    record["wall/seconds"] = trained - begun
    record["wall/programs"] = step.programs()
    if measured:
      record["wall/evaluate_seconds"] = done - trained
    if why is not None:
      record["stopped"] = why
    yield state._replace(plan=memory | watch), record
    if why is not None:
      return
