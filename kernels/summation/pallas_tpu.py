"""TPU: tiles of blocks, into which chunks of clients are added one by one.

Wires are read as they lie in memory, where 32 clients make a tile of bytes,
and the same byte of four of them a 32-bit word. A load with a stride collects
one client's words from eight tiles: a register then holds eight blocks, their
factors lie along the lanes, a client each, and one column of them is spread
over it. The accumulator's tile stays in VMEM while the chunks pass (the inner
grid axis), its values in the order of those of a wire.

Nothing but the accumulator is ever copied, and that only if its length is no
multiple of 1,024, since XLA then lays out a vector and a row differently.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fedjax_peft.kernels.quantization import api as quantize

LANES, SUBLANES = 128, 8
REGISTER = LANES * SUBLANES
VALUES = 2**15  # of a tile
CLIENTS = 128  # of a chunk, at most
BYTES = 2**21  # of wires in VMEM, once; the pipeline holds them twice
COLUMNS = 4096  # values of a row that add_rows keeps in VMEM


class _Tile(NamedTuple):
  """What a grid step takes in, and how it lies in registers.

  A group is what of a wire fills the 128 lanes: a part of the row of a block,
  or the rows of several blocks if they are short. Eight groups are a register.

  Attributes:
    bits: of a value.
    planes: values in an entry of the wire.
    row: entries of a block.
    blocks: of a tile.
    clients: of a chunk.
    words: clients of whom an entry fits into 32 bits.
    parts: groups that a row fills, or 1.
    sharing: blocks that share a group, or 1.
    side: registers of factors in use at once: more keep the units busy, too
      many do not fit.
  """

  bits: int
  planes: int
  row: int
  blocks: int
  clients: int
  words: int
  parts: int
  sharing: int
  side: int

  @property
  def groups(self) -> int:
    """Groups of a tile that hold the same part of their rows."""
    return self.blocks // self.sharing


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
  lay = quantize.layout(acc.size, bits=bits, block=block)
  if not packed.size:
    return acc
  if lay.block % LANES == 0:
    tile = _tile(lay, packed, bits)
    return _weighted_sum(acc, packed, scale, weight, tile, interpret)
  # One block of a size of its own: its planes are padded apart.
  planes, row = lay.block // lay.row, LANES * pl.cdiv(lay.row, LANES)
  packed = jnp.pad(packed, ((0, 0), (0, row - lay.length)))
  wide = jnp.pad(acc, (0, lay.block - acc.size)).reshape(planes, lay.row)
  wide = jnp.pad(wide, ((0, 0), (0, row - lay.row))).reshape(-1)
  tile = _tile(quantize.Layout(1, planes * row, row, row), packed, bits)
  wide = _weighted_sum(wide, packed, scale, weight, tile, interpret)
  return wide.reshape(planes, row)[:, : lay.row].reshape(-1)[: acc.size]


def _tile(lay: quantize.Layout, packed: jax.Array, bits: int) -> _Tile:
  """Chooses the sizes."""
  clients, itemsize = len(packed), packed.dtype.itemsize
  planes, sharing = lay.block // lay.row, max(LANES // lay.row, 1)
  side = 2 if planes <= 2 else 1
  blocks = min(VALUES // lay.block, pl.next_power_of_2(lay.blocks), LANES)
  blocks = max(blocks, side * SUBLANES * sharing)
  chunk = min(BYTES // (blocks * lay.row * itemsize), CLIENTS)
  return _Tile(
    bits=bits,
    planes=planes,
    row=lay.row,
    blocks=blocks,
    clients=min(chunk, 32 * pl.cdiv(clients, 32)),
    words=4 // itemsize,
    parts=max(lay.row // LANES, 1),
    sharing=sharing,
    side=side,
  )


def _weighted_sum(acc, packed, scale, weight, tile, interpret):
  """The sum, of blocks that fill their lanes."""
  clients, length = packed.shape
  columns = tile.blocks * tile.row
  values = columns * tile.planes
  chunks = pl.cdiv(clients, tile.clients)
  weight = jnp.pad(weight, (0, chunks * tile.clients - clients))
  tiles = LANES // tile.blocks  # whose scales are read together
  held = pl.BlockSpec((1, values), lambda t, c: (0, t))
  out = pl.pallas_call(
    # XLA on a CPU, which interprets, takes very long over unrolled loops.
    functools.partial(_add_chunk, tile=tile, rolled=bool(interpret)),
    grid=(pl.cdiv(length, columns), chunks),
    in_specs=[
      held,
      pl.BlockSpec((tile.clients, columns), lambda t, c: (c, t)),
      pl.BlockSpec(
        (tile.clients, LANES), lambda t, c: (c, jax.lax.div(t, tiles))
      ),
      pl.BlockSpec((None, 1, tile.clients), lambda t, c: (c, 0, 0)),
    ],
    out_specs=held,
    out_shape=jax.ShapeDtypeStruct((1, acc.size), acc.dtype),
    input_output_aliases={0: 0},
    scratch_shapes=[
      pltpu.VMEM((values // LANES, LANES), jnp.float32),
      pltpu.VMEM((tile.planes, tile.parts, tile.groups, LANES), jnp.float32),
      pltpu.VMEM((LANES, tile.clients), jnp.float32),
      pltpu.VMEM(
        (tile.sharing, LANES // tile.sharing, tile.clients), jnp.float32
      ),
      pltpu.VMEM(
        (tile.side, 2, tile.clients // tile.words * SUBLANES, LANES), jnp.int32
      ),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary")
    ),
    interpret=interpret,
    name="weighted_sum",
  )(acc[None], packed, scale, weight.reshape(chunks, 1, -1))
  return out.reshape(-1)


def _add_chunk(acc, wires, scale, weight, out, *scratch, tile, rolled):
  """Adds a chunk of clients to a tile."""
  flat, sums, across, factor, words = scratch
  t, c = pl.program_id(0), pl.program_id(1)

  @pl.when(c == 0)
  def _():
    flat[...] = acc[...].reshape(flat.shape)
    _split(tile, flat, sums)

  # What is read in place of clients beyond the last has factor 0, and wires,
  # whatever they are, are integers: it adds nothing.
  w = weight[...]
  across[...] = jnp.where(w != 0, w * scale[...].T, 0)
  for i in range(tile.sharing):
    every = pl.ds(i, LANES // tile.sharing, stride=tile.sharing)
    factor[i] = across[every]
  # Where the tile's first group is in `factor`.
  start = jax.lax.rem(t, LANES // tile.blocks) * tile.groups
  together = 2 - tile.parts % 2  # parts for which a factor is spread once

  @pl.loop(0, tile.groups // SUBLANES // tile.side)
  def _(g):
    @pl.loop(0, tile.parts // together)
    def _(p):
      groups = [(g * tile.side + s) * SUBLANES for s in range(tile.side)]
      parts = [p * together + i for i in range(together)]
      _gather(tile, wires, groups, parts, words, rolled)
      _add_parts(tile, factor, start, groups, parts, sums, words, rolled)

  @pl.when(c == pl.num_programs(1) - 1)
  def _():
    _join(tile, flat, sums)
    out[...] = flat[...].reshape(out.shape)


def _gather(tile, wires, groups, parts, words, rolled):
  """Puts the words of eight groups next to each other.

  Args:
    tile: how they lie.
    wires: of the chunk.
    groups: the first of eight, for each register of factors.
    parts: which parts of their rows.
    words: int32 [groups, parts, words of 32 clients and 8 groups, 128].
    rolled: whether the groups are a loop.
  """

  def gather(u, _):
    for s, group in enumerate(groups):
      for i, part in enumerate(parts):
        lane = ((group + u) * tile.parts + part) * LANES
        lanes = pl.ds(pl.multiple_of(lane, LANES), LANES)
        for k in range(0, tile.clients // tile.words, SUBLANES):
          rows = pl.ds(k * tile.words, SUBLANES * tile.words)
          to = pl.ds((k + u) * SUBLANES, SUBLANES)
          words[s, i, to] = pltpu.bitcast(wires[rows, lanes], jnp.int32)

  _repeat(SUBLANES, gather, None, rolled)


def _add_parts(tile, factor, start, groups, parts, sums, words, rolled):
  """Adds a chunk of clients to some parts of some groups.

  Args:
    tile: how they lie.
    factor: [blocks that share a group, groups, clients].
    start: the tile's first group in it.
    groups: see `_gather`.
    parts: see `_gather`.
    sums: see `_split`.
    words: see `_gather`.
    rolled: whether the clients are a loop.
  """

  def add(several, totals):
    high, low = divmod(several, SUBLANES)
    at = pl.ds(high * SUBLANES**2 + low, SUBLANES, stride=SUBLANES)
    for s, group in enumerate(groups):
      rows = pl.ds(pl.multiple_of(start + group, SUBLANES), SUBLANES)
      entries = [words.at[s, i][at] for i in range(len(parts))]
      for field in range(tile.words):
        by = _spread(tile, factor, rows, several * tile.words + field)
        for i, entry in enumerate(entries):
          for j in range(tile.planes):
            value = _value(entry, field * tile.planes + j, tile.bits)
            totals[s, i, j] += by * value
    return totals

  at = {
    (s, i, j): (j, part, pl.ds(pl.multiple_of(group, SUBLANES), SUBLANES))
    for s, group in enumerate(groups)
    for i, part in enumerate(parts)
    for j in range(tile.planes)
  }
  totals = {k: sums[here] for k, here in at.items()}
  totals = _repeat(tile.clients // tile.words, add, totals, rolled)
  for k, here in at.items():
    sums[here] = totals[k]


def _repeat(times, fun, carry, rolled):
  """Calls carry = fun(i, carry), in a loop or written out."""
  if rolled:
    return jax.lax.fori_loop(0, times, fun, carry)
  for i in range(times):
    carry = fun(i, carry)
  return carry


def _spread(tile, factor, rows, client):
  """A client's factors of eight groups, over the lanes, [8, 128]."""
  segment = _segment(tile, SUBLANES)
  by = jnp.zeros((SUBLANES, LANES), jnp.float32)
  for i in range(tile.sharing):
    by = jnp.where(segment >= i, factor[i, rows, pl.ds(client, 1)], by)
  return by


def _value(word, place, bits):
  """The value at a place of a word, as float32."""
  if bits == 1:
    x = 2 * ((word >> place) & 1) - 1
  else:
    x = (word << (32 - bits - place * bits)) >> (32 - bits)  # brings the sign
  return x.astype(jnp.float32)


def _split(tile, flat, sums):
  """Brings together what entries of a wire add to.

  Args:
    tile: how they lie.
    flat: values of a tile in their order.
    sums: [planes, parts, groups, 128].
  """

  @pl.loop(0, tile.planes)
  def _(plane):
    for part, block, rows in _pieces(tile, plane):
      x = flat[rows]
      if tile.sharing > 1:
        x = _turn(tile, x, block - plane)
        x = jnp.where(_segment(tile, len(x)) == block, x, sums[plane, part])
      sums[plane, part] = x


def _join(tile, flat, sums):
  """Undoes `_split`."""

  @pl.loop(0, tile.planes)
  def _(plane):
    for part, block, rows in _pieces(tile, plane):
      x = sums[plane, part]
      if tile.sharing > 1:
        x = _turn(tile, x, plane - block)
        here = _segment(tile, len(x)) == jax.lax.rem(plane, tile.sharing)
        x = jnp.where(here, x, flat[rows])
      flat[rows] = x


def _pieces(tile, plane):
  """Yields parts of a plane, which blocks of their groups, and rows in flat."""
  step = tile.planes * tile.row // LANES
  for part in range(tile.parts):
    for block in range(tile.sharing):
      first = jax.lax.div(plane * tile.parts, tile.sharing)
      first += block * step + part
      yield part, block, pl.ds(first, tile.groups, stride=tile.sharing * step)


def _turn(tile, x, rows):
  """Turns lanes by so many short rows, to the left if it is negative."""
  return pltpu.roll(x, ((rows + LANES) * tile.row) & (LANES - 1), 1)


def _segment(tile, rows):
  """Which block of its group a lane belongs to, int32 [rows, 128]."""
  lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
  return jax.lax.div(lane, tile.row)


def add_rows(
  acc: jax.Array,
  rows: jax.Array,
  present: jax.Array,
  *,
  interpret: bool = False,
) -> jax.Array:
  """See `api.add_rows`."""
  if not rows.size:
    return acc
  clients, size = rows.shape
  # Narrow integers are added as wide ones: the lowest bits are the same.
  wide = acc.dtype if acc.dtype.itemsize == 4 else np.dtype(np.int32)
  words = 4 // rows.dtype.itemsize  # clients of whom an entry fits into one
  columns = min(REGISTER * pl.cdiv(size, REGISTER), COLUMNS)
  height = SUBLANES * words
  chunk = min(height * pl.cdiv(clients, height), CLIENTS)
  chunks = pl.cdiv(clients, chunk)
  here = jnp.pad(present.astype(jnp.int32), (0, chunks * chunk - clients))
  held = pl.BlockSpec((1, columns), lambda t, c: (0, t))
  out = pl.pallas_call(
    functools.partial(_add_rows, words=words),
    grid=(pl.cdiv(size, columns), chunks),
    in_specs=[
      held,
      pl.BlockSpec((chunk, columns), lambda t, c: (c, t)),
      pl.BlockSpec(
        (None, 1, chunk), lambda t, c: (c, 0, 0), memory_space=pltpu.SMEM
      ),
    ],
    out_specs=held,
    out_shape=jax.ShapeDtypeStruct((1, size), wide),
    input_output_aliases={0: 0},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary")
    ),
    interpret=interpret,
    name="add_rows",
  )(acc.astype(wide)[None], rows, here.reshape(chunks, 1, chunk))
  return out.reshape(-1).astype(acc.dtype)


def _add_rows(acc, rows, here, out, *, words):
  """Adds a chunk of rows to a tile."""

  @pl.when(pl.program_id(1) == 0)
  def _():
    out[...] = acc[...]

  if words > 1:
    rows = rows.bitcast(out.dtype)
  # x + -0.0 is x, even if x is -0.0.
  nothing = np.array(0 if out.dtype.kind != "f" else -0.0, out.dtype)

  @pl.loop(0, out.shape[1] // REGISTER)
  def _(g):
    at = pl.ds(pl.multiple_of(g * REGISTER, REGISTER), REGISTER)
    total = out[:, at].reshape(SUBLANES, LANES)
    for several in range(rows.shape[0]):
      row = rows[several : several + 1, at].reshape(SUBLANES, LANES)
      for field in range(words):
        # What stays above the lowest bits is never looked at.
        x = row >> (32 // words * field) if field else row
        is_here = here[0, several * words + field] != 0
        total += jnp.where(is_here, x, nothing)
    out[:, at] = total.reshape(1, REGISTER)
