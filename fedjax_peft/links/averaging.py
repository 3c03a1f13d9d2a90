"""Averaging: a sum divided by a number that was fixed before.

`weigh` divides by the weight of those who came, so that one client more moves
what all others said. Here it moves nothing but its own part: what differential
privacy needs of a mean.

McMahan et al., Learning Differentially Private Recurrent Language Models,
2018, https://arxiv.org/abs/1710.06963, section 3 (the estimator with a fixed
denominator)
"""

import math

import jax.numpy as jnp

from fedjax_peft import link, tree, validate


def average(total: float, *, max_weight: int = 1) -> link.Link:
  """Multiplies a message by its capped weight; divides the sum by `total`.

  The value of an exchange with this link is sum(w m) / total with
  w = min(examples, max_weight), whoever took part. With `max_weight` 1 all
  count the same.

  Guarantees:
    the value is linear in the set of senders; the L2 bound grows by
    `max_weight`; nothing about weights travels.

  Args:
    total: what the weights are expected to add up to, > 0.
    max_weight: of one sender.

  Returns:
    A link with `receive_on="any"`; integer leaves pass unchanged.

  Raises:
    ValueError: if `total` is not positive and finite or `max_weight` is below
      1.

  Example:
    >>> two = average(4.0, max_weight=3)
    >>> wire, *_ = two.send({"a": jnp.ones(2)}, (), (), link.alone(weight=2))
    >>> two.receive(wire, (), None, None)[0]["a"]
    Array([0.5, 0.5], dtype=float32)
  """
  validate.positive(total=total)
  if not math.isfinite(total):
    raise ValueError(f"total must be a finite number, got {total=}")
  validate.at_least(1, max_weight=max_weight)

  def send(message, ctx):
    weight = jnp.clip(ctx.weight.astype(jnp.int32), 0, max_weight)

    def one(x):
      is_value = tree.is_factored(x) or tree.is_float(x)
      return tree.scale(x, weight) if is_value else x

    return tree.map_leaves(one, message), {}

  def receive(wire, roster):
    return tree.map_float(lambda x: x / jnp.asarray(total, x.dtype), wire)

  return link.stateless(
    "average",
    send,
    receive,
    bound=lambda bound, _: bound * max_weight,
    factored=True,
  )
