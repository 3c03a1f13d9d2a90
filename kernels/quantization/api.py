"""Quantizing: float32 values as integers of few bits, and back.

Alistarh et al., QSGD, 2017, https://arxiv.org/abs/1610.02132
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import validate
from fedjax_peft.kernels import argument, dispatch, native
from fedjax_peft.kernels.quantization import reference

BITS = (1, 2, 4, 8, 16)
BLOCKS = (128, 256, 512, 1024, 2048, 4096)


class Quantized(NamedTuple):
  """A quantized vector.

  Attributes:
    packed: int16 for 16 bits, int8 for 8, uint8 for fewer; 1-D.
    scale: float32, one for each block, or as it was given.
  """

  packed: jax.Array
  scale: jax.Array


class Layout(NamedTuple):
  """How a vector lies in blocks.

  Attributes:
    blocks: number of blocks.
    block: values in each of them, the last one padded.
    row: integers of a whole block on the wire.
    length: integers of the vector on the wire.
  """

  blocks: int
  block: int
  row: int
  length: int


def layout(size: int, *, bits: int, block: int = 256) -> Layout:
  """Says how a vector of `size` values lies on the wire.

  Raises:
    ValueError: if `bits` or `block` is none of those that exist.

  Example:
    >>> layout(1000, bits=4)
    Layout(blocks=4, block=256, row=128, length=512)
  """
  validate.one_of(BITS, bits=bits)
  validate.one_of(BLOCKS, block=block)
  block = min(block, max(-(-size // 8) * 8, 8))
  blocks = -(-size // block)
  row = block // reference.packing(bits)
  rest = size - (blocks - 1) * block
  length = (blocks - 1) * row + min(rest, row) if size else 0
  return Layout(blocks, block, row, length)


def quantize(
  x: jax.Array,
  key: jax.Array,
  *,
  bits: int,
  block: int = 256,
  stochastic: bool = True,
  scale: jax.Array | None = None,
  implementation: dispatch.Implementation | None = None,
) -> Quantized:
  """Rounds a vector to `bits` bits for each value.

  The codes are -L..L with L = 2^(bits - 1) - 1, or -1 and 1 for 1 bit, and a
  code stands for code * scale. In a block of B values an integer of the wire
  holds the codes of elements i, i + B / per, ..., per = 8 / bits of them, the
  first in its lowest bits, each in two's complement (1 bit: 1 stands for 1).
  A vector shorter than a block is one block of its size rounded up to a
  multiple of 8, and the wire ends with the last integer that holds a value.

  Guarantees:
    All implementations return the same bits, on every machine; so does a
    vector alone or under `vmap`.
    |decoded - x| < scale (2 scale for 1 bit), at most half of that when not
    stochastic, where |x| <= L scale; a value outside is cut to it. To that
    comes float32's own error, at most 2^-14 scale (2^-6 for 16 bits). What is
    decoded is finite.
    Stochastic rounding is unbiased: the mean over keys is within 2^-17 scale
    (2^-16 for 16 bits) of x, but for the same product.
    Zeros stay zeros, but for 1 bit. A value that is not finite counts as 0,
    and a block whose scale is below 2^-80 as zeros.

  Args:
    x: float32 [D].
    key: uint32 [2], as `jax.random.key_data` returns. Not used if not
      stochastic. One key for each vector: the random bits are a function of
      the key and the index of the value.
    bits: 1, 2, 4, 8 or 16.
    block: values that share a scale: 128, 256, 512, 1024, 2048 or 4096.
    stochastic: round up with the probability that makes the mean right,
      rather than to the nearest.
    scale: float32, a scalar or one for each block; None gives each block
      max|x| / L.
    implementation: None chooses by platform.

  Returns:
    `Quantized`: packed [layout(D).length], and the scale.

  Raises:
    ValueError: if an argument has another shape, dtype or value.

  Example:
    >>> x = jnp.array([-1.0, 0.0, 0.5, 2.0])
    >>> key = jnp.zeros(2, jnp.uint32)
    >>> packed, scale = quantize(x, key, bits=8, stochastic=False)
    >>> packed
    Array([-63,   0,  32, 127], dtype=int8)
    >>> (100 * dequantize(packed, scale, bits=8, size=4)).round()
    Array([-99.,   0.,  50., 200.], dtype=float32)
  """
  x, key = jnp.asarray(x), jnp.asarray(key)
  expect("x", x, jnp.float32)
  expect_key(key)
  lay = layout(x.size, bits=bits, block=block)
  given: tuple = ()
  if scale is not None:
    scale = jnp.asarray(scale)
    given = (_scales(scale, lay.blocks),)
  if not x.size:
    own = jnp.zeros((0,), jnp.float32) if scale is None else scale
    return Quantized(jnp.zeros((0,), reference.wire_dtype(bits)), own)
  padded = _pad(x, lay.blocks * lay.block).reshape(lay.blocks, lay.block)
  packed, own = dispatch.call(
    KERNEL,
    padded,
    key,
    *given,
    implementation=implementation,
    bits=bits,
    stochastic=stochastic,
  )
  packed = packed.reshape(-1)[: lay.length]
  return Quantized(packed, own if scale is None else scale)


def dequantize(
  packed: jax.Array,
  scale: jax.Array,
  *,
  bits: int,
  size: int,
  block: int = 256,
  implementation: dispatch.Implementation | None = None,
) -> jax.Array:
  """Decodes what `quantize` returned.

  Args:
    packed: [layout(size).length].
    scale: float32, a scalar or one for each block.
    bits: as in `quantize`.
    size: D.
    block: as in `quantize`.
    implementation: None chooses by platform.

  Returns:
    float32 [D], code * scale; the same bits from every implementation.

  Raises:
    ValueError: if an argument has another shape, dtype or value.

  Example:
    >>> byte = jnp.array([0x7F], jnp.uint8)
    >>> dequantize(byte, jnp.float32(0.5), bits=4, size=1)
    Array([-0.5], dtype=float32)
  """
  packed, scale = jnp.asarray(packed), jnp.asarray(scale)
  lay = layout(size, bits=bits, block=block)
  expect("packed", packed, reference.wire_dtype(bits))
  if packed.size != lay.length:
    raise ValueError(
      f"packed must hold {lay.length} integers for {size=} {bits=} {block=}, "
      f"got {packed.size}; give the size, bits and block of quantize"
    )
  scales = _scales(scale, lay.blocks)
  if not size:
    return jnp.zeros((0,), jnp.float32)
  rows = _pad(packed, lay.blocks * lay.row).reshape(lay.blocks, lay.row)
  x = dispatch.call(
    DEQUANTIZE, rows, scales, implementation=implementation, bits=bits
  )
  return x.reshape(-1)[:size]


def expect(name: str, array: jax.Array, dtype: Any) -> None:
  """Raises ValueError unless an array is a vector of this dtype."""
  argument.expect(name, array, dtype, ("D",), "use jax.vmap for many vectors")


def expect_key(key: jax.Array) -> None:
  """Raises ValueError unless a key is uint32 [2]."""
  hint = "use jax.random.key_data, and jax.vmap for many vectors"
  argument.expect("key", key, jnp.uint32, (2,), hint)


def _scales(scale, blocks):
  """One scale for each block."""
  if scale.dtype != jnp.float32 or scale.shape not in ((), (blocks,)):
    raise ValueError(
      f"scale must be float32, a scalar or [{blocks}], got {scale.dtype} "
      f"{list(scale.shape)}"
    )
  return jnp.broadcast_to(scale, (blocks,))


def _pad(x, size):
  """Zeros up to a size."""
  return jnp.pad(x, (0, size - x.size)) if size > x.size else x


def _quantize_native(x, key, *scale, bits, stochastic):
  """C++; see `reference.quantize`."""
  nb, block = x.shape
  row = block // reference.packing(bits)
  return native.call(
    "quantize.QuantizeOn" if scale else "quantize.Quantize",
    (
      jax.ShapeDtypeStruct((nb, row), reference.wire_dtype(bits)),
      jax.ShapeDtypeStruct((nb,), jnp.float32),
    ),
    x,
    key,
    *scale,
    bits=np.int32(bits),
    stochastic=np.int32(stochastic),
  )


def _dequantize_native(packed, scale, *, bits):
  """C++; see `reference.dequantize`."""
  nb, row = packed.shape
  shape = (nb, row * reference.packing(bits))
  return native.call(
    "quantize.Dequantize",
    jax.ShapeDtypeStruct(shape, jnp.float32),
    packed,
    scale,
    bits=np.int32(bits),
  )


KERNEL, DEQUANTIZE = (
  dispatch.register(
    dispatch.Kernel(
      name,
      reference=getattr(reference, name),
      native=fun,
      pallas_tpu=dispatch.lazily(f"{__package__}.pallas_tpu", name),
      pallas_gpu=dispatch.lazily(f"{__package__}.pallas_gpu", name),
      library="quantize",
    )
  )
  for name, fun in (
    ("quantize", _quantize_native),
    ("dequantize", _dequantize_native),
  )
)
