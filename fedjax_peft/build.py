"""Building: from a config to the nouns it names.

Whatever a config asks for is checked here, before anything is compiled: names
and options against the functions they stand for, with the near names.
"""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_peft import (
  algorithm,
  algorithms,
  attack,
  compose,
  config,
  data,
  demand,
  losses,
  membership,
  models,
  objective,
  peft,
  plan,
  rounds,
  sampling,
  scene,
  schema,
  splitting,
  work,
)
from fedjax_peft import settings as settings_lib
from fedjax_peft.governance import configured
from fedjax_peft.privacy import cyclic
from fedjax_peft.trust import configured as trusted

PEFT: dict[str, Callable] = {**peft.METHODS, "stack": algorithms.stack}


class Parts(NamedTuple):
  """What a config stands for.

  Attributes:
    data: the population.
    model: what is trained, what is shared, and the loss.
    algorithm: what happens in a round.
    cohort: who takes part in every round.
    state: shapes and dtypes of what a run carries from round to round.
    group: which cluster each client belongs to.
    private: the `privacy.mechanism.Mechanism` of its sums.
    holdout: rows of the examples that the server has for the gate.
  """

  data: data.Population
  model: objective.Model
  algorithm: algorithm.Algorithm
  cohort: plan.Plan
  state: rounds.State
  group: plan.Grouping | None = None
  private: Any = None
  holdout: np.ndarray | None = None


def build(run: schema.Config) -> Parts:
  """Builds the parts of a run.

  Raises:
    FileNotFoundError: if the data or the model are not on this machine.
    ValueError: if a name or an option does not exist, or parts do not fit.
  """
  options = {k: v for k, v in run.data.items() if k != "name"}
  groups = options.pop("groups", 1)
  population = data.load(run.data["name"], **{"seed": run.seed, **options})
  if groups != 1:
    population = data.planted(population, groups, seed=run.seed)
  population = compose.ranked(run, population)
  if run.attack:
    population = attack.attackers(
      population, run.attack.get("fraction", 0.2), seed=run.seed
    )
  population, canaries = trusted.planted(run, population)
  rule = compose.rule_of(run)
  residual = rule is not None and rule.residual
  model, population = _model(run, population, residual=residual)
  model = compose.model_of(run, model, population.examples)
  how = work.local(
    _rates(run),
    batch=run.client.batch,
    epochs=run.client.epochs or 1,
    steps=run.client.steps,
    shuffle=run.client.shuffle,
    drop_remainder=run.client.drop_remainder,
  )
  server = _server(run.server, run.rounds)
  over = splitting if splitting.is_split(run) else compose
  made = over.algorithm_of(run, population, model, how, server)
  if run.privacy != schema.Privacy():
    made = _protecting().by_example(run, model, how, made, population)
  if run.algorithm.get("name") == "centralized":
    population = algorithms.pooled(population)
  limited = [k for k, v in dataclasses.asdict(run.budget).items() if v]
  if limited and not scene.is_simulated(run) and limited != ["epsilon"]:
    raise ValueError(
      f"budget.{limited[0]} needs a simulated network, which counts what is "
      "spent: say what it is like, such as "
      "--set 'network.clock={kind=\"synchronous\"}'"
    )
  size = 1 if len(population) == 1 else run.cohort.size
  sampler = _sampler(run.cohort, size, population)
  group = membership.group_of(run, population, model, made)
  private, again = None, None
  if scene.is_simulated(run):
    also = frozenset() if group is None else group.hears
    population, made, cohort, private = _simulated(
      run, population, model, made, also
    )
  else:
    most = sampler.most(population)
    made, private = _protected(run, population, model, made, most)
    before = demand.before(made.work, population)
    again = functools.partial(plan.sampled, sampler, population, before=before)
    cohort = again(run.seed)
  if made.specialize is not None and not cohort.pool and canaries is None:
    made, _ = made.specialize(population)
  if group is not None:
    cohort = plan.grouped(cohort, group)
  if private is not None:
    cohort = _protecting().counted(run, made, cohort, private, again)
  made = trusted.guarded(run, made, model, cohort, canaries)
  if cohort.hears or cohort.pool:
    made = plan.prepared(cohort, made)
  # Tracing the first state lets every link refuse what it cannot carry.
  state = jax.eval_shape(
    lambda: made.init(clients=len(population), cohort=cohort.most)
  )
  state = state._replace(plan=cohort.init())
  parts = Parts(population, model, made, cohort, state, group, private)
  return configured.governed(run, parts)


def _protected(run, population, model, made, most):
  """The algorithm with the private sum that a config says, if it says one."""
  if run.privacy == schema.Privacy():
    return made, None
  return _protecting().protected(run, population, model, made, most)


def _protecting():
  """The module of private sums, which needs the extra `privacy`."""
  try:
    return importlib.import_module("fedjax_peft.protecting")
  except ImportError as error:
    raise ValueError(
      f"the privacy table needs packages that are not installed ({error}); "
      "pip install 'fedjax-peft[privacy]'"
    ) from error


def _simulated(run, population, model, made, also):
  """What a simulated network makes of data and algorithm, and its plan."""
  if run.algorithm.get("name") == "centralized":
    raise ValueError(
      "what is trained in one place crosses no network: got algorithm "
      "'centralized' with a simulated network; leave 'network' out"
    )
  if run.cohort.sampler != "uniform":
    raise ValueError(
      f"whom a simulated network asks is said by network.select: got "
      f"cohort.sampler={run.cohort.sampler!r}; write "
      "--set 'network.select={method=\"poisson\", rate=0.1}'"
    )
  fault = scene.fault_of(run, len(population.classes))
  population = fault.data(population, run.seed)
  job = fault.wrap(made.work)
  if job is not made.work:
    made = algorithm.extended(made, job=job)
  population = scene.fitted(run, population, model, made.work)

  def planned(made):
    return scene.plan_of(run, population, model, made, also=also)

  cohort, private = planned(made), None
  if run.privacy != schema.Privacy():
    made, private = _protected(run, population, model, made, cohort.most)
    cohort = planned(made)  # its messages have other sizes
  return population, made, cohort, private


def settings(run: schema.Config, parts: Parts) -> settings_lib.Settings:
  """Chooses how rounds are executed; what the config says is kept."""
  how = run.execution
  return settings_lib.choose(
    parts.algorithm,
    parts.model.base,
    parts.data.examples,
    parts.cohort.most,
    executor_name=how.executor,
    blocks=how.blocks,
    width=how.width,
    segment=how.segment,
  )


def _model(
  run: schema.Config, population: data.Population, *, residual: bool
) -> tuple[objective.Model, data.Population]:
  """The module with its adapters and its loss, and data as it reads them."""
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
  is_split = splitting.is_split(run)
  if is_split:
    population = splitting.population_of(run, module, population)
    module = splitting.module_of(run, module, population)
  if run.model.quantize != "no":
    module = peft.quantize_base(module, run.model.quantize)
  for i, table in enumerate(run.model.peft):
    where = f"model.peft.{i}"
    method, rest = compose.named(PEFT, table, "method", where)
    given: dict[str, Any] = {"module": module}
    if "seed" in inspect.signature(method).parameters and "seed" not in rest:
      given["seed"] = run.seed
    if residual and method is peft.lora:
      rest = {"residual": True, **rest}
    module = config.call(method, rest, where, **given)
  loss = getattr(losses, name)
  trusted.cut(run, module, population)
  if is_split:
    module, population = splitting.remembered(run, module, population)
    loss = splitting.loss_of(run, loss)
  made = objective.model(module, loss, precision=run.execution.precision)
  return made, population


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
  how: schema.Cohort, size: int, population: data.Population
) -> sampling.Sampler:
  """Who takes part, checked against the population."""
  seen = int(population.seen.sum())
  if size > seen:
    raise ValueError(
      f"cohort.size must be at most the {seen} clients to train on, got "
      f"{size}; write --set cohort.size={seen}"
    )
  if how.sampler == "poisson":
    return sampling.poisson(size / seen)
  if how.sampler == "cyclic":
    return cyclic.of_size(size, how.period, seen)
  return sampling.uniform(size)
