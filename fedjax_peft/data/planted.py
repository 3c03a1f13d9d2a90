"""Planted groups: clients that differ in what their labels mean.

For methods that find clusters: the truth is known, and no model fits all.
"""

import dataclasses

import numpy as np

from fedjax_peft import validate
from fedjax_peft.data.clients import Population
from fedjax_peft.data.ragged import Ragged


def planted(
  population: Population, groups: int, *, seed: int = 0
) -> Population:
  """Deals clients into groups, each of which names the classes otherwise.

  A client of group g calls class l what others call l + g C / groups, modulo
  the C classes. Every client gets its own copy of its examples; the central
  test set, whose labels would mean nothing, is left out.

  Args:
    population: of examples with labels.
    groups: G, at most the number of classes.
    seed: of the deal.

  Returns:
    A population with the trait `group`, int32 [N].

  Raises:
    ValueError: if there are no classes, or fewer than groups.

  Example:
    >>> from fedjax_peft import data
    >>> some = {"x": np.eye(4), "label": np.array([0, 1, 0, 1])}
    >>> two = planted(data.population(some, [0, 0, 1, 1]), 2)
    >>> int(two.traits["group"].sum()), two.examples["label"].tolist()
    (1, [0, 1, 1, 0])
  """
  classes = len(population.classes)
  if not classes:
    raise ValueError(
      "planted groups differ in what they call the classes, and "
      f"{population.name!r} has none; leave data.groups out"
    )
  validate.at_least(1, groups=groups)
  if groups > classes:
    raise ValueError(
      f"groups must be in 1..{classes}, the number of classes of "
      f"{population.name!r}: got {groups=}"
    )
  count = len(population)
  rng = np.random.default_rng([seed, groups])
  group = np.empty(count, np.int32)
  group[rng.permutation(count)] = np.arange(count) % groups
  sides = (population.train, population.heldout)
  rows = np.concatenate([side.rows for side in sides])
  owner = np.concatenate([side.owner for side in sides])
  examples = {k: v[rows] for k, v in population.examples.items()}
  shift = group[owner] * (classes // groups)
  label = (examples["label"] + shift) % classes
  examples["label"] = label.astype(population.examples["label"].dtype)
  train, heldout = sides
  first = train.rows.size
  return dataclasses.replace(
    population,
    examples=examples,
    train=Ragged(train.indptr, np.arange(first, dtype=np.int32)),
    heldout=Ragged(
      heldout.indptr, first + np.arange(heldout.rows.size, dtype=np.int32)
    ),
    test=np.zeros(0, np.int32),
    name=f"{population.name}, {groups} groups",
    traits={**population.traits, "group": group},
  )
