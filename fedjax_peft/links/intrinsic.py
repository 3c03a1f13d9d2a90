"""Intrinsic clipping: by what a message does to the model, not by its numbers.

A low-rank adapter adds s A B to a layer, and (A G, G^-1 B) is the same adapter
for every invertible G. The norm of a factor is not the same: it grows and
shrinks with G, so a clip norm on factors bounds what a client does to the model
only up to the size of its partner. The norm of the product does not change.

A sender knows its message and nothing of the model, so a link can measure the
product only where one factor stays as it is and is known to all when the chain
is built: where A is frozen (the rule `ffa`), the message dB changes the model
by s A dB. With s A = Q T, Q having orthonormal columns, |s A dB| = |T dB|: the
small matrix T is all that is needed, and T dB is what crosses.

`privacy.intrinsic` clips where both factors move, on the device, which knows
both. A `tree.Factored` leaf is a product by itself: `clip` measures that.

Sun et al., Improving LoRA in Privacy-preserving Federated Learning, 2024,
https://arxiv.org/abs/2403.12313 (FFA-LoRA)
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import link, validate
from fedjax_peft.links import clipping

_WORST = 1e4  # condition of a frame beyond which float32 keeps too little


def clip_product(
  frames: Mapping[str, jax.Array | np.ndarray], clip_norm: float
) -> link.Link:
  """Scales a message so that it changes the model by `clip_norm` at most.

  What crosses is T dB in place of dB, so that clipping, noise and grids at the
  right of it are in the metric of the product too: whatever G, the model gets
  the same clipped change and noise of the same law.

  Args:
    frames: {path of B: s A [stack, K, R]} of every adapter; other leaves are
      measured as they are.
    clip_norm: L2 bound over the products and all other float leaves together,
      > 0.

  Returns:
    A chain, `frame` and `clip`. Its L2 bound is that of what crosses, which
    noise and grids at the right need; what is received, dB, may be as large as
    clip_norm / (smallest singular value of s A).

  Raises:
    ValueError: as `frame` and `clip` do.

  Example:
    >>> a = np.array([[3.0], [4.0]])
    >>> both = clip_product({"b": a}, 1.0)
    >>> ctx, (mine, shared) = link.alone(), (((), ()), ((), ()))
    >>> wire, _, _ = both.send({"b": jnp.ones((1, 1))}, mine, shared, ctx)
    >>> print(
    ...   f"{both.receive(wire, shared, ctx.roster, ctx.key)[0]['b'][0, 0]:.2f}"
    ... )
    0.20
  """
  return link.chain(frame(frames), clipping.clip(clip_norm))


def frame(frames: Mapping[str, jax.Array | np.ndarray]) -> link.Link:
  """Sends factors in coordinates in which their norm is that of the product.

  Guarantees:
    the L2 norm of T dB is the Frobenius norm of s A dB; receiving gives dB
    back, up to rounding times the condition of the frame; linear.

  Args:
    frames: as in `clip_product`.

  Returns:
    A link with `receive_on="any"`. Its `init` raises ValueError if a frame is
    for no leaf of the message, or for one of another shape.

  Raises:
    ValueError: if there is no frame, or one whose columns depend on each other
      (a condition above 1e4): such directions of B do nothing to the model.
  """
  if not frames:
    raise ValueError(
      "a product needs a frame: got none; write {path of B: s * A}, or use "
      "clip() for messages without adapters"
    )
  into = {name: _triangle(name, a) for name, a in frames.items()}
  back = {name: np.linalg.inv(t) for name, t in into.items()}
  longest = max(np.linalg.norm(t, 2, (-2, -1)).max() for t in into.values())

  def init(spec):
    _check(into, spec.message)
    return (), ()

  def send(message, mine, shared, ctx):
    return _times(into, message), mine, {}

  def receive(wire, shared, roster, key):
    return _times(back, wire), shared

  def after(spec):
    # Leaves without a frame keep their norm.
    return spec._replace(bound=spec.bound * max(float(longest), 1.0))

  return link.Link(
    name="frame", init=init, send=send, receive=receive, after=after
  )


def _triangle(name: str, a) -> np.ndarray:
  """T of s A = Q T, float64 [stack, R, R]."""
  t = np.asarray(np.linalg.qr(np.asarray(a, np.float64), mode="r"))
  square = t.shape[-1] == t.shape[-2]
  if not square or not np.all(np.linalg.cond(t) < _WORST):
    raise ValueError(
      f"the columns of a frame must be independent: got '{name}' "
      f"{list(np.shape(a))} of condition "
      f"{np.max(np.linalg.cond(np.asarray(a, np.float64))):.3g}; use a smaller "
      "rank, or clip() on the factors"
    )
  return t


def _times(matrices: Mapping[str, np.ndarray], message):
  """The message, some of its leaves multiplied from the left."""

  def one(name, x):
    m = jnp.asarray(matrices[name], jnp.float32)
    y = jnp.matmul(m, x.astype(jnp.float32), precision="highest")
    return y.astype(x.dtype)

  return {k: one(k, x) if k in matrices else x for k, x in message.items()}


def _check(into: Mapping[str, np.ndarray], message) -> None:
  """Raises ValueError unless every frame is for a leaf that it fits."""
  names = list(message) if isinstance(message, dict) else []
  for name, t in into.items():
    if name not in names:
      raise ValueError(
        f"a frame must be for a leaf of the message: got '{name}', the leaves "
        f"are {names[:8]}{validate.near(name, names)}"
      )
    shape = message[name].shape
    if (*shape[:-2], shape[-2:-1]) != (*t.shape[:-2], t.shape[-1:]):
      raise ValueError(
        f"a frame [stack, K, R] must fit its factor [stack, R, F]: got "
        f"'{name}' {list(shape)} and R of {list(t.shape[:-2])} x {t.shape[-1]}"
      )
