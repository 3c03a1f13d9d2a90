"""Deals: clients to attack, of which the attacker knows one property.

Most examples of a client are of one class, the property; its other examples
are of any. Draws are functions of a numpy generator.
"""

from typing import NamedTuple

import numpy as np

from fedjax_peft.audit import voice


class Pool(NamedTuple):
  """Images of whom clients have some.

  Attributes:
    image: float32 [M, H, W, C] in [0, 1].
    label: int32 [M].
    classes: K.
  """

  image: np.ndarray
  label: np.ndarray
  classes: int


def shrunk(image: np.ndarray, factor: int) -> np.ndarray:
  """Images [M, H, W, C] whose pixels are means over squares of `factor`.

  Raises:
    ValueError: if `factor` does not divide both sides.
  """
  count, height, width, channels = image.shape
  if height % factor or width % factor:
    raise ValueError(
      f"factor must divide the sides of an image: got {factor=} for "
      f"{height} x {width}"
    )
  shape = (count, height // factor, factor, width // factor, factor, channels)
  return image.reshape(shape).mean((2, 4), dtype=np.float32)


def rows(
  pool: Pool, majority: np.ndarray, n: int, rng: np.random.Generator
) -> np.ndarray:
  """Rows of clients' examples, three in four (rounded up) of one class.

  Args:
    pool: what there is.
    majority: int [M], the class of each client.
    n: examples of a client.
    rng: generator.

  Returns:
    int [M, n] in random order; a client has no row twice.

  Raises:
    ValueError: if a class has fewer than n examples.
  """
  of_class = [np.flatnonzero(pool.label == c) for c in range(pool.classes)]
  fewest = min(map(len, of_class))
  if fewest < n:
    raise ValueError(
      f"every class must have the {n=} examples of a client: one has {fewest}; "
      "use a larger pool"
    )
  most = -(-3 * n // 4)

  def one(label):
    mine = rng.choice(of_class[label], most, replace=False)
    rest = np.setdiff1d(rng.integers(0, len(pool.label), 2 * n + most), mine)
    return rng.permutation(
      np.concatenate([mine, rng.permutation(rest)[: n - most]])
    )

  return np.stack([one(label) for label in majority])


def examples(pool: Pool, rows: np.ndarray) -> dict[str, np.ndarray]:
  """{feature: [..., ...]} of rows of any shape."""
  return {voice.IMAGE: pool.image[rows], voice.LABEL: pool.label[rows]}
