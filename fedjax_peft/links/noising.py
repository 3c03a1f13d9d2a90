"""Noising: Gaussian noise on a sum, or on every message before it is sent.

How large it must be follows from what stands at its left, which bounds one
sender's message; `privacy.mechanism` puts the two together.

Dwork and Roth, The Algorithmic Foundations of Differential Privacy, 2014,
https://doi.org/10.1561/0400000042
"""

import math

import jax
import jax.numpy as jnp

from fedjax_peft import link, tree

_SUM = 0x6E6F6973  # sets the receiver's key apart from those of senders
LOCAL = "local_noise"


def noise(std: float) -> link.Link:
  """Adds normal noise to the sum of all messages, once.

  Guarantees:
    every float value of the sum has independent noise of standard deviation
    `std`, whoever sent, and even if nobody did: that, too, is nobody's
    business.

  Args:
    std: standard deviation in the unit of the sum at this place of the chain.

  Returns:
    A link with `receive_on="sum"`; the wire is the message. Its `init` raises
    ValueError if a leaf is not a float, since such a leaf would be told
    exactly.

  Raises:
    ValueError: if `std` is negative or not finite.
  """
  _check(std)

  def receive(wire, shared, roster, key):
    return _noisy(wire, std, jax.random.fold_in(key, _SUM)), shared

  return link.Link(
    name=link.NOISE,
    init=_init,
    send=lambda message, mine, shared, ctx: (message, mine, {}),
    receive=receive,
    after=lambda spec: spec,
    receive_on="sum",
  )


def local_noise(std: float) -> link.Link:
  """Adds normal noise to every message before it leaves its sender.

  Guarantees:
    every float value of a message has independent noise of standard deviation
    `std`; of messages that are added up, the noise adds up too. Who is absent
    adds none.

  Args:
    std: standard deviation in the unit of the message at this place.

  Returns:
    A link with `receive_on="any"`. Noise has no bound, so none is known at its
    right. Its `init` raises ValueError if a leaf is not a float.

  Raises:
    ValueError: if `std` is negative or not finite.
  """
  _check(std)

  def send(message, mine, shared, ctx):
    here = jnp.where(ctx.weight > 0, jnp.float32(std), 0)
    return _noisy(message, here, ctx.key), mine, {}

  return link.Link(
    name=LOCAL,
    init=_init,
    send=send,
    receive=lambda wire, shared, roster, key: (wire, shared),
    after=lambda spec: spec._replace(bound=math.inf),
  )


def _noisy(message, std, key):
  """The message plus noise, in float32; each leaf from a key of its own."""
  leaves, treedef = jax.tree.flatten(message)

  def one(i, x):
    drawn = jax.random.normal(jax.random.fold_in(key, i), x.shape)
    return (x.astype(jnp.float32) + std * drawn).astype(x.dtype)

  return jax.tree.unflatten(treedef, [one(i, x) for i, x in enumerate(leaves)])


def _init(spec):
  """Refuses what noise cannot hide."""
  for path, x in jax.tree_util.tree_leaves_with_path(spec.message):
    if not tree.is_float(x):
      raise ValueError(
        "noise hides floats only, but an integer would be told exactly: got "
        f"{x.dtype}{list(x.shape)} at {jax.tree_util.keystr(path)}; use "
        "average(total) in place of weigh()"
      )
  return (), ()


def _check(std: float) -> None:
  """Raises ValueError unless it is a standard deviation."""
  if not 0 <= std < math.inf:
    raise ValueError(f"std must be a finite number >= 0, got {std=}")
