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
  return {k: v.at[place].set(now[k], mode="drop") for k, v in pool.items()}


def models(now: Leaves, pool: Leaves) -> dict[str, jax.Array]:
  """All versions, leaves [(1 + P) E, ...]; that of node e is v E + e."""
  return {
    k: jnp.concatenate([v[None], pool[k]]).reshape(-1, *v.shape[1:])
    for k, v in now.items()
  }


def drift(
  mix: Callable, models: Leaves, group: executor.Group, arrived: jax.Array
) -> dict[str, jax.Array]:
  """Mean over reports of mix (model now - model started from), for one node.

  Args:
    mix: (staleness) -> how much a report counts.
    models: leaves [1 + P, ...], that of now first.
    group: the clients [D, C].
    arrived: bool [D, C], whose report is there.
  """
  weight = jnp.where(arrived, group.weights, 0).astype(jnp.float32)
  share = weight / jnp.maximum(jnp.sum(weight), 1)
  if "staleness" in group.traits:
    share = share * mix(jnp.asarray(group.traits["staleness"]))

  def one(versions):
    each = jnp.zeros(versions.shape[:1]).at[group.source].add(share)
    moved = versions[:1] - versions
    return jnp.tensordot(each.astype(versions.dtype), moved, 1)

  return {k: one(v) for k, v in models.items()}
