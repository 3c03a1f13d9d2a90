"""Joining: what was cut as one model again, with what its parts have learned.

Parts share the paths of the model that was cut, but for the part's name in
front and the rows of stacked blocks; a model whose cut moves is whole, but for
its wire.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from fedjax_peft import peft
from fedjax_peft.models import stage
from fedjax_peft.peft import adapter, beside, contraction, quantized
from fedjax_peft.split import cutting, modules, moving

_ADAPTED = (peft.LoRA, peft.DoRA, peft.IA3)
_LAYERS = (*contraction.LAYERS, quantized.QuantizedLinear)


def whole(module: Any) -> Any:
  """The model that was cut, with the values of its parts.

  Guarantees:
    whole(pipeline(model, ends)) is the model, bit for bit, and so is
    whole(movable(model)). With wires that change nothing it computes what the
    pipeline does, as `stage.part` says.

  Args:
    module: a pipeline, or a model whose cut moves; untouched. Others are
      returned as they are. What is of no part (a device's own head, memories)
      is left out.

  Returns:
    The model. Where blocks of one stack are in several parts, and lora, dora
    or ia3 in some of these only, the other blocks have an adapter that changes
    nothing; it does not train in blocks before those that have one.

  Raises:
    ValueError: if the parts are not of one model, the blocks of a stack have
      adapters of different methods, ranks or scales, or a table that several
      parts read was trained apart.

  Example:
    >>> from fedjax_peft import models, split
    >>> model = models.load("encoder", classes=3)
    >>> pipe = split.pipeline(model, {"device": "layers/0", "server": None})
    >>> nnx.graphdef(whole(pipe)) == nnx.graphdef(model)
    True
  """
  if isinstance(getattr(module, "crossing", None), moving.Crossing):
    clone: Any = nnx.clone(module)
    clone.crossing = nnx.data(None)
    return clone
  if not isinstance(module, cutting.Pipeline):
    return module
  parts: list[Any] = module.parts()
  if all(isinstance(part, modules.Modules) for part in parts):
    parts = [nnx.clone(part) for part in parts]
    named = [
      (name, getattr(part, name)) for part in parts for name in part.names
    ]
    return modules.Modules(named, last=parts[-1].last)
  for name, part in zip(module.names, parts, strict=True):
    if not hasattr(part, "span"):
      raise ValueError(
        "a pipeline is put together of the parts of one model: got a "
        f"{type(part).__name__} as {name!r}; put the part back that was there"
      )
  return stage.joined(_completed(parts))


def _completed(parts):
  """The parts; where a stack is adapted in one, it is in the others too."""
  stacked = {p for s in parts[0].stages() if s.row is not None for p in s.owns}
  known: dict[tuple, Any] = {}
  for part in parts:
    for path, (node, _) in adapter.find(part, _ADAPTED).items():
      name = "/".join(map(str, path))
      is_inside = any(wrapper in path for wrapper in adapter.WRAPPED)
      if not is_inside and any(name.startswith(f"{p}/") for p in stacked):
        known.setdefault(path, node)

  def one(path, node):
    if path not in known or not isinstance(node, _LAYERS):
      return node
    return _silent(known[path], node)

  return [adapter.replace(part, one) if known else part for part in parts]


def _silent(like, layer):
  """The same adapter on another layer, such that it changes nothing.

  What it would train is a plain Param, so that it stays as it is.
  """
  made: Any = nnx.clone(like)
  count = nnx.to_flat_state(nnx.state(layer))[0][1].shape[0]

  def rows(old, value):
    return jnp.full((count, *old.shape[1:]), value, old.dtype)

  if isinstance(like, peft.IA3):
    adapted = isinstance(like.ia3_base, _ADAPTED)
    made.ia3_base = _silent(like.ia3_base, layer) if adapted else layer
    made.ia3_gain = nnx.Param(rows(like.ia3_gain, 1.0))
    return made
  made.lora_base = layer
  made.lora_a = nnx.Param(rows(like.lora_a, 0.0))
  made.lora_b = nnx.Param(rows(like.lora_b, 0.0))
  if isinstance(like, peft.DoRA):
    norm = jnp.linalg.norm(beside.matrix(layer, like.contraction), axis=-2)
    made.dora_magnitude = nnx.Param(norm)
    made.dora_norm = adapter.Frozen(norm)
  elif like.lora_residual is not None:
    made.lora_residual = adapter.Residual(rows(like.lora_residual, 0.0))
  return made
