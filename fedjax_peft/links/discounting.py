"""Discounting: a report counts less, the older the model that it started from.

Staleness is the number of model updates between a client's start and its
report: the trait `staleness`, which an open clock gives (`network.clock`).
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from fedjax_peft import link, tree, validate

KINDS = ("constant", "polynomial", "hinge")


def staleness_weight(
  staleness: jax.Array,
  kind: Literal["constant", "polynomial", "hinge"] = "polynomial",
  *,
  power: float = 0.5,
  start: float = 4.0,
) -> jax.Array:
  """What a report of a staleness counts, in (0, 1].

  constant: 1. polynomial: (1 + d)^-power. hinge: 1 up to `start`, then
  1 / (power (d - start) + 1). Xie et al., Asynchronous Federated Optimization,
  section 5.2, https://arxiv.org/abs/1903.03934.

  Args:
    staleness: d >= 0, any shape.
    kind: see above.
    power: a >= 0.
    start: b >= 0, of the hinge.
  """
  d = staleness.astype(jnp.float32)
  if kind == "constant":
    return jnp.ones_like(d)
  if kind == "polynomial":
    return (1 + d) ** -power
  return jnp.where(d <= start, 1.0, 1 / (power * jnp.maximum(d - start, 0) + 1))


def discount(
  kind: Literal["constant", "polynomial", "hinge"] = "polynomial",
  *,
  power: float = 0.5,
  start: float = 4.0,
) -> link.Link:
  """Scales a message by what its staleness counts.

  The weight of a message, at its right, stays what it is: a mean is over all
  who reported, as in FedBuff (Nguyen et al., 2022,
  https://arxiv.org/abs/2106.06639).

  Args:
    kind: see `staleness_weight`.
    power: see there.
    start: see there.

  Returns:
    A link with `receive_on="any"`; norms do not grow; integer leaves pass
    unchanged. A sender without the trait `staleness` is not stale.

  Raises:
    ValueError: if `kind` is not known or a number is negative.

  Example:
    >>> late = link.alone()._replace(traits={"staleness": jnp.int32(3)})
    >>> discount().send({"a": jnp.array([4.0])}, (), (), late)[0]["a"]
    Array([2.], dtype=float32)
  """
  validate.one_of(KINDS, kind=kind)
  for name, value in (("power", power), ("start", start)):
    if not 0 <= value < math.inf:
      raise ValueError(f"{name} must be at least 0, got {name}={value}")

  def send(message, ctx):
    staleness = jnp.asarray(ctx.traits.get("staleness", jnp.int32(0)))
    factor = staleness_weight(staleness, kind, power=power, start=start)

    def one(x):
      if tree.is_factored(x):
        return tree.Factored(x.left, one(x.right))
      return x * factor.astype(x.dtype) if tree.is_float(x) else x

    return tree.map_leaves(one, message), {"discount/factor": factor}

  return link.stateless("discount", send, factored=True)
