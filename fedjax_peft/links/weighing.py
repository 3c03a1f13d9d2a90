"""Weighing: a client counts as much as it has examples.

`weigh` multiplies by the weight, for sums; `count` only says it, for reductions
that are not linear.

The weight travels with the message as an integer, so a mask or a modulus at
the right of this link protects it too, and the mean is exact in the weights.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import link, tree, validate


class Weighed(NamedTuple):
  """A message times its weight, and the weight.

  Attributes:
    message: pytree, multiplied by the weight.
    weight: int32 scalar; 0 = absent.
  """

  message: Any
  weight: Any


def weigh(
  by: Literal["examples", "clients"] = "examples",
  *,
  max_weight: int | None = None,
) -> link.Link:
  """Multiplies a message by its weight; on the sum it divides by theirs.

  The value of an exchange with this link is sum(w m) / sum(w), and zero if
  nobody took part.

  Args:
    by: "examples" weighs by the number of training examples, "clients" gives
      everyone present the same weight 1.
    max_weight: larger example counts are cut to this. Needed wherever a range
      or a sensitivity must be known (fixed_point, masks, privacy).

  Returns:
    A link with `receive_on="sum"`. The L2 bound grows by `max_weight`.

  Raises:
    ValueError: if `max_weight` is below 1, or `by` is not known.
  """
  validate.one_of(["examples", "clients"], by=by)
  if max_weight is not None:
    validate.at_least(1, max_weight=max_weight)
  top = 1 if by == "clients" else max_weight

  def weight_of(ctx):
    weight = ctx.weight.astype(jnp.int32)
    return weight if top is None else jnp.minimum(weight, top)

  def send(message, mine, shared, ctx):
    weight = weight_of(ctx)
    return Weighed(tree.scale(message, weight), weight), mine, {}

  def receive(wire, shared, roster, key):
    total = jnp.maximum(wire.weight, 1)

    def mean(x):
      if tree.is_float(x):
        return x / total.astype(x.dtype)
      return x

    return jax.tree.map(mean, wire.message), shared

  def init(spec):
    return (), ()

  def after(spec):
    factor = math.inf if top is None else top
    held = any(not tree.is_float(x) for x in jax.tree.leaves(spec.message))
    return spec._replace(
      message=Weighed(spec.message, jax.ShapeDtypeStruct((), jnp.int32)),
      bound=spec.bound * factor,
      integer_bound=factor * (max(spec.integer_bound, 1) if held else 1),
    )

  return link.Link(
    name="weigh",
    init=init,
    send=send,
    receive=receive,
    after=after,
    receive_on="sum",
    factored=True,
  )


class Counted(NamedTuple):
  """A message, and how many examples stand behind it.

  Attributes:
    message: pytree, as it is.
    weight: int32 scalar.
  """

  message: Any
  weight: Any


def count(*, max_weight: int | None = None) -> link.Link:
  """Says how many examples stand behind a message, and leaves it as it is.

  Args:
    max_weight: larger counts are cut to this.

  Returns:
    A link with `receive_on="each"`, for the start of a chain into a reduction
    that weighs by itself (products of adapters).

  Raises:
    ValueError: if `max_weight` is below 1.
  """
  if max_weight is not None:
    validate.at_least(1, max_weight=max_weight)

  def send(message, ctx):
    weight = ctx.weight.astype(jnp.int32)
    if max_weight is not None:
      weight = jnp.minimum(weight, max_weight)
    return Counted(message, weight), {}

  made = link.stateless(link.COUNT, send, receive_on="each")

  def after(spec):
    most = math.inf if max_weight is None else max_weight
    integers = max(spec.integer_bound, most)
    return made.after(spec)._replace(integer_bound=integers)

  return made._replace(after=after)


def default(weighs: Literal["link", "count", "never"]) -> link.Link:
  """The uplink of a reduction for which none was given."""
  if weighs == "never":
    return link.chain()
  return count() if weighs == "count" else weigh()
