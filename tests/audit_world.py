"""A pool of images that needs no data set, and the subject made of it.

Each class is a smooth pattern; an image is its class's, moved and with texture
of its own.
"""

import functools

import numpy as np
import scipy.ndimage

from fedjax_peft import audit
from fedjax_peft.audit import deal, tiny

CLASSES, SIDE = 4, 10


@functools.cache
def pool() -> deal.Pool:
  rng = np.random.default_rng(0)
  smooth = functools.partial(scipy.ndimage.gaussian_filter, mode="wrap")
  pattern = [smooth(rng.normal(size=(SIDE, SIDE)), 3) for _ in range(CLASSES)]
  label = rng.integers(0, CLASSES, 600)

  def one(c):
    moved = np.roll(pattern[c], rng.integers(0, 4, 2), (0, 1))
    own = smooth(rng.normal(size=(SIDE, SIDE)), 1)
    image = moved / moved.std() + own / own.std()
    return np.clip(0.5 + 0.15 * image, 0, 1)

  image = np.stack([one(c) for c in label])[..., None].astype(np.float32)
  return deal.Pool(image, label.astype(np.int32), CLASSES)


@functools.cache
def subject() -> audit.Subject:
  return tiny.subject(pool(), crowd=12, cohort=4)


@functools.cache
def seen(name: str) -> audit.Boundary:
  """One boundary, the same for all tests, so that it is compiled once."""
  return audit.find(name, subject())


def clients(count, n=4, seed=0) -> dict:
  rng = np.random.default_rng(seed)
  majority = rng.integers(0, CLASSES, count)
  return deal.examples(pool(), deal.rows(pool(), majority, n, rng))
