"""Tiers: the receivers above the clients.

A tier is a level of receivers and the boundary below it: E edges that hear
clients, one cloud that hears edges. Every tier does the same three things:
it hears what its senders report, applies it, and tells them its model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_peft import link as link_lib
from fedjax_peft import reduce as reduce_lib
from fedjax_peft import tree, validate
from fedjax_peft.links import weighing

PyTree = Any


class Tier(NamedTuple):
  """A level of receivers; see `tier`.

  Attributes:
    name: "edge", "cloud", ...; a placement label and a prefix of records.
    size: E, number of nodes.
    link: what a message from below crosses on its way up.
    reduce: how messages become one.
    server: optax optimizer that applies the reduced message.
    period: rounds of the tier below between two of its reports.
    down: what the model crosses on its way to the senders.
    news: (specs, senders, round) -> specs of what has to be told after a round,
      where that is less than all leaves; for the count of bytes.
    watch: (message, params) -> {name: scalar}, what the record says of a
      reduced message.
    mix: (staleness) -> scalar: senders report their model and not how far it
      went, and count so much; the message is a mean over senders of
      mix (model now - model reported). None: how far it went.
  """

  name: str
  size: int
  link: link_lib.Link
  reduce: reduce_lib.Reduce
  server: optax.GradientTransformation
  period: int
  down: link_lib.Link
  news: Callable | None = None
  watch: Callable | None = None
  mix: Callable | None = None


def tier(
  name: str,
  size: int = 1,
  *,
  link: link_lib.Link | None = None,
  reduce: reduce_lib.Reduce | None = None,
  server: optax.GradientTransformation | None = None,
  period: int = 1,
  down: link_lib.Link | None = None,
  news: Callable | None = None,
  watch: Callable | None = None,
  mix: Callable | None = None,
) -> Tier:
  """A level of receivers, with the defaults of federated averaging.

  Args:
    name: any but "device" and "frozen", which are placements.
    size: number of nodes, 1 for the top.
    link: uplink into this tier; None weighs by examples, where the reduction
      has any use for weights.
    reduce: None is `reduce.sum()`, with the default link a weighted mean.
    server: None applies the message as it is (sgd with rate 1).
    period: how many rounds the tier below works before it reports.
    down: downlink from this tier; None sends the leaves as they are.
    news: see `Tier`; None tells all leaves.
    watch: see `Tier`.
    mix: see `Tier`; for a lowest tier of one node, and reports that are
      scaled by it (`links.discount`).

  Raises:
    ValueError: bad size, period or name, or a link and a reduction that
      cannot work together.
  """
  validate.at_least(1, size=size, period=period)
  if name in ("device", "frozen"):
    raise ValueError(
      f"a tier cannot be called {name!r}, since that is a placement; use "
      "another name such as 'edge'"
    )
  reduce = reduce_lib.sum() if reduce is None else reduce
  link = weighing.default(reduce.weighs) if link is None else link
  down = link_lib.chain() if down is None else down
  link_lib.exchange(link, reduce)
  link_lib.broadcast(down)
  server = optax.sgd(1.0) if server is None else server
  if mix is not None and size > 1:
    raise ValueError(
      f"reports can be mixed into one model only: got {size=}; use size=1"
    )
  return Tier(name, size, link, reduce, server, period, down, news, watch, mix)


class Node(NamedTuple):
  """What the nodes of a tier hold; axis E leads everywhere.

  Attributes:
    params: the node's model.
    opt: state of its server optimizer.
    shared: state of its uplink's receiving end.
    down: states of both ends of its downlink.
    anchor: the model it last got from above; {} at the top.
    mine: state of its uplink into the tier above; () at the top.
    weight: int32, examples behind what it has not yet reported.
  """

  params: dict[str, jax.Array]
  opt: PyTree
  shared: PyTree
  down: PyTree
  anchor: dict[str, jax.Array]
  mine: PyTree
  weight: jax.Array


class Boundary(NamedTuple):
  """A tier with its links put together, ready to run.

  Attributes:
    tier: what it was made of.
    uplink: link and reduction.
    downlink: the model going down.
    names: the leaves that cross it, sorted.
  """

  tier: Tier
  uplink: link_lib.Exchange
  downlink: Callable
  names: tuple[str, ...]

  @property
  def hides(self) -> bool:
    """Whether the sum of nobody is noise, like any other.

    Under a mask there is no such sum: who takes part is known there.
    """
    parts = {part.name for part in link_lib.parts_of(self.tier.link)}
    return link_lib.NOISE in parts and link_lib.MASK not in parts

  def pick(self, params: dict) -> dict:
    """The leaves that cross this boundary."""
    return {k: params[k] for k in self.names}


def boundary(tier: Tier, names: set[str]) -> Boundary:
  """Puts a tier's links together."""
  uplink = link_lib.exchange(tier.link, tier.reduce)
  return Boundary(
    tier, uplink, link_lib.broadcast(tier.down), tuple(sorted(names))
  )


def start(at: Boundary, params: dict, spec: link_lib.Spec) -> tuple[Node, Any]:
  """Nodes that hold a model and have heard nothing.

  Args:
    at: the boundary below the tier.
    params: the model of every node.
    spec: what is known of the messages from below.

  Returns:
    (nodes, state of ONE sender's end of the uplink).
  """
  mine, shared = at.uplink.init(spec)
  down = at.tier.down.init(link_lib.Spec(tree.spec(at.pick(params))))
  size = at.tier.size
  node = Node(
    params=repeat(params, size),
    opt=repeat(at.tier.server.init(at.pick(params)), size),
    shared=repeat(shared, size),
    down=repeat(down, size),
    anchor={},
    mine=(),
    weight=jnp.zeros((size,), jnp.int32),
  )
  return node, mine


def tell(at: Boundary, node: Node, key: jax.Array) -> tuple[dict, Node]:
  """Sends every node's model down.

  Returns:
    (the leaves as the node's senders receive them [E, ...], nodes).
  """

  def one(params, states, key):
    ctx = link_lib.alone()._replace(key=key)
    received, mine, shared, _ = at.downlink(params, *states, ctx)
    return received, (mine, shared)

  keys = jax.random.split(key, at.tier.size)
  received, down = jax.vmap(one)(at.pick(node.params), node.down, keys)
  return received, node._replace(down=down)


def hear(
  at: Boundary,
  node: Node,
  acc: PyTree,
  weight,
  roster,
  key,
  drift=None,
  first=0,
) -> tuple[Node, dict[str, jax.Array]]:
  """Applies what every node has heard.

  A node that heard nobody keeps its model and its optimizer's state, unless
  noise is on every sum: whether anybody came is then nobody's business.

  Args:
    at: the boundary below the tier.
    node: the tier's nodes.
    acc: reduced wires, axis E leads.
    weight: int32 [E], examples behind them.
    roster: who sent, to whom, and whose wire arrived.
    key: random key of the round and the boundary.
    drift: how far the model has moved since the senders started, to be added
      to what they report; None adds nothing.
    first: what the roster calls the first of these receivers.

  Returns:
    (nodes, {name: mean over the nodes that heard anyone}).
  """

  def one(acc, params, opt, shared, weight, e):
    here = roster
    if roster.nodes is not None:  # of the others it knows nothing
      mine = roster.nodes == e
      here = roster._replace(weights=jnp.where(mine, roster.weights, 0))
    message, shared = at.uplink.finish(acc, shared, here, key)
    moved = at.pick(params)
    if isinstance(message, dict):  # of what is only served nobody reports
      message = tree.zeros_like(moved) | message
    if drift is not None:
      message = jax.tree.map(jnp.add, message, at.pick(drift))
    stats = at.tier.watch(message, moved) if at.tier.watch else {}
    updates, new_opt = at.tier.server.update(message, opt, moved)
    new = optax.apply_updates(moved, updates)
    heard = (weight > 0) | at.hides
    return (
      params | tree.where(heard, new, moved),
      tree.where(heard, new_opt, opt),
      shared,
      stats,
    )

  params, opt, shared, stats = jax.vmap(one)(
    acc,
    node.params,
    node.opt,
    node.shared,
    weight,
    jnp.arange(at.tier.size, dtype=jnp.int32) + first,
  )
  heard = weight > 0
  nodes = jnp.maximum(jnp.sum(heard), 1).astype(jnp.float32)
  stats = {k: jnp.sum(jnp.where(heard, v, 0)) / nodes for k, v in stats.items()}
  node = node._replace(
    params=params, opt=opt, shared=shared, weight=node.weight + weight
  )
  return node, stats


def report(
  at: Boundary, below: Node, above: Node, key: jax.Array
) -> tuple[PyTree, jax.Array, PyTree, dict]:
  """Sends up how far every node of a tier has moved since it last heard.

  Args:
    at: the boundary between the two tiers.
    below: nodes that send, axis F.
    above: nodes that receive, axis E; F is a multiple of E.
    key: random key of the round and the boundary.

  Returns:
    (reduced wires [E, ...], weights [E], the senders' link states, stats).
  """
  roster = roster_of(below, above, key)
  parent, seats = roster.nodes, roster.clients
  message = jax.tree.map(jnp.subtract, below.anchor, at.pick(below.params))

  def send(message, mine, seat, weight, shared):
    own = jax.random.fold_in(key, seat)
    ctx = link_lib.Context(own, seat, weight, {}, roster)
    return at.uplink.send(message, mine, shared, ctx)

  shared = jax.tree.map(lambda x: x[parent], above.shared)
  wires, mine, stats = jax.vmap(send)(
    message, below.mine, seats, below.weight, shared
  )
  first = jax.tree.map(lambda x: x[0], above.shared)
  messages = jax.eval_shape(at.uplink.decode, wires, first, roster, key)
  zero = at.uplink.reduce.init(
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), messages
    ),
    below.weight.size,
  )
  acc, weight = gather(
    at,
    repeat(zero, above.weight.size),
    wires,
    below.weight,
    parent,
    first,
    roster,
  )
  return acc, weight, mine, stats


def gather(at: Boundary, acc, wires, weights, nodes, shared, roster):
  """Folds wires into the accumulators of the nodes they are sent to.

  Args:
    at: the boundary they crossed.
    acc: accumulators, axis E leads.
    wires: axis W leads.
    weights: int32 [W], 0 = absent.
    nodes: int32 [W], which accumulator each is for.
    shared: state of the receiving end of one node. An 'each' link decodes by
      what is in the wire, so that nodes do not differ.
    roster: who takes part.

  Returns:
    (accumulators, int32 [E] weights of what was folded in).
  """

  def one(acc, e):
    here = (weights > 0) & (nodes == e)
    total = jnp.sum(jnp.where(here, weights, 0), dtype=jnp.int32)
    new = at.uplink.fold(acc, wires, here, shared, roster, roster.key)
    return new, total

  size = jax.tree.leaves(acc)[0].shape[0]
  if size == 1:  # without a batch axis, kernels run in place
    only = one(jax.tree.map(lambda x: x[0], acc), jnp.int32(0))
    return jax.tree.map(lambda x: x[None], only)
  return jax.vmap(one)(acc, jnp.arange(size, dtype=jnp.int32))


def sync(
  at: Boundary, below: Node, above: Node, key: jax.Array
) -> tuple[Node, Node, dict]:
  """The tier below reports, the tier above applies it and answers.

  Returns:
    (below, above, stats of the uplink, one entry a sender, and of what was
    heard).
  """
  up, late = jax.random.split(key)
  acc, weight, mine, stats = report(at, below, above, up)
  roster = roster_of(below, above, up)
  roster = roster._replace(arrived=below.weight > 0)
  above, seen = hear(at, above, acc, weight, roster, up)
  received, above = tell(at, above, late)
  parent = parents(below, above)
  received = jax.tree.map(lambda x: x[parent], received)
  below = below._replace(
    params=below.params | received,
    anchor=received,
    mine=mine,
    weight=jnp.zeros_like(below.weight),
  )
  return below, above, stats | seen


def roster_of(below: Node, above: Node, key: jax.Array) -> link_lib.Roster:
  """The nodes of a tier as senders to the tier above."""
  parent = parents(below, above)
  seats = jnp.arange(parent.size, dtype=jnp.int32)
  return link_lib.Roster(seats, below.weight, key, parent)


def parents(below: Node, above: Node) -> jax.Array:
  """int32 [F], the node above each node below: neighbours share one."""
  F, E = below.weight.size, above.weight.size
  return jnp.arange(F, dtype=jnp.int32) * E // F


def repeat(value: PyTree, size: int) -> PyTree:
  """Gives every leaf a new leading axis, the same along it."""
  return jax.tree.map(
    lambda x: jnp.broadcast_to(x, (size, *jnp.shape(x))), value
  )
