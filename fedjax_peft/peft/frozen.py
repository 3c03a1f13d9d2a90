"""Frozen layers: products that are never differentiated by their kernel.

A frozen kernel needs no gradient and may be kept as the matrix unit wants it:
in bfloat16, and on CPUs with a transposed copy for the input's gradient (there
x @ w.T on bfloat16 is several times slower than x @ stored_transpose). Since
all clients share the kernel, a vmap over clients leaves one large product.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from fedjax_peft import validate
from fedjax_peft.peft import adapter, contraction, quantized


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def frozen_product(precision, dtype, axis, x, w, w_t):
  """The product x @ w, or x @ w.T, without a gradient for w.

  Args:
    precision: of the product, as in `lax.dot_general`.
    dtype: of x, and so of its gradient.
    axis: contracted axis of w: 0 is x @ w, 1 is x @ w.T.
    x: [..., K]; cast to the dtype of w.
    w: [K, F] (axis 0) or [F, K] (axis 1).
    w_t: the transpose of w, read by the backward pass, or None.

  Returns:
    [..., F], float32 if w is bfloat16, else in the dtype of w.

  Example:
    >>> x, w = jnp.ones((2, 3)), jnp.ones((3, 4), jnp.bfloat16)
    >>> frozen_product(None, jnp.float32, 0, x, w, None).dtype
    dtype('float32')
  """
  del dtype, w_t
  wide = jnp.float32 if w.dtype == jnp.bfloat16 else w.dtype
  return lax.dot_general(
    x.astype(w.dtype),
    w,
    (((x.ndim - 1,), (axis,)), ((), ())),
    precision=precision,
    preferred_element_type=wide,
  )


def _product_forward(precision, dtype, axis, x, w, w_t):
  """Forward rule: keeps nothing but the kernel."""
  return frozen_product(precision, dtype, axis, x, w, w_t), (w, w_t)


def _product_backward(precision, dtype, axis, kernels, g):
  """Backward rule: the same product with the other one of w and its copy."""
  w, w_t = kernels
  if w_t is None:
    dx = frozen_product(precision, g.dtype, 1 - axis, g, w, None)
  else:
    dx = frozen_product(precision, g.dtype, axis, g, w_t, w)
  return dx.astype(dtype), None, None


frozen_product.defvjp(_product_forward, _product_backward)


class FrozenLinear(nnx.Module):
  """A Linear, LinearGeneral or Einsum whose kernel stays as it is.

  Attributes:
    kernel: Param [stack, K, F], a matrix in the dtype of the product.
    kernel_t: Param [stack, F, K], its stored transpose, or None.
    bias: the layer's own Variable or None; it may be an Adapter.
    dtype: of the output; None is the promotion of input and `param_dtype`.
    param_dtype: what kernel and bias promote to.
    compute_dtype: of the product; None is the dtype of the output.
    precision: of the product.
    contraction: how the kernel meets the input.
  """

  def __init__(self, layer, shape, compute_dtype, transposed):
    matrix = shape.matrix(layer.kernel[...])
    if compute_dtype is not None:
      matrix = matrix.astype(compute_dtype)
    if matrix.shape == layer.kernel.shape:
      self.kernel = layer.kernel.copy(matrix)
    else:  # names of sharded axes would no longer fit
      self.kernel = nnx.Param(matrix)
    self.kernel_t = nnx.data(None)
    if transposed:
      self.kernel_t = nnx.Param(jnp.swapaxes(matrix, -1, -2))
    self.bias = layer.bias if layer.bias is not None else nnx.data(None)
    params = [p[...] for p in (layer.kernel, layer.bias) if p is not None]
    self.param_dtype = jnp.result_type(*(p.dtype for p in params))
    self.dtype = layer.dtype
    self.compute_dtype = compute_dtype
    self.precision = layer.precision
    self.contraction = shape

  def product(self, x: jax.Array) -> jax.Array:
    """The rows x [..., K] times the kernel, [..., F], without the bias."""
    low = self.compute_dtype or x.dtype
    w = self.kernel[...].astype(low)
    w_t = None if self.kernel_t is None else self.kernel_t[...].astype(low)
    return frozen_product(self.precision, x.dtype, 0, x, w, w_t)

  def __call__(self, x, out_sharding=None):
    """What the layer it replaces computes, in the chosen precision."""
    if out_sharding is not None:
      raise ValueError(
        f"a frozen layer takes no out_sharding: {out_sharding=}; call freeze "
        "on a module that leaves it None"
      )
    out = self.dtype or jnp.promote_types(x.dtype, self.param_dtype)
    if self.compute_dtype is None:
      x = x.astype(out)
    y = self.contraction.unflatten(self.product(self.contraction.flatten(x)))
    if self.bias is not None:
      y += self.contraction.spread(self.bias[...].astype(y.dtype), y.ndim)
    return y.astype(out)


def freeze(
  module: nnx.Module,
  precision: str = "bf16",
  transposed: bool | None = None,
) -> nnx.Module:
  """Makes the products of frozen layers cheap; the last of the PEFT functions.

  Replaces each nnx.Linear, LinearGeneral and Einsum whose kernel does not
  train, those inside LoRA layers too. Layers with their own dot_general,
  promote_dtype or einsum_op, batch_axis or an einsum that is no single
  contraction, and all other layers, stay as they are. Quantized kernels stay
  quantized and are decoded to the dtype of the product.

  Guarantees:
    no gradient is computed for a replaced kernel; under vmap over adapters its
    product stays one product for all clients;
    names and values of adapters do not change; a module without an Adapter
    (full fine-tuning) comes back as a clone;
    with "float32" a Linear's output is the same bit for bit.

  Args:
    module: any NNX module, e.g. from `lora` or `tune`; untouched.
    precision: "bf16": kernels are stored and inputs cast to bfloat16, sums are
      float32; a product errs by at most 0.004 * (|x| @ |kernel|). "float32":
      each layer's own dtypes.
    transposed: store a transposed copy of each kernel for the backward pass;
      None is True for "bf16" on CPUs, else False.

  Returns:
    A clone with `FrozenLinear` in place of the frozen layers.

  Raises:
    ValueError: if precision is neither, or the module is frozen already.

  Example:
    >>> from fedjax_peft import peft
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> fast = freeze(peft.lora(model, where="layers/0"))
    >>> fast.layers[0].lora_base.kernel.dtype
    dtype(bfloat16)
    >>> fast(jnp.ones((1, 4))).dtype
    dtype('float32')
  """
  validate.one_of(("bf16", "float32"), precision=precision)
  refuse(module, "freeze")
  if transposed is None:
    transposed = precision == "bf16" and jax.default_backend() == "cpu"
  compute_dtype = jnp.bfloat16 if precision == "bf16" else None
  if not adapter.find(module, adapter.Adapter):
    return nnx.clone(module, graph=True)

  def swap(path, node):
    if isinstance(node, quantized.QuantizedLinear):
      node.compute_dtype = compute_dtype
      return node
    if not _is_plain(node) or isinstance(node.kernel, adapter.Adapter):
      return node
    try:
      shape = contraction.of(node, adapter.join(path))
    except ValueError:
      return node
    return FrozenLinear(node, shape, compute_dtype, transposed)

  return adapter.replace(module, swap)


def product(
  layer: nnx.Module, shape: contraction.Contraction, x: jax.Array
) -> jax.Array:
  """Rows times a layer's kernel, without a gradient for the kernel.

  Args:
    layer: any that a Contraction can be made of, frozen or quantized or not.
    shape: its Contraction.
    x: [..., K].

  Returns:
    float32 [..., F]; the bias is left out.
  """
  if isinstance(layer, (FrozenLinear, quantized.QuantizedLinear)):
    return layer.product(x).astype(jnp.float32)
  w = shape.matrix(layer.kernel[...])
  y = frozen_product(layer.precision, x.dtype, 0, x, w, None)
  return y.astype(jnp.float32)


def _is_plain(node):
  """Whether a node is a layer whose arithmetic is known."""
  if type(node) not in contraction.LAYERS:
    return False
  product = {
    nnx.Linear: lambda n: n.dot_general is lax.dot_general,
    nnx.LinearGeneral: lambda n: n.dot_general is n.dot_general_cls is None,
    nnx.Einsum: lambda n: n.einsum_op is jnp.einsum,
  }[type(node)](node)
  return (
    product
    and node.promote_dtype is dtypes.promote_dtype
    and node.preferred_element_type is None
  )


def refuse(module: nnx.Module, name: str) -> None:
  """Raises ValueError if a module is frozen: `name` must come before freeze."""
  if adapter.find(module, FrozenLinear):
    raise ValueError(
      f"{name} needs a module that is not frozen: got one from freeze; "
      f"call {name} first and freeze last, on what it returns"
    )
