"""Gridding: integers on a grid that all senders share, whatever its step.

`fixed_point` takes the coarsest grid that is safe for whatever it is given,
`privacy.grid` that of a plan.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gridded:
  """A message on a grid.

  Attributes:
    message: pytree of unsigned integers, negative ones modulo their width.
    kinds: dtypes of the leaves before.
  """

  message: Any
  kinds: tuple = dataclasses.field(metadata={"static": True})


def on(message: Any, one: Callable) -> Gridded:
  """A message, or its spec, put on a grid leaf by leaf.

  Args:
    message: pytree of arrays or specs.
    one: leaf -> unsigned integers of its shape, or their spec.
  """
  kinds = tuple(np.dtype(x.dtype) for x in jax.tree.leaves(message))
  return Gridded(jax.tree.map(one, message), kinds)


def spec(message: Any, dtype: Any) -> Gridded:
  """What a message of this spec is on a grid of integers of a dtype."""
  return on(message, lambda x: jax.ShapeDtypeStruct(x.shape, dtype))


def off(wire: Gridded, scale: Any) -> Any:
  """The message again, or the sum of several.

  Args:
    wire: of one sender, or of many added modulo the width.
    scale: steps of the grid per unit of the message; integers travel as they
      are.
  """

  def one(x, kind):
    x = x.astype(jnp.dtype(f"int{8 * x.dtype.itemsize}"))
    if jnp.issubdtype(kind, jnp.floating):
      return (x.astype(jnp.float32) / scale).astype(kind)
    return x.astype(kind)

  leaves, treedef = jax.tree.flatten(wire.message)
  values = [one(x, k) for x, k in zip(leaves, wire.kinds, strict=True)]
  return jax.tree.unflatten(treedef, values)


def expect(message: Any, name: str) -> None:
  """Raises ValueError unless a message is on a grid.

  Args:
    message: pytree of specs.
    name: of the link that needs it to be.
  """
  for path, x in jax.tree_util.tree_leaves_with_path(message):
    if not jnp.issubdtype(x.dtype, jnp.unsignedinteger):
      raise ValueError(
        f"{name} needs unsigned integers on the wire: got "
        f"{x.dtype}{list(x.shape)} at {jax.tree_util.keystr(path)}; put "
        "fixed_point() or privacy.grid left of it"
      )


def floats(message: Any) -> int:
  """How many float values a message has."""
  return tree.size([x for x in jax.tree.leaves(message) if tree.is_float(x)])
