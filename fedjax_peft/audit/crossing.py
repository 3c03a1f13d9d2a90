"""Crossings: messages through links, as a round does it.

Each sender has a key of its own and its own view of the roster; what is
received is what the exchange makes of all wires.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_peft import link, reduce, tree

PyTree = Any


def alone(links: link.Link, message: PyTree, key: jax.Array) -> PyTree:
  """A message to one receiver, as that receiver decodes it."""
  link.refuse_sums(links, "a message that is seen alone")
  mine, shared = links.init(link.Spec(tree.spec(message)))
  ctx = link.alone()._replace(key=key)
  wire, _, _ = links.send(message, mine, shared, ctx)
  return links.receive(wire, shared, ctx.roster, key)[0]


def wires(
  links: link.Link, messages: PyTree, here: jax.Array, key: jax.Array
) -> tuple[PyTree, PyTree, link.Roster]:
  """What a cohort puts on its wires.

  Args:
    links: their chain.
    messages: [C, ...].
    here: bool [C], who takes part.
    key: of the round.

  Returns:
    (wires [C, ...], the receiver's state, the roster once they have come).
  """
  count = here.shape[0]
  ids = jnp.arange(count, dtype=jnp.int32)
  weights = here.astype(jnp.int32)
  roster = link.Roster(ids, weights, jax.random.fold_in(key, count))
  mine, shared = links.init(spec_of(messages))

  def send(message, id, weight):
    own = jax.random.fold_in(key, id)
    ctx = link.Context(own, id, weight, roster=roster)
    return links.send(message, mine, shared, ctx)[0]

  sent = jax.vmap(send)(messages, ids, weights)
  return sent, shared, roster._replace(arrived=here)


def added(
  links: link.Link, messages: PyTree, here: jax.Array, key: jax.Array
) -> PyTree:
  """What the receiver of a sum gets of a cohort; arguments as for `wires`."""
  both = link.exchange(links, reduce.sum())
  sent, shared, roster = wires(links, messages, here, key)
  acc = both.zeros(spec_of(messages), here.shape[0])
  acc = both.fold(acc, sent, here, shared, roster, key)
  return both.finish(acc, shared, roster, key)[0]


def spec_of(messages: PyTree) -> link.Spec:
  """What is known of the messages [C, ...] of a cohort."""
  count = jax.tree.leaves(messages)[0].shape[0]
  one = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), messages
  )
  return link.Spec(one, senders=count)


def joined(
  message: PyTree, others: PyTree, here: jax.Array
) -> tuple[PyTree, jax.Array]:
  """(messages [C, ...], here [C]) of a client and the rest of its cohort."""
  rest = jax.tree.leaves(others)[0].shape[0]
  every = jax.tree.map(
    lambda a, b: jnp.concatenate([a[None], b]), message, others
  )
  return every, jnp.concatenate([here[None], jnp.ones(rest, bool)])


def through(links: link.Link) -> Callable:
  """`Boundary.cross` of messages that are seen one by one."""
  return lambda message, around: alone(links, message, around.key)
