"""Reductions: many messages become one, in pieces of any size.

A Reduce is a monoid. Segments of a cohort are folded in as they finish, and
what several devices hold is merged, so memory need not grow with the cohort.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import tree
from fedjax_peft.kernels.summation import api as kernel


class Reduce(NamedTuple):
  """A streaming reduction over senders.

  Of each sender it gets the message as the receiver decodes it.

  Attributes:
    name: for messages and records.
    init: (spec of one message, places) -> accumulator, for at most so many
      messages.
    update: (accumulator, messages [W, ...], present bool [W]) -> accumulator.
      Rows that are not present hold anything and count for nothing.
    merge: (accumulator, accumulator) -> accumulator of all their messages.
    finalize: (accumulator) -> message.
    linear: whether the result is the sum, so that it can be taken over
      masked or weighted wires.
    memory: "flat" or "cohort", how the accumulator grows with the cohort.
    weighs: how examples come to count. "link": the link multiplies by them
      (`weigh`) or not. "count": the reduction does, and the link must tell
      them (`count`). "never": everyone counts the same.
  """

  name: str
  init: Callable
  update: Callable
  merge: Callable
  finalize: Callable
  linear: bool
  memory: Literal["flat", "cohort"]
  weighs: Literal["link", "count", "never"] = "link"


def sum() -> Reduce:
  """Adds messages up, each leaf in its own dtype.

  Integers wrap modulo 2^bits, so their sum does not depend on any order. A
  weighted mean is `links.weigh` followed by this sum. Of `Factored` leaves the
  products are added, in one matrix product over all senders.

  Example:
    >>> r = sum()
    >>> acc = r.init(jax.ShapeDtypeStruct((2,), jnp.float32), 3)
    >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
    >>> r.finalize(r.update(acc, x, jnp.array([True, True, False])))
    Array([4., 6.], dtype=float32)
  """

  def init(spec, places):
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


class Collected(NamedTuple):
  """Messages kept one by one.

  Attributes:
    rows: messages, axis C leads; what the rows of absent ones hold is zero.
    present: bool [C].
  """

  rows: Any
  present: jax.Array


def collect(
  name: str,
  finish: Callable[[Any, jax.Array], Any],
  *,
  weighs: Literal["count", "never"] = "never",
) -> Reduce:
  """Keeps every message until the last has come, then makes one of all.

  Args:
    name: for messages and records.
    finish: (messages [C, ...], present bool [C]) -> message. It must not
      depend on the order of the messages, and be zero where nobody is present.
    weighs: see `Reduce`.

  Returns:
    A Reduce that is not linear; memory grows with the cohort.

  Example:
    >>> largest = collect("largest", lambda rows, present: jnp.max(rows, 0))
    >>> acc = largest.init(jax.ShapeDtypeStruct((1,), jnp.float32), 2)
    >>> here = jnp.array([True, True])
    >>> acc = largest.update(acc, jnp.array([[2.0], [1.0]]), here)
    >>> largest.finalize(acc)
    Array([2.], dtype=float32)
  """

  def init(spec, places):
    rows = jax.tree.map(lambda x: jnp.zeros((places, *x.shape), x.dtype), spec)
    return Collected(rows, jnp.zeros((places,), bool))

  def update(acc, messages, present):
    # Free places are filled in the order of arrival.
    places = acc.present.size
    taken = jnp.sum(acc.present, dtype=jnp.int32)
    rank = jnp.cumsum(present.astype(jnp.int32)) - 1
    where = jnp.where(present, taken + rank, places)
    return jax.tree.map(
      lambda a, x: a.at[where].set(x, mode="drop"),
      acc,
      Collected(messages, present),
    )

  def merge(a, b):
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)

  return Reduce(
    name=name,
    init=init,
    update=update,
    merge=merge,
    finalize=lambda acc: finish(acc.rows, acc.present),
    linear=False,
    memory="cohort",
    weighs=weighs,
  )
