"""Feedback: what a link could not say this time is said the next time.

Seide et al., 1-Bit Stochastic Gradient Descent, 2014; Karimireddy et al.,
Error Feedback Fixes SignSGD and other Gradient Compression Schemes, 2019,
https://arxiv.org/abs/1901.09847
"""

import math

import jax
import jax.numpy as jnp

from fedjax_peft import link as link_lib
from fedjax_peft import tree


def error_feedback(link: link_lib.Link) -> link_lib.Link:
  """Adds to a message what the link has failed to say of those before it.

  Guarantees:
    the sum of all that was received plus what the sender still holds is the
    sum of all its messages, up to rounding. What it holds is kept with the
    client, and only committed when its wire arrives.

  Args:
    link: any link that can be received on every wire alone, such as `top_k`,
      `sign`, `lowrank`, `quantize` or a chain of them.

  Returns:
    A link with the `receive_on` of `link`. Its L2 bound is infinite, since
    what is held back has none: nothing that needs a range or a sensitivity
    may stand right of it without a `clip`.

  Raises:
    ValueError: if `link` means something only on a sum.
  """
  link_lib.refuse_sums(link, "error_feedback")

  def init(spec):
    held = tree.zeros_like(_floats(spec.message))
    return (held, *link.init(spec)[:1]), link.init(spec)[1]

  def send(message, mine, shared, ctx):
    held, inner = mine
    whole = _add(message, held)
    wire, inner, stats = link.send(whole, inner, shared, ctx)
    said, _ = link.receive(wire, shared, ctx.roster, ctx.key)
    held = jax.tree.map(jnp.subtract, _floats(whole), _floats(said))
    norm = tree.norm(held)
    return wire, (held, inner), stats | {"error_feedback/held_norm": norm}

  def after(spec):
    return link.after(spec)._replace(bound=math.inf)

  return link_lib.Link(
    name=f"error_feedback({link.name})",
    init=init,
    send=send,
    receive=link.receive,
    after=after,
    receive_on=link.receive_on,
    fold=link.fold,
  )


def _floats(message) -> list:
  """The float leaves of a message."""
  return [x for x in jax.tree.leaves(message) if tree.is_float(x)]


def _add(message, held: list):
  """The message plus what is held, leaf by leaf of its floats."""
  rest = iter(held)
  return jax.tree.map(
    lambda x: x + next(rest) if tree.is_float(x) else x, message
  )
