"""Keys of a prefix: theirs stand before words that begin at position P.

There a prefix of P keys shifts the words, here words keep their positions, and
rotary attention sees only how far apart two places are. So a key of theirs
that is turned back by P positions has our meaning.
"""

import numpy as np


def turned(keys: np.ndarray, positions: int, theta: float) -> np.ndarray:
  """Keys moved by a number of positions.

  Args:
    keys: float32 [..., d], the pairs (i, i + d / 2) turn together.
    positions: how far, negative is back.
    theta: base of the wavelengths.

  Returns:
    float32 [..., d], computed in float64 and rounded once.

  Example:
    >>> there = turned(np.ones((1, 4), np.float32), 3, 100.0)
    >>> turned(there, -3, 100.0).round(6)
    array([[1., 1., 1., 1.]], dtype=float32)
  """
  half = keys.shape[-1] // 2
  angle = positions * theta ** (-np.arange(half) / half)
  cos, sin = np.cos(angle), np.sin(angle)
  a, b = np.split(keys.astype(np.float64), 2, axis=-1)
  turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(np.float32)
