"""Folding adapters into the layers that they stand beside or rescale."""

import jax.numpy as jnp
from flax import nnx

from fedjax_peft.peft import adapter, beside, frozen, quantized, rescaling


def merged(module: nnx.Module) -> nnx.Module:
  """Folds what can be folded: plain layers again.

  LoRA, DoRA, VeRA, core, RAVAN and sparse deltas go into kernels, IA3 into
  kernels and biases. Bottlenecks, prompts and prefixes stay, since they are no
  linear map of a layer; with them the result is the same function too.

  Args:
    module: a module with adapters, neither frozen nor quantized under them (a
      bfloat16 or integer kernel could not hold the sum); untouched.

  Returns:
    A clone without such adapters; kernel + delta is summed in float32 and has
    the kernel's dtype. Every Adapter becomes an nnx.Param.

  Raises:
    ValueError: if the module is frozen, or a layer under an adapter quantized.

  Example:
    >>> from fedjax_peft import peft
    >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    >>> plain = merged(peft.lora(model, rank=2, where=".*"))
    >>> type(plain).__name__
    'Linear'
    >>> bool((plain.kernel[...] == model.kernel[...]).all())
    True
  """
  frozen.refuse(module, "merged")

  def fold(path, node):
    if isinstance(node, beside.Beside):
      layer = _plain(node.lora_base, path)
      delta = node.contraction.kernel(node.delta())
      _set(layer, "kernel", layer.kernel[...].astype(jnp.float32) + delta)
      return layer
    if isinstance(node, rescaling.IA3):
      layer = _plain(node.ia3_base, path)
      for name, gain in node.gains().items():
        _set(layer, name, getattr(layer, name)[...].astype(jnp.float32) * gain)
      return layer
    return node

  plain = adapter.replace(module, fold)
  return adapter.retype(plain, adapter.find(plain, adapter.Adapter), nnx.Param)


def _plain(layer, path):
  """The layer, unless it is quantized."""
  if isinstance(layer, quantized.QuantizedLinear):
    raise ValueError(
      "merged needs float kernels: "
      f"{adapter.join(path)!r} is quantized; merge the adapters into the "
      "module as it was before quantize_base"
    )
  return layer


def _set(layer, name, value):
  """Sets a parameter, in its own dtype."""
  # A new Variable: another layer that shares the old one keeps its own.
  old = getattr(layer, name)
  setattr(layer, name, old.copy(value.astype(old.dtype)))
