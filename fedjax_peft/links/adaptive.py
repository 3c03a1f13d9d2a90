"""Adaptive clipping: the clip norm follows a quantile of what clients send.

Each sender also says, in one value beside its message, whether it was within
the norm of the round. Message and value are scaled to a fixed bound together,
so that whatever stands at the right (a grid, a mask, noise) needs to know one
number that never changes; the receiver scales back and moves the norm.

Andrew et al., Differentially Private Learning with Adaptive Clipping, 2021,
https://arxiv.org/abs/1905.03871
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import link, tree, validate


class Told(NamedTuple):
  """A message in units of the clip norm, and whether it was within it.

  Attributes:
    message: pytree, of norm 1 at most.
    within: float32 scalar, plus or minus `weight` / 2; 0 of who is absent.
  """

  message: Any
  within: Any


def adaptive_clip(
  start: float,
  *,
  quantile: float = 0.5,
  rate: float = 0.2,
  weight: float = 0.2,
) -> link.Link:
  """Clips to a norm that moves until a share `quantile` is within it.

  After a round the norm is multiplied by exp(-rate (b - quantile)), b being
  the mean of who was within it, as the links at the right tell it: with noise,
  and over a fixed number.

  Guarantees:
    what is sent has an L2 norm of sqrt(1 + weight^2 / 4) at most (and 4 eps of
    the lowest leaf dtype), whatever the norm is now; non-finite messages are
    sent as zero.

  Args:
    start: the norm of the first round, > 0, in the unit of the message.
    quantile: share of the senders that should be within the norm, in (0, 1).
    rate: how fast the norm moves, > 0.
    weight: of what is told beside the message, against the message: noise of
      standard deviation s on the sum is s / weight on the number of those who
      were within.

  Returns:
    A link with `receive_on="sum"`, for a chain that divides by a fixed number
    (`average`). The receiver's state holds `clip_norm`.

  Raises:
    ValueError: if an option is out of its range.
  """
  validate.positive(start=start, rate=rate, weight=weight)
  if not 0 < quantile < 1:
    raise ValueError(f"quantile must be in (0, 1), got {quantile=}")

  def init(spec):
    return (), {"clip_norm": jnp.float32(start)}

  def send(message, mine, shared, ctx):
    limit = shared["clip_norm"]
    norm = tree.norm(message)
    ok, here = jnp.isfinite(norm), ctx.weight > 0
    factor = jnp.where(ok & here, 1 / jnp.maximum(norm, limit), 0)

    def one(x):
      if not tree.is_float(x):
        return x
      value = jnp.where(ok, x.astype(jnp.float32), 0)  # 0 * nan is nan
      return (value * factor).astype(x.dtype)

    inside = ok & (norm <= limit)
    within = jnp.where(here, jnp.where(inside, weight / 2, -weight / 2), 0)
    stats = {
      "clip/fraction": ~inside,
      "clip/nonfinite": ~ok,
      "clip/norm": limit,
    }
    wire = Told(tree.map_float(one, message), within.astype(jnp.float32))
    return wire, mine, {k: v.astype(jnp.float32) for k, v in stats.items()}

  def receive(wire, shared, roster, key):
    limit = shared["clip_norm"]
    share = wire.within / weight + 0.5
    # Noise may say anything; the norm moves by a factor of e^rate at most.
    moved = jnp.exp(-rate * jnp.clip(share - quantile, -1, 1))
    message = tree.map_float(
      lambda x: (x.astype(jnp.float32) * limit).astype(x.dtype), wire.message
    )
    return message, {"clip_norm": limit * moved}

  def after(spec):
    wire = Told(spec.message, jax.ShapeDtypeStruct((), jnp.float32))
    return spec._replace(message=wire, bound=math.sqrt(1 + weight**2 / 4))

  return link.Link(
    name="adaptive_clip",
    init=init,
    send=send,
    receive=receive,
    after=after,
    receive_on="sum",
  )
