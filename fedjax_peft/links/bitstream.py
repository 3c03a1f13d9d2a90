"""Bitstream: integers of any width side by side in bytes, without a gap.

The whole bytes of a code travel as they are. The bits above them, less than 8,
share bytes: 8 / gcd(width, 8) codes always fill some. A row is cut into as many
planes as that, and codes of the same place in all planes lie together, so that
packing is shifts of whole planes, without a loop or a gather.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import validate


class Packed(NamedTuple):
  """Codes side by side, uint8; together ceil(n bits / 8) bytes.

  Attributes:
    whole: [R, C] for each whole byte of a code, the lowest first.
    shared: [R, w], bits above them; None if there are none, or too few codes.
    rest: those of the last codes; None if the others hold all.
  """

  whole: tuple[jax.Array, ...]
  shared: jax.Array | None
  rest: jax.Array | None


def nbytes(size: int, bits: int) -> int:
  """Bytes of `size` packed codes: ceil(size bits / 8)."""
  return -(-size * bits // 8)


def pack(codes: jax.Array, bits: int) -> Packed:
  """Packs integers of `bits` bits each.

  Of b = bits % 8 bits above the whole bytes, with p = 8 / gcd(b, 8) and
  q = C // p, shared byte j q + i of a row holds bits 8 j to 8 j + 7 of those of
  its codes i, i + q, ... i + (p - 1) q written behind each other, lowest bit
  first. Rows of C codes that p does not divide are taken as one long row, and
  its last codes are written behind each other.

  Args:
    codes: uint32 [R, C]; their lowest `bits` bits are packed.
    bits: width of a code, 1 to 32.

  Returns:
    `Packed`, from which `unpack` restores the codes.

  Raises:
    ValueError: if `bits` is out of range.

  Example:
    >>> codes = jnp.array([[1, 2, 3, 4, 5]], jnp.uint32)
    >>> _, shared, rest = pack(codes, 4)
    >>> shared, rest
    (Array([[49, 66]], dtype=uint8), Array([5], dtype=uint8))
  """
  planes, rows, each = _layout(codes.shape, bits)
  low, left = bits - bits % 8, bits % 8
  whole = tuple(_byte(codes >> np.uint32(i)) for i in range(0, low, 8))
  if not left:
    return Packed(whole, None, None)
  top = ((codes >> np.uint32(low)) & _mask(left)).reshape(rows, -1)
  shared = rest = None
  if each:
    parts = [top[:, i * each : (i + 1) * each] for i in range(planes)]
    shared = _byte(_reread(parts, left, 8))
  if planes * each < top.shape[1]:
    last = _digits(top[0, planes * each :], left)
    last = jnp.pad(last, (0, -last.size % 8))
    rest = _byte(_number(last.reshape(-1, 8)))
  return Packed(whole, shared, rest)


def unpack(packed: Packed, bits: int, shape: tuple[int, int]) -> jax.Array:
  """The codes that `pack` packed.

  Args:
    packed: what `pack` returned.
    bits: width of a code, 1 to 32.
    shape: [R, C] of the codes.

  Returns:
    uint32 [R, C].

  Raises:
    ValueError: if `bits` is out of range.
  """
  planes, _, each = _layout(shape, bits)
  low, left = bits - bits % 8, bits % 8
  codes = jnp.zeros(shape, jnp.uint32)
  for i, byte in enumerate(packed.whole):
    codes |= byte.astype(jnp.uint32) << np.uint32(8 * i)
  found = []
  if packed.shared is not None:
    shared = packed.shared.astype(jnp.uint32)
    parts = jnp.split(shared, shared.shape[1] // each, axis=1)
    found.append(_reread(parts, 8, left))
  if packed.rest is not None:  # of one long row
    last = math.prod(shape) - planes * each
    digits = _digits(packed.rest.astype(jnp.uint32), 8)
    found.append(_number(digits[: last * left].reshape(1, last, left)))
  if found:
    codes |= jnp.concatenate(found, axis=1).reshape(shape) << np.uint32(low)
  return codes


def _layout(shape: tuple[int, ...], bits: int) -> tuple[int, int, int]:
  """(planes of a row, rows, codes in a plane)."""
  validate.at_least(1, bits=bits)
  if bits > 32:
    raise ValueError(f"bits must be at most 32, got {bits=}")
  planes = 8 // math.gcd(bits, 8)
  rows, columns = shape if shape[1] % planes == 0 else (1, shape[0] * shape[1])
  return planes, rows, columns // planes


def _reread(fields: list[jax.Array], wide: int, narrow: int) -> jax.Array:
  """Reads fields of `wide` bits, behind each other, by `narrow` bits.

  Args:
    fields: uint32 [R, q], as many as make whole results.
    wide: bits of a field; all above them are zero.
    narrow: bits that are read at once.

  Returns:
    uint32 [R, . q], what is read, behind each other.
  """
  found = []
  for j in range(len(fields) * wide // narrow):
    terms = [
      field >> np.uint32(down) if down >= 0 else field << np.uint32(-down)
      for i, field in enumerate(fields)
      if -narrow < (down := narrow * j - wide * i) < wide
    ]
    found.append(functools.reduce(jnp.bitwise_or, terms) & _mask(narrow))
  return jnp.concatenate(found, axis=1)


def _digits(x: jax.Array, bits: int) -> jax.Array:
  """uint32 [n] -> their binary digits, the lowest first, [n bits]."""
  places = np.arange(bits, dtype=np.uint32)
  return ((x[:, None] >> places[None]) & np.uint32(1)).reshape(-1)


def _number(digits: jax.Array) -> jax.Array:
  """Binary digits, the lowest first, [..., b] -> uint32 [...]."""
  places = jax.lax.broadcasted_iota(jnp.uint32, digits.shape, digits.ndim - 1)
  return jnp.sum(digits << places, axis=-1, dtype=jnp.uint32)


def _byte(x: jax.Array) -> jax.Array:
  """The lowest eight bits."""
  return (x & _mask(8)).astype(jnp.uint8)


def _mask(bits: int) -> np.uint32:
  """So many ones."""
  return np.uint32(2**bits - 1)
