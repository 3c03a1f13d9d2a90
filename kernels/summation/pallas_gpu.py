"""Triton: a program owns a tile and walks through the clients in order.

No two programs write to the same place, so there are no atomics, and the
order of the floats is fixed. Tails are masked: nothing is padded.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fedjax_peft.kernels.quantization import api as quantize
from fedjax_peft.kernels.summation import reference

TILE = 512  # entries of a wire that a program reads, a power of two
UNROLL = 4  # clients whose loads are under way at once


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
  _addressable(packed)
  lay = quantize.layout(acc.size, bits=bits, block=block)
  if not packed.size:
    return acc

  def kernel(acc_ref, packed_ref, scale_ref, weight_ref, out_ref):
    entry = pl.program_id(0) * TILE + jnp.arange(TILE, dtype=jnp.int32)
    inside = entry < lay.length
    of = entry // lay.row  # block of each entry
    first = of * lay.block + entry % lay.row
    index = [first + j * lay.row for j in range(lay.block // lay.row)]
    held = [inside & (i < acc.size) for i in index]
    sums = tuple(
      plgpu.load(acc_ref.at[i], mask=h, other=0.0) for i, h in zip(index, held)
    )

    def add(c, sums):
      w = weight_ref[c]
      factor = w * plgpu.load(scale_ref.at[c, of], mask=inside, other=0.0)
      q = plgpu.load(packed_ref.at[c, entry], mask=inside, other=0)
      return tuple(
        jnp.where(w != 0, s + factor * reference.decode(q, j, bits), s)
        for j, s in enumerate(sums)
      )

    sums = _each(weight.size, add, sums)
    for i, h, s in zip(index, held, sums):
      plgpu.store(out_ref.at[i], s, mask=h)

  return _call(
    kernel, pl.cdiv(lay.length, TILE), acc, interpret, "weighted_sum"
  )(acc, packed, scale, weight)


def add_rows(
  acc: jax.Array,
  rows: jax.Array,
  present: jax.Array,
  *,
  interpret: bool = False,
) -> jax.Array:
  """See `api.add_rows`."""
  _addressable(rows)
  if not rows.size:
    return acc
  zero = np.zeros((), acc.dtype)

  def kernel(acc_ref, rows_ref, present_ref, out_ref):
    index = pl.program_id(0) * TILE + jnp.arange(TILE, dtype=jnp.int32)
    inside = index < acc.size

    def add(c, total):
      row = plgpu.load(rows_ref.at[c, index], mask=inside, other=zero)
      return jnp.where(present_ref[c], total + row, total)

    total = plgpu.load(acc_ref.at[index], mask=inside, other=zero)
    total = _each(present.size, add, total)
    plgpu.store(out_ref.at[index], total, mask=inside)

  return _call(kernel, pl.cdiv(acc.size, TILE), acc, interpret, "add_rows")(
    acc, rows, present
  )


def _each(clients, add, carry):
  """Calls add(client, carry) for all clients in order."""

  def several(k, carry):
    for i in range(UNROLL):
      carry = add(k * UNROLL + i, carry)
    return carry

  carry = jax.lax.fori_loop(0, clients // UNROLL, several, carry)
  return jax.lax.fori_loop(clients // UNROLL * UNROLL, clients, add, carry)


def _call(kernel, programs, acc, interpret, name):
  """A kernel over whole arrays, of which the first becomes the result."""
  return pl.pallas_call(
    kernel,
    grid=(programs,),
    out_shape=jax.ShapeDtypeStruct(acc.shape, acc.dtype),
    input_output_aliases={0: 0},
    compiler_params=plgpu.CompilerParams(num_warps=4),
    interpret=interpret,
    name=name,
  )


def _addressable(rows: jax.Array) -> None:
  """Raises ValueError if a pointer's 32-bit offset could wrap."""
  if rows.size >= 2**31:
    raise ValueError(
      "pallas_gpu takes fewer than 2^31 entries in a call: got "
      f"shape={rows.shape}; add fewer clients in each of several calls"
    )
