"""Membership: from `cohort.group` of a config to who talks to which node."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from fedjax_peft import (
  algorithm,
  compose,
  config,
  data,
  grouping,
  objective,
  plan,
  preference,
  scene,
  schema,
  settings,
)
from fedjax_peft.algorithms import similarity
from fedjax_peft.network import centroid, positions


class Known(NamedTuple):
  """What groupings are made of: the parts of a run."""

  run: schema.Config
  data: data.Population
  model: objective.Model
  algorithm: algorithm.Algorithm

  @property
  def nodes(self) -> int:
    """How many there may be."""
    return self.algorithm.tiers[0].size


def adapters(known: Known, compare: similarity.By = "product") -> plan.Grouping:
  """By what each makes of the first model alone; see `find_nodes`."""

  def find():
    return similarity.find_nodes(
      known.model,
      known.algorithm.work.local,
      known.data,
      count=known.nodes,
      by=compare,
      seed=known.run.seed,
    )

  return grouping.by_adapters(len(known.data), find)


def device(known: Known) -> plan.Grouping:
  """By the speed of machines, and how far clients are from the middle."""
  count, seed = len(known.data), known.run.seed
  speed = scene.fleet_of(known.run, count).flops
  metres = positions.disc(np.arange(count), seed, radius=1.0)
  features = np.stack([np.log(speed), np.hypot(*metres.T)], 1)
  points = centroid.standardize(features)
  return grouping.fixed(centroid.kmeans(points, known.nodes, seed=seed).labels)


def loss(known: Known) -> plan.Grouping:
  """By whose model each client likes best, asked in every round."""
  name = known.run.algorithm.get("name")
  if name != "ifca":
    raise ValueError(
      "models that start alike are liked alike: got by='loss' with algorithm "
      f'{name!r}; write algorithm={{name="ifca", clusters={known.nodes}, '
      "spread=0.01}"
    )
  here = settings.Settings("shard_map", len(jax.devices()), 1, 1, 16)
  choose = preference.choose(
    known.algorithm, known.model, known.data, here, batch=64
  )
  return grouping.by_loss(len(known.data), choose)


def planted(known: Known) -> plan.Grouping:
  """As `data.groups` dealt them out."""
  if "group" not in known.data.traits:
    raise ValueError("by='planted' needs planted groups; write data.groups=3")
  return grouping.fixed(known.data.traits["group"] % known.nodes)


def update(
  known: Known, at: tuple[int, ...] = (5,), clusters: int | None = None
) -> plan.Grouping:
  """By the directions in which they move the model; see `by_update`."""
  return grouping.by_update(
    len(known.data), known.nodes, at=at, clusters=clusters
  )


GROUPINGS: dict[str, Callable[..., plan.Grouping]] = {
  "adapters": adapters,
  "device": device,
  "loss": loss,
  "planted": planted,
  "update": update,
}


def group_of(
  run: schema.Config,
  population: data.Population,
  model: objective.Model,
  made: algorithm.Algorithm,
) -> plan.Grouping | None:
  """Which cluster or edge each client belongs to; None where nothing says so.

  Raises:
    ValueError: if a config groups clients whom nothing keeps apart, or keeps
      them apart without saying how they are grouped.
  """
  table, tier = dict(run.cohort.group), made.tiers[0].name
  if not table and run.algorithm.get("name") == "ifca":
    table = {"by": "loss"}
  if bool(table) != (tier == "cluster") and not (table and tier == "edge"):
    raise ValueError(
      "clusters need an algorithm that has them and a way to find them: got "
      f"algorithm={run.algorithm} and cohort.group={dict(run.cohort.group)}; "
      'write algorithm={name="clustered", clusters=3} and '
      'cohort.group={by="update"}'
    )
  if not table:
    return None
  where = "cohort.group"
  make, rest = compose.named(GROUPINGS, table, "by", where)
  known = Known(run, population, model, made)
  return config.call(make, rest, where, known=known)
