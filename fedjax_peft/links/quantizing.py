"""Quantizing: integers on the wire.

`fixed_point` puts every client on one grid, so wires can be added as they are,
modulo 2^bits: the sum does not depend on any order, and it can be masked.
`quantize` gives each block of a client's message a scale of its own: it is
finer for the same bits, and every wire must be decoded alone.

Alistarh et al., QSGD, 2017, https://arxiv.org/abs/1610.02132
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import link, reduce, tree, validate
from fedjax_peft.kernels.quantization import api as kernel
from fedjax_peft.kernels.summation import api as sum_kernel
from fedjax_peft.links import gridding


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
    return gridding.on(message, one), mine, stats

  def receive(wire, shared, roster, key):
    return gridding.off(wire, shared["scale"]), shared

  def after(spec):
    step = 1 / grid(spec)[1] if math.isfinite(spec.bound) else 0.0
    error = step * math.sqrt(gridding.floats(spec.message))
    wire = gridding.spec(spec.message, dtype)
    return spec._replace(message=wire, bound=spec.bound + error)

  return link.Link(
    name="fixed_point",
    init=init,
    send=send,
    receive=receive,
    after=after,
  )


def _float32_below(limit: int) -> np.float32:
  """The largest float32 that is not above an integer."""
  value = np.float32(limit)
  return np.nextafter(value, np.float32(0)) if int(value) > limit else value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
  """A leaf on the wire: a few bits a value, and a scale for each block.

  Attributes:
    packed: int8, int16 or uint8 [n]; see `kernels.quantize`.
    scale: float32 [blocks], or scalar where the leaf has one.
    bits: of a value.
    block: values that share a scale.
    shape: of the leaf.
    dtype: of the leaf.
  """

  packed: jax.Array
  scale: jax.Array
  bits: int = dataclasses.field(metadata={"static": True})
  block: int = dataclasses.field(metadata={"static": True})
  shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  dtype: np.dtype = dataclasses.field(metadata={"static": True})

  @property
  def size(self) -> int:
    """Values of the leaf."""
    return math.prod(self.shape)

  def decode(self) -> jax.Array:
    """The leaf."""
    flat = kernel.dequantize(
      self.packed,
      self.scale,
      bits=self.bits,
      size=self.size,
      block=self.block,
    )
    return flat.reshape(self.shape).astype(self.dtype)


def quantize(
  bits: int, *, block: int = 256, stochastic: bool = True
) -> link.Link:
  """Rounds blocks of a message to few bits, each with a scale of its own.

  Guarantees:
    |decoded - x| < scale of the block, which is max|x| / (2^(bits-1) - 1), and
    half of it when not stochastic; unbiased when stochastic; zeros stay zeros,
    and so does a block whose scale is below 2^-80. With 1 bit the values are
    -max|x| and max|x|.

  Args:
    bits: 1, 2, 4, 8 or 16.
    block: values that share a scale, a power of two from 128 to 4096.
    stochastic: round up with the probability that makes the mean right,
      rather than to the nearest.

  Returns:
    A link with `receive_on="each"`: of every float leaf it sends packed
    integers and one float32 scale a block; integer leaves pass unchanged.

  Raises:
    ValueError: if `bits` or `block` is none of these.
  """
  validate.one_of([1, 2, 4, 8, 16], bits=bits)
  validate.one_of([2**i for i in range(7, 13)], block=block)

  def encode(x, ctx, i):
    key = jax.random.key_data(jax.random.fold_in(ctx.key, i))
    packed, scale = kernel.quantize(
      x.astype(jnp.float32).reshape(-1),
      key,
      bits=bits,
      block=block,
      stochastic=stochastic,
    )
    return Quantized(packed, scale, bits, block, x.shape, np.dtype(x.dtype))

  def bound(limit, spec):
    if bits == 1:
      return limit * math.sqrt(block)
    # In each block the error is at most sqrt(block) scales, and the squares
    # of the blocks' maxima add up to at most the squared norm.
    return limit * (1 + math.sqrt(block) / (2 ** (bits - 1) - 1))

  return _packed(f"quantize({bits})", encode, bound)


def int8(*, block: int = 256, stochastic: bool = True) -> link.Link:
  """`quantize(8)`: a byte a value, a scale for each block."""
  return quantize(8, block=block, stochastic=stochastic)._replace(name="int8")


def int4(*, block: int = 256, stochastic: bool = True) -> link.Link:
  """`quantize(4)`: half a byte a value, a scale for each block."""
  return quantize(4, block=block, stochastic=stochastic)._replace(name="int4")


def sign() -> link.Link:
  """Sends the sign of every value, and the mean magnitude of every leaf.

  Guarantees:
    a leaf decodes to +-mean|x|, so that no norm grows; a bit a value.

  Returns:
    A link with `receive_on="each"`; biased, so put `error_feedback` around it.

  Source: Karimireddy et al., Error Feedback Fixes SignSGD, 2019,
  https://arxiv.org/abs/1901.09847, the scaled sign.
  """
  block = 256

  def encode(x, ctx, i):
    flat = x.astype(jnp.float32).reshape(-1)
    # Each is divided before they are added, which could overflow.
    mean = jnp.sum(jnp.abs(flat) / flat.size)
    packed, scale = kernel.quantize(
      flat,
      jnp.zeros((2,), jnp.uint32),
      bits=1,
      block=block,
      stochastic=False,
      scale=mean,
    )
    return Quantized(packed, scale, 1, block, x.shape, np.dtype(x.dtype))

  return _packed("sign", encode, lambda limit, spec: limit)


def _packed(name: str, encode, bound) -> link.Link:
  """A link that sends float leaves as `Quantized`, by encode(x, ctx, i)."""

  def send(message, ctx):
    leaves, treedef = jax.tree.flatten(message)
    wires = [
      encode(x, ctx, i) if tree.is_float(x) and x.size else x
      for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, wires), {}

  def receive(wire, roster):
    return _map(lambda x: x.decode() if _is_quantized(x) else x, wire)

  def fold(acc, wires, present):
    def one(x, a):
      if not _is_quantized(x):
        here = present.reshape(-1, *(1,) * (x.ndim - 1))
        x = jnp.where(here, x, jnp.zeros_like(x))
        return a + jnp.sum(x, axis=0, dtype=x.dtype)
      if a.dtype != jnp.float32:
        rows = jax.vmap(lambda x: x.decode())(x)
        return reduce.sum().update(a, rows, present)
      senders = x.packed.shape[0]
      blocks = kernel.layout(a.size, bits=x.bits, block=x.block).blocks
      scale = x.scale.reshape(senders, -1)  # one a leaf, or one a block
      total = sum_kernel.weighted_sum(
        a.reshape(-1),
        x.packed,
        jnp.broadcast_to(scale, (senders, blocks)),
        present.astype(jnp.float32),
        bits=x.bits,
        block=x.block,
      )
      return total.reshape(a.shape)

    return _map(one, wires, acc)

  return link.stateless(
    name, send, receive, bound=bound, receive_on="each", fold=fold
  )


def _is_quantized(x: Any) -> bool:
  """True for a leaf that was quantized."""
  return isinstance(x, Quantized)


def _map(fun, *trees):
  """`jax.tree.map` that takes `Quantized` leaves whole."""
  return jax.tree.map(fun, *trees, is_leaf=_is_quantized)
