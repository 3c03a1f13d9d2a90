"""Composing: from the tables of a config to what happens in a round.

Links, rules, reductions, algorithms and attacks by the names that a config
calls them, each checked against the function that it stands for.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from fedjax_peft import (
  algorithm,
  algorithms,
  alias,
  attack,
  config,
  data,
  link,
  links,
  objective,
  reduce,
  robust,
  rules,
  schema,
  validate,
  work,
)
from fedjax_peft.network import topology

LINKS: dict[str, Callable] = {
  "affine": links.affine,
  "clip": links.clip,
  "air": links.air,
  "count": links.count,
  "discount": links.discount,
  "fixed_point": links.fixed_point,
  "int4": links.int4,
  "int8": links.int8,
  "lowrank": links.lowrank,
  "mask": links.mask,
  "quantize": links.quantize,
  "rand_k": links.rand_k,
  "rotate": links.rotate,
  "sign": links.sign,
  "top_k": links.top_k,
  "weigh": links.weigh,
}
# What helps algorithms: for adapters, data and models, or a run of its own.
TOOLS = ("by_example", "find_nodes", "mix", "pooled", "slora", "stack")
ALGORITHMS: dict[str, Callable] = {
  "fedavg": alias.fedavg,
  "flasc": alias.flasc,
  **{
    name: getattr(algorithms, name)
    for name in algorithms.__all__
    if name not in TOOLS
  },
}
REDUCTIONS: dict[str, Callable] = {
  name: getattr(robust, name) for name in robust.__all__
}
ATTACKS: dict[str, Callable] = {
  name: getattr(attack, name)
  for name in ("gaussian", "label_flip", "scale", "sign_flip")
}


# What these algorithms say themselves, so that a config must not.
_TAKEN: dict[str, tuple[str, ...]] = {
  "centralized": ("placement",),
  "fedasync": ("server",),
  "flasc": ("uplink", "downlink"),
  "gossip": ("uplink", "downlink", "placement", "server"),
  "local_only": ("placement",),
  "reptile": ("server",),
}
PLAIN = schema.Config(model=schema.Model(name=""), data={})


def algorithm_of(
  run: schema.Config,
  population: data.Population,
  model: objective.Model,
  how: work.Local,
  server: optax.GradientTransformation,
) -> algorithm.Algorithm:
  """What clients and server do, from the config's parts."""
  name = run.algorithm.get("name", "fedavg")
  factory, options = named(
    ALGORITHMS, {**run.algorithm, "name": name}, "name", "algorithm"
  )
  given: dict[str, Any] = {
    "model": model,
    "local": how,
    "server": server,
  }
  if name != "centralized":
    given |= {
      "uplink": chain_of(run.uplink, "uplink"),
      "downlink": chain_of(run.downlink, "downlink"),
      "placement": placement_of(run),
    }
  for taken in _TAKEN.get(name, ()):
    if getattr(run, taken) != getattr(PLAIN, taken):
      raise ValueError(
        f"algorithm '{name}' says itself what '{taken}' is: got "
        f"{getattr(run, taken)}; leave '{taken}' out of the config"
      )
    given.pop(taken, None)
  known = inspect.signature(factory).parameters
  if "clients" in known:
    everyone = len(population)
    seen = int(population.seen.sum())
    given["clients"] = everyone if name == "afl" else seen
  if name == "centralized":
    given |= {"data": population, "cohort": run.cohort.size}
  if name == "moon":
    given["features"] = None  # those of the model
  if name == "feddpa" and algorithms.nearness.CENTER in model.params:
    options.pop("by_example", None)  # see model_of
  if name == "gossip":
    given = {"model": model, "local": how}
    given["mixing"] = _mixing(options, len(population), run.seed)
  if name == "pfedme":
    given["inner"] = optax.sgd(options.pop("inner_rate", 0.1))
  plain = {
    "proximal": run.client.proximal,
    "rule": rule_of(run),
    "ranks": bool(run.aggregate.ranks),
    "watch": run.aggregate.watch,
    "reduce": _reduction(run),
  }
  if name == "fedavg":
    given |= plain
  else:
    odd = [k for k, v in plain.items() if v]
    if odd:
      raise ValueError(
        f"'{odd[0]}' is an option of fedavg and does not go together with "
        f"algorithm '{name}'; leave one of them out"
      )
  made = config.call(factory, options, "algorithm", **given)
  return _attacked(run, population, made)


def placement_of(run: schema.Config) -> dict[str, str]:
  """Where leaves live, those that say where a client is cut among them."""
  if not run.split.cuts:
    return dict(run.placement)
  return {"crossing/.*": "frozen", **run.placement}


def model_of(
  run: schema.Config, model: objective.Model, examples: Mapping[str, Any]
) -> objective.Model:
  """The model as the algorithm needs it: FedDPA's may mix by example.

  Args:
    run: the config.
    model: with its adapters and its loss.
    examples: {name: [M, ...]}, for their shapes.
  """
  most = run.algorithm.get("by_example")
  if run.algorithm.get("name") != "feddpa" or most is None:
    return model
  return config.call(
    algorithms.by_example,
    {"most": most},
    "algorithm.by_example",
    model=model,
    examples=examples,
  )


def mixing_of(run: schema.Config, clients: int) -> np.ndarray | None:
  """Who sends to whom under gossip, [N, N]; None where there is a server."""
  if run.algorithm.get("name") != "gossip":
    return None
  return _mixing(dict(run.algorithm), clients, run.seed)


def _mixing(options: dict, clients: int, seed: int) -> np.ndarray:
  """The mixing matrix of the graph that gossip's options name."""
  table = {"graph": options.pop("graph", "ring")}
  for name in ("probability", "radius", "rows"):
    if name in options:
      table[name] = options.pop(name)
  where = "algorithm.graph"
  make, rest = named(topology.GRAPHS, table, "graph", where)
  known = inspect.signature(make).parameters
  more = {"seed": seed} if "seed" in known else {}
  return topology.metropolis(
    config.call(make, rest, where, nodes=clients, **more)
  )


def rule_of(run: schema.Config) -> rules.Rule | None:
  """How adapters are aggregated."""
  table = run.aggregate.rule
  if not table:
    return None
  where = "aggregate.rule"
  factory, rest = named(rules.RULES, table, "method", where)
  return config.call(factory, rest, where)


def ranked(run: schema.Config, population: data.Population) -> data.Population:
  """Gives every client a rank, in the shares that the config says."""
  shares = run.aggregate.ranks
  if not shares:
    return population
  where = "aggregate.ranks"
  rank = drawn(shares, len(population), run.seed, where, 4)
  return population.with_traits(rank=rank)


def drawn(
  shares: Mapping[Any, float], clients: int, seed: int, where: str, stream: int
) -> np.ndarray:
  """Numbers that clients have, in the shares that a config says.

  Args:
    shares: {number: share of the clients}.
    clients: N.
    seed: of the run.
    where: dotted key of the table, for messages.
    stream: apart from other draws.

  Returns:
    int64 [N].

  Raises:
    ValueError: if these are no shares of positive numbers.
  """
  good = all(
    str(k).isdecimal() and int(k) > 0 and isinstance(v, int | float) and v >= 0
    for k, v in shares.items()
  )
  if not good or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
    raise ValueError(
      f"{where} must be shares of the clients that sum to one: got "
      f"{dict(shares)}; write {{4 = 0.5, 8 = 0.5}}"
    )
  rng = np.random.default_rng([seed, stream])
  edges = np.cumsum([0, *shares.values()])
  place = rng.permutation(clients) / clients
  which = np.searchsorted(edges, place, side="right") - 1
  which = np.minimum(which, len(shares) - 1)
  return np.array([int(k) for k in shares])[which]


def _reduction(run: schema.Config) -> reduce.Reduce | None:
  """A robust reduction, if the config names one."""
  table = run.aggregate.reduce
  if not table:
    return None
  where = "aggregate.reduce"
  factory, rest = named(REDUCTIONS, table, "method", where)
  return config.call(factory, rest, where)


def _attacked(
  run: schema.Config, population: data.Population, made: algorithm.Algorithm
) -> algorithm.Algorithm:
  """The same algorithm, some of whose clients do what the config says."""
  if not run.attack:
    return made
  factory, rest = named(ATTACKS, run.attack, "method", "attack")
  rest = {k: v for k, v in rest.items() if k != "fraction"}
  given: dict[str, Any] = {"job": made.work}
  if run.attack["method"] == "label_flip":
    given["classes"] = len(population.classes)
  job = config.call(factory, rest, "attack", **given)
  return algorithm.federated(job, made.tiers)


def chain_of(tables: Sequence[schema.Table], where: str) -> link.Link:
  """The links of a config, put together."""
  parts = []
  for i, table in enumerate(tables):
    at = f"{where}.{i}"
    table = dict(table)
    feedback = table.pop("error_feedback", False)
    factory, rest = named(LINKS, table, "link", at)
    part = config.call(factory, rest, at)
    parts.append(links.error_feedback(part) if feedback is True else part)
  try:
    return link.chain(*parts)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def named(
  options: dict[str, Callable], table: schema.Table, kind: str, where: str
) -> tuple[Callable, schema.Table]:
  """The function that a free table names, and the rest of the table."""
  if kind not in table:
    raise ValueError(
      f"{where} must say its {kind}: got {dict(table)}; one of "
      f"{', '.join(options)}"
    )
  name = table[kind]
  if name not in options:
    raise ValueError(
      f"{where}.{kind} must be one of {', '.join(options)}, got {name!r}"
      f"{validate.near(name, options)}"
    )
  return options[name], {k: v for k, v in table.items() if k != kind}
