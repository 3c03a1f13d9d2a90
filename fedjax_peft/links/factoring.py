"""Factoring: a matrix on the wire as the product of two thin ones.

Vogels et al., PowerSGD, 2019, https://arxiv.org/abs/1905.13727, with one step
of its power iteration from random columns that the round draws for everyone.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import linalg, link, tree, validate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Thin:
  """A stack of matrices on the wire.

  Attributes:
    left: float32 [..., D, R], orthonormal columns.
    right: float32 [..., R, F].
    dtype: what it decodes to.
  """

  left: jax.Array
  right: jax.Array
  dtype: np.dtype = dataclasses.field(metadata={"static": True})


def lowrank(rank: int) -> link.Link:
  """Sends matrices as products of rank `rank`.

  Guarantees:
    left right = left left^T M, the projection of a matrix M onto `rank`
    directions of its range: no norm grows, and a matrix of that rank is sent
    exactly, up to rounding. Leaves that are no matrices, and those that it
    would not make smaller, pass unchanged.

  Args:
    rank: R, at least 1.

  Returns:
    A link with `receive_on="each"`; biased, so put `error_feedback` around it.
  """
  validate.at_least(1, rank=rank)

  def pays(x):
    if not tree.is_float(x) or x.ndim < 2:
      return False
    D, F = x.shape[-2:]
    return rank * (D + F) < D * F

  def send(message, ctx):
    leaves, treedef = jax.tree.flatten(message)
    wires = [
      encode(x, jax.random.fold_in(ctx.roster.key, i)) if pays(x) else x
      for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, wires), {}

  def encode(x, key):
    m = x.astype(jnp.float32)  # [..., D, F]
    # A product of tiny or huge numbers would vanish or overflow.
    peak = jnp.max(jnp.abs(m), initial=0)
    peak = jnp.where(jnp.isfinite(peak) & (peak > 0), peak, 1)
    columns = jax.random.normal(key, (x.shape[-1], rank))
    left, _ = linalg.basis(jnp.matmul(m / peak, columns, precision="highest"))
    right = jnp.matmul(jnp.swapaxes(left, -1, -2), m, precision="highest")
    return Thin(left, right, np.dtype(x.dtype))

  def receive(wire, roster):
    def one(x):
      if not isinstance(x, Thin):
        return x
      whole = jnp.matmul(x.left, x.right, precision="highest")
      return whole.astype(x.dtype)

    return jax.tree.map(one, wire, is_leaf=lambda x: isinstance(x, Thin))

  return link.stateless(
    "lowrank",
    send,
    receive,
    bound=lambda limit, spec: limit * (1 + 1e-5),  # columns are nearly normal
    receive_on="each",
  )
