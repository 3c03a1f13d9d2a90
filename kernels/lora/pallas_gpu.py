"""LoRA's product on GPUs: the narrow products ride along with the wide one.

A program makes one tile of the result. It makes the narrow product of its rows
again, from the tiles of x that it has loaded for the wide one: rank / COLUMNS
more work, and no second kernel. Compiled for GPUs, never timed on one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

ROWS, COLUMNS, DEPTH = 64, 64, 32  # of a tile
NARROWEST = 16  # side of a matrix that the matrix unit takes


def lora_matmul(
  x: jax.Array,
  w: jax.Array,
  a: jax.Array,
  b: jax.Array,
  *,
  scale: float,
  flip: bool = False,
  interpret: bool = False,
) -> jax.Array:
  """As `reference.lora_matmul`."""
  clients, rows, width = x.shape
  rank, columns = b.shape[1:]
  if not (clients and rows and columns):
    return jnp.zeros((clients, rows, columns), jnp.float32)
  broad = max(pl.next_power_of_2(rank), NARROWEST)
  return pl.pallas_call(
    functools.partial(
      _kernel, shape=(rows, width, columns, rank), scale=scale, flip=flip
    ),
    grid=(clients, pl.cdiv(rows, ROWS), pl.cdiv(columns, COLUMNS)),
    in_specs=[
      pl.BlockSpec((None, rows, width), lambda c, m, n: (c, 0, 0)),
      pl.BlockSpec(w.shape, lambda c, m, n: (0, 0)),
      pl.BlockSpec((None, width, broad), lambda c, m, n: (c, 0, 0)),
      pl.BlockSpec((None, broad, columns), lambda c, m, n: (c, 0, 0)),
    ],
    out_specs=pl.BlockSpec((None, rows, columns), lambda c, m, n: (c, 0, 0)),
    out_shape=jax.ShapeDtypeStruct((clients, rows, columns), jnp.float32),
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name="lora_matmul",
  )(x, w, a, b)


def _kernel(x, w, a, b, out, *, shape, scale, flip):
  """One tile of the result, over all of K."""
  rows, width, columns, rank = shape
  broad = a.shape[1]
  row = pl.ds(pl.program_id(1) * ROWS, ROWS)
  column = pl.ds(pl.program_id(2) * COLUMNS, COLUMNS)
  in_rows = row.start + lax.iota(jnp.int32, ROWS) < rows
  in_rank = lax.iota(jnp.int32, broad) < rank
  in_columns = column.start + lax.iota(jnp.int32, COLUMNS) < columns

  def add(i, sums):
    wide, narrow = sums
    part = pl.ds(i * DEPTH, DEPTH)
    inside = part.start + lax.iota(jnp.int32, DEPTH) < width
    left = _load(x, row, part, in_rows, inside)
    if flip:
      right = _load(w, column, part, in_columns, inside)
    else:
      right = _load(w, part, column, inside, in_columns)
    down = _load(a, part, pl.ds(0, broad), inside, in_rank)
    wide += _dot(left.astype(w.dtype), right, int(flip))
    narrow += _dot(left.astype(jnp.float32), down, 0)
    return wide, narrow

  start = (
    jnp.zeros((ROWS, COLUMNS), jnp.float32),
    jnp.zeros((ROWS, broad), jnp.float32),
  )
  wide, narrow = lax.fori_loop(0, pl.cdiv(width, DEPTH), add, start)
  up = _load(b, pl.ds(0, broad), column, in_rank, in_columns)
  side = _dot(narrow * np.float32(scale), up, 0)
  y = wide + jnp.where(side == 0, np.float32(-0.0), side)
  inside = in_rows[:, None] & in_columns[None, :]
  plgpu.store(out.at[row, column], y, mask=inside)


def _load(ref, row, column, in_rows, in_columns):
  """A tile, zero outside of the matrix."""
  mask = in_rows[:, None] & in_columns[None, :]
  return plgpu.load(ref.at[row, column], mask=mask, other=0.0)


def _dot(x, y, axis):
  """The product x @ y or x @ y.T, summed in float32."""
  return lax.dot_general(
    x, y, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
  )
