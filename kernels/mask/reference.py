"""The specification of `mask_add`, in plain jnp.

A few tiles at a time, so that what is made fits a cache, and with the rounds
in a loop, since XLA on a CPU is slowest where they are written out.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft.kernels import chacha
from fedjax_peft.kernels.mask import layout

_AT_ONCE = 4  # tiles


def mask_add(q, keys, plus, minus, nonce):
  """See `api.mask_add`."""
  if q.size == 0:
    return q
  full, lanes = layout.split(q.shape[1])
  begin, parts = 0, []
  for steps, tiles, n in (
    (full // _AT_ONCE, _AT_ONCE, layout.LANES),
    (full % _AT_ONCE, 1, layout.LANES),
    (min(lanes, 1), 1, lanes),
  ):
    if steps == 0:
      continue
    size = steps * tiles * layout.WORDS * n
    part = q[:, begin : begin + size]
    width = part.shape[1]
    part = jnp.pad(part, ((0, 0), (0, size - width)))
    part = part.reshape(-1, steps, tiles, layout.WORDS, n).swapaxes(0, 1)
    tile = np.uint32(begin // layout.TILE) + jnp.arange(
      steps * tiles, dtype=jnp.uint32
    )

    def mask(args):
      y, tile = args
      return _mask(y, tile, keys, plus, minus, nonce)

    part = jax.lax.map(mask, (part, tile.reshape(steps, tiles)))
    parts.append(part.swapaxes(0, 1).reshape(-1, size)[:, :width])
    begin += width
  return jnp.concatenate(parts, axis=1)


def _mask(y, tile, keys, plus, minus, nonce):
  """Masks the tiles with these numbers: y [C, tiles, 16, n]."""
  C, _, _, n = y.shape
  lane = jnp.arange(n, dtype=jnp.uint32)
  counter = tile[:, None] * np.uint32(layout.LANES) + lane[None]

  def is_row(row):
    return (row >= 0) & (row < C)

  def add(y, row, x):
    at = jnp.clip(row, 0, C - 1)
    x = y[at] + jnp.where(is_row(row), x, np.uint32(0))
    return jax.lax.dynamic_update_index_in_dim(y, x, at, 0)

  def pair(y, args):
    key, plus, minus = args
    stream = jax.lax.cond(
      is_row(plus) | is_row(minus),
      lambda: jnp.stack(chacha.words(key, counter, nonce), axis=1),
      lambda: jnp.zeros(y.shape[1:], jnp.uint32),
    )
    return add(add(y, plus, stream), minus, -stream), None

  return jax.lax.scan(pair, y, (keys, plus, minus))[0]
