"""Quantizing on GPUs, in Triton: a program for each block of values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fedjax_peft.kernels.quantization import reference


def quantize(x, key, scale=None, *, bits, stochastic, interpret=False):
  """See `reference.quantize`."""
  nb, block = x.shape
  per = reference.packing(bits)
  row = block // per
  if not nb:
    return reference.quantize(x, key, scale, bits=bits, stochastic=stochastic)
  width = pl.next_power_of_2(row)  # another only where there is one block
  planes = _widen(x.reshape(nb, per, row), width)
  given = () if scale is None else (scale,)
  one = pl.BlockSpec((1,), lambda i: (i,))
  packed, scales = pl.pallas_call(
    functools.partial(_quantize, row=row, bits=bits, stochastic=stochastic),
    grid=(nb,),
    in_specs=[
      pl.BlockSpec((2,), lambda i: (0,)),
      pl.BlockSpec((None, per, width), lambda i: (i, 0, 0)),
      *(one for _ in given),
    ],
    out_specs=(pl.BlockSpec((None, width), lambda i: (i, 0)), one),
    out_shape=(
      jax.ShapeDtypeStruct((nb, width), reference.wire_dtype(bits)),
      jax.ShapeDtypeStruct((nb,), jnp.float32),
    ),
    compiler_params=_params(block),
    name="quantize",
    interpret=interpret,
  )(reference.seeds(key), planes, *given)
  return packed[:, :row], scales


def _params(block):
  """Eight values for each thread, in at most eight warps."""
  return plgpu.CompilerParams(num_warps=min(max(block // 256, 1), 8))


def _widen(x, width):
  """Zeros up to a width that Triton takes."""
  rest = width - x.shape[-1]
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rest)]) if rest else x


def _half_even(y):
  """`reference.half_even`, which Triton lacks, where products are clipped."""
  whole = np.float32(2.0**23)  # floats from here on are integers
  most = jnp.abs(y)
  near = jnp.where(most < whole, (most + whole) - whole, most)
  return jnp.where(y < 0, -near, near)


def _quantize(seeds, x, *refs, row, bits, stochastic):
  """Refs: scale if given, packed, scale."""
  *given, packed, out = refs
  per, width = x.shape
  parts = [x[j, :] for j in range(per)]
  if given:
    scale = given[0][0]
  else:
    most = [jnp.max(reference.magnitude(part)) for part in parts]
    scale = reference.own_scale(functools.reduce(jnp.maximum, most), bits)
  out[0] = scale
  m = reference.inverse(scale, bits)
  start = pl.program_id(0) * np.int32(per * row)
  index = (jnp.arange(width, dtype=jnp.int32) + start).astype(jnp.uint32)
  word = jnp.zeros((width,), jnp.int32)
  for j, part in enumerate(parts):
    random = None
    if stochastic:
      at = index + np.uint32(j * row)
      random = reference.words(at, seeds[0], seeds[1])
    code = reference.encode(part, m, random, bits, _half_even)
    word |= reference.field(code, j, bits)
  packed[:] = word.astype(packed.dtype)


def dequantize(packed, scale, *, bits, interpret=False):
  """See `reference.dequantize`."""
  nb, row = packed.shape
  per = reference.packing(bits)
  if not nb:
    return reference.dequantize(packed, scale, bits=bits)
  width = pl.next_power_of_2(row)
  x = pl.pallas_call(
    functools.partial(_dequantize, bits=bits),
    grid=(nb,),
    in_specs=[
      pl.BlockSpec((None, width), lambda i: (i, 0)),
      pl.BlockSpec((1,), lambda i: (i,)),
    ],
    out_specs=pl.BlockSpec((None, per, width), lambda i: (i, 0, 0)),
    out_shape=jax.ShapeDtypeStruct((nb, per, width), jnp.float32),
    compiler_params=_params(per * row),
    name="dequantize",
    interpret=interpret,
  )(_widen(packed, width), scale)
  return x[:, :, :row].reshape(nb, per * row)


def _dequantize(packed, scale, x, *, bits):
  """Fields of a word go to planes of the block."""
  word, s = packed[:].astype(jnp.int32), scale[0]
  for j in range(x.shape[0]):
    x[j, :] = reference.value(word, j, bits) * s
