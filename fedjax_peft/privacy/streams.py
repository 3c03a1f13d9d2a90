"""Keystreams on and off a vector, with the masks of `links.mask`."""

from collections.abc import Sequence

import jax
import numpy as np

from fedjax_peft.links import masking
from fedjax_peft.privacy import keys

_add = jax.jit(masking.add)


def add(
  values: np.ndarray, plus: Sequence[bytes], minus: Sequence[bytes]
) -> np.ndarray:
  """Adds and subtracts the keystream of each key, modulo 2^32.

  Args:
    values: uint32 [D].
    plus: keys of 32 bytes, for this vector only: the nonce is always 0.
    minus: keys whose stream is subtracted.

  Returns:
    uint32 [D].

  Example:
    >>> values = np.array([1, 2], np.uint32)
    >>> add(add(values, [bytes(32)], []), [], [bytes(32)])
    array([1, 2], dtype=uint32)
  """
  count = len(plus) + len(minus)
  # Powers of two, so that few shapes are ever compiled.
  room = max(8, 1 << (count - 1).bit_length()) if count else 8
  words = np.zeros((room, keys.KEY_BYTES // 4), np.uint32)
  drawn = np.frombuffer(b"".join([*plus, *minus]), "<u4")
  words[:count] = drawn.reshape(count, -1)
  at = np.arange(room)
  is_plus, is_key = at < len(plus), at < count
  pairs = masking.Pairs(
    *jax.device_put(
      (words, is_plus, is_key & ~is_plus, np.zeros(room, np.int32))
    )
  )
  return np.asarray(_add(values, pairs))
