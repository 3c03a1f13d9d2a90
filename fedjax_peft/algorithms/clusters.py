"""Clusters: one model for each kind of client, and parts that all share.

A cluster is a node of the lowest tier. Leaves placed there are averaged over
the clients of a cluster, the others over all. Who belongs where is said from
outside, by the cohort's `nodes`: found in updates (`network.clustering`) or by
trying the models (`preference`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from fedjax_peft import (
  algorithm,
  hierarchy,
  link,
  objective,
  rounds,
  tree,
  validate,
  work,
)

CLUSTER, CLOUD = "cluster", "cloud"


def clustered(
  model: objective.Model,
  local: work.Local,
  *,
  clusters: int,
  shared: str | None = None,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """Federated averaging within clusters that are given.

  A client talks to the cluster that `Cohort.nodes` says. All clusters start
  from the same model; see `regroup` for clusters that split.

  Args:
    model: what is trained.
    local: how clients train.
    clusters: E, how many models there are.
    shared: regex of leaves that all clusters share; None shares none.
    server: optax optimizer: of a cluster's own leaves at the cluster, of
      shared ones at the cloud. None applies the mean delta as it is.
    uplink: from the clients to the clusters; None weighs by examples.
    downlink: from the clusters to the clients.
    placement: {regex: "cluster", "cloud", "device" or "frozen"}, for what else
      there is; goes before `shared`.

  Raises:
    ValueError: if a regex matches no leaf.
  """
  validate.at_least(1, clusters=clusters)
  rules = dict(placement or {})
  if shared is not None:
    rules.setdefault(shared, CLOUD)
  rules.setdefault(".*", CLUSTER)
  job = work.train(model, local, rules=rules, tiers=(CLUSTER, CLOUD))
  plain = optax.sgd(1.0)

  def labels(leaves):
    return {k: job.placement[k] for k in leaves}

  own = dict.fromkeys(sorted(set(job.placement.values())), plain)
  if server is not None:  # shared leaves move once, at the cloud
    own[CLUSTER] = server
  return algorithm.federated(
    job,
    [
      hierarchy.tier(
        CLUSTER,
        clusters,
        link=uplink,
        server=optax.partition(own, labels),
        down=downlink,
      ),
      hierarchy.tier(CLOUD, server=server),
    ],
  )


def ifca(
  model: objective.Model,
  local: work.Local,
  *,
  clusters: int,
  spread: float,
  seed: int = 0,
  **options: Any,
) -> algorithm.Algorithm:
  """IFCA: clients try the models of all clusters and join the best.

  Ghosh et al., An efficient framework for clustered federated learning, 2020,
  https://arxiv.org/abs/2006.04088. `preference.choose` says which that is. For
  this every client is sent the clusters' own leaves of all E clusters, and
  `bytes` counts them; what they share is sent once.

  Clusters that start alike stay alike, so each starts from the model with
  Gaussian noise on its own leaves. With adapters whose product is zero at the
  start (B = 0 in LoRA) it is the noise that tells clusters apart.

  Args:
    model: what is trained.
    local: how clients train.
    clusters: E.
    spread: standard deviation of the noise, > 0, in the unit of the leaves.
      Small is better: of models that differ much, all clients first like the
      shortest. From some starts two kinds of clients stay with one model, as
      in the paper; try another seed.
    seed: of the noise. A cluster's noise depends on the seed, its number and
      the leaf.
    **options: of `clustered`.
  """
  validate.positive(spread=spread)
  made = clustered(model, local, clusters=clusters, **options)
  placed = made.work.placement
  own = [k for k in sorted(placed) if placed[k] == CLUSTER]
  varied = [k for k in own if k not in model.mutable]
  if not varied:
    raise ValueError(
      "ifca needs leaves that clusters have for themselves: got none placed at "
      f"'{CLUSTER}'; share fewer"
    )

  def wrap(made):
    def init(params=None, *, clients, cohort):
      state = made.init(params, clients=clients, cohort=cohort)
      return scatter(state, jax.random.key(seed), spread, varied)

    def sizes(cohort, *, traits=None, round=0):
      found = made.bytes(cohort, traits=traits, round=round)
      leaves = tree.spec({k: made.work.params[k] for k in own})
      one = made.tiers[0].down.after(link.Spec(leaves)).message
      name = f"{CLUSTER}/down_bytes"
      return found | {name: found[name] + (clusters - 1) * tree.nbytes(one)}

    return made._replace(init=init, bytes=sizes)

  return algorithm.wrapped(made, wrap)


def scatter(
  state: rounds.State, key: jax.Array, spread: float, names: list[str]
) -> rounds.State:
  """Adds noise of its own to every node of the lowest tier.

  Args:
    state: before the first round.
    key: random key.
    spread: standard deviation.
    names: leaves that get noise; those above the lowest tier must stay equal.
  """
  low = state.nodes[0]

  def one(i, x):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
      jax.random.fold_in(key, i), jnp.arange(x.shape[0])
    )
    noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)
    return x + noise * jnp.asarray(spread, x.dtype)

  moved = {k: one(i, low.params[k]) for i, k in enumerate(names)}
  low = low._replace(params=low.params | moved)
  return state._replace(nodes=(low, *state.nodes[1:]))


def regroup(state: rounds.State, parents: npt.ArrayLike) -> rounds.State:
  """Gives every cluster the model and the memory of its parent.

  For clusters that split (`network.clustering.divide`): reserve as many as
  there may become, and give the new ones what the old ones have.

  Args:
    state: between two rounds.
    parents: int [K], K at most the clusters E; the others stay as they are.

  Raises:
    ValueError: if there are more parents than clusters, or one does not exist.
  """
  size = state.nodes[0].weight.shape[0]
  given = np.asarray(parents)
  if (
    given.ndim != 1
    or given.size > size
    or not np.isin(given, range(size)).all()
  ):
    raise ValueError(
      f"parents must be at most {size} clusters in 0..{size - 1}: got "
      f"{given.tolist()}; write clusters={max(given.size, size)} for more"
    )
  rows = np.arange(size)
  rows[: given.size] = given
  low = jax.tree.map(lambda x: jnp.asarray(x)[rows], state.nodes[0])
  return state._replace(nodes=(low, *state.nodes[1:]))
