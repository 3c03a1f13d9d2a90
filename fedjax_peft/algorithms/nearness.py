"""Nearness: how much of a personal adapter an example gets.

An example that looks like those a client has trained on is for its personal
adapter, others are for everyone's. What it looks like is said by the frozen
base, so that all adapters agree on it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_peft import objective, work
from fedjax_peft.algorithms import memory, seeing, stacked

CENTER = "feddpa/center"  # the leaf with the mean direction of a client's data
_NAMES = ("shared", "personal")


def by_example(
  model: objective.Model,
  examples: Mapping[str, Any],
  *,
  most: float = 0.5,
) -> objective.Model:
  """A model that mixes `shared` and `personal` adapters for each example.

  The weight of `personal` is `most` times the mean cosine between an example's
  features and those of the examples that the client trained on, 0 where that
  is negative; `shared` has what is left of one. Cosines add up, so the mean
  over all of a client's examples is one inner product with the mean direction
  of their features, a leaf `feddpa/center` [D] that lives on the device. A
  client that has not trained has the center zero, and uses `shared` alone.

  Given to `feddpa` and to `fp.evaluation`: clients train with the fixed
  weight of `feddpa`, and are tested with this one. Features cost a pass
  through the base for each batch, and a product with the adapters is one for
  each example.

  Yang et al., 2024, https://arxiv.org/abs/2403.19211, who average over five
  examples and look with the personal adapter.

  Args:
    model: of a module from `stack(module, {"shared": R, "personal": R})`, with
      a method `features` as in `moon`.
    examples: {name: [M, ...]}, any, for their shapes; `data.examples` will do.
    most: w_max, the largest weight, in [0, 1].

  Raises:
    ValueError: if adapters or features are missing, the weight is out of range,
      or the forward pass changes leaves (batch statistics).
  """
  if not 0 <= most <= 1:
    raise ValueError(f"most must be in [0, 1]: got {most=}")
  stacked.check(model.params, _NAMES)
  if model.mutable:
    raise ValueError(
      "by_example runs each example alone, and this model's forward pass "
      f"changes {sorted(model.mutable)[0]!r}; use norms without running means"
    )
  look = direction(model)
  one = {
    k: jax.ShapeDtypeStruct((1, *v.shape[1:]), v.dtype)
    for k, v in examples.items()
  }
  width = jax.eval_shape(look, model.params, model.base, one).shape[-1]

  def loss(params, base, examples, key):
    if CENTER not in params:
      return model.loss(params, base, examples, key)
    params = dict(params)
    center = params.pop(CENTER)
    cosine = look(params, base, examples) @ center  # [B]
    weight = jax.lax.stop_gradient(most * jnp.maximum(cosine, 0))

    def alone(weight, example):
      mixture = {"personal": weight, "shared": 1 - weight}
      here = jax.tree.map(lambda x: x[None], example)
      each, metrics, _ = model.loss(
        stacked.mix(params, mixture), base, here, key
      )
      return jax.tree.map(lambda x: x[0], (each, metrics))

    each, metrics = jax.vmap(alone)(weight, dict(examples))
    return each, metrics, {}

  params = {**model.params, CENTER: jnp.zeros((width,), jnp.float32)}
  return model._replace(params=params, loss=loss)


def direction(model: objective.Model) -> Callable:
  """Features of length one, (params, base, examples) -> float32 [B, D].

  They are of the module without its adapters; zero features stay zero.
  """
  seen = seeing.features_of(model, "by_example")

  def look(params, base, examples):
    silent = stacked.mix(params, dict.fromkeys(_NAMES, 0.0))
    x = seen(model.module(silent, base), examples).astype(jnp.float32)
    square = jnp.sum(jnp.square(x), -1, keepdims=True)
    unit = x / jnp.sqrt(jnp.where(square > 0, square, 1))
    return jax.lax.stop_gradient(unit)

  return look


def centered(job: work.Work, model: objective.Model) -> work.Work:
  """A job whose clients note the mean direction of what they train on.

  Args:
    job: a `work.train` of the model's leaves but the center.
    model: from `by_example`.
  """
  look = direction(model)
  start = jnp.zeros_like(model.params[CENTER])

  def see(leaves, base, batch):
    x = look(leaves, base, batch.examples)
    here = (batch.mask > 0)[:, None]
    total = jnp.sum(jnp.where(here, x, jnp.zeros_like(x)), axis=0)
    return total, jnp.sum(batch.mask)

  def close(held, leaves, message):
    total, count = held.seen
    mean = total / jnp.maximum(count, 1)
    # Who came without any example keeps what it knew.
    return message, {CENTER: jnp.where(count > 0, mean, leaves[CENTER])}

  return memory.remember(
    job,
    own={CENTER: start},
    close=close,
    watch=memory.Watch((start, jnp.zeros(())), see),
  )
