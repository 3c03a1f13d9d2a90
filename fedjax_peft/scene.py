"""Scenes: from the tables of a config to a simulated network.

Machines, links, availability, faults, selection and a clock by the names that
a config calls them, each checked against the function that it stands for.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedjax_peft import (
  algorithm,
  compose,
  config,
  data,
  demand,
  notes,
  objective,
  plan,
  schema,
  splitting,
  summing,
  traffic,
  validate,
  work,
)
from fedjax_peft.network import (
  availability,
  clock,
  fault,
  ledger,
  multi,
  profile,
  radio,
  scenario,
  selection,
  serving,
  station,
  steps,
  timeline,
  trace,
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
  *,
  also: frozenset[str] = frozenset(),
) -> plan.Plan:
  """The plan of a simulated network.

  Args:
    run: the config.
    population: who there is.
    model: what is trained.
    made: the algorithm in its general form, with what faults do.
    also: notes that clients send for others than the network.

  Raises:
    ValueError: if a name or an option does not exist, or parts do not fit.
  """
  net, clients = run.network, len(population)
  select = select_of(net.select or {"method": "uniform"})
  machines = fleet_of(run, clients)
  stand = config.call(station.stations, net.stations, "network.stations")
  air = links_of(run)
  when = clock_of(run)
  mixing = compose.mixing_of(run, clients)
  if when.is_open and mixing is not None:
    raise ValueError(
      "gossip has no server whose model moves on while clients work: got "
      f"network.clock={net.clock}; use a synchronous or deadline clock"
    )
  if net.allocate and mixing is not None:
    raise ValueError(
      "gossip has no server that decides for clients: got network.allocate="
      f"{net.allocate}; leave it out, or use another algorithm"
    )
  adapt = splitting.adapt_of(run, model, made.work, air, when.is_open)
  if when.is_open:  # who is at work at one time has a part of the band each
    air = multi.divided(air, when.concurrency)
  count, hears = _steps(run)
  clustered = _is_clustered(run, made)
  places = 1 if clustered else made.tiers[0].size
  told = hears | also | ({"loss"} & select.reads)
  said = sum(notes.NOTES[name].nbytes for name in told)
  up, down = summing.beside(run)
  sizes = traffic.sizes(made, run.cohort.size)
  needs = demand.needs(made.work, model, population)
  if adapt is not None and adapt.needs is not None:
    needs = np.full(clients, adapt.needs)
  where = world.World(
    seed=run.seed,
    examples=population.train.sizes.astype(np.int64),
    seen=population.seen,
    fleet=machines,
    radio=air,
    distance=station.distance(
      stand, clients, places, multi.radius(air), run.seed
    ),
    load=demand.load(
      made.work, model, population, sizes, (said + up, down), mixing
    ),
    needs=needs,
    before=demand.before(made.work, population),
    hops=[] if clustered else _hops(run, made),
    home=station.home(stand, places),
    fault=fault_of(run, len(population.classes)),
    available=available_of(run),
    select=select,
    prices=prices_of(run),
    steps=count,
    server=server_of(run, made.work),
    adapt=adapt,
    recharge=net.recharge,
  )
  return timeline.plan(where, when, run.cohort.size, hears=hears)


def server_of(run: schema.Config, job: work.Work) -> serving.Server | None:
  """What computes the server's part of clients' steps, if there is one."""
  if job.split is None:
    return None
  return serving.server(
    run.split.server_flops,
    shared=run.split.server == "shared",
    waits=job.split.waits,
    common=job.split.common,
  )


def available_of(run: schema.Config) -> availability.Availability:
  """Who can be reached."""
  where = "network.available"
  table = run.network.available or {"kind": "always"}
  make, rest = compose.named(availability.AVAILABILITIES, table, "kind", where)
  if make is availability.trace and "path" in rest:
    return config.call(make, rest, where, path=str(rest.pop("path")))
  return config.call(make, rest, where)


def prices_of(run: schema.Config) -> ledger.Prices:
  """What traffic and requests cost.

  Raises:
    ValueError: if a price has no name, or is no amount of money.
  """
  where = "network.prices"
  found = config.call(ledger.Prices, run.network.prices, where)
  for name, value in found._asdict().items():
    if not 0 <= value < np.inf:
      raise ValueError(
        f"{where}.{name} must be at least 0 dollars, got {value}; leave it out "
        "where nothing is paid"
      )
  return found


LINKS: dict[str, Callable] = {**radio.RADIOS, "trace": trace.read_trace}


def links_of(run: schema.Config) -> multi.Links:
  """The clients' links: one radio or several, or rates from a file."""
  net, found = run.network, []
  tables = [("network.radio", net.radio or {"kind": "cell"})]
  tables += [(f"network.also.{i}", table) for i, table in enumerate(net.also)]
  for where, table in tables:
    make, rest = compose.named(LINKS, table, "kind", where)
    found.append(config.call(make, rest, where))
  if not net.also:
    if net.access:
      raise ValueError(
        "network.access says how several radios are used, but there is one: "
        'name others, network.also=[{kind="wifi"}]'
      )
    return found[0]
  if any(isinstance(one, trace.Trace) for one in found):
    raise ValueError(
      "recorded rates are all that a client has: got network.radio or "
      "network.also of kind 'trace' beside others; leave the others out"
    )
  return config.call(multi.multi, net.access, "network.access", radios=found)


def _is_clustered(run: schema.Config, made: algorithm.Algorithm) -> bool:
  """Whether nodes are models of one receiver, not receivers elsewhere.

  The edges of HiLoRA are either: those that clients are grouped by, or near to.
  """
  grouped = run.algorithm.get("name") == "hilora" and bool(run.cohort.group)
  return made.tiers[0].name == "cluster" or grouped


def fleet_of(run: schema.Config, clients: int) -> profile.Fleet:
  """The clients' machines: from a file, or drawn.

  Raises:
    ValueError: if both are said, or the file has too few rows.
  """
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
  memory = fleet_of(run, len(population)).memory
  rank = np.array(population.traits["rank"])
  for smaller in sorted(map(int, run.aggregate.ranks), reverse=True):
    here = population.with_traits(rank=np.minimum(rank, smaller))
    held = population.with_traits(rank=rank)
    tight = demand.needs(job, model, held) > memory
    fits = demand.needs(job, model, here) <= memory
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


class Counted(NamedTuple):
  """How many local steps clients take.

  Attributes:
    steps: see `World.steps`; None is what the local work says.
    hears: notes that this reads.
  """

  steps: Callable[..., np.ndarray] | None = None
  hears: frozenset[str] = frozenset()


def adaptive(first: int) -> Counted:
  """The same for all, fewer as the loss falls; see `steps.adaptive`."""
  validate.at_least(1, first=first)

  def count(ids, number, memory, seconds, links):
    start, now = memory["loss"]
    taken = first if start == 0 else steps.adaptive(first, start, now)
    return np.full(len(ids), taken, np.int64)

  return Counted(count, frozenset({"loss"}))


def within(deadline: float, most: int, least: int = 1) -> Counted:
  """As many as fit into a deadline; see `steps.within`."""
  fits = functools.partial(steps.within, deadline, least=least, most=most)
  fits(seconds=np.ones(1))  # refuses what is out of range

  def count(ids, number, memory, seconds, links):
    # Who has no link is late anyway, with any overhead.
    return fits(seconds=seconds, overhead=np.minimum(links, deadline))

  return Counted(count)


STEPS: dict[str, Callable[..., Counted]] = {
  "adaptive": adaptive,
  "within": within,
}


def _steps(run: schema.Config) -> Counted:
  """How many local steps clients take, and the notes that this reads."""
  if not run.network.steps:
    return Counted()
  where = "network.steps"
  make, rest = compose.named(STEPS, run.network.steps, "method", where)
  return config.call(make, rest, where)


def select_of(
  table: schema.Table, where: str = "network.select"
) -> selection.Selection:
  """Whom the server asks; `charged` chooses by another one, named or a table.

  Args:
    table: {method="charged", then={method="by_loss", power=2.0}}.
    where: dotted key of the table, for messages.
  """
  make, rest = compose.named(selection.SELECTIONS, table, "method", where)
  if make is not selection.charged:
    return config.call(make, rest, where)
  then = rest.pop("then", "uniform")
  inner = then if isinstance(then, dict) else {"method": then}
  return config.call(make, rest, where, then=select_of(inner, f"{where}.then"))
