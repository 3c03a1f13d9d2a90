"""Planar tiles: which word of which block masks which value.

A tile is 1,024 blocks, its lanes, of 16 words. Word w of all its blocks lies
side by side, so that vectors of any width, on any backend, take whole vectors
of keystream without a transpose. The last tile has only as many lanes as it
needs, in steps of 128: at most 2,047 words of keystream go unused. It is the
keystream of RFC 8439 under a fixed public permutation.
"""

import numpy as np

WORDS = 16
LANES = 1024
TILE = WORDS * LANES
STEP = 128
MAX_D = WORDS * 2**32  # what a 32-bit counter can number


def split(D: int) -> tuple[int, int]:
  """The number of full tiles, and the lanes of the tile after them, or 0."""
  full, rest = divmod(D, TILE)
  return full, STEP * -(-rest // (WORDS * STEP))


def order(D: int) -> np.ndarray:
  """Which word of the keystream of RFC 8439 masks each value.

  Args:
    D: number of values.

  Returns:
    int64 [D]: 16 * block counter + word, all different.

  Example:
    >>> order(20_000)[[0, 1, 1024, 16384, 16385, 16640]]
    array([     0,     16,      1,  16384,  16400,  16385])
  """
  i = np.arange(D)
  tile, within = np.divmod(i, TILE)
  full, lanes = split(D)
  n = np.where(tile < full, LANES, max(lanes, 1))
  word, lane = np.divmod(within, n)
  return (tile * LANES + lane) * WORDS + word
