"""Gossip: no server; neighbours average their models.

Everyone owns a whole model, trains it, and takes a weighted mean of its own
and its neighbours' (Lian et al., Can decentralized algorithms outperform
centralized algorithms?, 2017, https://arxiv.org/abs/1705.09056; with local
steps Koloskova et al., 2020, https://arxiv.org/abs/2003.10422).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import objective, tree, work
from fedjax_peft.algorithms import baseline
from fedjax_peft.network import topology

PyTree = Any


def gossip(
  model: objective.Model,
  local: work.Local,
  *,
  mixing: npt.ArrayLike,
) -> algorithm_lib.Algorithm:
  """Decentralized averaging: x_i <- sum over j of mixing[i, j] x_j.

  Who is not in a round's cohort, or whose training did not end in finite
  numbers, neither trains nor mixes; see `among`. So the mean over all clients
  moves by their training alone.

  The record says how far the clients present are from their mean, as a root
  mean square over them, before mixing (`consensus/distance_before`) and after
  (`consensus/distance`), and how many models were sent (`cloud/messages`): one
  from every client present to each of its neighbours present. `bytes` are
  those of one such message; nothing crosses a link to a server.

  Args:
    model: what is trained; every leaf lives on the clients.
    local: how clients train.
    mixing: [N, N], symmetric and doubly stochastic, N the population, such as
      `topology.metropolis(topology.ring(N))`. It is a constant of the compiled
      round: meant for N up to a few hundred.

  Raises:
    ValueError: if the matrix is not doubly stochastic, or when the algorithm
      is started for a population of another size.
  """
  topology.check(np.asarray(mixing))
  weights = np.asarray(mixing, np.float32)
  alone = baseline.local_only(model, local)
  name = alone.tiers[0].name

  def wrap(alone):
    def init(params=None, *, clients, cohort):
      if clients != len(weights):
        raise ValueError(
          f"mixing must have a row for each of {clients} clients: got "
          f"{list(weights.shape)}; write topology.metropolis("
          f"topology.ring({clients}))"
        )
      return alone.init(params, clients=clients, cohort=cohort)

    def finish(state, common, flight, cohort, **options):
      state, outcome = alone.finish(state, common, flight, cohort, **options)
      present = _present(flight.arrived, cohort.clients, len(weights))
      w = among(jnp.asarray(weights), present)
      before = state.clients.local
      after = mix(w, before, present)
      record = {
        "consensus/distance_before": distance(before, present),
        "consensus/distance": distance(after, present),
        f"{name}/messages": _messages(w).astype(jnp.float32),
      }
      state = state._replace(clients=state.clients._replace(local=after))
      return state, outcome._replace(record=outcome.record | record)

    def of_one(cohort, *, traits=None, round=0):
      del cohort, traits, round
      labels = alone.work.placement
      owned = [k for k, v in labels.items() if v == "device"]
      one = tree.nbytes({k: alone.work.params[k] for k in owned})
      return {f"{name}/up_bytes": one, f"{name}/down_bytes": one}

    return alone._replace(
      init=init, finish=finish, bytes=of_one, specialize=None
    )

  return algorithm_lib.wrapped(alone, wrap)


def among(mixing: jax.Array, present: jax.Array) -> jax.Array:
  """Mixing among those who are there.

  What would have gone to and come from the absent goes onto the diagonal, so a
  symmetric, doubly stochastic matrix stays one.

  Args:
    mixing: float [N, N].
    present: bool [N].

  Returns:
    Like `mixing`; rows and columns of the absent are those of the identity.

  Example:
    >>> third = jnp.full((3, 3), 0.25) + 0.25 * jnp.eye(3)
    >>> among(third, jnp.array([True, True, False]))
    Array([[0.75, 0.25, 0.  ],
           [0.25, 0.75, 0.  ],
           [0.  , 0.  , 1.  ]], dtype=float32)
  """
  off = jnp.where(present[:, None] & present[None], mixing, 0)
  off = jnp.fill_diagonal(off, 0, inplace=False)
  return off + jnp.diag(1 - jnp.sum(off, axis=1))


def mix(mixing: jax.Array, rows: PyTree, present: jax.Array) -> PyTree:
  """Applies a mixing matrix to rows of leaves.

  Args:
    mixing: float32 [N, N].
    rows: pytree of floats [N, ...].
    present: bool [N]; the rows of others come back to the bit.
  """

  def leaf(x):
    flat = x.reshape(x.shape[0], -1).astype(jnp.float32)  # [N, D]
    new = jnp.matmul(mixing, flat, precision="highest")
    new = jnp.where(present[:, None], new.astype(x.dtype), flat.astype(x.dtype))
    return new.reshape(x.shape)

  return jax.tree.map(leaf, rows)


def distance(rows: PyTree, present: jax.Array) -> jax.Array:
  """Root mean square distance of the clients present to their mean.

  Args:
    rows: pytree of floats [N, ...].
    present: bool [N].

  Returns:
    float32 scalar, 0 where nobody is present.
  """
  count = jnp.maximum(jnp.sum(present), 1).astype(jnp.float32)

  def squares(x):
    flat = x.reshape(x.shape[0], -1).astype(jnp.float32)
    here = present[:, None]
    mean = jnp.sum(jnp.where(here, flat, 0), 0, keepdims=True) / count
    return jnp.sum(jnp.where(here, (flat - mean) ** 2, 0))

  total = sum(map(squares, jax.tree.leaves(rows)), jnp.float32(0))
  return jnp.sqrt(total / count)


def messages(mixing: npt.ArrayLike, ids: npt.ArrayLike) -> np.ndarray:
  """How many models every client of a cohort sends, and so receives.

  Args:
    mixing: [N, N].
    ids: int [C], the cohort.

  Returns:
    int64 [C], its neighbours that are in the cohort.

  Example:
    >>> messages(topology.metropolis(topology.ring(5)), [0, 1, 3])
    array([1, 1, 0])
  """
  here = np.asarray(ids, np.int64)
  edges = np.asarray(mixing)[np.ix_(here, here)] > 0
  np.fill_diagonal(edges, False)
  return edges.sum(axis=1).astype(np.int64)


def _messages(mixing):
  """How many models were sent, of a matrix among those present."""
  return jnp.sum(mixing > 0) - jnp.sum(jnp.diag(mixing) > 0)


def _present(arrived, clients, size):
  """Bool [N], from what arrived [D, C] of which clients [D, C]."""
  where = jnp.where(arrived, clients, size)
  return jnp.zeros((size,), bool).at[where].set(True, mode="drop")
