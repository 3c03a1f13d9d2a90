"""Grouping: which node of the lowest tier each client talks to, while it runs.

Clusters are nodes of the lowest tier (`algorithms.clustered`). Who belongs
where may be fixed, asked of the clients in every round, or found in what they
report; then a cluster that splits hands its model on.

| grouping | clients are together that | source |
| --- | --- | --- |
| `fixed` | were put together, by device or otherwise | |
| `by_adapters` | make the same of the first model | HiLoRA, arXiv 2603.02785 |
| `by_loss` | like the same model best | IFCA, arXiv 2006.04088 |
| `by_update` | move the model the same way | CFL, arXiv 1910.01991 |
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from fedjax_peft import plan, validate
from fedjax_peft.algorithms import clusters as clusters_lib
from fedjax_peft.network import clustering, structure


def fixed(nodes: npt.ArrayLike) -> plan.Grouping:
  """Clients stay where they are put.

  Args:
    nodes: int [N].
  """
  return plan.Grouping("fixed", np.asarray(nodes, np.int32))


def by_adapters(
  clients: int, find: Callable[[], npt.ArrayLike]
) -> plan.Grouping:
  """Clients are put together once, before the first round, and then stay.

  What is found is part of what a run remembers, so that it is found once in a
  run, however often that is stopped.

  Args:
    clients: N.
    find: () -> int [N], such as `algorithms.find_nodes` of the model, the
      local work and the data.
  """

  def before(state, now, number):
    return state, np.asarray(find(), np.int32) if number == 0 else now

  return plan.Grouping("by_adapters", np.zeros(clients, np.int32), before)


def by_loss(clients: int, choose: Callable) -> plan.Grouping:
  """Every client of a round joins the node whose model it likes best.

  Args:
    clients: N.
    choose: from `preference.choose`.
  """
  return plan.Grouping(
    "by_loss",
    np.zeros(clients, np.int32),
    join=lambda state, ids: choose(state, ids)[0],
  )


def by_update(
  clients: int,
  nodes: int,
  *,
  at: Sequence[int] = (5,),
  clusters: int | None = None,
  level: float = 0.05,
) -> plan.Grouping:
  """Clients are put together by the directions in which they move the model.

  All are together at first. In the rounds `at` every cluster is split by the
  cosines of the sketches that its clients last sent, if they fall apart; a new
  cluster starts from the model of the one that it was part of. Clusters are
  never put together again, since clients of different models move differently.
  Who has not reported stays.

  Args:
    clients: N.
    nodes: E, the most clusters there may be.
    at: rounds before which clusters are split.
    clusters: into how many the first one is split, once; None finds out, and
      splits nothing where there is no structure (`structure.choose`).
    level: largest p-value at which there is structure.

  Raises:
    ValueError: if there are more clusters than nodes.
  """
  validate.at_least(1, nodes=nodes)
  if clusters is not None and not 1 <= clusters <= nodes:
    raise ValueError(
      f"clusters must be in 1..{nodes}, the nodes there are: got {clusters=}"
    )

  def split(points, room):
    if clusters is not None:
      most = min(clusters, len(points))
      return clustering.agglomerate(clustering.distances(points), clusters=most)
    if room < 1 or len(points) < 4:
      return np.zeros(len(points), np.int32)
    return structure.choose(points, most=room + 1, level=level).labels

  def before(state, now, number):
    if number not in at or (clusters is not None and now.any()):
      return state, now
    sketches = np.asarray(state.clients.told["sketch"], np.float64)
    length = np.linalg.norm(sketches, axis=1)
    heard = np.asarray(np.isfinite(length) & (length > 0))
    new, parents = now.copy(), np.arange(nodes, dtype=np.int32)
    used = int(now.max()) + 1
    for node in range(used):
      here = np.flatnonzero(np.logical_and(heard, now == node))
      if here.size < 2:
        continue
      labels = split(clustering.unit(sketches[here]), nodes - used)
      count = np.bincount(labels)
      stays = int(count.argmax())  # the largest part keeps the node
      for part in range(count.size):
        if part != stays and used < nodes:
          new[here[labels == part]], parents[used] = used, node
          used += 1
    return clusters_lib.regroup(state, parents), new

  first = np.zeros(clients, np.int32)
  return plan.Grouping("by_update", first, before, hears=frozenset({"sketch"}))
