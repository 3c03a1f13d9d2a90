"""Clipping: bound what one client can say.

Abadi et al., Deep Learning with Differential Privacy, 2016,
https://arxiv.org/abs/1607.00133
"""

import jax
import jax.numpy as jnp

from fedjax_peft import link, tree, validate


def clip(clip_norm: float) -> link.Link:
  """Scales a message so that its L2 norm is at most `clip_norm`.

  Guarantees:
    norm(sent) <= clip_norm * (1 + 4 eps of the lowest leaf dtype); shapes and
    dtypes unchanged; a non-finite message is sent as zero and counted in
    `clip/nonfinite`; a message within the bound is sent bit for bit.

  Args:
    clip_norm: L2 bound over all float leaves together, > 0, in the unit of
      the message.

  Returns:
    A link with `receive_on="any"`; integer leaves pass unchanged.

  Raises:
    ValueError: if `clip_norm` is not positive.

  Example:
    >>> ctx = link.alone()
    >>> clip(1.0).send({"a": jnp.array([3.0, 4.0])}, (), (), ctx)[0]["a"]
    Array([0.6, 0.8], dtype=float32)
  """
  validate.positive(clip_norm=clip_norm)

  def send(message, ctx):
    norm = tree.norm(message)
    ok = jnp.isfinite(norm)
    factor = jnp.where(norm > clip_norm, clip_norm / norm, 1)

    def one(x):
      if tree.is_factored(x):
        return tree.Factored(keep(x.left), keep(scaled(x.right)))
      return keep(scaled(x)) if tree.is_float(x) else x

    def scaled(x):  # in float32: a small factor would vanish in half precision
      return (x.astype(jnp.float32) * factor).astype(x.dtype)

    def keep(x):
      return jnp.where(ok, x, jnp.zeros_like(x))  # where: 0 * nan is nan

    stats = {"clip/fraction": norm > clip_norm, "clip/nonfinite": ~ok}
    return tree.map_leaves(one, message), jax.tree.map(jnp.float32, stats)

  return link.stateless(
    "clip", send, bound=lambda bound, _: min(bound, clip_norm), factored=True
  )
