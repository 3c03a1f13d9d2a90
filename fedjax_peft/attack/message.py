"""Messages: attackers train as they should and report something else.

Messages are `params - new`, a descent direction, so a sign flip climbs.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fedjax_peft import placement, tree, validate, work
from fedjax_peft.attack import wrap


def sign_flip(job: work.Work, factor: float = 1.0) -> work.Work:
  """Attackers send -factor times their message (Li et al., RSA, 2019).

  Args:
    job: what clients do.
    factor: > 0.

  Raises:
    ValueError: if `factor` is not positive, or the job's stride is not 1.
  """
  validate.positive(factor=factor)
  return scale(job, -factor)


def scale(job: work.Work, factor: float) -> work.Work:
  """Attackers send factor times their message.

  A large factor behind poisoned examples is boosting (Bhagoji et al., 2019,
  arXiv 1811.12470); 0 is a free rider.

  Args:
    job: what clients do.
    factor: any finite number.

  Raises:
    ValueError: if `factor` is not finite, or the job's stride is not 1.
  """
  if not math.isfinite(factor):
    raise ValueError(f"factor must be a finite number, got factor={factor}")

  def change(message, sent, key):
    return tree.scale(message, jnp.float32(factor))

  return wrap.on_message(job, change)


def gaussian(job: work.Work, sigma: float) -> work.Work:
  """Attackers send noise in place of their message (Blanchard et al., 2017).

  Args:
    job: what clients do.
    sigma: > 0, standard deviation of each value; integer leaves are sent as
      they are.

  Raises:
    ValueError: if `sigma` is not positive, or the job's stride is not 1.
  """
  validate.positive(sigma=sigma)

  def change(message, sent, key):
    leaves, treedef = jax.tree.flatten(message)
    keys = jax.random.split(key, max(len(leaves), 1))

    def noise(x, key):
      if not tree.is_float(x):
        return x
      drawn = jax.random.normal(key, x.shape, jnp.float32)
      return (sigma * drawn).astype(x.dtype)

    drawn = [noise(x, key) for x, key in zip(leaves, keys, strict=False)]
    return jax.tree.unflatten(treedef, drawn)

  return wrap.on_message(job, change)


def replace(
  job: work.Work, target: Mapping[str, jax.Array], boost: float
) -> work.Work:
  """Attackers send boost * (sent - target), to put the model at a target.

  Under a mean of n messages, of which m are such and the others small, a boost
  of n / m takes the model there in one round (model replacement, Bagdasaryan
  et al., 2020).

  Args:
    job: what clients do.
    target: {path: array} with all leaves that clients report; others are
      ignored. They become constants of the program, so let it be adapters.
    boost: > 0.

  Raises:
    ValueError: if a leaf is missing or has another shape, `boost` is not
      positive, or the job's stride is not 1.
  """
  validate.positive(boost=boost)
  for name in placement.split(job.placement).moving:
    shape = jnp.shape(job.params[name])
    if name not in target:
      raise ValueError(
        f"target must have every leaf that clients report: got no '{name}'"
        f"{validate.near(name, target)}"
      )
    if jnp.shape(target[name]) != shape:
      raise ValueError(
        f"target '{name}' must have the shape of the model's, {list(shape)}: "
        f"got {list(jnp.shape(target[name]))}"
      )

  def change(message, sent, key):
    def one(name, x):
      away = sent.params[name] - jnp.asarray(target[name], x.dtype)
      return away * jnp.asarray(boost, x.dtype)

    return {name: one(name, x) for name, x in message.items()}

  return wrap.on_message(job, change)
