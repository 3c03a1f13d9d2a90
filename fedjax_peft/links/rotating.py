"""Rotating: spreads a message's energy evenly before it is quantized.

A random rotation makes the values of a block alike, so that a grid of few
points loses less on them. All senders of a round rotate by the same matrix:
the receiver turns the sum back once.

Suresh et al., Distributed Mean Estimation with Limited Communication, 2017,
https://arxiv.org/abs/1611.00429
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import link, tree, validate
from fedjax_peft.kernels import rotation as kernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotated:
  """A leaf on the wire, as whole blocks of a vector.

  Attributes:
    values: float32 [blocks * block].
    shape: of the leaf.
    dtype: of the leaf.
  """

  values: jax.Array
  shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  dtype: np.dtype = dataclasses.field(metadata={"static": True})


def rotate(block: int = 256) -> link.Link:
  """Multiplies blocks of a message by a random rotation of the round.

  Guarantees:
    norms stay; linear and the same for all senders, so that wires can be
    added; received, it is undone up to float32 rounding.

  Args:
    block: values that are rotated together, a power of two from 128 to 4096.

  Returns:
    A link with `receive_on="any"`. Float leaves are padded to whole blocks,
    integer leaves pass unchanged.

  Raises:
    ValueError: if `block` is not such a power of two.
  """
  validate.one_of([2**i for i in range(7, 13)], block=block)

  def send(message, ctx):
    return _leaves(_turn, message, ctx.roster.key), {}

  def receive(wire, roster):
    return _leaves(_back, wire, roster.key)

  def _turn(x, key):
    flat = x.astype(jnp.float32).reshape(-1)
    return Rotated(
      kernel.rotate(flat, key, block=block), x.shape, np.dtype(x.dtype)
    )

  def _back(x, key):
    size = int(np.prod(x.shape, dtype=np.int64))
    flat = kernel.unrotate(x.values, key, size=size, block=block)
    return flat.reshape(x.shape).astype(x.dtype)

  # A product of 256 terms in float32 errs by less than this.
  return link.stateless(
    "rotate", send, receive, bound=lambda limit, spec: limit * (1 + 1e-5)
  )


def _leaves(fun, message: Any, key: jax.Array) -> Any:
  """Applies fun(leaf, uint32 [2]) to float leaves, each with its own key."""
  leaves, treedef = jax.tree.flatten(
    message, is_leaf=lambda x: isinstance(x, Rotated)
  )
  return jax.tree.unflatten(
    treedef,
    [
      fun(x, jax.random.key_data(jax.random.fold_in(key, i)))
      if isinstance(x, Rotated) or tree.is_float(x)
      else x
      for i, x in enumerate(leaves)
    ],
  )
