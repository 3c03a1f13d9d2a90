"""Preference: which of several models a client likes best.

Every model is scored on the examples that a client trains on, by the compiled
scorer of `evaluate`: one program, whatever the number of models.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import data as data_lib
from fedjax_peft import evaluate, objective, placement, validate
from fedjax_peft import rounds as round_lib
from fedjax_peft import settings as settings_lib


def choose(
  algorithm: algorithm_lib.Algorithm,
  model: objective.Model,
  data: data_lib.Population,
  settings: settings_lib.Settings,
  *,
  batch: int = 16,
) -> Callable[[round_lib.State, npt.ArrayLike], tuple[np.ndarray, np.ndarray]]:
  """Lets clients choose a node of the lowest tier by their training loss.

  The choice of IFCA (Ghosh et al., 2020, https://arxiv.org/abs/2006.04088).
  Models are tried as the nodes hold them, before the downlink changes them. A
  client pays for it with E forward passes over its examples.

  Args:
    algorithm: of several nodes in its lowest tier, such as
      `algorithms.ifca(...)`.
    model: loss and metrics.
    data: the population.
    settings: devices.
    batch: examples scored at once on a device.

  Returns:
    (state, ids [C]) -> (nodes int32 [C], losses float64 [E, C]): the node of
    least mean loss over a client's training examples, the first of equals, and
    all of those losses; nan for a client without examples.

  Raises:
    ValueError: if leaves live on the clients, since then no model is tried
      without them.
  """
  validate.at_least(1, batch=batch)
  labels = algorithm.work.placement
  kept = sorted(k for k, v in labels.items() if v == placement.DEVICE)
  if kept:
    raise ValueError(
      "clients choose between models that they are sent whole: got "
      f"'{kept[0]}', which lives on the device; place it at "
      f"'{algorithm.tiers[0].name}'"
    )
  score = evaluate.scorer(model, data.examples, settings, batch)

  def of(state: round_lib.State, node: int) -> dict:
    low, top = state.nodes[0].params, state.nodes[-1].params
    return {k: v[0] for k, v in top.items()} | {
      k: v[node] for k, v in low.items()
    }

  def run(state, ids):
    clients = [data.train[int(c)] for c in np.asarray(ids)]
    rows = data_lib.Ragged.of(clients)
    here = np.arange(len(clients))
    losses = np.full((algorithm.tiers[0].size, len(clients)), np.nan)
    for node, mine in enumerate(losses):
      params = algorithm.work.view(of(state, node))
      found = score(params, model.base, rows.rows)
      top, bottom = evaluate.per_client(found, rows, here)["loss"]
      np.divide(top.astype(np.float64), bottom, out=mine, where=bottom > 0)
    known = np.where(np.isfinite(losses), losses, np.inf)
    return known.argmin(axis=0).astype(np.int32), losses

  return run
