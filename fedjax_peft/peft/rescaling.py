"""IA3: learned gains on what goes into a layer or comes out of it.

Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning, 2022, https://arxiv.org/abs/2205.05638
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft import validate
from fedjax_peft.peft import (
  adapter,
  beside,
  contraction,
  frozen,
  quantized,
)

_LAYERS = (*contraction.LAYERS, quantized.QuantizedLinear, beside.Beside)


class IA3(nnx.Module):
  """A layer with a gain on its output or input; `ia3` puts it in place.

  Attributes:
    ia3_base: the layer it wraps, with or without an adapter beside it.
    ia3_gain: Adapter, float32 [stack, F] or, on inputs, [stack, K].
    side: "output" or "input".
    contraction: how the layer's kernel meets its input.
  """

  def __init__(self, base, gain, side, shape):
    self.ia3_base = base
    self.ia3_gain = adapter.Adapter(gain)
    self.side = side
    self.contraction = shape

  def __call__(self, x: jax.Array, *args, **options) -> jax.Array:
    """The layer's output, bias and all, times the gain; or of the input."""
    gain = self.ia3_gain[...]
    if self.side == "input":
      gain = self.contraction.spread_rows(gain, x.ndim)
      return self.ia3_base(x * gain.astype(x.dtype), *args, **options)
    y = self.ia3_base(x, *args, **options)
    return y * self.contraction.spread(gain, y.ndim).astype(y.dtype)

  def gains(self) -> dict[str, jax.Array]:
    """What each parameter of the layer is to be multiplied by."""
    gain, shape = self.ia3_gain[...], self.contraction
    wide = (*gain.shape[:-1], shape.rows, shape.columns)
    rows = gain[..., :, None] if self.side == "input" else gain[..., None, :]
    gains = {"kernel": shape.kernel(jnp.broadcast_to(rows, wide))}
    layer = self.ia3_base
    if self.side == "output" and layer.bias is not None:
      gains["bias"] = gain.reshape(layer.bias.shape)
    return gains


def ia3(
  module: nnx.Module,
  where: str = r".*/(key|value)",
  *,
  side: str = "output",
) -> nnx.Module:
  """Puts a gain on every matched layer.

  The paper's places are keys and values (side="output") and the hidden layer
  of the feed-forward, which is what its down projection reads:
  `ia3(ia3(module), where=".*/down", side="input")`.

  Guarantees:
    gains are one at first: the result computes what `module` computes, bit for
    bit; layers stacked on leading axes get stacked gains.

  Args:
    module: any NNX module; untouched.
    where: regex, matched in full against the "/"-joined name of each layer, as
      in `lora`. A layer may also have an adapter beside it, put there before
      or after; the gain multiplies both.
    side: "output" (after the bias) or "input".

  Returns:
    A clone with `IA3` in place of the matched layers. It trains ia3_gain: F
    entries a layer on outputs, K on inputs.

  Raises:
    ValueError: if `where` matches no layer (near names are listed) or one with
      a gain; if `side` is neither; if the module is frozen already.

  Example:
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> ia3(model, where="layers/0").layers[0].ia3_gain.shape
    (3,)
    >>> ia3(model, where="layers/0", side="input").layers[0].ia3_gain.shape
    (4,)
  """
  validate.one_of(("output", "input"), side=side)
  frozen.refuse(module, "ia3")
  found = adapter.find(module, (*_LAYERS, IA3))
  names = {
    path: names
    for path, (_, names) in found.items()
    if path[-1:] not in (("lora_base",), ("ia3_base",))
  }
  chosen = adapter.select(where, names, "layer that ia3 can rescale")

  def one(path, node):
    if path not in chosen:
      return node
    name = adapter.join(path)
    if isinstance(node, IA3):
      raise ValueError(
        f"a layer takes one gain: {name!r} has one and {where=} matches it; "
        "leave it out of where"
      )
    shape = contraction.of(node, name)
    inner = node.lora_base if isinstance(node, beside.Beside) else node
    size = shape.columns if side == "output" else shape.rows
    gain = jnp.ones((*beside.stack(inner, shape), size), jnp.float32)
    return IA3(node, gain, side, shape)

  return adapter.replace(module, one)
