"""Contexts: who takes part in an exchange, and what one sender knows of it.

Links and reductions compute with a message and with this, and nothing else. By
the names that users write, these are in `link`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Roster(NamedTuple):
  """Who takes part in an exchange; the same for every sender.

  Attributes:
    clients: int32 [C] ids, all different, -1 where a place is empty.
    weights: int32 [C] example counts, 0 = absent.
    key: random key of the round and the boundary, which all senders know.
    nodes: int32 [C], the receiver of each; None if there is one.
    arrived: bool [C], whose wire has come; None while they are under way.
    traits: {name: [C]}, facts about them; for receivers that play a protocol
      out.
  """

  clients: jax.Array
  weights: jax.Array
  key: jax.Array
  nodes: jax.Array | None = None
  arrived: jax.Array | None = None
  traits: Mapping[str, jax.Array] = {}


class Context(NamedTuple):
  """What one sender knows besides its message.

  Attributes:
    key: random key of (seed, round, sender).
    client: int32 scalar, id of the sender.
    weight: int32 scalar, its number of examples; 0 = absent.
    traits: read-only facts about the sender (rank, device, ...), scalars.
    roster: who else takes part.
  """

  key: jax.Array
  client: jax.Array
  weight: jax.Array
  traits: Mapping[str, jax.Array] = {}
  roster: Roster | None = None


def alone(weight: int = 1, seed: int = 0) -> Context:
  """Context of a single sender, for one-to-one links and examples."""
  clients, key = jnp.zeros((1,), jnp.int32), jax.random.key(seed)
  weights = jnp.full((1,), weight, jnp.int32)
  roster = Roster(clients, weights, jax.random.fold_in(key, 0))
  return Context(key, clients[0], weights[0], roster=roster)
