"""Hierarchies: edges average their clients, the cloud averages the edges.

Liu et al., Client-Edge-Cloud Hierarchical Federated Learning, 2020,
https://arxiv.org/abs/1905.06641
"""

from collections.abc import Mapping, Sequence

import optax

from fedjax_peft import algorithm, hierarchy, link, objective, work


def hierarchical(
  model: objective.Model,
  local: work.Local,
  *,
  edges: int = 4,
  period: int = 1,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  backhaul: link.Link | None = None,
  tiers: Sequence[hierarchy.Tier] = (),
  placement: Mapping[str, str] | None = None,
  proximal: float = 0.0,
) -> algorithm.Algorithm:
  """Federated averaging over a tree of receivers.

  Clients report to an edge every round, edges to the cloud every `period`
  rounds; in between an edge goes on with its own model. With one edge and
  period 1 this is federated averaging.

  Args:
    model: what is trained.
    local: how clients train.
    edges: E.
    period: rounds between two reports of an edge.
    server: optax optimizer at the cloud; None applies the mean as it is.
    uplink: from the clients to the edges; None weighs by examples.
    downlink: from the edges to the clients.
    backhaul: from the edges to the cloud; None weighs by examples.
    tiers: any other tree, lowest first and ending with a tier of size 1; then
      `edges`, `period` and `backhaul` mean nothing.
    placement: {regex: a tier's name, "device" or "frozen"}.
    proximal: mu of FedProx.
  """
  if not tiers:
    tiers = (
      hierarchy.tier("edge", edges, link=uplink, down=downlink),
      hierarchy.tier("cloud", link=backhaul, server=server, period=period),
    )
  names = tuple(t.name for t in tiers)
  job = work.train(
    model, local, rules=placement, tiers=names, proximal=proximal
  )
  return algorithm.federated(job, tiers)
