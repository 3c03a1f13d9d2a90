"""Holdout: examples that the server keeps for itself, to look at models with.

They are drawn from the central test set and are no longer tested on by anyone,
so that what a gate has chosen by is not what is reported in the end.
"""

import dataclasses

import jax
import numpy as np

from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import data as data_lib
from fedjax_peft import evaluate, objective, placement, validate
from fedjax_peft import rounds as round_lib
from fedjax_peft import settings as settings_lib
from fedjax_peft.governance import gate

_STREAM = 7  # apart from other draws of a run's seed


def split(
  data: data_lib.Population, share: float, *, seed: int = 0
) -> tuple[data_lib.Population, np.ndarray]:
  """Takes a share of the test examples for the server.

  Args:
    data: the population.
    share: of the central test set, in (0, 1).
    seed: of the draw.

  Returns:
    (the population, which is not tested on these any more; int32 [K], rows of
    `data.examples` that the server has, K at least 1).

  Raises:
    ValueError: if the share is out of range, or there are fewer than two test
      examples.
  """
  if not 0 < share < 1:
    raise ValueError(
      f"the server's share of the test examples must be in (0, 1): {share=}"
    )
  rows = np.unique(data.test)
  if rows.size < 2:
    raise ValueError(
      "a server's examples are taken from the central test set, of which at "
      f"least two are expected: got {rows.size}; load the data with held-out "
      "examples (data.heldout=0.2)"
    )
  count = min(max(round(share * rows.size), 1), rows.size - 1)
  drawn = np.random.default_rng([seed, _STREAM]).permutation(rows)[:count]
  held = data.heldout
  stays = ~np.isin(held.rows, drawn)
  heldout = data_lib.Ragged.grouped(
    held.owner[stays], len(held), held.rows[stays]
  )
  test = data.test[~np.isin(data.test, drawn)]
  rest = dataclasses.replace(data, heldout=heldout, test=test)
  return rest, np.sort(drawn).astype(np.int32)


def measure(
  algorithm: algorithm_lib.Algorithm,
  model: objective.Model,
  data: data_lib.Population,
  rows: np.ndarray,
  *,
  batch: int = 16,
  settings: settings_lib.Settings | None = None,
) -> gate.Measure:
  """Measures the model at the top on the server's examples.

  Args:
    algorithm: whose view says what model clients make of it.
    model: loss and metrics.
    data: whose examples the rows point into.
    rows: int [K], the server's.
    batch: examples measured at once on a device.
    settings: devices and lanes.

  Returns:
    (state) -> {metric: number}, `loss` among them.

  Raises:
    ValueError: if a leaf of the model is not the same for all: a server cannot
      measure what it does not have.
  """
  validate.at_least(1, batch=batch)
  if settings is None:
    devices = len(jax.devices())
    settings = settings_lib.Settings("shard_map", devices, 1, 1, 16)
  top = algorithm.tiers[-1].name
  shared = (top, placement.FROZEN, placement.SERVED)
  labels = algorithm.work.placement
  apart = [k for k in model.params if labels.get(k, top) not in shared]
  if apart:
    raise ValueError(
      f"a gate measures one model that all share, but {apart[0]!r} lives at "
      f"'{labels[apart[0]]}' ({len(apart)} leaves do not live at '{top}'); "
      "leave the gate out, or place all leaves at the top"
    )
  mine = {k: v[rows] for k, v in data.examples.items()}
  score = evaluate.scorer(model, mine, settings, batch)

  def found(state: round_lib.State) -> dict[str, float]:
    params = algorithm.work.view(state.params)
    params = settings_lib.everywhere(params, settings)  # a run's may be fewer
    scores = score(params, model.base, np.arange(len(rows)))
    return {
      name: float(top.sum(dtype=np.float64) / max(bottom.sum(), 1))
      for name, (top, bottom) in scores.items()
    }

  return found
