"""`mask_add` for TPUs.

A block is two tiles of some rows, and word w of a tile one vector register,
[8, 128] lanes: two tiles side by side keep the vector units busy where one
would wait for itself. It stays in VMEM while all keys go by.
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
  C, P = q.shape[0], keys.shape[0]
  if q.size == 0 or P == 0:
    return q
  q_tiles = _tile(q)
  rows, side, n = min(C, _ROWS), min(q_tiles.shape[1], _SIDE), min(P, _KEYS)
  q_tiles = _pad(q_tiles, {0: rows, 1: side})
  ends = jnp.stack([plus, minus])
  ends = jnp.where((ends >= 0) & (ends < C), ends, -1)
  block = pl.BlockSpec(
    (rows, side, *q_tiles.shape[2:]), lambda c, t, p: (c, t, 0, 0, 0)
  )
  y_tiles = pl.pallas_call(
    # XLA on a CPU, which interprets, takes very long over unrolled rounds.
    functools.partial(_kernel, unroll=not interpret),
    out_shape=jax.ShapeDtypeStruct(q_tiles.shape, q_tiles.dtype),
    grid=(q_tiles.shape[0] // rows, q_tiles.shape[1] // side, pl.cdiv(P, n)),
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
  )(_chunk(keys.T, n, 0), _chunk(ends, n, -1), nonce[None], q_tiles)
  return _untile(y_tiles, *q.shape)


def _kernel(keys, ends, nonce, q, y, *, unroll):
  """Adds a block of keys to a block of tiles."""
  rows, side = y.shape[:2]
  n = keys.shape[2]
  first_row = pl.program_id(0) * rows
  first_tile = pl.program_id(1) * side

  @pl.when(pl.program_id(2) == 0)
  def _():
    @pl.loop(0, rows)
    def _(row):
      y[row] = q[row]

  shape = (side, *_LANES)
  tile, high, low = (
    jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3)
  )
  lane = high * _LANES[1] + low
  counter = (first_tile + tile) * layout.LANES + lane
  counter = counter.astype(jnp.uint32)

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

      @pl.when(is_plus)
      def _():
        for w, x in enumerate(stream):
          y[plus, :, w] += x

      @pl.when(is_minus)
      def _():
        for w, x in enumerate(stream):
          y[minus, :, w] -= x


def _chunk(x, n, fill):
  """[height, P] to [chunks, height, n]."""
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % n)), constant_values=fill)
  return x.reshape(x.shape[0], -1, n).swapaxes(0, 1)


def _pad(x, multiples):
  """Pads each axis to a multiple."""
  widths = [(0, -d % multiples.get(i, 1)) for i, d in enumerate(x.shape)]
  return jnp.pad(x, widths)


def _tile(q):
  """[C, D] to [C, tiles, 16, 8, 128], the last tile among them."""
  C, D = q.shape
  full, lanes = layout.split(D)
  begin = full * layout.TILE
  tiles = q[:, :begin].reshape(C, full, layout.WORDS, *_LANES)
  if lanes:
    last = _pad(q[:, begin:], {1: layout.WORDS * lanes})
    last = last.reshape(C, 1, layout.WORDS, lanes // _LANES[1], _LANES[1])
    tiles = jnp.concatenate([tiles, _pad(last, {3: _LANES[0]})], axis=1)
  return tiles


def _untile(tiles, C, D):
  """Undoes `_tile`, and what was padded since."""
  full, lanes = layout.split(D)
  y = tiles[:C, :full].reshape(C, full * layout.TILE)
  if lanes:
    last = tiles[:C, full, :, : lanes // _LANES[1]].reshape(C, -1)
    y = jnp.concatenate([y, last[:, : D - y.shape[1]]], axis=1)
  return y
