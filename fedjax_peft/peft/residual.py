"""Residuals: what a receiver adds to a layer that no adapter can say.

Rules that aggregate products exactly (FLoRA, FedEx-LoRA) move the layer itself.
What they add up is kept beside the kernel, in float32, and is never trained. A
plain kernel takes it in once a round (`fold`), which costs a step nothing; a
quantized one cannot, and multiplies by it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft.peft import adapter, frozen, lowrank

_NAME = "lora_residual"


def is_residual(name: str) -> bool:
  """Whether a path is that of a residual."""
  return name.rsplit("/", 1)[-1] == _NAME


def strip(module: nnx.Module) -> tuple[nnx.Module, dict[str, jax.Array]]:
  """Takes out the residuals that their layers' kernels can take in.

  Args:
    module: as `freeze` returns it; untouched.

  Returns:
    (clone, {path: float32 [stack, K, F]}).
  """
  found = {}
  for path, (node, _) in adapter.find(module, lowrank.LoRA).items():
    layer = node.lora_base
    if node.lora_residual is not None and isinstance(
      layer, frozen.FrozenLinear
    ):
      found[path] = node.lora_residual[...]
  if not found:
    return module, {}

  def one(path, node):
    if path in found:
      node.lora_residual = nnx.data(None)
    return node

  names = {f"{adapter.join(p)}/{_NAME}": x for p, x in found.items()}
  return adapter.replace(module, one), names


def fold(
  base: Mapping[str, Any], residuals: Mapping[str, jax.Array]
) -> dict[str, Any]:
  """Adds residuals to the frozen kernels that they stand beside.

  Args:
    base: {path: array}, with `FrozenLinear` kernels [stack, K, F] and their
      transposes.
    residuals: {path: [stack, K, F]}, as `strip` returns them.

  Returns:
    The base with kernels summed in float32 and rounded once.
  """
  moved = dict(base)
  for path, value in residuals.items():
    layer = path.removesuffix(_NAME)
    for name, side in (
      (f"{layer}kernel", value),
      (f"{layer}kernel_t", jnp.swapaxes(value, -1, -2)),
    ):
      if name in moved:
        kernel = moved[name]
        total = kernel.astype(jnp.float32) + side
        moved[name] = total.astype(kernel.dtype)
  return moved
