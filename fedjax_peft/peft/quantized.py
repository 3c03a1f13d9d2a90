"""Quantized layers: frozen kernels kept as integer codes and scales.

Codes come from the qwix library. They are turned into floats where a product
needs them, forward and again backward, so that neither a float kernel nor its
gradient outlives the product. All clients share the codes: under a vmap over
adapters one kernel is decoded, and one large product is made.
"""

import functools
import types

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fedjax_peft.peft import adapter, contraction


def qwix() -> types.ModuleType:
  """The qwix library.

  Raises:
    ImportError: if it is not installed, with the command that installs it.
  """
  try:
    import qwix
  except ImportError as error:
    raise ImportError(
      "quantized bases need the qwix library, which is not installed; write "
      'pip install "fedjax-peft[quantized]"'
    ) from error
  return qwix


def decode(qtype: str, codes: jax.Array, scale: jax.Array) -> jax.Array:
  """Floats of a quantized matrix.

  Args:
    qtype: "int8", "int4" or "nf4".
    codes: [stack, K, F] in the storage dtype of `qtype`.
    scale: float [stack, K / tile, F].

  Returns:
    [stack, K, F] in the dtype of `scale`.
  """
  library = qwix()
  return library.dequantize(library.QArray(codes, scale, None, qtype=qtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def quantized_product(qtype, precision, low, dtype, axis, x, codes, scale):
  """The product x @ w, or x @ w.T, of a quantized w, without gradient for w.

  Args:
    qtype: of the codes.
    precision: of the product, as in `lax.dot_general`.
    low: dtype in which x and w enter the product.
    dtype: of x, and so of its gradient.
    axis: contracted axis of w: 0 is x @ w, 1 is x @ w.T.
    x: [..., K].
    codes: [K, F].
    scale: [K / tile, F].

  Returns:
    [..., F], float32 if `low` is bfloat16, else in the dtype `low`.
  """
  del dtype
  w = decode(qtype, codes, scale).astype(low)
  return lax.dot_general(
    x.astype(low),
    w,
    (((x.ndim - 1,), (axis,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32 if low == jnp.bfloat16 else low,
  )


def _forward(qtype, precision, low, dtype, axis, x, codes, scale):
  """Forward rule: keeps the codes, not the floats."""
  y = quantized_product(qtype, precision, low, dtype, axis, x, codes, scale)
  return y, (codes, scale)


def _backward(qtype, precision, low, dtype, axis, kept, g):
  """Backward rule: the product with the transpose, decoded again."""
  dx = quantized_product(qtype, precision, low, g.dtype, 1 - axis, g, *kept)
  return dx.astype(dtype), None, None


quantized_product.defvjp(_forward, _backward)


class QuantizedLinear(nnx.Module):
  """A Linear, LinearGeneral or Einsum with a quantized kernel.

  Attributes:
    kernel: Frozen [stack, K, F], codes of the kernel as a matrix.
    kernel_scale: Frozen float [stack, K / tile, F].
    bias: the layer's own Variable or None; it may be an Adapter.
    qtype: "int8", "int4" or "nf4".
    dtype: of the output; None is the promotion of input and `param_dtype`.
    param_dtype: what kernel and bias promoted to.
    compute_dtype: of the product; None is the dtype of the output.
    precision: of the product.
    contraction: how the kernel meets the input.
  """

  def __init__(
    self,
    layer: nnx.Module,
    shape: contraction.Contraction,
    qtype: str,
    tile: int,
  ):
    matrix = shape.matrix(layer.kernel[...])
    stack = matrix.ndim - 2
    coded = qwix().quantize(
      matrix,
      getattr(jnp, qtype, qtype),
      channelwise_axes=(*range(stack), stack + 1),
      tiled_axes={stack: tile},
    )
    self.kernel = adapter.Frozen(coded.qvalue)
    self.kernel_scale = adapter.Frozen(coded.scale)
    self.bias = layer.bias if layer.bias is not None else nnx.data(None)
    params = [p[...] for p in (layer.kernel, layer.bias) if p is not None]
    self.qtype = qtype
    self.dtype = layer.dtype
    self.param_dtype = jnp.result_type(*(p.dtype for p in params))
    self.compute_dtype = None
    self.precision = layer.precision
    self.contraction = shape

  def matrix(self) -> jax.Array:
    """The kernel as floats, [stack, K, F]."""
    return decode(self.qtype, self.kernel[...], self.kernel_scale[...])

  def product(self, x: jax.Array) -> jax.Array:
    """The rows x [..., K] times the kernel, [..., F], without the bias."""
    low = jnp.dtype(self.compute_dtype or x.dtype)
    codes, scale = self.kernel[...], self.kernel_scale[...]
    return quantized_product(
      self.qtype, self.precision, low, x.dtype, 0, x, codes, scale
    )

  def __call__(self, x: jax.Array, out_sharding=None) -> jax.Array:
    """What the layer it replaces computes, with the decoded kernel."""
    if out_sharding is not None:
      raise ValueError(
        f"a quantized layer takes no out_sharding: {out_sharding=}; call "
        "quantize_base on a module that leaves it None"
      )
    out = self.dtype or jnp.promote_types(x.dtype, self.param_dtype)
    x = self.contraction.flatten(x)
    y = self.product(x if self.compute_dtype else x.astype(out))
    y = self.contraction.unflatten(y)
    if self.bias is not None:
      y += self.contraction.spread(self.bias[...].astype(y.dtype), y.ndim)
    return y.astype(out)
