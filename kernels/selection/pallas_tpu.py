"""Top-k on TPUs: a search for the threshold, four bits in one pass.

A message of up to half a million entries stays in VMEM for all eight passes;
a longer one is read in tiles, once for each pass. What is kept is collected
by XLA. Compiled for TPUs, never timed on one.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fedjax_peft.kernels.selection import threshold

LANES, SUBLANES = 128, 8
ROWS = 4096  # of a tile: 2 MiB


def top_k(
  x: jax.Array, *, k: int, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
  """As `reference.top_k`."""
  order = threshold.order(x)
  return threshold.take(x, order, search(order, k, interpret=interpret), k)


def search(
  order: jax.Array, k: int, *, rows: int = ROWS, interpret: bool = False
) -> jax.Array:
  """The k-th largest of `order`.

  Args:
    order: int32 [D], not negative.
    k: its rank, 1 <= k <= D.
    rows: of 128 entries in a tile at most, a multiple of 8.
    interpret: as of `pallas_call`.

  Returns:
    int32 scalar.
  """
  (width,) = order.shape
  whole = SUBLANES * pl.cdiv(width, LANES * SUBLANES)
  rows = min(rows, whole)
  tiles = pl.cdiv(whole, rows)
  # Zeros reach no candidate.
  order = jnp.pad(order, (0, tiles * rows * LANES - width))
  found = pl.pallas_call(
    functools.partial(_kernel, k=k, rows=rows),
    grid=(len(threshold.SHIFTS), tiles),
    in_specs=[pl.BlockSpec((rows, LANES), lambda p, t: (t, 0))],
    out_specs=pl.BlockSpec((SUBLANES, LANES), lambda p, t: (0, 0)),
    out_shape=jax.ShapeDtypeStruct((SUBLANES, LANES), jnp.int32),
    scratch_shapes=[
      pltpu.SMEM((1,), jnp.int32),
      pltpu.VMEM((2**threshold.BITS - 1, SUBLANES, LANES), jnp.int32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary", "arbitrary")
    ),
    interpret=interpret,
    name="top_k_threshold",
  )(order.reshape(tiles * rows, LANES))
  return found[0, 0]


def _kernel(order, out, known, counts, *, k, rows):
  """Counts a tile's entries for each candidate; then picks the digit."""
  level, tile = pl.program_id(0), pl.program_id(1)

  @pl.when((level == 0) & (tile == 0))
  def _():
    known[0] = jnp.int32(0)

  @pl.when(tile == 0)
  def _():
    counts[...] = jnp.zeros(counts.shape, jnp.int32)

  shift = threshold.SHIFTS[0] - threshold.BITS * level
  candidates = threshold.candidates(known[0], shift)

  def count(r, sums):
    block = order[pl.ds(r * SUBLANES, SUBLANES), :]
    return tuple(
      n + (block >= candidate).astype(jnp.int32)
      for n, candidate in zip(sums, candidates)
    )

  sums = tuple(counts[j] for j in range(len(candidates)))
  sums = lax.fori_loop(0, rows // SUBLANES, count, sums)
  for j, n in enumerate(sums):
    counts[j] = n

  @pl.when(tile == pl.num_programs(1) - 1)
  def _():
    digit = jnp.int32(0)
    for n, candidate in zip(sums, candidates):
      reached = (jnp.sum(n) >= k) & (candidate > 0)
      digit += reached.astype(jnp.int32)
    known[0] += digit << shift
    out[...] = jnp.full(out.shape, known[0], jnp.int32)
