"""TPU: tiles of blocks, into which chunks of clients are added one by one.

The accumulator's tile stays in VMEM while the chunks pass (the inner grid
axis). A block's factors lie along the lanes, a client each, so that one column
is spread over a tile of values.

A tile holds one block in a row. Wires that were quantized in the same program
lie like that already, if their last block is whole; others are copied.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fedjax_peft.kernels.quantization import api as quantize
from fedjax_peft.kernels.summation import reference

BLOCKS = 64  # blocks of a tile
CLIENTS = 128  # clients of a chunk, at most
BYTES = 2**21  # of wires in VMEM, once; the pipeline holds them twice
LANES = 128
COLUMNS = 4096  # values of a row that add_rows keeps in VMEM


def weighted_sum(
  acc: jax.Array,
  packed: jax.Array,
  scale: jax.Array,
  weight: jax.Array,
  *,
  bits: int,
  block: int,
  interpret: bool = False,
) -> jax.Array:
  """See `api.weighted_sum`."""
  lay = quantize.layout(acc.size, bits=bits, block=block)
  if not packed.size:
    return acc
  clients = weight.size
  tile = min(lay.blocks, BLOCKS)
  row_bytes = max(lay.row, LANES) * packed.dtype.itemsize
  chunk = min(clients, CLIENTS, max(BYTES // (max(tile, 32) * row_bytes), 1))
  chunks = pl.cdiv(clients, chunk)
  # Clients beyond the last have factor 0, and their wires, whatever is read
  # in their place, are integers: they add nothing.
  factor = jnp.where(weight[None] != 0, weight[None] * scale.T, 0)
  factor = jnp.pad(factor, ((0, 0), (0, chunks * chunk - clients)))
  factor = factor.reshape(lay.blocks, chunks, chunk).swapaxes(0, 1)
  short = lay.blocks * lay.row - lay.length
  wires = jnp.pad(packed, ((0, 0), (0, short)))
  wires = wires.reshape(clients, lay.blocks, lay.row)
  padded = jnp.pad(acc, (0, lay.blocks * lay.block - acc.size))

  def kernel(acc_ref, wires_ref, factor_ref, out_ref):
    @pl.when(pl.program_id(1) == 0)
    def _():
      out_ref[...] = acc_ref[...]

    at = [pl.ds(j * lay.row, lay.row) for j in range(lay.block // lay.row)]
    sums = [out_ref[:, i] for i in at]
    for c in range(chunk):
      q = wires_ref[c]
      by = factor_ref[:, c : c + 1]
      sums = [s + by * reference.decode(q, j, bits) for j, s in enumerate(sums)]
    for i, s in zip(at, sums):
      out_ref[:, i] = s

  held = pl.BlockSpec((tile, lay.block), lambda t, c: (t, 0))
  out = pl.pallas_call(
    kernel,
    grid=(pl.cdiv(lay.blocks, tile), chunks),
    in_specs=[
      held,
      pl.BlockSpec((chunk, tile, lay.row), lambda t, c: (c, t, 0)),
      pl.BlockSpec((None, tile, chunk), lambda t, c: (c, t, 0)),
    ],
    out_specs=held,
    out_shape=jax.ShapeDtypeStruct((lay.blocks, lay.block), acc.dtype),
    input_output_aliases={0: 0},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary")
    ),
    interpret=interpret,
    name="weighted_sum",
  )(padded.reshape(lay.blocks, lay.block), wires, factor)
  return out.reshape(-1)[: acc.size]


def add_rows(
  acc: jax.Array,
  rows: jax.Array,
  present: jax.Array,
  *,
  interpret: bool = False,
) -> jax.Array:
  """See `api.add_rows`."""
  if not rows.size:
    return acc
  clients, size = rows.shape
  # Narrow integers are added as wide ones: the lowest bits are the same.
  wide = acc.dtype if acc.dtype.itemsize == 4 else np.dtype(np.int32)
  exact = wide.kind != "f"  # any order gives the same bits
  nothing = wide.type(0 if exact else -0.0)  # x + -0.0 is x, even if x is -0.0
  columns = min(size, COLUMNS)
  chunk = min(clients, CLIENTS)
  chunks = pl.cdiv(clients, chunk)
  here = jnp.pad(present.astype(jnp.int32), (0, chunks * chunk - clients))

  def kernel(acc_ref, rows_ref, here_ref, out_ref):
    @pl.when(pl.program_id(1) == 0)
    def _():
      out_ref[...] = acc_ref[...]

    kept = jnp.where(here_ref[...] != 0, rows_ref[...].astype(wide), nothing)
    while exact and kept.shape[0] % 16 == 0:
      kept = kept[: kept.shape[0] // 2] + kept[kept.shape[0] // 2 :]
    total = out_ref[...]
    for c in range(kept.shape[0]):
      total = total + kept[c : c + 1]
    out_ref[...] = total

  held = pl.BlockSpec((1, columns), lambda t, c: (0, t))
  out = pl.pallas_call(
    kernel,
    grid=(pl.cdiv(size, columns), chunks),
    in_specs=[
      held,
      pl.BlockSpec((chunk, columns), lambda t, c: (c, t)),
      pl.BlockSpec((chunk, 1), lambda t, c: (c, 0)),
    ],
    out_specs=held,
    out_shape=jax.ShapeDtypeStruct((1, size), wide),
    input_output_aliases={0: 0},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary")
    ),
    interpret=interpret,
    name="add_rows",
  )(acc.astype(wide)[None], rows, here[:, None])
  return out[0].astype(acc.dtype)
