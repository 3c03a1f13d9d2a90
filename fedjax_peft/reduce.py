"""Reductions: many messages become one, in pieces of any size.

A Reduce is a monoid. Segments of a cohort are folded in as they finish, and
what several devices hold is merged, so memory need not grow with the cohort.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import tree
from fedjax_peft.kernels.summation import api as kernel


class Reduce(NamedTuple):
  """A streaming reduction over senders.

  Attributes:
    name: for messages and records.
    init: (spec of one message) -> accumulator.
    update: (accumulator, messages [W, ...], present bool [W]) -> accumulator.
      Rows that are not present hold anything and count for nothing.
    merge: (accumulator, accumulator) -> accumulator.
    finalize: (accumulator) -> message.
    linear: whether the result is the sum, so that it can be taken over
      masked or weighted wires.
    memory: "flat" or "cohort", how the accumulator grows with the cohort.
  """

  name: str
  init: Callable
  update: Callable
  merge: Callable
  finalize: Callable
  linear: bool
  memory: Literal["flat", "cohort"]


def sum() -> Reduce:
  """Adds messages up, each leaf in its own dtype.

  Integers wrap modulo 2^bits, so their sum does not depend on any order. A
  weighted mean is `links.weigh` followed by this sum. Of `Factored` leaves the
  products are added, in one matrix product over all senders.

  Example:
    >>> r = sum()
    >>> acc = r.init(jax.ShapeDtypeStruct((2,), jnp.float32))
    >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
    >>> r.finalize(r.update(acc, x, jnp.array([True, True, False])))
    Array([4., 6.], dtype=float32)
  """

  def init(spec):
    def one(x):
      if tree.is_factored(x):
        shape = (*x.left.shape[:-2], x.left.shape[-1], x.right.shape[-1])
        return jnp.zeros(shape, x.right.dtype)
      return jnp.zeros(x.shape, x.dtype)

    return tree.map_leaves(one, spec)

  def update(acc, messages, present):
    def one(x, a):
      if tree.is_factored(x):
        left = x.left.reshape(-1, x.left.shape[-1])
        right = tree.where(present, x.right, jnp.zeros_like(x.right))
        return a + left.T @ right.reshape(-1, right.shape[-1])
      if x.dtype in kernel.DTYPES:
        rows = x.reshape(x.shape[0], a.size)
        return kernel.add_rows(a.reshape(-1), rows, present).reshape(a.shape)
      x = tree.where(present, x, jnp.zeros_like(x))
      return a + jnp.sum(x, axis=0, dtype=x.dtype)

    return tree.map_leaves(one, messages, acc)

  return Reduce(
    name="sum",
    init=init,
    update=update,
    merge=lambda a, b: jax.tree.map(jnp.add, a, b),
    finalize=lambda acc: acc,
    linear=True,
    memory="flat",
  )
