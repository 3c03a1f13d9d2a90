"""`mask_add` for GPUs, in Triton.

A program makes the keystream of some keys for 128 lanes, one a thread, and
adds it where it belongs: whoever comes first, the sum modulo 2^32 is the same.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fedjax_peft.kernels import chacha
from fedjax_peft.kernels.mask import layout

_KEYS = 16  # of a program


def mask_add(q, keys, plus, minus, nonce, *, interpret=False):
  """See `api.mask_add`."""
  P = keys.shape[0]
  if q.size == 0 or P == 0:
    return q
  full, tail = layout.split(q.shape[1])
  steps = (full * layout.LANES + tail) // layout.STEP
  return pl.pallas_call(
    functools.partial(_kernel, interpret=interpret),
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    grid=(steps, pl.cdiv(P, _KEYS)),
    input_output_aliases={4: 0},
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="mask_add",
  )(keys, plus, minus, nonce, q)


def _kernel(keys, plus, minus, nonce, q, y, *, interpret):
  """Adds a block of keys to 128 lanes."""
  del q  # is y
  C, D = y.shape
  P = keys.shape[0]
  full, tail = layout.split(D)
  # Unsigned, where a quotient is a shift; and `select`, since Triton's lowering
  # of `where` makes booleans of two Python integers.
  first = pl.program_id(0).astype(jnp.uint32) * np.uint32(layout.STEP)
  tile = first // np.uint32(layout.LANES)
  lane = first % np.uint32(layout.LANES)
  n = jax.lax.select(
    tile < np.uint32(full), jnp.int32(layout.LANES), jnp.int32(tail)
  )
  thread = jnp.arange(layout.STEP, dtype=jnp.int32)
  counter = first + thread.astype(jnp.uint32)
  begin = (tile * np.uint32(layout.TILE) + lane).astype(jnp.int32) + thread
  begin_key = pl.program_id(1) * _KEYS

  def is_row(row):
    return (row >= 0) & (row < C)

  def add(row, stream):
    # A mask, not a branch: in a branch the row of a single client would be
    # known, and registers would hold its addresses through all the rounds.
    end = jnp.where(is_row(row), jnp.int32(D), jnp.int32(0))
    at = begin
    for x in stream:
      _add_at(y, row, at, x, at < end, interpret)
      at += n

  def pair(p, carry):
    to, from_ = plus[p], minus[p]

    @pl.when(is_row(to) | is_row(from_))
    def _():
      stream = chacha.words(
        [keys[p, i] for i in range(8)],
        counter,
        [nonce[i] for i in range(3)],
      )
      add(to, stream)
      add(from_, [-x for x in stream])

    return carry

  jax.lax.fori_loop(begin_key, jnp.minimum(begin_key + _KEYS, P), pair, None)


def _add_at(y, row, at, x, mask, interpret):
  """Adds to y[row, at]; the interpreter has no mask for what is atomic."""
  if interpret:
    here = y.at[row, at]
    plgpu.store(here, plgpu.load(here, mask=mask) + x, mask=mask)
  else:
    plgpu.atomic_add(y, (row, at), x, mask=mask)
