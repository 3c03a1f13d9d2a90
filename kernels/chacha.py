"""ChaCha20: a keystream from a key, a block's number and a nonce.

Only additions, exclusive ors and rotations of 32-bit words, the same on every
backend; any number of blocks side by side, in any shape.

Nir and Langley, RFC 8439, 2018, https://www.rfc-editor.org/rfc/rfc8439
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# "expand 32-byte k", as four little-endian words.
_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
_COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))


def words(
  key: Sequence[Any],
  counter: jax.Array,
  nonce: Sequence[Any],
  *,
  unroll: bool = False,
) -> list[jax.Array]:
  """The keystream of one key, block by block.

  Args:
    key: eight uint32 scalars, the key's bytes read little-endian.
    counter: uint32 of any shape, the numbers of the blocks.
    nonce: three uint32 scalars.
    unroll: write all rounds out, for compilers that schedule; XLA on a CPU
      would compute them again and again.

  Returns:
    Sixteen uint32 arrays of the counter's shape; entry w holds word w of each
    block.

  Example:
    >>> [hex(x) for x in words([0] * 8, jnp.zeros(1, jnp.uint32), [0] * 3)[0]]
    ['0xade0b876']
  """
  first: list[Any] = [
    *(np.uint32(x) for x in _CONSTANTS),
    *(jnp.asarray(key[i], jnp.uint32) for i in range(8)),
    counter,
    *(jnp.asarray(nonce[i], jnp.uint32) for i in range(3)),
  ]
  if unroll:
    # Words stay scalars until they meet a counter.
    state = tuple(first)
    for _ in range(10):
      state = _double_round(state)
  else:
    state = tuple(jnp.broadcast_to(x, counter.shape) for x in first)
    state = jax.lax.fori_loop(0, 10, lambda _, s: _double_round(s), state)
  return [x + y for x, y in zip(state, first)]


def _double_round(state):
  """Four quarter rounds down the columns, four down the diagonals."""
  x = list(state)
  for a, b, c, d in _COLUMNS + _DIAGONALS:
    x[a] = x[a] + x[b]
    x[d] = _rotate(x[d] ^ x[a], 16)
    x[c] = x[c] + x[d]
    x[b] = _rotate(x[b] ^ x[c], 12)
    x[a] = x[a] + x[b]
    x[d] = _rotate(x[d] ^ x[a], 8)
    x[c] = x[c] + x[d]
    x[b] = _rotate(x[b] ^ x[c], 7)
  return tuple(x)


def _rotate(x, n):
  """Rotates a word to the left."""
  return (x << np.uint32(n)) | (x >> np.uint32(32 - n))
