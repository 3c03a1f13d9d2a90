"""Intrinsic clipping on the device: the change of the model is bounded.

With both factors of an adapter on the move, a client that was sent (A, B) and
reports (dA, dB) changes the layer by s (A B - (A - dA)(B - dB)), that is
s (A dB + dA B - dA dB). Its Frobenius norm does not depend on the gauge, and
follows from Gram matrices of size R; nothing of the layer's size is formed. The
device knows both, which a link does not.

What is bounded is what one client does to the model, in place of a clip on the
factors, whose effect depends on the gauge: scaled by (A G, G^-1 B) the same
change of the model has factors of any norm. For the same reason the L2 norm of
the message is not bounded: noise still needs a `clip` at its left, or a frozen
A and `links.clip_product`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import tree, validate, work
from fedjax_peft.rules import heard, product

_EPS = 4 * float(jnp.finfo(jnp.float32).eps)
_STEPS = 30  # halvings of the scale's interval, to below a float's last bits


class Growth(NamedTuple):
  """The squared norm of the change that a scaled message makes.

  |c L - c^2 Q|^2 = c^2 |L|^2 - 2 c^3 <L, Q> + c^4 |Q|^2, with
  L = A dB + dA B and Q = dA dB.

  Attributes:
    values: float32 [3]: |L|^2, that of all leaves that are no factors with it;
      <L, Q>; |Q|^2.
    lost: float32 [3], most that rounding may have taken from each.
  """

  values: jax.Array
  lost: jax.Array

  def norm(self, c: jax.Array) -> jax.Array:
    """From above, at a scale c in [0, 1]."""
    powers = jnp.stack([c**2, -2 * c**3, c**4])
    square = jnp.sum(powers * self.values)
    return jnp.sqrt(
      jnp.maximum(square, 0) + jnp.sum(jnp.abs(powers) * self.lost)
    )


def clip_change(
  job: work.Work, pairs: Sequence[heard.Pair], clip_norm: float
) -> work.Work:
  """Clients whose message changes the model by `clip_norm` at most.

  The message is multiplied by one scale, the same in every gauge. What is not
  finite, or too large for float32, becomes zero.

  Args:
    job: what clients do.
    pairs: its adapters, `rules.pairs_of(model.origin)`.
    clip_norm: bound on the Frobenius norm over all adapters' changes and all
      other leaves together, > 0.

  Returns:
    The Work. What stays on the device is as the job left it.

  Raises:
    ValueError: if `clip_norm` is not positive, there is no adapter, or a factor
      lives on the device, so that no two clients' changes compare.
  """
  validate.positive(clip_norm=clip_norm)
  named = {name for p in pairs for name in (p.a, p.b)}
  away = sorted(k for k in named if job.placement.get(k, "device") == "device")
  if not pairs or away:
    raise ValueError(
      "the change of a product needs adapters whose factors are both sent to "
      f"the clients: got {len(pairs)} adapters, not sent {away}; use "
      "links.clip() for other messages"
    )

  def finish(carry, sent):
    message, local = job.finish(carry, sent)
    made = growth(pairs, sent.params, message)
    c = scale(made, jnp.float32(clip_norm))

    def one(x):  # where: 0 * nan is nan
      return jnp.where(c > 0, x * c.astype(x.dtype), jnp.zeros_like(x))

    return tree.map_float(one, message), local

  return job._replace(finish=finish)


def growth(
  pairs: Sequence[heard.Pair],
  params: Mapping[str, jax.Array],
  message: Mapping[str, jax.Array],
) -> Growth:
  """How the change of the model grows with the scale of a message.

  Args:
    pairs: the adapters.
    params: {path: factor}, as they were sent.
    message: {path: params - new}; a factor that is not in it did not move.
  """
  factors = {name for p in pairs for name in (p.a, p.b)}
  rest = {k: v for k, v in message.items() if k not in factors}
  values = jnp.zeros(3).at[0].set(jnp.square(tree.norm(rest)))
  lost = jnp.zeros(3)
  for pair in pairs:
    a, b = params[pair.a], params[pair.b]
    da = message.get(pair.a, jnp.zeros_like(a))
    db = message.get(pair.b, jnp.zeros_like(b))
    linear = product.stack(
      jnp.concatenate([a, da], -1), jnp.concatenate([db, b], -2)
    )
    square = product.stack(da, db)
    terms = [
      pair.scale**2 * _inner(x, y)
      for x, y in ((linear, linear), (linear, square), (square, square))
    ]
    error = _EPS * math.sqrt(a.shape[-2] + b.shape[-1])
    values += jnp.stack([jnp.sum(t) for t in terms])
    lost += error * jnp.stack([jnp.sum(jnp.abs(t)) for t in terms])
  return Growth(values, lost)


def scale(made: Growth, clip_norm: jax.Array) -> jax.Array:
  """A scale in [0, 1] by which the change is within the bound; 1 if it is."""

  def halve(_, interval):
    low, high = interval
    middle = (low + high) / 2
    fits = made.norm(middle) <= clip_norm  # false of nan
    return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

  whole = made.norm(jnp.ones(())) <= clip_norm
  # Within the bound at its lower end, always.
  low, _ = jax.lax.fori_loop(0, _STEPS, halve, (jnp.zeros(()), jnp.ones(())))
  return jnp.where(whole, 1.0, low)


def _inner(x: product.Stack, y: product.Stack) -> jax.Array:
  """Terms [..., Q, P] of the inner product of two products."""
  left = product.matmul(x.left, jnp.swapaxes(y.left, -1, -2))
  right = product.matmul(x.right, jnp.swapaxes(y.right, -1, -2))
  return left * right
