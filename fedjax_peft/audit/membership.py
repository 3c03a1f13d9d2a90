"""Membership: whether an example was among those that a message is about.

Two scores, higher for members. `alignment` asks how much what an example alone
would have made a client say points where the message points; `lower_loss` how
much a model that was released, or that an update makes, likes the example.

Yeom et al., Privacy Risk in Machine Learning, 2018,
https://arxiv.org/abs/1709.01604; Nasr et al., Comprehensive Privacy Analysis of
Deep Learning, 2019, https://arxiv.org/abs/1812.00910
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fedjax_peft import objective
from fedjax_peft.audit import boundaries, voice

PyTree = Any


def alignment(
  seen: boundaries.Boundary, observed: PyTree, candidates: Mapping[str, Any]
) -> np.ndarray:
  """Cosines of what was seen and what candidates alone would say.

  What all messages have in common says nothing about any one, so the means
  over trials, and over candidates, are taken away first.

  Args:
    seen: the boundary.
    observed: [M, ...], what was seen in each trial.
    candidates: {feature: [M, k, ...]}, of which some were in trial m.

  Returns:
    float64 [M, k].
  """
  trials, count = next(iter(candidates.values())).shape[:2]
  alone = {k: x.reshape(-1, 1, *x.shape[2:]) for k, x in candidates.items()}
  said = _flat(voice.of_many(seen.voice, alone), 1)  # [M k, D]
  said = said.reshape(trials, count, -1)
  if seen.rows:
    heard = _flat(observed, 2)  # [M, n, D]
  else:
    heard = _flat(observed, 1)[:, None]
  heard = _unit(heard - heard.mean((0, 1)))
  said = _unit(said - said.mean((0, 1)))
  return np.einsum("mnd,mkd->mkn", heard, said).max(-1)


def _flat(messages, axes):
  """Messages [M, ...], or [M, k, ...], to one float64 vector each."""
  leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(messages)]
  lead = leaves[0].shape[:axes]
  return np.concatenate([x.reshape(*lead, -1) for x in leaves], axis=-1)


def _unit(x):
  """Rows of length one, or of zeros."""
  norm = np.linalg.norm(x, axis=-1, keepdims=True)
  return x / np.where(norm > 0, norm, 1)


def lower_loss(
  model: objective.Model,
  params: PyTree,
  base: PyTree,
  candidates: Mapping[str, Any],
) -> np.ndarray:
  """Minus the losses of models that were released, one a trial.

  Args:
    model: what was trained.
    params: [M, ...], of the model of each trial.
    base: its frozen weights.
    candidates: {feature: [M, k, ...]}.

  Returns:
    float64 [M, k].
  """
  run = _losses(model.loss)
  found = voice.in_chunks(
    lambda params, rows: run(params, base, rows), (params, dict(candidates))
  )
  return -np.asarray(found, np.float64)


@functools.lru_cache(maxsize=16)
def _losses(loss):
  """Losses of candidates in many trials."""

  def one(params, base, examples):
    return loss(params, base, examples, jax.random.key(0))[0]

  return jax.jit(jax.vmap(one, (0, None, 0)))


def after_update(
  seen: boundaries.Boundary, observed: PyTree, length: float = 0.1
) -> PyTree:
  """Params [M, ...] of the models that what was seen would make.

  Args:
    seen: a boundary of reports, whose messages are descent directions.
    observed: [M, ...].
    length: L2 norm of the update, whose direction is what was seen; 0 is the
      model as it was.
  """
  norm = np.linalg.norm(_flat(observed, 1), axis=-1)
  scale = np.float32(length / np.where(norm > 0, norm, 1))

  def one(x, m):
    return np.asarray(x) - m * scale.reshape(-1, *[1] * (m.ndim - 1))

  params = seen.voice.weights[0]
  return {k: one(params[k], m) for k, m in observed.items()}
