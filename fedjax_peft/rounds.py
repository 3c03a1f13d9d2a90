"""Rounds: the parts that every round is put together from.

The model goes down, clients work in segments on every device, what they send
is folded into sums, the tiers apply them. Each part is a pure function of what
it is given; `algorithm.federated` binds them together.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from fedjax_peft import (
  earlier,
  executor,
  hierarchy,
  ingredients,
  link,
  tree,
  work,
)

PyTree = Any

_SEND = 2**32 - 1  # folded into a client's key for its uplink; steps count up


class Rows(NamedTuple):
  """What lives on the clients; axis N (the population) leads.

  Attributes:
    local: leaves placed on the device.
    mine: state of the clients' end of the uplink.
    told: what the receivers remember of each; see `ingredients.Note`.
  """

  local: dict[str, jax.Array]
  mine: PyTree
  told: Mapping[str, jax.Array] = {}


class State(NamedTuple):
  """Everything that a run carries from one round to the next.

  Attributes:
    round: int32 scalar, rounds done.
    nodes: what each tier holds, lowest first.
    clients: what lives on the clients.
    pool: {path: [P, E, ...]}, earlier models of the lowest tier's nodes, from
      which clients are still at work.
    plan: what the plan of the rounds remembers (`plan.Plan`): numpy arrays,
      which no compiled program sees.
  """

  round: jax.Array
  nodes: tuple[hierarchy.Node, ...]
  clients: Rows
  pool: Mapping[str, jax.Array] = {}
  plan: Mapping[str, Any] = {}

  @property
  def params(self) -> dict[str, jax.Array]:
    """The model at the top."""
    return jax.tree.map(lambda x: x[0], self.nodes[-1].params)


class Flight(NamedTuple):
  """A round under way on one device (under way on all: axis D leads).

  Attributes:
    group: who runs on the device.
    lanes: what the lanes hold.
    buffer: what the clients of the last segment left.
    sums: accumulators of the lowest tier's nodes [E, ...].
    weight: int32 [E], examples behind the sums.
    mine: link rows [C, ...] that the clients will keep.
    stats: {name: (numerator [C], denominator [C])}.
    link_stats: {name: [C]}.
    arrived: bool [C], whether a finite message came.
    worked: bool [C], whether a message came, finite or not.
    told: {name: [C, ...]}, what clients told of themselves.
    seen: int32 [C, 2], what a watch saw in each report: see `_looked`; None
      where nobody watches.
  """

  group: executor.Group
  lanes: executor.Lane
  buffer: executor.Buffer
  sums: PyTree
  weight: jax.Array
  mine: PyTree
  stats: PyTree
  link_stats: dict[str, jax.Array]
  arrived: jax.Array
  worked: jax.Array
  told: Mapping[str, jax.Array] = {}
  seen: jax.Array | None = None


class Outcome(NamedTuple):
  """What a round reports.

  Attributes:
    record: {name: scalar}.
    clients: {name: (numerator [D, C], denominator [D, C])} of every client,
      at the places of `Cohort.clients`.
    seen: int32 [D, C, 2], what a watch saw at these places, or None.
  """

  record: dict[str, jax.Array]
  clients: dict[str, tuple[jax.Array, jax.Array]]
  seen: jax.Array | None = None


def init(setup, params=None, *, clients, cohort):
  """The state before the first round."""
  params = setup.job.params if params is None else params
  params = {k: jnp.asarray(v) for k, v in params.items()}
  nodes, rows = [], ()
  for i, (at, spec) in enumerate(
    zip(setup.boundaries, ingredients.specs(setup, cohort), strict=True)
  ):
    top = i == len(setup.boundaries) - 1
    held = at.pick(params)
    if top:
      held |= {k: params[k] for k in setup.frozen}
    node, mine = hierarchy.start(at, held, spec)
    if i == 0:
      rows = hierarchy.repeat(mine, clients)
    else:
      below = nodes[-1]
      size = below.weight.size
      nodes[-1] = below._replace(
        anchor=at.pick(below.params), mine=hierarchy.repeat(mine, size)
      )
    nodes.append(node)
  local = {k: hierarchy.repeat(params[k], clients) for k in setup.owned}
  told = {
    note.name: jnp.full((clients, *note.shape), note.first, jnp.float32)
    for note in setup.notes
  }
  pool = {}
  if setup.pool:
    lowest = setup.boundaries[0]
    start = lowest.pick(nodes[0].params) | {
      k: hierarchy.repeat(params[k], lowest.tier.size) for k in setup.frozen
    }
    pool = hierarchy.repeat(start, setup.pool)
  state = State(
    jnp.zeros((), jnp.int32), tuple(nodes), Rows(local, rows, told), pool
  )
  return jax.tree.map(jnp.array, state)  # broadcasts become arrays


def begin(
  setup,
  state,
  base,
  cohort,
  key,
  *,
  shape,
  width,
  whole=executor.as_it_is,
):
  """The model goes down, and every device gets its clients' rows."""
  at, key = setup.boundaries[0], jax.random.fold_in(key, state.round)
  tell = whole(functools.partial(hierarchy.tell, at))
  received, node = tell(state.nodes[0], _boundary_key(key, 0))
  state = state._replace(nodes=(node, *state.nodes[1:]))
  top = state.nodes[-1].params
  received |= {
    k: hierarchy.repeat(top[k][0], at.tier.size) for k in setup.frozen
  }
  alone, same = at.tier.size == 1, at.tier.size == 1 and not setup.pool
  if setup.pool:
    pool = earlier.kept(state.pool, received, cohort.keep[0])
    state, received = state._replace(pool=pool), earlier.models(received, pool)
  elif alone:
    received = jax.tree.map(lambda x: x[0], received)
  sent = work.Sent(received, {"round": state.round})
  if same:  # models that differ cannot share what is prepared
    sent, base = setup.job.prepare(sent, base)
  roster = link.Roster(
    cohort.clients.reshape(-1),
    cohort.weights.reshape(-1),
    _boundary_key(key, 0),
    None if alone else cohort.nodes.reshape(-1),
    traits={k: jnp.reshape(v, (-1,)) for k, v in cohort.traits.items()},
  )
  update = None
  if setup.updates > 1:  # whose reports belong together talk to one receiver
    update = cohort.update
    roster = roster._replace(nodes=update.reshape(-1))
  common = executor.Common(sent, base, cohort.examples, key, roster)
  rows = jnp.maximum(cohort.clients, 0)
  local, mine = jax.tree.map(lambda x: x[rows], tuple(state.clients)[:2])
  nodes = None if alone else cohort.nodes
  source = nodes
  if setup.pool:
    source = cohort.version * at.tier.size + cohort.nodes
  group = executor.Group(
    cohort.clients, cohort.weights, nodes, local, cohort.traits, source, update
  )
  one = functools.partial(_launch, setup, common, node, shape, width)
  return state, common, jax.vmap(one)(group, mine)


def _launch(setup, common, node, shape, width, group, mine):
  """An empty flight for one device."""
  at, places = setup.boundaries[0], group.clients.size
  lanes, buffer = executor.empty(setup.job, common, group, shape, width)
  zero = at.uplink.zeros(
    ingredients.specs(setup, 1)[0]._replace(bound=1.0, integer_bound=1), places
  )
  shared, own = jax.tree.map(lambda x: x[0], (node.shared, mine))
  one = jax.tree.map(lambda x: x[0], buffer.message)
  _, _, names = jax.eval_shape(at.uplink.send, one, own, shared, link.alone())
  return Flight(
    group=group,
    lanes=lanes,
    buffer=buffer,
    sums=hierarchy.repeat(zero, setup.updates * at.tier.size),
    weight=jnp.zeros((setup.updates * at.tier.size,), jnp.int32),
    mine=mine,
    stats=jax.tree.map(
      lambda x: jnp.zeros((places, *x.shape[1:])), buffer.stats
    ),
    link_stats={k: jnp.zeros((places,)) for k in names},
    arrived=jnp.zeros((places,), bool),
    worked=jnp.zeros((places,), bool),
    told={note.name: jnp.zeros((places, *note.shape)) for note in setup.notes},
    seen=None if setup.job.watch is None else jnp.zeros((places, 2), jnp.int32),
  )


def segments(setup, shared_args, split_args):
  """Runs all segments of one device's schedule."""
  common, shared, number = shared_args
  flight, plans = split_args

  def one(s, flight):
    plan = jax.tree.map(lambda x: x[s], plans)
    lanes, buffer = executor.segment(
      setup.job, common, flight.group, flight.lanes, flight.buffer, plan
    )
    flight = flight._replace(lanes=lanes, buffer=buffer)
    return absorb(setup, common, shared, flight, plan.slots)

  if number is None:
    number = plans.rows.shape[0]
  return jax.lax.fori_loop(0, number, one, flight)


def absorb(setup, common, shared, flight, slots):
  """Sends what finished in a segment, and folds it into the sums.

  A message that is not finite, or whose client's own leaves are not, becomes
  zero with weight zero before the first link; it shows in `arrived`. So does
  one in which a watch sees something, and a wire in which it does is dropped.
  """
  at, group, buffer = setup.boundaries[0], flight.group, flight.buffer
  roster = common.roster
  first = jax.tree.map(lambda x: x[0], shared)

  def send(message, mine, client, weight, node):
    key = jax.random.fold_in(client.key, _SEND)
    ctx = link.Context(key, client.id, weight, client.traits, roster)
    own = jax.tree.map(lambda x: x[node], shared)
    return at.uplink.send(message, mine, own, ctx)

  def piece(sums, part):
    message, local, mine, told, place, present = part
    finite = jax.vmap(tree.is_finite, axis_size=place.size)  # even of nothing
    arrived = present & finite((message, local, told))
    seen, arrived = _looked(setup.job.watch, (message, told), arrived)
    message = tree.where(arrived, message, tree.zeros_like(message))
    weight = jnp.where(arrived, group.weights[place], 0)
    node = jnp.zeros_like(place) if group.nodes is None else group.nodes[place]
    clients = jax.vmap(group.client, (None, 0))(common.key, place)
    wires, mine, stats = jax.vmap(send)(message, mine, clients, weight, node)
    chex.assert_tree_shape_prefix((wires, stats), place.shape)
    late, arrived = _looked(setup.job.watch, wires, arrived)
    if setup.job.watch is not None:  # of a wire, leaves are counted below zero
      weight = jnp.where(arrived, weight, 0)
      seen = seen + late * jnp.array([[-1, 1]], jnp.int32)
    box = node if group.update is None else group.update[place]
    sums, heard = hierarchy.gather(at, sums, wires, weight, box, first, roster)
    return sums, (heard, arrived, mine, stats, seen)

  place = jnp.maximum(slots, 0)
  present = (slots >= 0) & (group.weights[place] > 0)
  rows = jax.tree.map(lambda x: x[place], flight.mine)
  # In pieces as wide as a block of lanes: what lies between a message and the
  # sums then stays in a CPU's cache, and takes no memory to speak of.
  width = math.gcd(slots.size, flight.lanes.step.shape[-1])
  told = {
    note.name: jax.vmap(note.make)(buffer.message, buffer.stats)
    for note in setup.notes
  }
  parts = (buffer.message, buffer.local, rows, told, place, present)
  sums, left = jax.lax.scan(
    piece,
    flight.sums,
    jax.tree.map(lambda x: x.reshape(-1, width, *x.shape[1:]), parts),
  )
  heard = jnp.sum(left[0], axis=0, dtype=jnp.int32)
  arrived, mine, stats, seen = jax.tree.map(
    lambda x: x.reshape(-1, *x.shape[2:]), left[1:]
  )

  def keep(rows, new, which):
    where = jnp.where(which, slots, group.clients.size)
    return jax.tree.map(
      lambda r, x: r.at[where].set(x.astype(r.dtype), mode="drop"), rows, new
    )

  return flight._replace(
    group=group._replace(local=keep(group.local, buffer.local, arrived)),
    sums=sums,
    weight=flight.weight + heard,
    mine=keep(flight.mine, mine, arrived),
    stats=keep(flight.stats, buffer.stats, present),
    link_stats=keep(flight.link_stats, stats, arrived),
    arrived=keep(flight.arrived, arrived, present),
    worked=keep(flight.worked, present, present),
    told=keep(flight.told, told, arrived),
    seen=keep(flight.seen, seen, present),
  )


def _looked(watch, values, arrived):
  """(int32 [K, 2] of what a watch sees, arrived where it sees nothing).

  It sees 1 + the number of a leaf, and which canary is in it; zeros for none.
  """
  if watch is None:
    return None, arrived
  seen = jnp.zeros((arrived.size, 2), jnp.int32)
  if jax.tree.leaves(values):  # else nothing is reported
    seen = jnp.where(arrived[:, None], watch.look(values), seen)
  return seen, arrived & (seen[:, 0] == 0)


def finish(setup, state, common, flight, cohort, *, whole=executor.as_it_is):
  """The tiers apply what they heard, lowest first; the rows go home."""
  nodes, key = list(state.nodes), common.key
  sums = _merge(setup.boundaries[0].tier.reduce, flight.sums)
  weight = jnp.sum(flight.weight, axis=0, dtype=jnp.int32)
  roster = common.roster._replace(arrived=flight.arrived.reshape(-1))
  hear = whole(functools.partial(hierarchy.hear, setup.boundaries[0]))
  if setup.updates > 1:
    nodes[0], pool, seen = earlier.in_turn(
      setup, hear, state, common, flight, cohort.keep, sums, weight, roster
    )
    state = state._replace(pool=pool)
  else:
    drift = earlier.since(setup, nodes[0], common, flight, flight.arrived)
    nodes[0], seen = hear(nodes[0], sums, weight, roster, roster.key, drift)
  record, span = {}, 1
  record |= {f"{setup.boundaries[0].tier.name}/{k}": v for k, v in seen.items()}
  for i, at in enumerate(setup.boundaries[1:], start=1):
    span *= at.tier.period
    due = (state.round + 1) % span == 0
    sync = whole(functools.partial(hierarchy.sync, at))
    low, high, stats = sync(nodes[i - 1], nodes[i], _boundary_key(key, i))
    pick = functools.partial(jnp.where, due)
    nodes[i - 1] = jax.tree.map(pick, low, nodes[i - 1])
    nodes[i] = jax.tree.map(pick, high, nodes[i])
    name = at.tier.name
    record[f"{name}/synced"] = due.astype(jnp.float32)
    record |= {f"{name}/{k}": jnp.mean(v) for k, v in stats.items()}
  nodes[-1] = nodes[-1]._replace(weight=jnp.zeros_like(nodes[-1].weight))
  rows = _go_home(state.clients, flight, cohort)
  record |= _summary(setup.boundaries[0].tier.name, flight)
  new = state._replace(round=state.round + 1, nodes=tuple(nodes), clients=rows)
  return new, Outcome(record, flight.stats, flight.seen)


def _boundary_key(key, i):
  """Key of a boundary in a round, apart from every client's."""
  return jax.random.fold_in(key, 2**32 - 1 - i)  # above every client id


def _merge(reduce, sums):
  """Merges the devices' accumulators, in the order of the devices."""
  if reduce.name == "sum":  # one collective, however many devices
    return jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), sums)
  parts = [
    jax.tree.map(lambda x, d=d: x[d], sums)
    for d in range(jax.tree.leaves(sums)[0].shape[0])
  ]
  return functools.reduce(jax.vmap(reduce.merge), parts)


def _go_home(clients, flight, cohort):
  """Writes the rows of those whose message arrived back to the population."""

  def write(rows, new):
    where = jnp.where(flight.arrived, cohort.clients, rows.shape[0])
    return rows.at[where].set(new, mode="drop")

  new = (flight.group.local, flight.mine, flight.told)
  return Rows(*jax.tree.map(write, tuple(clients), new))


def _summary(name, flight):
  """Scalars of a round, over the clients whose message arrived."""
  weights, arrived = flight.group.weights, flight.arrived

  def total(values):
    return jnp.sum(jnp.where(arrived, values, 0))

  def mean(top, bottom):
    return total(top) / jnp.where(total(bottom) > 0, total(bottom), 1)

  record = {f"train/{k}": mean(*pair) for k, pair in flight.stats.items()}
  for key, values in flight.link_stats.items():
    record[f"{name}/{key}"] = mean(values, jnp.ones_like(values))
  record["train/clients"] = jnp.sum(flight.worked)
  record["train/examples"] = jnp.sum(jnp.where(flight.worked, weights, 0))
  lost = flight.worked & ~arrived
  if flight.seen is not None:
    found = flight.seen[..., 0] != 0
    record["trust/found"] = jnp.sum(found)
    lost &= ~found
  record["train/nonfinite"] = jnp.sum(lost)
  return {k: jnp.asarray(v, jnp.float32) for k, v in record.items()}
