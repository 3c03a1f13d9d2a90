"""Arrays of a module by path, and how theirs are laid out."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedjax_peft import objective, peft
from fedjax_peft.models import family
from fedjax_peft.peft import adapter

# Axis of a leaf along which a client may have less than the module.
_RANK = {"lora_a": -1, "lora_b": -2}


def filled(
  parts: nnx.Module | objective.Model | peft.Split,
  params: Mapping[str, Any] | None,
) -> nnx.Module:
  """A module with other values in it.

  Args:
    parts: a module that is not frozen, or one that was taken apart.
    params: {path: array}, of all or some of what trains; None changes nothing.
      Factors may have a smaller rank than those of the module.

  Returns:
    A new module.

  Raises:
    ValueError: if a path is not known, or an array of another shape.
  """
  if isinstance(parts, objective.Model):
    module = parts.origin
  elif isinstance(parts, peft.Split):
    module = peft.merge(*parts)
  else:
    module = parts
  if params is None:
    return module
  split = peft.split(module)
  held = {"params": split.params, "mutable": split.mutable}
  known = {name: x for part in held.values() for name, x in part.items()}
  for name, value in params.items():
    if name not in known:
      raise ValueError(
        f"params must be what the module trains: {name!r} is not"
        f"{adapter.near(name, known)}"
      )
    if not _fits(name, jnp.shape(value), known[name].shape):
      raise ValueError(
        f"params must have the shapes of the module's: {name!r} is "
        f"{list(known[name].shape)}, got {list(jnp.shape(value))}"
      )
  new = {
    kind: {k: jnp.asarray(params.get(k, x)) for k, x in part.items()}
    for kind, part in held.items()
  }
  return peft.merge(
    split.graph, new["params"], split.rng, new["mutable"], split.base
  )


def _fits(name, shape, like):
  """Whether a shape is that of the module, or of a smaller rank."""
  axis = _RANK.get(name.rsplit("/", 1)[-1])
  if axis is None or len(shape) != len(like):
    return shape == like
  cut = list(like)
  cut[axis] = min(shape[axis], like[axis])
  return tuple(shape) == tuple(cut)


def cut(params: Mapping[str, Any], rank: int) -> dict[str, Any]:
  """The first `rank` columns of every A and rows of every B.

  Example:
    >>> {k: x.shape for k, x in cut({"q/lora_a": jnp.ones((4, 8))}, 2).items()}
    {'q/lora_a': (4, 2)}
  """
  kept = dict(params)
  for name, x in params.items():
    axis = _RANK.get(name.rsplit("/", 1)[-1])
    if axis is not None:
      kept[name] = jnp.moveaxis(jnp.moveaxis(x, axis, 0)[:rank], 0, axis)
  return kept


def held(module: nnx.Module) -> dict[str, jax.Array]:
  """{path: array} of all Variables of a module, trained or not."""
  _, state = nnx.split(module, graph=True)
  return {
    adapter.join(path): leaf.get_raw_value()
    for path, leaf in nnx.to_flat_state(state)
    if isinstance(leaf, nnx.Variable)
  }


def theirs(
  path: str, value: np.ndarray, kind: str, config: family.Config
) -> np.ndarray:
  """One of our arrays, of one layer, in their layout: undoes `Family.convert`.

  Args:
    path: of the array.
    value: of one layer.
    kind: a `model_type`.
    config: of the module.
  """
  leaf = path.rsplit("/", 1)[-1]
  if path == "embeddings/patch/kernel":
    size, channels = config.patch, config.channels  # type: ignore[union-attr]
    return value.reshape(size, size, channels, -1).transpose(3, 2, 0, 1)
  if path in ("embeddings/position", "embeddings/registers"):
    return value[None]
  if path in ("embeddings/class_token", "embeddings/distillation_token"):
    return value[None, None]
  if kind in ("gemma", "gemma2") and leaf == "scale":
    return value - 1
  return value.T if leaf == "kernel" else value
