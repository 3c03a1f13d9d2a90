"""Quantizing: integers on the wire.

`fixed_point` puts every client on one grid, so wires can be added as they are,
modulo 2^bits: the sum does not depend on any order, and it can be masked.
`int8` gives each block of a client's message a scale of its own: it is finer
for the same bits, and every wire must be decoded alone.

Alistarh et al., QSGD, 2017, https://arxiv.org/abs/1610.02132
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import link, tree, validate


def fixed_point(bits: int = 32) -> link.Link:
  """Rounds to the nearest point of one grid that all senders share.

  The grid is as fine as the modulus allows: with C senders, each of norm at
  most b, one step is about C b / 2^(bits - 1), and the sum of all senders
  cannot wrap, whatever they send; a value outside the range is cut to it and
  counted in `fixed_point/saturated`.

  Args:
    bits: width of the modulus, 8, 16 or 32; the wire holds unsigned integers
      of this width.

  Returns:
    A link with `receive_on="any"`. Integer leaves (weights) travel exactly.
    Its `init` raises ValueError if no L2 bound is known at its left, or if
    the sum of the integer leaves could wrap.

  Raises:
    ValueError: if `bits` is not 8, 16 or 32.
  """
  validate.one_of([8, 16, 32], bits=bits)
  dtype = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[bits]
  signed = {8: jnp.int8, 16: jnp.int16, 32: jnp.int32}[bits]

  def grid(spec):
    limit = (2 ** (bits - 1) - 1) // spec.senders
    return limit, (limit - 0.5) / spec.bound

  def init(spec):
    if any(tree.is_float(x) for x in jax.tree.leaves(spec.message)):
      if not math.isfinite(spec.bound):
        raise ValueError(
          "fixed_point needs to know how large a message can be, but no bound "
          "stands at its left; write clip(...) first, and weigh(max_weight=...)"
          " if you weigh"
        )
      if grid(spec)[0] < 2:
        raise ValueError(
          f"fixed_point({bits=}) has no room for {spec.senders} senders; use "
          "more bits or a smaller cohort"
        )
    exact = any(not tree.is_float(x) for x in jax.tree.leaves(spec.message))
    if exact and not spec.integer_bound * spec.senders < 2 ** (bits - 1):
      raise ValueError(
        f"integers of up to {spec.integer_bound} from {spec.senders} senders "
        f"can wrap in fixed_point({bits=}); use weigh(max_weight=...) with a "
        "smaller weight, more bits or a smaller cohort"
      )
    limit, scale = grid(spec)
    shared = {
      "scale": jnp.float32(scale),
      # The largest float32 that is not above the limit.
      "limit": jnp.asarray(_float32_below(limit)),
    }
    return (), shared

  def send(message, mine, shared, ctx):
    scale, limit = shared["scale"], shared["limit"]

    def one(x):
      if not tree.is_float(x):
        return x.astype(signed).astype(dtype)
      y = jnp.clip(jnp.round(x.astype(jnp.float32) * scale), -limit, limit)
      return y.astype(jnp.int32).astype(dtype)

    room = limit * 1.000001 + 1  # what is at the bound may round above it
    saturated = [
      jnp.sum(jnp.abs(x.astype(jnp.float32) * scale) > room)
      for x in jax.tree.leaves(message)
      if tree.is_float(x)
    ]
    total = sum(saturated, jnp.zeros((), jnp.int32)).astype(jnp.float32)
    stats = {"fixed_point/saturated": total}
    kinds = tuple(np.dtype(x.dtype) for x in jax.tree.leaves(message))
    return _Grid(jax.tree.map(one, message), kinds), mine, stats

  def receive(wire, shared, roster, key):
    leaves, treedef = jax.tree.flatten(wire.message)

    def one(x, kind):
      x = x.astype(signed)
      if jnp.issubdtype(kind, jnp.floating):
        return (x.astype(jnp.float32) / shared["scale"]).astype(kind)
      return x.astype(kind)

    values = [one(x, k) for x, k in zip(leaves, wire.kinds, strict=True)]
    return jax.tree.unflatten(treedef, values), shared

  def after(spec):
    kinds = tuple(np.dtype(x.dtype) for x in jax.tree.leaves(spec.message))
    wire = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, dtype), spec.message
    )
    n = tree.size(
      [x for x in jax.tree.leaves(spec.message) if tree.is_float(x)]
    )
    step = 1 / grid(spec)[1] if math.isfinite(spec.bound) else 0.0
    return spec._replace(
      message=_Grid(wire, kinds), bound=spec.bound + step * math.sqrt(n)
    )

  return link.Link(
    name="fixed_point",
    init=init,
    send=send,
    receive=receive,
    after=after,
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Grid:
  """Integers on a shared grid, with the dtypes they decode to."""

  message: Any
  kinds: tuple = dataclasses.field(metadata={"static": True})


def _float32_below(limit: int) -> np.float32:
  """The largest float32 that is not above an integer."""
  value = np.float32(limit)
  return np.nextafter(value, np.float32(0)) if int(value) > limit else value


def int8(*, block: int = 256, stochastic: bool = True) -> link.Link:
  """Rounds blocks of a message to 8 bits, each with a scale of its own.

  Guarantees:
    |decoded - x| < scale of the block = max|x| / 127 (half of it when not
    stochastic); unbiased when stochastic; zeros stay zeros.

  Args:
    block: values that share a scale, at least 1.
    stochastic: round up with the probability that makes the mean right,
      rather than to the nearest.

  Returns:
    A link with `receive_on="each"`: of every float leaf it sends int8 values
    and one float32 scale for each block; integer leaves pass unchanged.
  """
  validate.at_least(1, block=block)

  def encode(x, key):
    flat = x.astype(jnp.float32).reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    scale = jnp.max(jnp.abs(blocks), axis=1) / 127
    safe = jnp.where(scale > 0, scale, 1)
    y = blocks / safe[:, None]
    if stochastic:
      y = jnp.floor(y + jax.random.uniform(key, y.shape))
    else:
      y = jnp.round(y)
    q = jnp.clip(y, -127, 127).astype(jnp.int8).reshape(-1)[: flat.size]
    return Quantized(q.reshape(x.shape), scale, np.dtype(x.dtype))

  def decode(wire):
    q = wire.values.astype(jnp.float32).reshape(-1)
    blocks = jnp.pad(q, (0, -q.size % block)).reshape(-1, block)
    flat = (blocks * wire.scale[:, None]).reshape(-1)[: q.size]
    return flat.reshape(wire.values.shape).astype(wire.dtype)

  def send(message, ctx):
    leaves, treedef = jax.tree.flatten(message)
    wires = [
      encode(x, jax.random.fold_in(ctx.key, i)) if tree.is_float(x) else x
      for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, wires), {}

  def receive(wire, roster):
    def one(x):
      return decode(x) if isinstance(x, Quantized) else x

    return jax.tree.map(one, wire, is_leaf=lambda x: isinstance(x, Quantized))

  def bound(limit, spec):
    # In each block the error is at most sqrt(block) max|x| / 127, and the
    # squares of the blocks' maxima add up to at most the squared norm.
    return limit * (1 + math.sqrt(block) / 127)

  return link.stateless("int8", send, receive, bound=bound, receive_on="each")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
  """Block-quantized values on the wire.

  Attributes:
    values: int8, in the shape of the leaf.
    scale: float32 [blocks].
    dtype: what it decodes to.
  """

  values: jax.Array
  scale: jax.Array
  dtype: np.dtype = dataclasses.field(metadata={"static": True})
