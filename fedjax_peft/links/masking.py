"""Masking: a wire alone says nothing, the sum of all says what it did.

Two senders that share a secret add and subtract the same ChaCha20 keystream,
so that it cancels in the sum modulo 2^bits. Everyone does so with some
neighbours on a ring in random order: what a sender said is hidden from whoever
knows less than all of its neighbours' secrets.

A neighbour whose wire does not arrive leaves its half of a mask behind; the
receiver is told its secrets and takes that out again, with the same kernel.

Here a pair's secret follows from the round's key, where a deployment would
agree on it (X25519, HKDF).

Bonawitz et al., Practical Secure Aggregation, 2017,
https://eprint.iacr.org/2017/281; Bell et al., Secure Single-Server
Aggregation with (Poly)Logarithmic Overhead, 2020,
https://eprint.iacr.org/2020/704
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import link, validate
from fedjax_peft.kernels.mask import api as mask_kernel
from fedjax_peft.links import gridding


class Pairs(NamedTuple):
  """The masks of one sender.

  Attributes:
    keys: uint32 [n, 8], ChaCha20 keys that it shares with each neighbour.
    plus: bool [n], where it adds the keystream.
    minus: bool [n], where it subtracts it; neither: no such neighbour.
    place: int32 [n], places of the neighbours in the roster.
  """

  keys: jax.Array
  plus: jax.Array
  minus: jax.Array
  place: jax.Array


def mask(neighbours: int = 32) -> link.Link:
  """Adds masks to integers on the wire that cancel in the sum.

  Guarantees:
    the sum of all wires, received, is the sum of all messages, bit for bit,
    whoever of the roster dropped; without the secrets of one's neighbours a
    wire is indistinguishable from uniform integers.

  Args:
    neighbours: with how many others a sender shares a mask, even, at least 2;
      all others where there are fewer. The work is proportional to it.

  Returns:
    A link with `receive_on="sum"`; shapes, dtypes and bytes are unchanged.
    Its `init` raises ValueError if a leaf of the message is not an unsigned
    integer: use it right of `fixed_point`.

  Raises:
    ValueError: if `neighbours` is not a positive even number.
  """
  validate.at_least(2, neighbours=neighbours)
  if neighbours % 2:
    raise ValueError(
      "neighbours must be even, as many on either side of the ring: got "
      f"{neighbours=}; use neighbours={neighbours + 1}"
    )

  def init(spec):
    gridding.expect(spec.message, link.MASK)
    return (), ()

  def send(message, mine, shared, ctx):
    at = jnp.argmax(ctx.roster.clients == ctx.client)
    pairs = pairs_of(ctx.roster, at, neighbours)
    # A sender that is not there has no neighbours.
    here = ctx.weight > 0
    pairs = pairs._replace(plus=pairs.plus & here, minus=pairs.minus & here)
    return add(message, pairs), mine, {}

  def receive(wire, shared, roster, key):
    if roster.arrived is None:
      return wire, shared
    expected = (roster.weights > 0) & (roster.clients >= 0)
    dropped = expected & ~roster.arrived
    order = jnp.argsort(~dropped, stable=True)

    def one(i, wire):
      # What it would have sent, but towards those only that did send.
      pairs = pairs_of(roster, order[i], neighbours)
      there = roster.arrived[pairs.place]
      return add(
        wire,
        pairs._replace(plus=pairs.plus & there, minus=pairs.minus & there),
      )

    return jax.lax.fori_loop(0, jnp.sum(dropped), one, wire), shared

  return link.Link(
    name=link.MASK,
    init=init,
    send=send,
    receive=receive,
    after=lambda spec: spec,
    receive_on="sum",
  )


def pairs_of(roster: link.Roster, at: jax.Array, neighbours: int) -> Pairs:
  """The masks of the sender at a place of the roster.

  Those who send to the same receiver stand on a ring in an order that the
  round's key draws; a sender's neighbours are the nearest on either side.

  Args:
    roster: who takes part; weight 0 or id -1 does not.
    at: int32 scalar.
    neighbours: n, even.
  """
  clients = roster.clients
  here = (roster.weights > 0) & (clients >= 0)
  node = jnp.zeros_like(clients) if roster.nodes is None else roster.nodes
  draw = jax.vmap(lambda c: jax.random.bits(jax.random.fold_in(roster.key, c)))(
    jnp.maximum(clients, 0)
  )
  # Ties of the draw go by id, not by place: the ring is a function of a set.
  order = jnp.lexsort((clients, draw, node, ~here))
  place = jnp.argmax(order == at)
  group = here & (node == node[at])
  size = jnp.sum(group)
  first = jnp.argmax(group[order])
  half = jnp.arange(1, neighbours // 2 + 1)
  steps = jnp.concatenate([half, -half])
  # Nobody is met twice, going round a short ring from both sides.
  met = jnp.where(steps > 0, 2 * steps <= size, -2 * steps < size)
  other = order[first + (place - first + steps) % jnp.maximum(size, 1)]
  mine, theirs = clients[at], clients[other]
  met &= here[at] & (theirs != mine)
  low, high = jnp.minimum(mine, theirs), jnp.maximum(mine, theirs)
  keys = jax.vmap(_secret, (None, 0, 0))(roster.key, low, high)
  return Pairs(keys, met & (mine < theirs), met & (mine > theirs), other)


def _secret(key, low, high):
  """uint32 [8], what two senders share in a round."""
  # Above every id: a client's draw on the ring is folded from its id.
  low = low.astype(jnp.uint32) + np.uint32(2**31)
  pair = jax.random.fold_in(jax.random.fold_in(key, low), high)
  return jax.random.bits(pair, (8,), jnp.uint32)


def add(message, pairs: Pairs):
  """Adds and subtracts a sender's keystreams, each leaf under its own nonce."""
  row, nobody = jnp.int32(0), jnp.int32(-1)
  plus, minus = (jnp.where(x, row, nobody) for x in (pairs.plus, pairs.minus))

  def one(i, x):
    nonce = jnp.array([i, 0, 0], jnp.uint32)
    row = x.astype(jnp.uint32).reshape(1, -1)
    # Narrow integers take the low bits: masks cancel modulo 2^bits too.
    row = mask_kernel.mask_add(row, pairs.keys, plus, minus, nonce)
    return row.reshape(x.shape).astype(x.dtype)

  leaves, treedef = jax.tree.flatten(message)
  return jax.tree.unflatten(treedef, [one(i, x) for i, x in enumerate(leaves)])
