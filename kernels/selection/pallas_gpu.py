"""Top-k on GPUs: a search for the threshold, four bits in one pass.

Each of eight passes counts in parallel over tiles; the counts are added, and
what is kept is collected, by XLA. Compiled for GPUs, never timed on one.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fedjax_peft.kernels.selection import threshold

TILE = 4096
COUNTS = 2**threshold.BITS  # one more than candidates: a power of two


def top_k(
  x: jax.Array, *, k: int, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
  """As `reference.top_k`."""
  order = threshold.order(x)
  return threshold.take(x, order, search(order, k, interpret=interpret), k)


def search(
  order: jax.Array, k: int, *, tile: int = TILE, interpret: bool = False
) -> jax.Array:
  """The k-th largest of `order`.

  Args:
    order: int32 [D], not negative.
    k: its rank, 1 <= k <= D.
    tile: entries that one program counts, a power of two.
    interpret: as of `pallas_call`.

  Returns:
    int32 scalar.
  """
  (width,) = order.shape
  tiles = pl.cdiv(width, tile)
  # Zeros reach no candidate.
  order = jnp.pad(order, (0, tiles * tile - width))

  count = pl.pallas_call(
    _kernel,
    grid=(tiles,),
    in_specs=[
      pl.BlockSpec((2,), lambda t: (0,)),
      pl.BlockSpec((tile,), lambda t: (t,)),
    ],
    out_specs=pl.BlockSpec((1, COUNTS), lambda t: (t, 0)),
    out_shape=jax.ShapeDtypeStruct((tiles, COUNTS), jnp.int32),
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="top_k_count",
  )

  def level(known, shift):
    counts = jnp.sum(count(jnp.stack([known, shift]), order), axis=0)
    candidates = jnp.stack(threshold.candidates(known, shift))
    reached = (counts[1:] >= k) & (candidates > 0)
    digit = jnp.sum(reached, dtype=jnp.int32)
    return known + (digit << shift), None

  shifts = jnp.array(threshold.SHIFTS, jnp.int32)
  return lax.scan(level, jnp.int32(0), shifts)[0]


def _kernel(state, order, counts):
  """Counts a tile's entries for each candidate, and all of them at place 0."""
  block = order[...]
  candidates = threshold.candidates(state[0], state[1])
  counts[0, 0] = jnp.int32(block.size)
  for j, candidate in enumerate(candidates):
    counts[0, j + 1] = jnp.sum((block >= candidate).astype(jnp.int32))
