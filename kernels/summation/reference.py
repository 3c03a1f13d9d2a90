"""The specification, in plain jnp: a scan over clients.

The accumulator is the carry, so one row at a time is decoded and none is kept.
A reduction over the client axis would be about ten times slower on a CPU,
whose compiler does not vectorize it.
"""

import jax
import jax.numpy as jnp

from fedjax_peft.kernels.quantization import api as quantize


def decode(entries: jax.Array, plane: int, bits: int) -> jax.Array:
  """Returns the values (float32) of one plane of a block's entries."""
  x = entries.astype(jnp.int32)
  if bits == 1:
    x = 2 * ((x >> plane) & 1) - 1
  elif bits < 8:
    x = (x << (32 - bits - plane * bits)) >> (32 - bits)  # extends the sign
  return x.astype(jnp.float32)


def weighted_sum(
  acc: jax.Array,
  packed: jax.Array,
  scale: jax.Array,
  weight: jax.Array,
  *,
  bits: int,
  block: int,
) -> jax.Array:
  """See `api.weighted_sum`."""
  lay = quantize.layout(acc.size, bits=bits, block=block)
  whole = acc.size // lay.block  # blocks that are not cut
  # The planes of a block do not interleave: each has its own accumulator.
  count = lay.block // lay.row
  blocked = acc[: whole * lay.block].reshape(whole, count, lay.row)
  rest = acc[whole * lay.block :]
  main = [blocked[:, j] for j in range(count)]
  tail = [rest[j * lay.row : (j + 1) * lay.row] for j in range(count)]

  def add(carry, client):
    main, tail = carry
    row, scale, w = client
    factor = w * scale
    head = row[: whole * lay.row].reshape(whole, lay.row)
    last = row[whole * lay.row :]
    if whole:
      by = factor[:whole, None]
      main = [
        jnp.where(w != 0, x + by * decode(head, j, bits), x)
        for j, x in enumerate(main)
      ]
    if whole < lay.blocks:
      by = factor[whole]
      tail = [
        jnp.where(w != 0, x + by * decode(last[: x.size], j, bits), x)
        for j, x in enumerate(tail)
      ]
    return (main, tail), None

  carry, _ = jax.lax.scan(add, (main, tail), (packed, scale, weight))
  main, tail = carry
  return jnp.concatenate([jnp.stack(main, axis=1).reshape(-1), *tail])


def add_rows(acc: jax.Array, rows: jax.Array, present: jax.Array) -> jax.Array:
  """See `api.add_rows`."""

  def add(acc, client):
    row, here = client
    return jnp.where(here, acc + row, acc), None

  return jax.lax.scan(add, acc, (rows, present))[0]
