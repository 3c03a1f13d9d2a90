"""`mask_add` for TPUs.

A block is two tiles of some rows, and word w of a tile one vector register of
1,024 lanes: two tiles side by side keep the vector units busy where one would
wait for itself. It stays in VMEM while all keys go by.

Rows are read and written as they lie in memory, eight beside each other: one
row of 1,024 values comes into a register with a stride.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fedjax_peft.kernels import chacha
from fedjax_peft.kernels.mask import layout

_ROWS = 16  # of a block; with what is on its way in and out, 8 MiB
_SIDE = 2  # tiles of a block
_KEYS = 64  # of a block
_LANES = (8, 128)


def mask_add(q, keys, plus, minus, nonce, *, interpret=False):
  """See `api.mask_add`; `interpret` is True or `InterpretParams`."""
  (C, D), P = q.shape, keys.shape[0]
  if q.size == 0 or P == 0:
    return q
  full, tail = layout.split(D)
  side = min(full + (tail > 0), _SIDE)
  rows, n = min(C, _ROWS), min(P, _KEYS)
  ends = jnp.stack([plus, minus])
  ends = jnp.where((ends >= 0) & (ends < C), ends, -1)
  width = side * layout.TILE if full else layout.WORDS * tail
  block = pl.BlockSpec((rows, width), lambda c, t, p: (c, t))
  return pl.pallas_call(
    # XLA on a CPU, which interprets, takes very long over unrolled rounds.
    functools.partial(_kernel, D=D, side=side, unroll=not interpret),
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    grid=(pl.cdiv(C, rows), pl.cdiv(D, width), pl.cdiv(P, n)),
    in_specs=[
      *(
        pl.BlockSpec(
          (1, height, n), lambda c, t, p: (p, 0, 0), memory_space=pltpu.SMEM
        )
        for height in (8, 2)
      ),
      pl.BlockSpec((1, 3), lambda c, t, p: (0, 0), memory_space=pltpu.SMEM),
      block,
    ],
    out_specs=block,
    input_output_aliases={3: 0},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    interpret=interpret,
    name="mask_add",
  )(_chunk(keys.T, n, 0), _chunk(ends, n, -1), nonce[None], q)


def _kernel(keys, ends, nonce, q, y, *, D, side, unroll):
  """Adds a block of keys to a block of tiles."""
  rows, n = y.shape[0], keys.shape[2]
  first_row = pl.program_id(0) * rows
  step = pl.program_id(1)
  full, tail = layout.split(D)

  @pl.when(pl.program_id(2) == 0)
  def _():
    y[...] = q[...]

  shape = (side, *_LANES)
  tile, high, low = (
    jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3)
  )
  lane = high * _LANES[1] + low
  counter = (step * side + tile) * layout.LANES + lane
  counter = counter.astype(jnp.uint32)

  # When, and the lanes of each of the block's tiles then.
  whole, rest = divmod(full, side)
  last = [layout.LANES] * rest + ([tail] if tail else [])
  cases = [(step < whole, [layout.LANES] * side), (step == whole, last)]
  if not whole:
    del cases[0]

  def add(row, stream):
    for is_case, lanes in cases:

      @pl.when(is_case & (row >= 0) & (row < rows))
      def _(lanes=lanes):
        for s, width in enumerate(lanes):
          words = [x[s, : width // _LANES[1]] for x in stream]
          size = layout.WORDS * width
          here = pl.ds(row, 1), pl.ds(s * layout.TILE, size)
          y[here] += jnp.concatenate(words).reshape(1, size)

  @pl.loop(0, n)
  def _(p):
    plus, minus = ends[0, 0, p] - first_row, ends[0, 1, p] - first_row
    is_plus, is_minus = ((row >= 0) & (row < rows) for row in (plus, minus))

    @pl.when(is_plus | is_minus)
    def _():
      key = [keys[0, i, p] for i in range(8)]
      stream = chacha.words(
        key, counter, [nonce[0, i] for i in range(3)], unroll=unroll
      )
      add(plus, stream)
      add(minus, [-x for x in stream])


def _chunk(x, n, fill):
  """[height, P] to [chunks, height, n]."""
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % n)), constant_values=fill)
  return x.reshape(x.shape[0], -1, n).swapaxes(0, 1)
