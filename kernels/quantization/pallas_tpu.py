"""Quantizing on TPUs: blocks lie in rows, and 32 rows are worked on at a time.

A grid step brings 2^17 values into VMEM. Within it a loop goes over 32 rows,
the height of a tile of bytes, so that what is between load and store stays in
registers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fedjax_peft.kernels.quantization import reference

ROWS = 32
VALUES = 1 << 17
LANES = 256  # of a block, handled at a time


def quantize(x, key, scale=None, *, bits, stochastic, interpret=False):
  """See `reference.quantize`."""
  nb, block = x.shape
  row = block // reference.packing(bits)
  if not nb:
    return reference.quantize(x, key, scale, bits=bits, stochastic=stochastic)
  rows, grid = _tiles(nb, block)
  given = () if scale is None else (scale[:, None],)
  column = pl.BlockSpec((rows, 1), lambda i: (i, 0))
  packed, scales = pl.pallas_call(
    functools.partial(_quantize, block=block, bits=bits, stochastic=stochastic),
    grid=grid,
    in_specs=[
      pl.BlockSpec(memory_space=pltpu.SMEM),
      pl.BlockSpec((rows, block), lambda i: (i, 0)),
      *(column for _ in given),
    ],
    out_specs=(pl.BlockSpec((rows, row), lambda i: (i, 0)), column),
    out_shape=(
      jax.ShapeDtypeStruct((nb, row), reference.wire_dtype(bits)),
      jax.ShapeDtypeStruct((nb, 1), jnp.float32),
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    cost_estimate=pl.CostEstimate(
      flops=32 * x.size,
      transcendentals=0,
      bytes_accessed=4 * x.size + row * nb * (2 if bits == 16 else 1),
    ),
    name="quantize",
    interpret=interpret,
  )(reference.seeds(key)[None], x, *given)
  return packed, scales[:, 0]


def _tiles(nb, block):
  """Rows of a grid step, and the grid."""
  rows = max(VALUES // block // ROWS, 1) * ROWS
  rows = min(rows, -(-nb // ROWS) * ROWS)
  return rows, (pl.cdiv(nb, rows),)


def _quantize(seeds, x, *refs, block, bits, stochastic):
  """Refs: scales if given, packed, scales."""
  *given, packed, scales = refs
  rows, row = packed.shape
  first, second = seeds[0, 0], seeds[0, 1]
  base = pl.program_id(0) * rows

  @pl.loop(0, rows // ROWS)
  def _(i):
    here = pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)
    if given:
      scale = given[0][here, :]
    else:
      most = jnp.max(reference.magnitude(x[here, :]), axis=1, keepdims=True)
      scale = reference.own_scale(most, bits)
    scales[here, :] = scale
    m = reference.inverse(scale, bits)
    for lane in range(0, row, LANES):
      width = min(LANES, row - lane)
      index = _index(base + i * ROWS, width, block) + np.uint32(lane)
      word = jnp.zeros((ROWS, width), jnp.int32)
      for j in range(reference.packing(bits)):
        start = j * row + lane
        random = None
        if stochastic:
          random = reference.words(index + np.uint32(j * row), first, second)
        part = x[here, start : start + width]
        code = reference.encode(part, m, random, bits)
        word |= reference.field(code, j, bits)
      packed[here, lane : lane + width] = word.astype(packed.dtype)


def _index(first_row, width, block):
  """Index in the vector of the first values of 32 rows, uint32."""
  shape = (ROWS, width)
  row = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + first_row
  lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  return (row * np.int32(block) + lane).astype(jnp.uint32)


def dequantize(packed, scale, *, bits, interpret=False):
  """See `reference.dequantize`."""
  nb, row = packed.shape
  block = row * reference.packing(bits)
  if not nb:
    return reference.dequantize(packed, scale, bits=bits)
  rows, grid = _tiles(nb, block)
  return pl.pallas_call(
    functools.partial(_dequantize, bits=bits),
    grid=grid,
    in_specs=[
      pl.BlockSpec((rows, row), lambda i: (i, 0)),
      pl.BlockSpec((rows, 1), lambda i: (i, 0)),
    ],
    out_specs=pl.BlockSpec((rows, block), lambda i: (i, 0)),
    out_shape=jax.ShapeDtypeStruct((nb, block), jnp.float32),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    name="dequantize",
    interpret=interpret,
  )(packed, scale[:, None])


def _dequantize(packed, scale, x, *, bits):
  """Fields of a word go to planes of the block."""
  rows, row = packed.shape

  @pl.loop(0, rows // ROWS)
  def _(i):
    here = pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)
    s = scale[here, :]
    for lane in range(0, row, LANES):
      width = min(LANES, row - lane)
      word = packed[here, lane : lane + width].astype(jnp.int32)
      for j in range(reference.packing(bits)):
        start = j * row + lane
        x[here, start : start + width] = reference.value(word, j, bits) * s
