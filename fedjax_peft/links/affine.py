"""Affine: codes of a few bits between the least and the largest value.

A group of values (a tensor, a channel, a token) sends its least value m, a step
Delta = (M - m) / (2^bits - 1), and for each value how many steps it lies above
m. Activations, which are rarely centred on zero, waste no code; any number of
bits from 1 to 31 will do, so that bits can be allocated one by one.

Jacob et al., Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference, 2018, https://arxiv.org/abs/1712.05877;
stochastic rounding as in Alistarh et al., QSGD, 2017,
https://arxiv.org/abs/1610.02132
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import link, tree, validate
from fedjax_peft.links import bitstream, ranging


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ranged:
  """A leaf on the wire: packed codes, and where those of each group lie.

  Attributes:
    packed: codes of the leaf as a matrix, `links.ranging.matrix`.
    low: float32, the value of code 0 in each group.
    step: float32, between two codes.
    bits: of a code.
    per: what a group is.
    shape: of the leaf.
    dtype: of the leaf.
  """

  packed: bitstream.Packed
  low: jax.Array
  step: jax.Array
  bits: int = dataclasses.field(metadata={"static": True})
  per: ranging.Per = dataclasses.field(metadata={"static": True})
  shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  dtype: np.dtype = dataclasses.field(metadata={"static": True})

  def decode(self) -> jax.Array:
    """The leaf."""
    matrix = ranging.matrix(self.shape, self.per)
    codes = bitstream.unpack(self.packed, self.bits, matrix)
    codes = codes.astype(jnp.int32).astype(jnp.float32)
    values = ranging.decode(codes, self.low, self.step)
    return values.reshape(self.shape).astype(self.dtype)


def affine(
  bits: int, *, per: ranging.Per = "tensor", stochastic: bool = True
) -> link.Link:
  """Rounds to 2^bits points from the least to the largest value of a group.

  Guarantees, with Delta = (M - m) / (2^bits - 1) and eps = 2^-23:
    |decoded - x| < Delta, half of it when not stochastic, plus what float32
    loses: 4 eps (M - m) + eps max(|m|, |M|), and the rounding of a narrower
    leaf. From about 20 bits on that is what limits it.
    Unbiased when stochastic, but for that loss and 2^-24 Delta; the squared
    error of n values has a mean of at most n Delta^2 / 4, of spread values
    n Delta^2 / 6 (n Delta^2 / 12 when not stochastic).
    m decodes to itself, and so does a group of equal values; a group whose
    step would be below 2^-100 decodes to m. Subnormal numbers may become 0.
    A value that is not finite, or 2^125 or more in magnitude, does not count
    for the range and is cut to it; nan counts as 0, and a group without any
    other value decodes to zeros. No group changes what another decodes to.
    Per token, what [b, ...] decodes to is a function of the key, of b and of
    x[b]: examples do not depend on their companions.
    A leaf has the same bits alone, under `jit` and under `vmap`.

  Args:
    bits: of a value, 1 to 32. With 32 float leaves pass as they are.
    per: what has a range of its own: each leaf ("tensor"), each place of its
      last axis ("channel"), or each place of all its other axes ("token").
      Leaves of fewer than two axes have one range.
    stochastic: round up with the probability that makes the mean right,
      rather than to the nearest.

  Returns:
    A link with `receive_on="each"`: of every float leaf it sends packed codes
    and two float32 a group, `nbytes` together; integer leaves and empty ones
    pass unchanged.

  Raises:
    ValueError: if `bits` or `per` is none of these.

  Example:
    >>> x, ctx = jnp.array([1.0, 2.2, 4.0]), link.alone()
    >>> nearest = affine(2, stochastic=False)
    >>> wire, _, _ = nearest.send(x, (), (), ctx)
    >>> nearest.receive(wire, (), ctx.roster, ctx.key)[0]
    Array([1., 2., 4.], dtype=float32)
  """
  validate.at_least(1, bits=bits)
  if bits > ranging.FLOATS:
    raise ValueError(
      f"bits must be at most {ranging.FLOATS}, got {bits=}; "
      f"affine({ranging.FLOATS}) sends floats as they are"
    )
  validate.one_of(["tensor", "channel", "token"], per=per)

  def is_coded(x):
    return bits < ranging.FLOATS and tree.is_float(x) and math.prod(x.shape) > 0

  def encode(x, key):
    if not is_coded(x):
      return x
    draws = key if stochastic else None
    codes, low, step = ranging.encode(x, bits, draws, per)
    packed = bitstream.pack(codes.astype(jnp.int32).astype(jnp.uint32), bits)
    return Ranged(packed, low, step, bits, per, x.shape, np.dtype(x.dtype))

  def send(message, ctx):
    leaves, treedef = jax.tree.flatten(message)
    wires = [
      encode(x, jax.random.fold_in(ctx.key, i)) for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, wires), {}

  def receive(wire, roster):
    return jax.tree.map(
      lambda x: x.decode() if isinstance(x, Ranged) else x,
      wire,
      is_leaf=lambda x: isinstance(x, Ranged),
    )

  def bound(limit, spec):
    coded = [x.shape for x in jax.tree.leaves(spec.message) if is_coded(x)]
    if not coded:
      return limit
    largest = max(math.prod(s) // ranging.groups(s, per) for s in coded)
    # A group of norm b has a range of at most sqrt(2) b, and no decoded value
    # is farther from zero than its largest.
    eps = float(np.finfo(np.float32).eps)
    part = (1 if stochastic else 0.5) / ranging.levels(bits) + 5 * eps
    grown = min(1 + part * math.sqrt(2 * largest), math.sqrt(largest))
    return limit * grown * (1 + 10 * eps)

  return link.stateless(
    f"affine({bits})", send, receive, bound=bound, receive_on="each"
  )


def rounded(
  x: jax.Array,
  bits: int | jax.Array,
  key: jax.Array,
  *,
  per: ranging.Per = "tensor",
  stochastic: bool = True,
) -> jax.Array:
  """What `affine(bits)` decodes a leaf to, for bits that may be traced.

  Nothing is packed: for simulations in which every client has bits of its own,
  together with `nbytes`.

  Args:
    x: float, any shape.
    bits: int32 scalar, 1 to 31; less counts as 1, and 32 or more returns x.
    key: random key of this leaf; of leaf i of a message `affine` uses
      `fold_in(ctx.key, i)`. Not used if not stochastic.
    per: see `affine`.
    stochastic: see `affine`.

  Returns:
    Shape and dtype of x; the same bits as from the link with the same key.

  Raises:
    ValueError: if `per` is none of those of `affine`.
  """
  validate.one_of(["tensor", "channel", "token"], per=per)
  if not x.size:
    return x
  bits = jnp.asarray(bits, jnp.int32)
  width = jnp.clip(bits, 1, ranging.FLOATS - 1)
  draws = key if stochastic else None
  decoded = ranging.decode(*ranging.encode(x, width, draws, per))
  decoded = decoded.reshape(x.shape).astype(x.dtype)
  return jnp.where(bits >= ranging.FLOATS, x, decoded)


def nbytes(
  shape: tuple[int, ...],
  bits: int,
  per: ranging.Per = "tensor",
  dtype=np.float32,
) -> int:
  """Bytes that a float leaf takes on the wire of `affine(bits, per=per)`.

  Args:
    shape: of the leaf.
    bits: 1 to 31, or 32 and more for floats as they are.
    per: see `affine`.
    dtype: of the leaf, which counts with 32 bits only.

  Returns:
    ceil(n bits / 8), and 8 for each group.

  Example:
    >>> nbytes((4, 32, 384), 3, "token")
    19456
  """
  size = math.prod(shape)
  if bits >= ranging.FLOATS or not size:
    return size * np.dtype(dtype).itemsize
  return bitstream.nbytes(size, bits) + 8 * ranging.groups(shape, per)
