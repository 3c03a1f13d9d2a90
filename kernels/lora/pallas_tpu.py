"""LoRA's product on TPUs: the narrow products ride along with the wide one.

A client's x is read once for each tile of columns, as in the wide product
alone; its narrow product is made beside the first of them, and stays in VMEM
for the others. Compiled for TPUs, never timed on one.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
ROWS, COLUMNS, DEPTH = 256, 256, 1024  # of a tile, at most


def lora_matmul(
  x: jax.Array,
  w: jax.Array,
  a: jax.Array,
  b: jax.Array,
  *,
  scale: float,
  flip: bool = False,
  depth: int = DEPTH,
  interpret: bool = False,
) -> jax.Array:
  """As `reference.lora_matmul`; `depth` bounds the tile's part of K."""
  clients, rows, width = x.shape
  rank, columns = b.shape[1:]
  if not (clients and rows and columns):
    return jnp.zeros((clients, rows, columns), jnp.float32)
  depth, padding = _split(width, depth)
  if padding:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padding)))
    a = jnp.pad(a, ((0, 0), (0, padding), (0, 0)))
    w = jnp.pad(w, ((0, 0), (0, padding)) if flip else ((0, padding), (0, 0)))
  tall, broad = min(rows, ROWS), min(columns, COLUMNS)
  tile = (broad, depth) if flip else (depth, broad)
  return pl.pallas_call(
    functools.partial(_kernel, scale=scale, flip=flip),
    grid=(
      clients,
      pl.cdiv(rows, tall),
      pl.cdiv(columns, broad),
      (width + padding) // depth,
    ),
    in_specs=[
      pl.BlockSpec((None, tall, depth), lambda c, m, n, k: (c, m, k)),
      pl.BlockSpec(tile, lambda c, m, n, k: (n, k) if flip else (k, n)),
      pl.BlockSpec((None, depth, rank), lambda c, m, n, k: (c, k, 0)),
      pl.BlockSpec((None, rank, broad), lambda c, m, n, k: (c, 0, n)),
    ],
    out_specs=pl.BlockSpec((None, tall, broad), lambda c, m, n, k: (c, m, n)),
    out_shape=jax.ShapeDtypeStruct((clients, rows, columns), jnp.float32),
    scratch_shapes=[
      pltpu.VMEM((tall, broad), jnp.float32),
      pltpu.VMEM((tall, rank), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
    ),
    interpret=interpret,
    name="lora_matmul",
  )(x, w, a, b)


def _split(width: int, depth: int) -> tuple[int, int]:
  """The tile's part of K, and how many zeros K needs for it to divide."""
  if width <= depth:
    return width, 0
  padded = LANES * pl.cdiv(width, LANES)
  parts = range(depth // LANES * LANES, 0, -LANES)
  return next(part for part in parts if padded % part == 0), padded - width


def _kernel(x, w, a, b, out, wide, narrow, *, scale, flip):
  """Adds a part of K; the last one writes the tile."""
  n, k = pl.program_id(2), pl.program_id(3)

  @pl.when(k == 0)
  def _():
    wide[...] = jnp.zeros(wide.shape, jnp.float32)

  wide[...] += _dot(x[...].astype(w.dtype), w[...], int(flip))

  @pl.when((n == 0) & (k == 0))
  def _():
    narrow[...] = jnp.zeros(narrow.shape, jnp.float32)

  @pl.when(n == 0)
  def _():
    narrow[...] += _dot(x[...].astype(jnp.float32), a[...], 0)

  @pl.when(k == pl.num_programs(3) - 1)
  def _():
    side = _dot(narrow[...] * scale, b[...], 0)
    out[...] = wide[...] + jnp.where(side == 0, -0.0, side)


def _dot(x, y, axis):
  """The product x @ y or x @ y.T, summed in float32."""
  return lax.dot_general(
    x, y, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
  )
