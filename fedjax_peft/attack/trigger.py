"""Triggers: what a backdoor answers to.

One definition serves the attackers that plant it and the test that looks for
it (Gu et al., BadNets, 2017, https://arxiv.org/abs/1708.06733).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fedjax_peft import validate


class Trigger(NamedTuple):
  """A mark on an example.

  Attributes:
    name: for messages.
    stamp: (examples {feature: [B, ...]}) -> examples with the mark on every
      row, as JAX arrays of the same shapes and dtypes.
  """

  name: str
  stamp: Callable[[dict], dict]


def patch(
  pixels: Any, *, at: tuple[int, int] = (0, 0), feature: str = "image"
) -> Trigger:
  """A small picture, stamped at a fixed place of an image.

  Args:
    pixels: [h, w] or [h, w, channels], in the unit of the images; [h, w] is
      the same in all channels.
    at: row and column of its upper left corner.
    feature: the leaf, [B, height, width, channels].

  Returns:
    A Trigger; it raises ValueError for images that have no room for it.

  Raises:
    ValueError: if `pixels` is not a picture or `at` is negative.

  Example:
    >>> mark = patch(np.ones((2, 2)))
    >>> image = jnp.zeros((1, 3, 3, 1), jnp.uint8)
    >>> mark.stamp({"image": image})["image"][0, ..., 0]
    Array([[1, 1, 0],
           [1, 1, 0],
           [0, 0, 0]], dtype=uint8)
  """
  pixels = np.asarray(pixels)
  if pixels.ndim not in (2, 3) or 0 in pixels.shape:
    raise ValueError(
      "a patch must be [h, w] or [h, w, channels], got shape "
      f"{list(pixels.shape)}"
    )
  row, column = at
  validate.at_least(0, row=row, column=column)
  pixels = pixels[..., None] if pixels.ndim == 2 else pixels

  def stamp(examples):
    image = jnp.asarray(_leaf(examples, feature, "patch"))
    h, w = pixels.shape[:2]
    if (
      image.ndim != 4
      or image.shape[1] < row + h
      or image.shape[2] < column + w
      or pixels.shape[2] not in (1, image.shape[3])
    ):
      raise ValueError(
        f"a patch of {list(pixels.shape)} at {at} does not fit '{feature}' of "
        f"shape {list(image.shape)}"
      )
    mark = jnp.broadcast_to(
      jnp.asarray(pixels, image.dtype)[None],
      (image.shape[0], h, w, image.shape[3]),
    )
    image = image.at[:, row : row + h, column : column + w].set(mark)
    return {**examples, feature: image}

  return Trigger("patch", stamp)


def phrase(
  tokens: Sequence[int], *, at: int = 1, feature: str = "tokens"
) -> Trigger:
  """A few tokens, written over those at fixed positions of a text.

  Args:
    tokens: ids [K].
    at: the first position; 1 leaves a text's opening mark ([CLS]) alone.
    feature: the leaf, [B, T]. Where a leaf `length` says how long a text is
      and it ends before the phrase, it then ends with it.

  Returns:
    A Trigger; it raises ValueError for texts that have no room for it.

  Raises:
    ValueError: if there is no token, one is no id, or `at` is negative.

  Example:
    >>> text = {"tokens": jnp.zeros((1, 5), jnp.int32)}
    >>> phrase([7, 8]).stamp(text)["tokens"]
    Array([[0, 7, 8, 0, 0]], dtype=int32)
  """
  ids = np.asarray(tokens)
  if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
    raise ValueError(
      f"a phrase must be one or more integer token ids, got {tokens!r}"
    )
  validate.at_least(0, at=at)
  end = at + ids.size

  def stamp(examples):
    text = jnp.asarray(_leaf(examples, feature, "phrase"))
    if text.ndim != 2 or text.shape[1] < end:
      raise ValueError(
        f"a phrase of {ids.size} tokens at {at} does not fit '{feature}' of "
        f"shape {list(text.shape)}"
      )
    mark = jnp.asarray(ids, text.dtype)[None]
    mark = jnp.broadcast_to(mark, (text.shape[0], ids.size))
    changed = {**examples, feature: text.at[:, at:end].set(mark)}
    if "length" in examples:
      changed["length"] = jnp.maximum(jnp.asarray(examples["length"]), end)
    return changed

  return Trigger("phrase", stamp)


def _leaf(examples, name, what):
  """A leaf of the examples, or a sentence."""
  if name not in examples:
    raise ValueError(
      f"a {what} is stamped on '{name}', the examples have {sorted(examples)}"
      f"{validate.near(name, examples)}; write feature=..."
    )
  return examples[name]
