"""Starting: adapters that begin as the best approximation of an update."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft.peft import adapter, lowrank
from fedjax_peft.rules import product


def start(module: nnx.Module, updates: Mapping[str, jax.Array]) -> nnx.Module:
  """Gives low-rank adapters the best factors for updates of their layers.

  U S V^T being the SVD of an update, A <- U_R and B <- S_R V_R^T / scale. So
  SLoRA goes on from a sparse update (arXiv 2308.06522).

  Args:
    module: with low-rank adapters; untouched.
    updates: {layer: float [stack, K, F]}, what is to be added to the layer's
      kernel as a matrix; other adapters stay as they are.

  Returns:
    A clone.

  Raises:
    ValueError: if a name is no layer with an adapter, or a shape does not fit.
  """
  found = {
    adapter.join(path): (path, node)
    for path, (node, _) in adapter.find(module, lowrank.LoRA).items()
  }
  new = {}
  for name, update in updates.items():
    if name not in found:
      raise ValueError(
        f"updates must be for layers with a low-rank adapter: got {name!r}"
        f"{adapter.near(name, found)}"
      )
    path, node = found[name]
    a, b = node.lora_a[...], node.lora_b[...]
    shape = (*a.shape[:-1], b.shape[-1])
    if update.shape != shape:
      raise ValueError(
        f"the update of {name!r} must be {list(shape)}: got "
        f"{list(update.shape)}"
      )
    u, s, v = product.svd(product.Dense(jnp.asarray(update)), a.shape[-1])
    new[path] = (u, s[..., None] * v / node.scale)

  def one(path, node):
    if path in new:
      node.lora_a, node.lora_b = (adapter.Adapter(x) for x in new[path])
    return node

  return adapter.replace(module, one)
