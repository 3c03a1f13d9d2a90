"""Configured: what the table `trust` of a config asks for."""

from typing import Any

import numpy as np

from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import config, data, notes, objective, plan, schema
from fedjax_peft.split import cutting
from fedjax_peft.trust import boundary, canary, cuts, expectation, watching


def is_asked(run: schema.Config) -> bool:
  """Whether anything is."""
  return run.trust != schema.Trust()


def planted(
  run: schema.Config, population: data.Population
) -> tuple[data.Population, canary.Canaries | None]:
  """The clients, some with a canary, and what these are.

  Raises:
    ValueError: as `canary.plant`.
  """
  if not run.trust.canaries:
    return population, None
  return canary.plant(population, run.trust.canaries, seed=run.seed)


def cut(run: schema.Config, module: Any, population: data.Population) -> None:
  """Refuses a cut that carries more than it may.

  Where canaries are asked for, one that hands examples on too.

  Args:
    run: the config.
    module: before its first part is remembered; any.
    population: whose examples it computes on.

  Raises:
    Violation: in one sentence.
  """
  if not is_asked(run):
    return
  asked = []
  if run.trust.canaries:
    asked = cuts.pairs(population.examples, seed=run.seed)
  for pipe in _pipes(run, module, population):
    here = cuts.boundaries(pipe, population.spec)
    expectation.check(here, _expected(run, ("cut",)))
    cuts.refuse_plain(pipe, asked)


def _pipes(run, module, population):
  """The model, cut in every place where a client's is."""
  if isinstance(module, cutting.Pipeline):
    return [module]
  if not run.split.cuts:
    return []
  places = np.unique(population.traits["cut"]).tolist()
  wire = module.crossing.wire
  return [
    cutting.pipeline(module, {"device": place, "server": None}, wire)
    for place in places
    if place < len(module.stages())
  ]


def guarded(
  run: schema.Config,
  made: algorithm_lib.Algorithm,
  model: objective.Model,
  cohort: plan.Plan,
  found: canary.Canaries | None,
) -> algorithm_lib.Algorithm:
  """The algorithm, if all that crosses may; watched if canaries are planted.

  Args:
    run: the config.
    made: in the form that will run, before its notes.
    model: what is trained.
    cohort: who takes part, and which notes are read.
    found: what `planted` returned.

  Raises:
    Violation: in one sentence.
    ValueError: if the table names what is not there.
  """
  if not is_asked(run):
    return made
  is_cut = isinstance(model.origin, cutting.Pipeline) or run.split.cuts
  if run.trust.cut and not is_cut:
    raise ValueError(
      "trust.cut says what crosses a cut: got a model without; write "
      "split.ends or split.cuts, or leave trust.cut out"
    )
  told = [notes.NOTES[name] for name in sorted(cohort.hears)]
  here = boundary.boundaries(made, cohort=cohort.most, notes=told)
  expectation.check(here, _expected(run, ("up", "down", "notes")))
  if found is None:
    return made
  return watching.watched(made, found, model=model)


def _expected(run, ways):
  """{way: what may cross} of the ways that are asked for."""
  tables = {way: getattr(run.trust, way) for way in ways}
  return {
    way: config.call(expectation.Expectation, table, f"trust.{way}")
    for way, table in tables.items()
    if table
  }
