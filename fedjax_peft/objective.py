"""The objective: a module taken apart, and the loss that is minimized.

What clients train (`params`) and what they share (`base`) are separate
arguments from here on: the base is never differentiated, and under `vmap` over
clients it has no client axis.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft import peft, validate

Params = dict[str, jax.Array]


class Model(NamedTuple):
  """A module split into arguments, with its loss.

  Attributes:
    params: {path: array}, what can be trained, and variables that change in
      the forward pass (`mutable`).
    base: {path: array}, frozen; an argument of everything, never batched.
    mutable: paths in `params` that the forward pass changes and no gradient
      touches (batch statistics).
    loss: (params, base, examples, key) -> (per_example [B], metrics, changed),
      `changed` holding the new values of the mutable paths.
    module: (params, base) -> nnx.Module, ready to be called.
    origin: the module as it was given.
    loss_fn: the loss as it was given, with what it returns checked.
    served: paths in `params` that only a receiver changes (residuals).
    fold: (params, base) -> (params, base), moves residuals into the frozen
      kernels they stand beside; the loss does so by itself where nobody has.
  """

  params: Params
  base: Params
  mutable: frozenset[str]
  loss: Callable
  module: Callable
  origin: nnx.Module
  loss_fn: Callable
  served: frozenset[str] = frozenset()
  fold: Callable = lambda params, base: (params, base)


def model(
  module: nnx.Module,
  loss: Callable[[nnx.Module, Mapping[str, Any], jax.Array], tuple],
  *,
  precision: Literal["bf16", "float32"] = "bf16",
) -> Model:
  """Takes a module apart into what is trained and what is shared.

  Args:
    module: any NNX module, with adapters (`peft.lora`, `peft.tune`) or without
      (then all its `nnx.Param`s are trained). It is not changed.
    loss: loss(module, examples, key) -> (per_example [B], metrics), metrics
      {name: (numerator [B], denominator [B])}.
    precision: of the frozen matrix products. "bf16": inputs rounded to
      bfloat16, accumulated in float32; "float32": as they are. What is
      trained is float32 in both.

  Returns:
    A Model; merge it back with `model.module(params, model.base)`.
  """
  validate.one_of(["bf16", "float32"], precision=precision)
  plain, residuals = peft.strip(peft.freeze(module, precision=precision))
  split = peft.split(plain)

  def merge(params, base, key):
    trained = {k: params[k] for k in split.params}
    mutable = {k: params[k] for k in split.mutable}
    rng = reseed(split.rng, key)
    return peft.merge(split.graph, trained, rng, mutable, base)

  def checked(module, examples, key):
    per_example, metrics = loss(module, examples, key)
    _check(per_example, metrics, jax.tree.leaves(examples)[0].shape[0])
    return per_example, metrics

  def fold(params, base):
    here = {k: params[k] for k in residuals if k in params}
    rest = {k: v for k, v in params.items() if k not in here}
    return rest, peft.fold(base, here)

  def loss_(params, base, examples, key):
    params, base = fold(params, base)
    merged = merge(params, base, key)
    per_example, metrics = checked(merged, examples, key)
    changed = peft.split(merged).mutable if split.mutable else {}
    return per_example, metrics, changed

  def rebuild(params, base, key=None):
    key = jax.random.key(0) if key is None else key
    params, base = fold(params, base)
    return merge(params, base, key)

  served = {k for k in split.params if peft.is_residual(k)} | set(residuals)
  return Model(
    params={**split.params, **residuals, **split.mutable},
    base=split.base,
    mutable=frozenset(split.mutable),
    loss=loss_,
    module=rebuild,
    origin=module,
    loss_fn=checked,
    served=frozenset(served),
    fold=fold,
  )


def _check(per_example, metrics, rows: int) -> None:
  """Raises ValueError unless a loss returned one value an example."""
  parts = {"the loss": per_example}
  for name, (top, bottom) in metrics.items():
    parts |= {f"numerator of {name!r}": top, f"denominator of {name!r}": bottom}
  for name, value in parts.items():
    if jnp.shape(value) != (rows,):
      raise ValueError(
        f"a loss must return one value an example, [{rows}], so that padding "
        f"can be left out: got {name} of shape {list(jnp.shape(value))}; leave "
        "out the mean or the sum over the batch"
      )


def reseed(rng: Params, key: jax.Array) -> Params:
  """Gives every random stream of a module a key of its own, counting from 0."""

  def one(i, x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      own = jax.random.fold_in(key, i)
      return jax.random.split(own, x.shape) if x.shape else own
    return jnp.zeros_like(x)

  return {name: one(i, x) for i, (name, x) in enumerate(sorted(rng.items()))}
