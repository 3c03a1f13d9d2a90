"""Success: how often a backdoor answers.

Measured on examples whose true label is another one than the backdoor's: a
model that predicts the target without a trigger would count otherwise.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from fedjax_peft import data as data_lib
from fedjax_peft import evaluate as evaluate_lib
from fedjax_peft import objective, validate
from fedjax_peft import settings as settings_lib
from fedjax_peft.attack import poison
from fedjax_peft.attack import trigger as trigger_lib


def triggered(
  data: data_lib.Population, trigger: trigger_lib.Trigger, target: int
) -> data_lib.Population:
  """The same clients, tested on triggered examples with the target's label.

  An accuracy on them is the rate at which the backdoor answers, for every
  client and with the leaves that live on it:
  `fp.evaluation(algorithm, model, attack.triggered(data, mark, 0))`.

  Args:
    data: examples with integer labels.
    trigger: the mark.
    target: the label that the backdoor answers with.

  Returns:
    A population whose held-out and test rows are stamped, less those whose
    label is the target's already. What is trained on is as it was.

  Raises:
    ValueError: if no row would be left, or the labels are no integers.
  """
  label = _labels(data, target)
  kept = np.flatnonzero(label[data.heldout.rows] != target)
  heldout = data_lib.Ragged.grouped(
    data.heldout.owner[kept], len(data), data.heldout.rows[kept]
  )
  test = data.test[label[data.test] != target]
  rows = np.unique(np.concatenate([heldout.rows, test]))
  stamped = _stamped(data, trigger, target, rows)
  examples = {name: np.array(leaf) for name, leaf in data.examples.items()}
  for name, leaf in examples.items():
    leaf[rows] = stamped[name]
  return dataclasses.replace(
    data, examples=examples, heldout=heldout, test=test
  )


def backdoor_rate(
  model: objective.Model,
  data: data_lib.Population,
  trigger: trigger_lib.Trigger,
  target: int,
  *,
  batch: int = 64,
  settings: settings_lib.Settings | None = None,
) -> Callable[[dict, dict], dict[str, float]]:
  """Measures the backdoor of the model at the top, as `central` of evaluation.

  Args:
    model: its loss must report the metric `accuracy`, and all its leaves live
      at the top.
    data: whose central test set is stamped.
    trigger: the mark.
    target: the label that the backdoor answers with.
    batch: examples evaluated at once on a device.
    settings: devices; None takes all.

  Returns:
    (params, base) -> {"backdoor_rate": fraction of the triggered examples of
    other labels that are taken for the target}.

  Raises:
    ValueError: if the test set holds no example of another label.
  """
  label = _labels(data, target)
  rows = data.test[label[data.test] != target]
  stamped = _stamped(data, trigger, target, rows)
  if settings is None:
    settings = settings_lib.Settings("shard_map", len(jax.devices()), 1, 1, 16)
  score = evaluate_lib.scorer(model, stamped, settings, batch)
  every = np.arange(rows.size)

  def rate(params, base):
    scores = score(params, base, every)
    if "accuracy" not in scores:
      raise ValueError(
        "backdoor_rate needs the metric 'accuracy' of the loss, which reports "
        f"{sorted(scores)}"
      )
    hits, total = scores["accuracy"]
    return {"backdoor_rate": float(hits.sum() / total.sum())}

  return rate


def _labels(data, target):
  """Labels [M] of all examples."""
  validate.at_least(0, target=target)
  label = data.examples.get(poison.LABEL)
  if label is None or label.dtype.kind not in "iu":
    raise ValueError(
      f"a backdoor is measured on integer labels: leaf '{poison.LABEL}' of "
      f"'{data.name}' came as {None if label is None else label.dtype}"
    )
  return label


def _stamped(data, trigger, target, rows):
  """Rows of the examples, marked and with the target's label."""
  if not rows.size:
    raise ValueError(
      f"a backdoor is measured on test examples of other labels than its own, "
      f"target={target}: '{data.name}' has none"
    )
  taken = {name: leaf[rows] for name, leaf in data.examples.items()}
  taken = jax.device_get(trigger.stamp(taken))
  return {**taken, poison.LABEL: np.full_like(taken[poison.LABEL], target)}
