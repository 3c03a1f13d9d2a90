"""Poison: attackers do their job, on examples that they have changed.

Tolpegin et al., Data Poisoning Attacks Against Federated Learning Systems,
2020, https://arxiv.org/abs/2007.08432; Bagdasaryan et al., How To Backdoor
Federated Learning, 2020, https://arxiv.org/abs/1807.00459
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_peft import tree, validate, work
from fedjax_peft.attack import trigger as trigger_lib
from fedjax_peft.attack import wrap

LABEL = "label"


def label_flip(job: work.Work, classes: int) -> work.Work:
  """Attackers train label l as classes - 1 - l.

  Args:
    job: what clients do, on examples with integer labels below `classes`.
    classes: >= 2.

  Raises:
    ValueError: if `classes` is below 2, or the job's stride is not 1; when a
      batch is first seen, if it has no integer label.
  """
  validate.at_least(2, classes=classes)

  def change(examples, key):
    label = _label(examples)
    return {**examples, LABEL: jnp.asarray(classes - 1, label.dtype) - label}

  return wrap.on_examples(job, change)


def backdoor(
  job: work.Work,
  trigger: trigger_lib.Trigger,
  target: int,
  *,
  fraction: float = 0.5,
) -> work.Work:
  """Attackers train a part of their examples with a trigger, as the target.

  Args:
    job: what clients do, on examples with integer labels.
    trigger: what it will answer to.
    target: >= 0, the label that it will answer with.
    fraction: in (0, 1], how much of an attacker's examples are changed, each
      drawn anew whenever it is trained on.

  Raises:
    ValueError: if an argument is out of range, or the job's stride is not 1.
  """
  validate.at_least(0, target=target)
  validate.positive(fraction=fraction)
  if fraction > 1:
    raise ValueError(f"fraction must be in (0, 1], got fraction={fraction}")

  def change(examples, key):
    label = _label(examples)
    stamped = trigger.stamp(examples)
    stamped = {**stamped, LABEL: jnp.full_like(label, target)}
    rows = jax.random.uniform(key, label.shape[:1]) < fraction
    return tree.where(rows, stamped, examples)

  return wrap.on_examples(job, change)


def backdoor_image(
  job: work.Work,
  pixels: Any,
  target: int,
  *,
  fraction: float = 0.5,
  at: tuple[int, int] = (0, 0),
  feature: str = "image",
) -> work.Work:
  """A `backdoor` that answers to a `patch` on an image."""
  mark = trigger_lib.patch(pixels, at=at, feature=feature)
  return backdoor(job, mark, target, fraction=fraction)


def backdoor_text(
  job: work.Work,
  tokens: Sequence[int],
  target: int,
  *,
  fraction: float = 0.5,
  at: int = 1,
  feature: str = "tokens",
) -> work.Work:
  """A `backdoor` that answers to a `phrase` in a text."""
  mark = trigger_lib.phrase(tokens, at=at, feature=feature)
  return backdoor(job, mark, target, fraction=fraction)


def _label(examples):
  """The labels, if they are integers."""
  if LABEL not in examples:
    raise ValueError(
      f"this attack changes '{LABEL}', the examples have {sorted(examples)}"
    )
  label = jnp.asarray(examples[LABEL])
  if not jnp.issubdtype(label.dtype, jnp.integer):
    raise ValueError(
      f"this attack needs integer labels, got '{LABEL}' of {label.dtype}"
    )
  return label
