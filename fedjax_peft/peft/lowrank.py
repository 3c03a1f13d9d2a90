"""LoRA: a frozen layer plus a product of two small matrices.

y = base(x) + alpha / rank * (x @ A) @ B, with A ~ normal / sqrt(fan in), B = 0.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021,
https://arxiv.org/abs/2106.09685
"""

import functools
import math
import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft import validate
from fedjax_peft.peft import adapter, contraction, frozen

_REFUSED = (nnx.Embed, nnx.Conv, nnx.ConvTranspose)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def side_product(
  scale: float, x: jax.Array, a: jax.Array, b: jax.Array
) -> jax.Array:
  """Scale * (x @ a) @ b in float32, with an exact zero written as -0.0.

  y + -0.0 is y bit for bit for every y, while -0.0 + 0.0 is 0.0: so an adapter
  with B = 0 leaves its layer's output as it is.

  Args:
    scale: alpha / rank.
    x: [..., K], any float dtype.
    a: float32 [K, R].
    b: float32 [R, F].

  Returns:
    float32 [..., F].

  Example:
    >>> side_product(2.0, jnp.ones((1, 3)), jnp.ones((3, 1)), jnp.ones((1, 2)))
    Array([[6., 6.]], dtype=float32)
  """
  return _side_forward(scale, x, a, b)[0]


def _side_forward(scale, x, a, b):
  """Forward rule: keeps x, A, B and the narrow product."""
  narrow = (x.astype(jnp.float32) @ a) * scale  # [..., R]
  y = narrow @ b
  return jnp.where(y == 0, -0.0, y), (x, a, b, narrow)


def _side_backward(scale, residuals, g):
  """Backward rule: dA is computed as [R, K], the fast form on CPUs."""
  x, a, b, narrow = residuals
  dnarrow = (g @ b.T) * scale  # [..., R]
  dx = (dnarrow @ a.T).astype(x.dtype)
  x = x.astype(jnp.float32)
  da = _rows(dnarrow).T @ _rows(x)  # [R, K]
  return dx, da.T, _rows(narrow).T @ _rows(g)


side_product.defvjp(_side_forward, _side_backward)


def _rows(x):
  """[..., K] -> [M, K]."""
  return x.reshape(-1, x.shape[-1])


class LoRA(nnx.Module):
  """A layer with a low-rank adapter beside it; `lora` puts it in place.

  Attributes:
    lora_base: the layer it wraps.
    lora_a: Adapter, float32 [stack, K, R]; K = the layer's inputs.
    lora_b: Adapter, float32 [stack, R, F]; F = the layer's outputs.
    lora_residual: Residual, float32 [stack, K, F], added to the kernel, or
      None.
    scale: alpha / rank.
    contraction: how the layer's kernel meets its input.
  A stack axis (layers of a deep model under a scan) is gone by the time the
  layer is called.
  """

  def __init__(self, base, a, b, scale, contraction, residual=None):
    self.lora_base = base
    self.lora_a = adapter.Adapter(a)
    self.lora_b = adapter.Adapter(b)
    self.lora_residual = nnx.data(None)
    if residual is not None:
      self.lora_residual = adapter.Residual(residual)
    self.scale = scale
    self.contraction = contraction

  def __call__(self, x, *args, **options):
    """The layer's output plus the adapter's, in the dtype of the layer's."""
    y = self.lora_base(x, *args, **options)
    x = self.contraction.flatten(x)
    side = side_product(self.scale, x, self.lora_a[...], self.lora_b[...])
    if self.lora_residual is not None:
      fixed = jax.lax.stop_gradient(self.lora_residual[...])
      more = x.astype(jnp.float32) @ fixed
      side = side + jnp.where(more == 0, -0.0, more)
    return y + self.contraction.unflatten(side).astype(y.dtype)


def lora(
  module: nnx.Module,
  rank: int = 8,
  where: str = r".*/(query|value)",
  *,
  alpha: float | None = None,
  residual: bool = False,
  seed: int = 0,
) -> nnx.Module:
  """Puts a low-rank adapter beside every matched layer.

  Guarantees:
    the result computes what `module` computes, bit for bit (finite inputs);
    an adapter's initial value depends on (seed, layer name) only;
    a layer used in several places gets one adapter; layers stacked on leading
    axes get adapters stacked likewise.

  Args:
    module: any NNX module; untouched.
    rank: R >= 1.
    where: regex, matched in full against the "/"-joined name of each layer.
      Layers: nnx.Linear, nnx.LinearGeneral (without batch_axis), nnx.Einsum
      (one contraction); the projections of nnx.MultiHeadAttention are such.
    alpha: the adapter's output is scaled by alpha / rank; None is 2 * rank.
    residual: also give each layer a residual, zero [K, F], which no client
      trains: rules that aggregate products exactly keep there what factors
      cannot say.
    seed: of the adapters' initial values.

  Returns:
    A clone with `LoRA` in place of the matched layers. It trains their lora_a
    and lora_b: rank * (K + F) entries a layer.

  Raises:
    ValueError: if `where` matches no layer (near names are listed), an Embed or
      convolution, or a layer with an adapter; if rank < 1 or alpha <= 0;
      if the module is frozen already.

  Example:
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> tuned = lora(model, rank=2, where="layers/0")
    >>> x = jnp.ones((1, 4))
    >>> bool((tuned(x) == model(x)).all())
    True
    >>> tuned.layers[0].lora_a.shape, tuned.layers[0].lora_b.shape
    ((4, 2), (2, 3))
  """
  alpha = 2 * rank if alpha is None else alpha
  validate.at_least(1, rank=rank)
  validate.positive(alpha=alpha)
  frozen.refuse(module, "lora")
  layers = _layers(module, where)
  key = jax.random.key(seed)

  def wrap(path, node):
    if path not in layers:
      return node
    name = adapter.join(path)
    shape = contraction.of(node, name)
    kernel = node.kernel
    stack = kernel.shape[: kernel.ndim - len(shape.fan_in + shape.fan_out)]
    layer_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    a = jax.random.normal(layer_key, (*stack, shape.rows, rank), jnp.float32)
    b = jnp.zeros((*stack, rank, shape.columns), jnp.float32)
    side = None
    if residual:
      side = jnp.zeros((*stack, shape.rows, shape.columns), jnp.float32)
    a = a / math.sqrt(shape.rows)
    return LoRA(node, a, b, alpha / rank, shape, side)

  return adapter.replace(module, wrap)


def _layers(module, where):
  """Paths of the layers to wrap; refuses what cannot be wrapped."""
  found = adapter.find(module, (*contraction.LAYERS, *_REFUSED, LoRA))
  names = {
    path: names
    for path, (_, names) in found.items()
    if path[-1:] != (adapter.WRAPPED,)
  }
  chosen = adapter.select(where, names, "layer that LoRA can wrap")
  for path in chosen:
    node, name = found[path][0], adapter.join(path)
    if isinstance(node, LoRA):
      raise ValueError(
        f"a layer takes one adapter: {name!r} has one and {where=} matches it; "
        "leave it out of where"
      )
    if isinstance(node, _REFUSED):
      raise ValueError(
        f"LoRA is for Linear, LinearGeneral and Einsum: {where=} matches "
        f"{name!r} of type {type(node).__name__}; leave it out, or train "
        "it as it is with tune"
      )
  return chosen


def merged(module: nnx.Module) -> nnx.Module:
  """Folds low-rank adapters into the kernels: plain layers again.

  Args:
    module: a module with LoRA layers, not frozen (a bfloat16 kernel could not
      hold the sum); untouched.

  Returns:
    A clone without LoRA layers; kernel + alpha / rank * A @ B is summed in
    float32 and has the kernel's dtype. Every Adapter becomes an nnx.Param.

  Raises:
    ValueError: if the module is frozen.

  Example:
    >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    >>> plain = merged(lora(model, rank=2, where=".*"))
    >>> type(plain).__name__
    'Linear'
    >>> bool((plain.kernel[...] == model.kernel[...]).all())
    True
  """
  frozen.refuse(module, "merged")

  def fold(path, node):
    del path
    if not isinstance(node, LoRA):
      return node
    layer = node.lora_base
    delta = node.scale * (node.lora_a[...] @ node.lora_b[...])
    if node.lora_residual is not None:
      delta = delta + node.lora_residual[...]
    old = layer.kernel[...]
    new = old.astype(jnp.float32) + node.contraction.kernel(delta)
    # A new Variable: another layer that shares the old one keeps its own.
    layer.kernel = layer.kernel.copy(new.astype(old.dtype))
    return layer

  plain = adapter.replace(module, fold)
  return adapter.retype(plain, adapter.find(plain, adapter.Adapter), nnx.Param)
