"""Earlier models: kept for clients that are at work while the model moves on.

The pool has P places. Version 0 of a model is that of now, version 1 + p is
what place p holds.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from fedjax_peft import executor

Leaves = Mapping[str, jax.Array]


def kept(pool: Leaves, now: Leaves, place: jax.Array) -> Leaves:
  """Puts the model of now into a place of the pool, if there is such a place.

  Args:
    pool: leaves [P, E, ...].
    now: leaves [E, ...].
    place: int32 scalar; P or more for none.
  """
  return {k: pool[k].at[place].set(v, mode="drop") for k, v in now.items()}


def models(now: Leaves, pool: Leaves) -> dict[str, jax.Array]:
  """All versions, leaves [(1 + P) E, ...]; that of node e is v E + e."""
  return {
    k: jnp.concatenate([v[None], pool[k]]).reshape(-1, *v.shape[1:])
    for k, v in now.items()
  }


def drift(
  mix: Callable,
  now: Leaves,
  models: Leaves,
  group: executor.Group,
  arrived: jax.Array,
) -> dict[str, jax.Array]:
  """Mean over reports of mix (model now - model started from), for one node.

  Args:
    mix: (staleness) -> how much a report counts.
    now: leaves [...], the model of now.
    models: leaves [1 + P, ...], all versions.
    group: the clients [D, C].
    arrived: bool [D, C], whose report is there.
  """
  weight = jnp.where(arrived, group.weights, 0).astype(jnp.float32)
  share = weight / jnp.maximum(jnp.sum(weight), 1)
  if "staleness" in group.traits:
    share = share * mix(jnp.asarray(group.traits["staleness"]))

  def one(here, versions):
    each = jnp.zeros(versions.shape[:1]).at[group.source].add(share)
    moved = here[None] - versions
    return jnp.tensordot(each.astype(versions.dtype), moved, 1)

  return {k: one(now[k], v) for k, v in models.items() if k in now}


def since(setup, node, common, flight, arrived):
  """How far the model has moved since these reports' clients started."""
  mix = setup.boundaries[0].tier.mix
  if mix is None or not setup.pool:
    return None
  now = {k: v[0] for k, v in node.params.items()}
  return drift(mix, now, common.sent.params, flight.group, arrived)


def in_turn(setup, hear, state, common, flight, keep, sums, weight, roster):
  """Applies a round's updates one after another.

  Returns:
    (the receiver, the pool of earlier models, means of its stats).
  """

  def one(carry, u):
    node, pool = carry
    here = flight.arrived & (flight.group.update == u)
    moved = since(setup, node, common, flight, here)
    acc = jax.tree.map(lambda x: x[u][None], sums)
    key = jax.random.fold_in(roster.key, u)
    node, seen = hear(node, acc, weight[u][None], roster, key, moved, u)
    now = {k: node.params[k] for k in setup.boundaries[0].names}
    after = jnp.append(keep[1:], jnp.iinfo(jnp.int32).max)
    return (node, {**pool, **kept(pool, now, after[u])}), seen

  (node, pool), seen = jax.lax.scan(
    one, (state.nodes[0], dict(state.pool)), jnp.arange(setup.updates)
  )
  return node, pool, {k: jnp.mean(v) for k, v in seen.items()}
