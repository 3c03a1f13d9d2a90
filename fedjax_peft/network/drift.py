"""Drift: examples that change with the round, inside the compiled step.

Gama et al., A Survey on Concept Drift Adaptation, 2014,
https://doi.org/10.1145/2523813
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import tree, validate, work

LABEL = "label"

_DRIFT = 2**32 - 4  # folded into keys of steps


class Carry(NamedTuple):
  """What a client that may drift holds between two batches.

  Attributes:
    job: carry of the job that is wrapped.
    drifts: bool scalar.
  """

  job: Any
  drifts: jax.Array


def labels(
  rounds: int, classes: int, *, trait: str
) -> Callable[[work.Work], work.Work]:
  """Label l becomes l + 1, of more and more examples.

  Args:
    rounds: >= 1, until all are.
    classes: >= 2; the last label becomes 0.
    trait: name of the trait that says who drifts.

  Returns:
    (Work) -> Work that reads the trait.

  Raises:
    ValueError: if an argument is out of range; when a batch is first seen, if
      it has no integer label.
  """
  validate.at_least(1, rounds=rounds)
  validate.at_least(2, classes=classes)

  def change(examples, progress, drawn):
    label = examples.get(LABEL)
    if label is None or not jnp.issubdtype(label.dtype, jnp.integer):
      raise ValueError(
        f"drift_labels changes an integer '{LABEL}', the examples have "
        f"{ {k: str(v.dtype) for k, v in sorted(examples.items())} }; leave it "
        "out, or use drift_features"
      )
    new = jnp.where(label == classes - 1, jnp.zeros_like(label), label + 1)
    rows = (drawn < progress).reshape(-1, *[1] * (label.ndim - 1))
    return {**examples, LABEL: jnp.where(rows, new, label)}

  return _wrapper(rounds, trait, change)


def features(
  rounds: int, shift: float, *, trait: str, feature: str | None = None
) -> Callable[[work.Work], work.Work]:
  """Features move away from where they were, a little each round.

  Args:
    rounds: >= 1, until the whole shift is reached.
    shift: finite, in the unit of the features.
    trait: name of the trait that says who drifts.
    feature: the leaf; None is all leaves of floats but the label. A leaf of
      small integers must be named; it is rounded and saturates.

  Returns:
    (Work) -> Work that reads the trait.

  Raises:
    ValueError: if an argument is out of range; when a batch is first seen, if
      it has no such leaf.
  """
  validate.at_least(1, rounds=rounds)
  if not math.isfinite(shift):
    raise ValueError(f"shift must be a finite number, got shift={shift}")

  def moved(x, progress):
    away = jnp.float32(shift) * progress
    if tree.is_float(x):
      return x + away.astype(x.dtype)
    info = jnp.iinfo(x.dtype)
    there = jnp.round(x.astype(jnp.float32) + away)
    return jnp.clip(there, info.min, info.max).astype(x.dtype)

  def change(examples, progress, drawn):
    if feature is None:
      names = [
        k for k, x in examples.items() if tree.is_float(x) and k != LABEL
      ]
    else:
      names = [k for k, x in examples.items() if k == feature and _is_dense(x)]
    if not names:
      raise ValueError(
        f"drift_features moves {feature or 'leaves of floats'!r}, the examples "
        f"have { {k: str(v.dtype) for k, v in sorted(examples.items())} }; "
        "write feature= with a leaf of floats or of 8 or 16 bit integers"
      )
    return {**examples, **{k: moved(examples[k], progress) for k in names}}

  return _wrapper(rounds, trait, change)


def _is_dense(x) -> bool:
  """True for floats, and for integers that are amounts rather than names."""
  return tree.is_float(x) or x.dtype.itemsize <= 2


def _wrapper(rounds, trait, change):
  """Wraps a job so that those with the trait see changed examples.

  `change` takes the examples, the progress of the drift (float32 scalar in
  [0, 1]) and a uniform draw for each row.
  """

  def wrap(job):
    def init(sent, base, local, client):
      if trait not in client.traits:
        raise ValueError(
          f"a drift reads the trait '{trait}', the clients have "
          f"{sorted(client.traits)}; give them what the fault's `traits` says"
        )
      inner = job.init(sent, base, local, client)
      return Carry(inner, jnp.asarray(client.traits[trait]) > 0)

    def step(carry, sent, base, batch):
      now = jnp.asarray(sent.extras["round"], jnp.float32)
      progress = jnp.minimum(now / rounds, 1)
      drawn = _uniform(batch)
      changed = change(batch.examples, progress, drawn)
      examples = tree.where(carry.drifts, changed, batch.examples)
      inner, stats = job.step(
        carry.job, sent, base, batch._replace(examples=examples)
      )
      return carry._replace(job=inner), stats

    def finish(carry, sent):
      return job.finish(carry.job, sent)

    traits = tuple(dict.fromkeys((*job.traits, trait)))
    return job._replace(init=init, step=step, finish=finish, traits=traits)

  return wrap


def _uniform(batch):
  """A draw for each row [stride B], of (seed, round, client, step)."""
  keys = batch.key.reshape(-1)
  each = batch.mask.size // keys.size

  def one(key):
    return jax.random.uniform(jax.random.fold_in(key, _DRIFT), (each,))

  return jax.vmap(one)(keys).reshape(-1)
