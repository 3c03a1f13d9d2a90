"""Relay: what becomes of leaves that clients hand on to each other.

Of such a leaf the last client's value is that of all; other leaves are
averaged, as always.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import reduce


class Turns(NamedTuple):
  """What was heard so far.

  Attributes:
    total: sum of weight times message.
    weight: int32 scalar, sum of the weights.
    last: the last message.
    some: bool scalar, whether there was any.
  """

  total: Any
  weight: jax.Array
  last: Any
  some: jax.Array


def relay(kept: Callable[[str], bool]) -> reduce.Reduce:
  """Means over the senders, but of some leaves what the last sender said.

  Messages count in the order in which they come, so senders must work one
  after another (`Work.lanes` "one").

  Args:
    kept: (name of a leaf) -> whether the last message says it.

  Returns:
    A Reduce of `count()`ed messages {name: array}; not linear, flat memory.

  Example:
    >>> from fedjax_peft import links
    >>> r = relay(lambda name: name == "b")
    >>> zero = jnp.zeros(1)
    >>> one = links.Counted({"a": zero, "b": zero}, jnp.int32(1))
    >>> acc = r.init(jax.eval_shape(lambda: one), 2)
    >>> x = jnp.array([[1.0], [4.0]])
    >>> both = links.Counted({"a": x, "b": x}, jnp.array([2, 1]))
    >>> said = r.finalize(r.update(acc, both, jnp.array([True, True])))
    >>> [float(said[k][0]) for k in "ab"]
    [2.0, 4.0]
  """

  def init(spec, places):
    def zeros(x):
      return jnp.zeros(x.shape, x.dtype)

    message = jax.tree.map(zeros, spec.message)
    return Turns(message, jnp.int32(0), message, jnp.array(False))

  def update(acc, messages, present):
    weight = jnp.where(present, messages.weight, 0)
    at = jnp.max(jnp.where(present, jnp.arange(present.size), -1))

    def add(total, x):
      here = present.reshape(-1, *[1] * (x.ndim - 1))
      times = weight.reshape(here.shape).astype(x.dtype)
      return total + jnp.sum(jnp.where(here, x * times, 0), axis=0)

    def newest(old, x):
      return jnp.where(at >= 0, x[jnp.maximum(at, 0)], old)

    return Turns(
      jax.tree.map(add, acc.total, messages.message),
      acc.weight + jnp.sum(weight, dtype=jnp.int32),
      jax.tree.map(newest, acc.last, messages.message),
      acc.some | (at >= 0),
    )

  def merge(a, b):
    return Turns(
      jax.tree.map(jnp.add, a.total, b.total),
      a.weight + b.weight,
      jax.tree.map(lambda x, y: jnp.where(b.some, y, x), a.last, b.last),
      a.some | b.some,
    )

  def finalize(acc):
    count = jnp.maximum(acc.weight, 1)
    return {
      k: acc.last[k] if kept(k) else x / count.astype(x.dtype)
      for k, x in acc.total.items()
    }

  return reduce.Reduce(
    name="relay",
    init=init,
    update=update,
    merge=merge,
    finalize=finalize,
    linear=False,
    memory="flat",
    weighs="count",
  )
