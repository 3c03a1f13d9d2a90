"""Packing: a message as one vector, and back.

Links that look at a message as a whole (the largest values of all leaves) or
as a matrix keep its form beside the wire, as static data.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import tree


@dataclasses.dataclass(frozen=True)
class Form:
  """The structure of a message; hashable, so that a wire can carry it.

  Attributes:
    treedef: of the message.
    shapes: of its leaves.
    dtypes: of its leaves.
  """

  treedef: Any
  shapes: tuple[tuple[int, ...], ...]
  dtypes: tuple[np.dtype, ...]

  @property
  def floats(self) -> tuple[bool, ...]:
    """Which leaves hold floats."""
    return tuple(bool(jnp.issubdtype(t, jnp.floating)) for t in self.dtypes)

  @property
  def size(self) -> int:
    """Values of the float leaves."""
    pairs = zip(self.shapes, self.floats, strict=True)
    return sum(math.prod(shape) for shape, is_float in pairs if is_float)

  def pack(self, message: Any) -> tuple[jax.Array, list]:
    """(float32 [size], integer leaves)."""
    leaves = jax.tree.leaves(message)
    flat = [
      x.astype(jnp.float32).reshape(-1) for x in leaves if tree.is_float(x)
    ]
    vector = jnp.concatenate(flat) if flat else jnp.zeros((0,), jnp.float32)
    return vector, [x for x in leaves if not tree.is_float(x)]

  def unpack(self, vector: jax.Array, rest: list) -> Any:
    """The message whose parts these are."""
    leaves, begin, others = [], 0, iter(rest)
    for shape, dtype, is_float in zip(
      self.shapes, self.dtypes, self.floats, strict=True
    ):
      if is_float:
        end = begin + math.prod(shape)
        leaves.append(vector[begin:end].reshape(shape).astype(dtype))
        begin = end
      else:
        leaves.append(next(others))
    return jax.tree.unflatten(self.treedef, leaves)


def form_of(message: Any) -> Form:
  """The form of a message of arrays or specs."""
  leaves, treedef = jax.tree.flatten(message)
  return Form(
    treedef,
    tuple(tuple(x.shape) for x in leaves),
    tuple(np.dtype(x.dtype) for x in leaves),
  )
