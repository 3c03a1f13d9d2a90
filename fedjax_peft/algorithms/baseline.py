"""Baselines: what federation is compared with, at the same number of steps."""

import numpy as np
import optax

from fedjax_peft import algorithm, alias, factored, objective, validate, work
from fedjax_peft import data as data_lib
from fedjax_peft import placement as placement_lib


def local_only(
  model: objective.Model, local: work.Local, **options
) -> algorithm.Algorithm:
  """Everyone alone: all leaves live on the devices and nothing is sent.

  Args:
    model: what is trained.
    local: how clients train.
    **options: see `fedavg`.
  """
  everything = {".*": placement_lib.DEVICE}
  return alias.fedavg(
    model, local, placement=everything, lowrank=False, **options
  )


def pooled(data: data_lib.Population) -> data_lib.Population:
  """A population of one, who trains on all that seen clients train on.

  Its held-out rows are those of all clients, so that a central test is the
  same; what clients are tested on alone is in the original population.
  """
  train = np.concatenate(
    [data.train[int(c)] for c in np.flatnonzero(data.seen)]
  )
  held = np.unique(data.heldout.rows)
  return data_lib.Population(
    examples=data.examples,
    train=data_lib.Ragged.of([np.unique(train)]),
    heldout=data_lib.Ragged.of([held]),
    names=("all",),
    seen=np.ones(1, bool),
    test=data.test,
    classes=data.classes,
    name=f"{data.name}, pooled",
  )


def centralized(
  model: objective.Model,
  local: work.Local,
  *,
  data: data_lib.Population,
  cohort: int,
  server: optax.GradientTransformation | None = None,
) -> algorithm.Algorithm:
  """One trainer with all data, for `pooled(data)` and cohorts of one.

  A round makes as many steps as `cohort` clients make on average; as on a
  client, the optimizer starts anew with each round.

  Args:
    model: what is trained.
    local: how clients train.
    data: the population that is compared with, not the pooled one.
    cohort: how many clients take part in a round there.
    server: see `fedavg`; None keeps what was trained.
  """
  validate.at_least(1, cohort=cohort)
  sizes = data.train.sizes[data.seen]
  steps = round(cohort * float(np.mean(factored.steps_of(local, sizes))))
  how = local._replace(epochs=1, steps=max(steps, 1))
  return alias.fedavg(model, how, server=server, lowrank=False)
