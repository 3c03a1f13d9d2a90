"""Matrix: the messages of a cohort as the rows of one matrix.

Geometry is that of whole messages: all leaves of a message together are one
vector, so a rule is a function of a matrix and knows nothing of trees.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import reduce as reduce_lib
from fedjax_peft import tree


def collect(
  name: str, finish: Callable[[jax.Array, jax.Array], jax.Array]
) -> reduce_lib.Reduce:
  """A reduction that is a function of a matrix.

  Args:
    name: for messages and records.
    finish: (messages float32 [C, D], present bool [C]) -> float32 [D]. Rows
      that are not present are zero, those that are present are finite. It
      must not depend on the order of the rows, and be zero where nobody is
      present.

  Returns:
    A Reduce that is not linear. A message that is not finite counts as not
    present. It raises ValueError for a message with integer or `Factored`
    leaves as soon as it sees one's shapes.
  """

  def whole(rows, present):
    leaves, treedef = jax.tree.flatten(rows)
    if not leaves:
      return rows
    flat = [x.reshape(x.shape[0], -1).astype(jnp.float32) for x in leaves]
    x = jnp.concatenate(flat, axis=1)  # [C, D]
    here = present & jnp.all(jnp.isfinite(x), axis=1)
    found = finish(jnp.where(here[:, None], x, 0), here)
    ends = np.cumsum([math.prod(x.shape[1:]) for x in leaves])
    parts = jnp.split(found, ends[:-1])
    return jax.tree.unflatten(
      treedef,
      [
        part.reshape(x.shape[1:]).astype(x.dtype)
        for part, x in zip(parts, leaves, strict=True)
      ],
    )

  made = reduce_lib.collect(name, whole)

  def init(spec, places):
    _check(name, spec)
    return made.init(spec, places)

  return made._replace(init=init)


def mean(x: jax.Array, chosen: jax.Array) -> jax.Array:
  """Mean [D] of the chosen rows of [C, D]; zero where none is chosen."""
  total = jnp.sum(jnp.where(chosen[:, None], x, 0), axis=0)
  return total / jnp.maximum(count(chosen), 1).astype(x.dtype)


def count(present: jax.Array) -> jax.Array:
  """How many are present, int32 scalar."""
  return jnp.sum(present, dtype=jnp.int32)


def _check(name, spec):
  """Raises ValueError for leaves that are no part of a vector of floats."""
  for path, leaf in jax.tree.leaves_with_path(spec, is_leaf=tree.is_factored):
    if tree.is_factored(leaf) or not tree.is_float(leaf):
      came = "factors" if tree.is_factored(leaf) else str(leaf.dtype)
      raise ValueError(
        f"reduction '{name}' compares messages as vectors of floats: leaf "
        f"'{jax.tree_util.keystr(path, simple=True, separator='/')}' came as "
        f"{came}; let it live on the device or freeze it, or use reduce.sum()"
      )
