"""Bottleneck adapters: two narrow dense layers after, or beside, a module.

Sequential: h = f(x); y = h + up(act(down(h))). Parallel: y = f(x) + scale *
up(act(down(x))). `up` is zero at first.

Houlsby et al., Parameter-Efficient Transfer Learning for NLP, 2019,
https://arxiv.org/abs/1902.00751
He et al., Towards a Unified View of Parameter-Efficient Transfer Learning,
2021, https://arxiv.org/abs/2110.04366
"""

import functools
import math
import zlib
from collections.abc import Callable

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
  rescaling,
)

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  "tanh": jnp.tanh,
}
_LAYERS = (
  *contraction.LAYERS,
  quantized.QuantizedLinear,
  beside.Beside,
  rescaling.IA3,
)


class Bottleneck(nnx.Module):
  """A module with a bottleneck; `bottleneck` puts it in place.

  Attributes:
    adapter_base: the module it wraps.
    bottleneck_down: Adapter, float32 [stack, D, M].
    bottleneck_down_bias: Adapter, float32 [stack, M].
    bottleneck_up: Adapter, float32 [stack, M, F].
    bottleneck_up_bias: Adapter, float32 [stack, F].
    parallel: it reads the module's input, not its output.
    activation: between the two, a key of the module's table.
    scale: a factor on what is added.
  """

  def __init__(self, base, down, columns, parallel, activation, scale):
    *stack, _, size = down.shape
    zeros = lambda *shape: jnp.zeros((*stack, *shape), jnp.float32)  # noqa: E731
    self.adapter_base = base
    self.bottleneck_down = adapter.Adapter(down)
    self.bottleneck_down_bias = adapter.Adapter(zeros(size))
    self.bottleneck_up = adapter.Adapter(zeros(size, columns))
    self.bottleneck_up_bias = adapter.Adapter(zeros(columns))
    self.parallel = parallel
    self.activation = activation
    self.scale = scale

  def __call__(self, x: jax.Array, *args, **options) -> jax.Array:
    """The module's output plus the bottleneck's, in the dtype of the former."""
    h = self.adapter_base(x, *args, **options)
    source = (x if self.parallel else h).astype(jnp.float32)
    down = source @ self.bottleneck_down[...]
    down = _ACTIVATIONS[self.activation](
      down + beside.row(self.bottleneck_down_bias[...], down)
    )
    up = down @ self.bottleneck_up[...]
    up = self.scale * (up + beside.row(self.bottleneck_up_bias[...], up))
    return h + beside.silent(up).astype(h.dtype)


def bottleneck(
  module: nnx.Module,
  size: int = 16,
  where: str = r".*/(output|down)",
  *,
  parallel: bool = False,
  width: int | None = None,
  activation: str = "gelu",
  scale: float = 1.0,
  seed: int = 0,
) -> nnx.Module:
  """Puts a bottleneck after, or beside, every matched module.

  The default places are Houlsby's: what attention and feed-forward return,
  before it is added to the stream.

  Guarantees:
    the result computes what `module` computes, bit for bit (finite inputs);
    an adapter's initial value depends on (seed, module name) only; modules
    stacked on leading axes get stacked adapters.

  Args:
    module: any NNX module; untouched.
    size: M >= 1, of the hidden layer.
    where: regex, matched in full against the "/"-joined name of each module
      that can be called with an array first. A wrapped module keeps its name,
      but attributes that others read from it are out of reach.
    parallel: read the module's input instead of its output (He et al.).
    width: D = F, last axis of the input and output of the matched modules;
      None reads both from a Linear, and must be given for other modules.
    activation: "gelu", "relu", "silu" or "tanh".
    scale: a factor on what is added.
    seed: of the adapters' initial values: down ~ normal / sqrt(D), up = 0.

  Returns:
    A clone with `Bottleneck` in place of the matched modules. It trains
    M * (D + F) + M + F entries a module; D = F unless it is parallel.

  Raises:
    ValueError: if `where` matches no module (near names are listed), one with
      a bottleneck, one that cannot be called, or one whose width is unknown;
      if the module is frozen already.

  Example:
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> tuned = bottleneck(model, 2, where="layers/0")
    >>> tuned.layers[0].bottleneck_down.shape
    (3, 2)
  """
  validate.at_least(1, size=size)
  validate.one_of(_ACTIVATIONS, activation=activation)
  validate.positive(scale=scale)
  if width is not None:
    validate.at_least(1, width=width)
  frozen.refuse(module, "bottleneck")
  found = adapter.find(module, nnx.Module)
  names = {
    path: names
    for path, (_, names) in found.items()
    if path[-1:] not in [(name,) for name in adapter.WRAPPED]
  }
  chosen = adapter.select(where, names, "module")
  key = jax.random.key(seed)

  def one(path, node):
    if path not in chosen:
      return node
    name = adapter.join(path)
    _check(node, name, where)
    rows, columns = _widths(node, name, width)
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    rows = rows if parallel else columns
    shape = (*beside.stack_within(node), rows, size)
    down = jax.random.normal(own, shape, jnp.float32) / math.sqrt(rows)
    return Bottleneck(node, down, columns, parallel, activation, scale)

  return adapter.replace(module, one)


def _check(node, name, where):
  """Refuses modules that take no bottleneck."""
  if isinstance(node, Bottleneck):
    raise ValueError(
      f"a module takes one bottleneck: {name!r} has one and {where=} matches "
      "it; leave it out of where"
    )
  if not callable(node):
    raise ValueError(
      f"a bottleneck stands after a module that can be called: {where=} "
      f"matches {name!r} of type {type(node).__name__}; leave it out of where"
    )


def _widths(node, name, width):
  """Last axes of the input and the output of a module."""
  if width is not None:
    return width, width
  if isinstance(node, _LAYERS):
    shape = contraction.of(node, name)
    flat = len(shape.fan_in) == len(shape.fan_out) == 1
    if flat and not shape.equation and shape.axis == (-1,):
      return shape.rows, shape.columns
  raise ValueError(
    "the width of a module that is no Linear must be given: "
    f"{name!r} is of type {type(node).__name__}; write width=..., the last "
    "axis of what it reads and returns"
  )
