"""Voices: what a client says of its examples, before anything happens to it.

A voice is deterministic and differentiable by float examples, so an attacker
can ask what any guess would have made the client say.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_peft import objective
from fedjax_peft import work as work_lib
from fedjax_peft.split import cutting

PyTree = Any
IMAGE, LABEL = "image", "label"
CHUNK = 16  # rows of one program


class Voice(NamedTuple):
  """What a client says; made by `trained` and `activations`.

  Attributes:
    model: what everybody knows, with its loss.
    weights: (params, base) of it, the first argument of `say`.
    say: (weights, {feature: [n, ...]}) -> message.
  """

  model: objective.Model
  weights: tuple[PyTree, PyTree]
  say: Callable[[tuple, dict], PyTree]


def trained(model: objective.Model) -> Voice:
  """A client that takes one step of SGD on all its examples.

  With a learning rate of 1 its message is the gradient of its mean loss, by
  what the model trains.

  Raises:
    ValueError: if the model has leaves that its forward pass changes, which
      are another message.
  """
  if model.mutable:
    raise ValueError(
      "a voice is a gradient, but leaves change in the forward pass: got "
      f"{sorted(model.mutable)}; use a model without batch statistics"
    )
  job = work_lib.train(model, work_lib.local(optax.sgd(1.0), batch=1))
  nobody = jax.random.key(0)  # one step on all examples draws nothing

  def say(weights, examples):
    params, base = weights
    count = jax.tree.leaves(examples)[0].shape[0]
    sent = work_lib.Sent(params, {"round": jnp.int32(0)})
    client = work_lib.Client(nobody, jnp.int32(0), jnp.int32(count))
    batch = work_lib.Batch(examples, jnp.ones(count), nobody)
    carry, _ = job.step(job.init(sent, base, {}, client), sent, base, batch)
    return job.finish(carry, sent)[0]

  return Voice(model, (model.params, model.base), say)


def activations(model: objective.Model) -> Voice:
  """A device that hands on what the first part of a model makes of examples.

  Args:
    model: of a `split.pipeline` of two parts; its loss is not used.

  Raises:
    ValueError: if the module is no pipeline, or one of more than two parts.
  """
  pipe = model.origin
  if not isinstance(pipe, cutting.Pipeline) or len(pipe.names) != 2:
    raise ValueError(
      "activations are those of a model cut once: got a "
      f"{type(pipe).__name__}; use split.pipeline(module, "
      '{"device": ..., "server": None})'
    )

  def say(weights, examples):
    features = {k: v for k, v in examples.items() if k != LABEL}
    return model.module(*weights).parts()[0](**features)

  return Voice(model, (model.params, model.base), say)


def of_many(voice: Voice, examples: Mapping[str, Any]) -> PyTree:
  """What many clients say: {feature: [M, n, ...]} to numpy [M, ...]."""
  say = _many(voice.say)
  return in_chunks(lambda rows: say(voice.weights, rows), (dict(examples),))


@functools.lru_cache(maxsize=32)
def _many(say):
  """Many clients at once, compiled once a voice."""
  return jax.jit(jax.vmap(say, (None, 0)))


def in_chunks(fun: Callable, arrays: tuple) -> PyTree:
  """A function of rows on any number of them, in one program.

  Args:
    fun: of arrays whose leading axis is `CHUNK`, to the same.
    arrays: pytrees, leading axis M >= 1.

  Returns:
    Numpy pytree [M, ...].
  """
  count = len(jax.tree.leaves(arrays)[0])
  found = []
  for start in range(0, count, CHUNK):
    # The last rows stand in for those that are missing.
    rows = np.minimum(np.arange(start, start + CHUNK), count - 1)
    chunk = jax.tree.map(lambda x, rows=rows: x[rows], arrays)
    found.append(jax.tree.map(np.asarray, fun(*chunk)))
  return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *found)
