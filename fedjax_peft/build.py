"""Building: from a config to the nouns it names.

Whatever a config asks for is checked here, before anything is compiled: names
and options against the functions they stand for, with the near names.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_peft import (
  algorithm,
  alias,
  config,
  data,
  link,
  links,
  losses,
  models,
  objective,
  peft,
  rounds,
  rules,
  sampling,
  schema,
  validate,
  work,
)
from fedjax_peft import settings as settings_lib

LINKS: dict[str, Callable] = {
  "clip": links.clip,
  "count": links.count,
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
PEFT: dict[str, Callable] = {"lora": peft.lora, "tune": peft.tune}


class Parts(NamedTuple):
  """What a config stands for.

  Attributes:
    data: the population.
    model: what is trained, what is shared, and the loss.
    algorithm: what happens in a round.
    cohort: who takes part.
    state: shapes and dtypes of what a run carries from round to round.
  """

  data: data.Population
  model: objective.Model
  algorithm: algorithm.Algorithm
  cohort: sampling.Sampler
  state: rounds.State


def build(run: schema.Config) -> Parts:
  """Builds the parts of a run.

  Raises:
    FileNotFoundError: if the data or the model are not on this machine.
    ValueError: if a name or an option does not exist, or parts do not fit.
  """
  options = {k: v for k, v in run.data.items() if k != "name"}
  population = data.load(run.data["name"], **{"seed": run.seed, **options})
  population = _ranks(run, population)
  rule = _rule(run)
  model = _model(run, population, residual=rule is not None and rule.residual)
  how = work.local(
    _rates(run),
    batch=run.client.batch,
    epochs=run.client.epochs or 1,
    steps=run.client.steps,
    shuffle=run.client.shuffle,
    drop_remainder=run.client.drop_remainder,
  )
  made = alias.fedavg(
    model,
    how,
    server=_server(run.server, run.rounds),
    uplink=_chain(run.uplink, "uplink"),
    downlink=_chain(run.downlink, "downlink"),
    placement=run.placement,
    proximal=run.client.proximal,
    rule=rule,
    ranks=bool(run.aggregate.ranks),
    watch=run.aggregate.watch,
  )
  if made.specialize is not None:
    made, _ = made.specialize(population)
  cohort = _sampler(run.cohort, population)
  most = cohort.most(population)
  # Tracing the first state lets every link refuse what it cannot carry.
  state = jax.eval_shape(
    lambda: made.init(clients=len(population), cohort=most)
  )
  return Parts(population, model, made, cohort, state)


def settings(run: schema.Config, parts: Parts) -> settings_lib.Settings:
  """Chooses how rounds are executed; what the config says is kept."""
  how = run.execution
  return settings_lib.choose(
    parts.algorithm,
    parts.model.base,
    parts.data.examples,
    parts.cohort.most(parts.data),
    executor_name=how.executor,
    blocks=how.blocks,
    width=how.width,
    segment=how.segment,
  )


def _rule(run: schema.Config) -> rules.Rule | None:
  """How adapters are aggregated."""
  table = run.aggregate.rule
  if not table:
    return None
  where = "aggregate.rule"
  if "method" not in table:
    raise ValueError(
      f'{where} must name a method: got {table}; write {{method="fedit"}}'
    )
  factory, rest = _named(rules.RULES, table, "method", where)
  return config.call(factory, rest, where)


def _ranks(run: schema.Config, population: data.Population) -> data.Population:
  """Gives every client a rank, in the shares that the config says."""
  shares = run.aggregate.ranks
  if not shares:
    return population
  good = all(
    str(k).isdecimal() and int(k) > 0 and isinstance(v, int | float) and v >= 0
    for k, v in shares.items()
  )
  if not good or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
    raise ValueError(
      "aggregate.ranks must be shares of the clients that sum to one, by rank: "
      f"got {dict(shares)}; write {{4 = 0.5, 8 = 0.5}}"
    )
  rng = np.random.default_rng([run.seed, 4])
  edges = np.cumsum([0, *shares.values()])
  place = rng.permutation(len(population)) / len(population)
  which = np.searchsorted(edges, place, side="right") - 1
  which = np.minimum(which, len(shares) - 1)
  return population.with_traits(rank=np.array([int(k) for k in shares])[which])


def _model(
  run: schema.Config, population: data.Population, *, residual: bool
) -> objective.Model:
  """The module with its adapters and its loss."""
  name, classes = run.model.loss, len(population.classes)
  if name == "auto":
    name = "classification" if classes else "next_token"
  options: dict[str, Any] = {"seed": run.seed}
  if name == "classification":
    if not classes:
      raise ValueError(
        "model.loss 'classification' needs data with labels, got "
        f"{population.name!r} without; write --set model.loss=next_token"
      )
    options["classes"] = classes
  module = models.load(run.model.name, **options | run.model.options)
  for i, table in enumerate(run.model.peft):
    where = f"model.peft.{i}"
    method, rest = _named(PEFT, table, "method", where)
    given: dict[str, Any] = {"module": module}
    if table["method"] == "lora" and "seed" not in rest:
      given["seed"] = run.seed
    if residual and table["method"] == "lora":
      rest = {"residual": True, **rest}
    module = config.call(method, rest, where, **given)
  loss = getattr(losses, name)
  return objective.model(module, loss, precision=run.execution.precision)


def _named(
  options: dict[str, Callable], table: schema.Table, kind: str, where: str
) -> tuple[Callable, schema.Table]:
  """The function that a free table names, and the rest of the table."""
  name = table[kind]
  if name not in options:
    raise ValueError(
      f"{where}.{kind} must be one of {', '.join(options)}, got {name!r}"
      f"{validate.near(name, options)}"
    )
  return options[name], {k: v for k, v in table.items() if k != kind}


def _chain(tables: Sequence[schema.Table], where: str) -> link.Link:
  """The links of a config, put together."""
  parts = []
  for i, table in enumerate(tables):
    at = f"{where}.{i}"
    table = dict(table)
    feedback = table.pop("error_feedback", False)
    factory, rest = _named(LINKS, table, "link", at)
    part = config.call(factory, rest, at)
    parts.append(links.error_feedback(part) if feedback is True else part)
  try:
    return link.chain(*parts)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def _rates(run: schema.Config) -> Callable:
  """The clients' optimizer as a function of the round."""
  how = run.client
  make = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=how.momentum),
    "adam": optax.adam,
    "adamw": optax.adamw,
  }[how.optimizer]
  if how.schedule == "constant" and not how.warmup:
    fixed = make(how.learning_rate)
    return lambda round: fixed
  length = max(run.rounds - how.warmup, 1)

  def optimizer(round):
    done = jnp.asarray(round).astype(jnp.float32)
    part = jnp.clip((done - how.warmup) / length, 0, 1)
    shape = {
      "constant": jnp.ones_like(part),
      "linear": 1 - part,
      "cosine": (1 + jnp.cos(np.pi * part)) / 2,
    }[how.schedule]
    rise = jnp.minimum(1, (done + 1) / (how.warmup + 1))
    return make(how.learning_rate * rise * shape)

  return optimizer


def _server(how: schema.Server, rounds: int) -> optax.GradientTransformation:
  """The server's optimizer."""
  rate = {
    "constant": lambda peak: peak,
    "linear": lambda peak: optax.linear_schedule(peak, 0.0, rounds),
    "cosine": lambda peak: optax.cosine_decay_schedule(peak, rounds),
  }[how.schedule](how.learning_rate)
  return {
    "sgd": lambda: optax.sgd(rate),
    "momentum": lambda: optax.sgd(rate, momentum=how.momentum),
    "adam": lambda: optax.adam(rate, b1=how.b1, b2=how.b2, eps=how.eps),
    "yogi": lambda: optax.yogi(rate, b1=how.b1, b2=how.b2, eps=how.eps),
    "adagrad": lambda: optax.adagrad(
      rate, initial_accumulator_value=how.eps**2, eps=how.eps
    ),
  }[how.optimizer]()


def _sampler(
  how: schema.Cohort, population: data.Population
) -> sampling.Sampler:
  """Who takes part, checked against the population."""
  seen = int(population.seen.sum())
  if how.size > seen:
    raise ValueError(
      f"cohort.size must be at most the {seen} clients to train on, got "
      f"{how.size}; write --set cohort.size={seen}"
    )
  if how.sampler == "poisson":
    return sampling.poisson(how.size / seen)
  return sampling.uniform(how.size)
