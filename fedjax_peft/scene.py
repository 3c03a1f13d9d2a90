"""Scenes: from the tables of a config to a simulated network.

Machines, links, availability, faults, selection and a clock by the names that
a config calls them, each checked against the function that it stands for.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fedjax_peft import (
  algorithm,
  compose,
  config,
  data,
  factored,
  grouping,
  objective,
  one_step,
  plan,
  preference,
  schema,
  settings,
  traffic,
  tree,
  work,
)
from fedjax_peft.network import (
  availability,
  centroid,
  clock,
  failover,
  fault,
  ledger,
  positions,
  profile,
  radio,
  scenario,
  selection,
  steps,
  timeline,
  world,
)


def is_simulated(run: schema.Config) -> bool:
  """Whether a config says anything of a network."""
  return run.network != schema.Network()


def fault_of(run: schema.Config, classes: int) -> fault.Fault:
  """What goes wrong."""
  net = run.network
  parts: list[fault.Fault] = []
  if net.scenario:
    make, rest = compose.named(
      scenario.SCENARIOS, net.scenario, "name", "network.scenario"
    )
    known = inspect.signature(make).parameters
    given = {"classes": classes} if "classes" in known else {}
    parts += config.call(make, rest, "network.scenario", **given)
  for i, table in enumerate(net.faults):
    where = f"network.faults.{i}"
    make, rest = compose.named(fault.FAULTS, table, "fault", where)
    known = inspect.signature(make).parameters
    given = {"classes": classes} if "classes" in known else {}
    parts.append(config.call(make, rest, where, **given))
  return fault.compose(*parts)


def clock_of(run: schema.Config) -> clock.Clock:
  """When rounds end."""
  table = run.network.clock or {"kind": "synchronous"}
  make, rest = compose.named(clock.CLOCKS, table, "kind", "network.clock")
  return config.call(make, rest, "network.clock")


def plan_of(
  run: schema.Config,
  population: data.Population,
  model: objective.Model,
  made: algorithm.Algorithm,
) -> plan.Plan:
  """The plan of a simulated network.

  Args:
    run: the config.
    population: who there is.
    model: what is trained.
    made: the algorithm in its general form, with what faults do.

  Raises:
    ValueError: if a name or an option does not exist, or parts do not fit.
  """
  net, clients = run.network, len(population)
  select_make, select_rest = compose.named(
    selection.SELECTIONS,
    net.select or {"method": "uniform"},
    "method",
    "network.select",
  )
  select = config.call(select_make, select_rest, "network.select")
  available_make, available_rest = compose.named(
    availability.AVAILABILITIES,
    net.available or {"kind": "always"},
    "kind",
    "network.available",
  )
  radio_make, radio_rest = compose.named(
    radio.RADIOS, net.radio or {"kind": "cell"}, "kind", "network.radio"
  )
  machines = _fleet(run, clients)
  air = config.call(radio_make, radio_rest, "network.radio")
  when = clock_of(run)
  if when.is_open:  # who is at work at one time has a part of the band each
    share = when.concurrency if air.sharing == "equal" else 1
    air = air._replace(
      bandwidth=air.bandwidth / share, sharing="own", broadcast=False
    )
  count, hears = _steps(run)
  # Clusters are models of one receiver, edges are receivers at other places.
  clustered = made.tiers[0].name == "cluster"
  places = 1 if clustered else made.tiers[0].size
  notes_bytes = 4 * len(hears | ({"loss"} & select.reads))
  sizes = traffic.sizes(made, run.cohort.size)
  where = world.World(
    seed=run.seed,
    examples=population.train.sizes.astype(np.int64),
    seen=population.seen,
    fleet=machines,
    radio=air,
    distance=_distance(run, clients, places, air.radius),
    load=_load(made.work, model, population, sizes, notes_bytes),
    needs=_needs(made.work, model, population),
    hops=[] if clustered else _hops(run, made),
    home=_home(run, places),
    fault=fault_of(run, len(population.classes)),
    available=config.call(available_make, available_rest, "network.available"),
    select=select,
    prices=config.call(ledger.Prices, net.prices, "network.prices"),
    steps=count,
    recharge=net.recharge,
  )
  return timeline.plan(where, when, run.cohort.size, hears=hears)


def _fleet(run: schema.Config, clients: int) -> profile.Fleet:
  """The clients' machines: from a file, or drawn."""
  net = run.network
  if net.fleet_file and net.fleet:
    raise ValueError(
      "network.fleet and network.fleet_file answer one question: got both; "
      "remove one of them"
    )
  if net.fleet_file:
    found = profile.read_fleet(net.fleet_file)
    if len(found) < clients:
      raise ValueError(
        f"network.fleet_file must have a row for each client: got {len(found)} "
        f"for {clients} in {net.fleet_file}"
      )
    return found.take(np.arange(clients))
  mix = net.fleet or {"phone": 1.0}
  return profile.fleet(mix, clients, run.seed, spread=net.spread)


def _load(job, model, population, sizes, more) -> Callable:
  """What a round asks of clients: FLOPs of their steps, bytes both ways."""
  step = one_step.flops_of(job, model.base, population.examples)
  usual = factored.steps_of(job.local, population.train.sizes)

  def load(ids, number, count):
    count = usual[ids] if count is None else count
    traits = {
      k: population.traits.get(k, np.zeros(len(population)))[ids]
      for k in job.traits
    }
    traits["client"] = ids
    each = sizes(traits, number)
    return ledger.Load(
      np.asarray(count, np.float64) * step,
      each["up_bytes"] + more,
      each["down_bytes"],
    )

  return load


def _needs(job: work.Work, model: objective.Model, population) -> np.ndarray:
  """Bytes [N] that training takes: the base, and what a step holds.

  Of smaller ranks, less: weights, gradients and reports are cut.
  """
  step = settings.lane_bytes(job, model.base, population.examples)
  needs = np.full(len(population), float(tree.nbytes(model.base) + step))
  if "rank" in job.traits:
    rank = population.traits["rank"]
    cut = {k: v for k, v in job.params.items() if "/lora_" in k}
    needs -= 3 * tree.nbytes(cut) * (1 - rank / _full_rank(cut))
  return needs


def _full_rank(cut) -> int:
  """The rank that the arrays have room for."""
  return max(v.shape[-1] for k, v in cut.items() if k.endswith("lora_a"))


def fitted(
  run: schema.Config,
  population: data.Population,
  model: objective.Model,
  job: work.Work,
) -> data.Population:
  """Clients whose machine is too small get the largest rank that fits.

  Ranks are those that `aggregate.ranks` lists; whom none fits keeps its own,
  and is excluded.
  """
  if run.network.unfit != "rank":
    return population
  if "rank" not in job.traits:
    raise ValueError(
      "network.unfit 'rank' chooses among the ranks that clients may have, but "
      "all have the same: list them, aggregate.ranks={2 = 0.5, 8 = 0.5}"
    )
  memory = _fleet(run, len(population)).memory
  rank = np.array(population.traits["rank"])
  for smaller in sorted(map(int, run.aggregate.ranks), reverse=True):
    here = population.with_traits(rank=np.minimum(rank, smaller))
    tight = _needs(job, model, population.with_traits(rank=rank)) > memory
    fits = _needs(job, model, here) <= memory
    rank = np.where(tight & fits, np.minimum(rank, smaller), rank)
  return population.with_traits(rank=rank)


def _hops(run: schema.Config, made: algorithm.Algorithm) -> list[world.Hop]:
  """The wires between the tiers."""
  wire = config.call(
    radio.wire,
    {"rate": 1e9, "latency": 0.01, **run.network.backhaul},
    "network.backhaul",
  )
  node, span, hops = traffic.between(made, run.cohort.size), 1, []
  for below, tier in zip(made.tiers, made.tiers[1:], strict=False):
    span *= tier.period
    sizes = node[tier.name]
    hops.append(
      world.Hop(
        tier.name,
        span,
        below.size,
        sizes["up_bytes"],
        sizes["down_bytes"],
        wire,
      )
    )
  return hops


def _distance(run, clients, edges, radius) -> Callable:
  """Metres from every client to every station, as a function of time."""
  how = run.network.stations
  ids = np.arange(clients)
  spacing = float(how.get("spacing", 1.5 * radius))
  speed = float(how.get("speed", 0.0))
  sites = positions.grid(edges, spacing)
  reach = radius if edges == 1 else radius + np.hypot(*sites.T).max()

  @functools.lru_cache(maxsize=2)
  def at(seconds):
    points = positions.waypoint(
      ids,
      seconds,
      run.seed,
      radius=reach,
      speed=speed,
      pause=float(how.get("pause", 0.0)),
    )
    return np.maximum(positions.distances(points, sites), 1.0)

  return (lambda seconds: at(seconds)) if speed else (lambda seconds: at(0.0))


_STATIONS = ("spacing", "speed", "pause", "hysteresis", "capacity", "outages")


def _home(run: schema.Config, edges: int) -> Callable | None:
  """Which edge hears each client; None where there is one."""
  how = run.network.stations
  unknown = sorted(set(how) - set(_STATIONS))
  if unknown:
    raise ValueError(
      f"network.stations has no {unknown[0]!r}; one of {', '.join(_STATIONS)}"
    )
  if edges == 1:
    return None
  alive = failover.outages(edges, how.get("outages"))
  capacity = how.get("capacity")
  hysteresis = float(how.get("hysteresis", 0.0))

  def home(distance, number, before):
    here = alive(number)
    if not here.any():
      raise ValueError(
        f"network.stations.outages leaves no edge alive in round {number}; "
        "keep one"
      )
    if capacity is not None:
      found = failover.assign(distance, here, int(capacity))
    else:
      found = failover.handover(before, distance, hysteresis, here)
    if (found < 0).any():
      raise ValueError(
        f"{int((found < 0).sum())} clients find no edge with room in round "
        f"{number}; raise network.stations.capacity"
      )
    return found

  return home


def _steps(run: schema.Config) -> tuple[Callable | None, frozenset[str]]:
  """How many local steps clients take, and the notes that this reads."""
  table = dict(run.network.steps)
  if not table:
    return None, frozenset()
  method = table.pop("method", None)
  where = "network.steps"
  if method == "adaptive":
    first = config.call(_first, table, where)

    def adaptive(ids, number, memory, seconds, links):
      start, now = memory["loss"]
      taken = first if start == 0 else steps.adaptive(first, start, now)
      return np.full(len(ids), taken, np.int64)

    return adaptive, frozenset({"loss"})
  if method == "within":
    options = config.call(_within, table, where)

    def within(ids, number, memory, seconds, links):
      links = np.where(np.isfinite(links), links, math.inf)
      finite = np.minimum(links, options["deadline"])
      return steps.within(overhead=finite, seconds=seconds, **options)

    return within, frozenset()
  raise ValueError(f"{where}.method must be adaptive or within, got {method!r}")


def _first(first: int) -> int:
  """Options of steps.method adaptive."""
  return first


def _within(deadline: float, most: int, least: int = 1) -> dict[str, Any]:
  """Options of steps.method within."""
  return {"deadline": deadline, "most": most, "least": least}


def group_of(
  run: schema.Config,
  population: data.Population,
  model: objective.Model,
  made: algorithm.Algorithm,
) -> plan.Grouping | None:
  """Which cluster each client belongs to; None where there are none.

  Raises:
    ValueError: if a config groups clients whom nothing keeps apart, or keeps
      them apart without saying how they are grouped.
  """
  table = dict(run.cohort.group)
  clusters = made.tiers[0].size
  is_clustered = made.tiers[0].name == "cluster"
  if not table and is_clustered:
    table = {"by": "loss"} if run.algorithm["name"] == "ifca" else {}
  if bool(table) != is_clustered:
    raise ValueError(
      "clusters need an algorithm that has them and a way to find them: got "
      f"algorithm={run.algorithm} and cohort.group={dict(run.cohort.group)}; "
      'write algorithm={name="clustered", clusters=3} and '
      'cohort.group={by="update"}'
    )
  if not table:
    return None
  where = "cohort.group"
  count = len(population)

  def loss():
    here = settings.Settings("shard_map", len(jax.devices()), 1, 1, 16)
    return grouping.by_loss(
      count, preference.choose(made, model, population, here, batch=64)
    )

  def update(at: tuple[int, ...] = (5,), clusters_: int | None = None):
    return grouping.by_update(count, clusters, at=at, clusters=clusters_)

  def device(seed: int = run.seed):
    machines = _fleet(run, count)
    metres = positions.disc(np.arange(count), run.seed, radius=1.0)
    away = np.hypot(*metres.T)
    features = np.stack([np.log(machines.flops), away], 1)
    means = centroid.kmeans(centroid.standardize(features), clusters, seed=seed)
    return grouping.fixed(means.labels)

  def planted():
    if "group" not in population.traits:
      raise ValueError("by='planted' needs data.groups; write data.groups=3")
    return grouping.fixed(population.traits["group"] % clusters)

  kinds = {
    "device": device,
    "loss": loss,
    "planted": planted,
    "update": update,
  }
  make, rest = compose.named(kinds, table, "by", where)
  if "clusters" in rest and make is update:
    rest["clusters_"] = rest.pop("clusters")
  return config.call(make, rest, where)
