"""Advice for configs: what is asked, and what a config then says."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import optax

from fedjax_peft import (
  build,
  compose,
  config,
  data,
  losses,
  models,
  offers,
  peft,
  scene,
  schema,
  work,
)
from fedjax_peft.network import adaptation, serving, station
from fedjax_peft.split import advising, answer, trial

_SAID = ("server", "server_flops")  # of a split, by whoever asks for advice


def asked(
  run: schema.Config,
  wanted: advising.Target,
  *,
  ranks: Sequence[int] = (),
  schemes: Sequence[str] = advising.SCHEMES,
) -> advising.Advice:
  """Advice for a config that cuts nothing.

  Args:
    run: model, data, devices and links; synchronous rounds, one cell.
    wanted: weights and limits.
    ranks: of adapters, to choose among; none: as they are.
    schemes: to choose among; federated training is always one.

  Raises:
    ValueError: if parts do not fit, or no scheme keeps within the limits.
  """
  population = population_of(run)
  name = run.model.loss
  if name == "auto":
    name = "classification" if population.classes else "next_token"
  how = work.local(
    optax.sgd(0.1),
    batch=run.client.batch,
    epochs=run.client.epochs or 1,
    steps=run.client.steps,
    drop_remainder=run.client.drop_remainder,
  )
  task = offers.Workload(
    module_of(run, population),
    lambda module, rank, where: adapted(run, module, rank, where),
    getattr(losses, name),
    how,
    population,
    min(run.cohort.size, int(population.seen.sum())),
    _federate(run, population),
    run.execution.precision,
  )
  listed = offers.offers(task, ranks or (0,), schemes)
  return advising.advise(listed, _place(run, population), wanted)


def pasted(advice: advising.Advice, run: schema.Config) -> dict[str, Any]:
  """{dotted key: value} that make a config train as advised.

  Args:
    advice: what `asked` returned.
    run: the config as it is, whose own cut gives way.
  """
  found, rank = answer.config(advice), advice.trial.candidate.offer.rank
  where = {"frozen": offers.SERVER, "sequential": "(device|server)/"}
  prefix = where.get(advice.scheme, "")
  if rank or prefix:
    found["model.peft"] = in_part(run.model.peft, rank, prefix)
  plain = schema.Split()
  for field in dataclasses.fields(plain):
    key, usual = f"split.{field.name}", getattr(plain, field.name)
    if field.name in _SAID or key in found:
      continue
    if getattr(run.split, field.name) != usual:
      found[key] = list(usual) if isinstance(usual, tuple) else usual
  return found


def whole(run: schema.Config) -> schema.Config:
  """The config without a cut; what it says of the server stays.

  Raises:
    ValueError: if its parts have names, which adapters' patterns may hold.
  """
  if run.split.ends:
    raise ValueError(
      "advice is for a model that is not cut yet, since its adapters are named "
      f"after parts: got split.ends={run.split.ends}; leave split.ends out, "
      "and write model.peft for the whole model"
    )
  said = {k: getattr(run.split, k) for k in _SAID}
  return dataclasses.replace(
    run,
    split=schema.Split(**said),
    network=dataclasses.replace(run.network, allocate={}),
  )


def in_part(tables: Sequence[schema.Table], rank: int, where: str) -> list:
  """Tables of `model.peft` of some rank, for layers of some parts.

  Args:
    tables: for the whole model.
    rank: 0 leaves each its own.
    where: regex of what comes before layers' names, "server/"; "" nothing.
  """
  if where and not tables:
    return [{"method": "tune", "where": f"{where}.*"}]
  found = []
  for given in tables:
    changed = dict(given)
    method = build.PEFT.get(str(given.get("method")))
    known = inspect.signature(method).parameters if method else {}
    if rank and "rank" in known:
      changed["rank"] = rank
    if where and "where" in known:
      own = given.get("where", known["where"].default)
      changed["where"] = f"{where}({own})"
    found.append(changed)
  return found


def population_of(run: schema.Config) -> data.Population:
  """The clients."""
  given = {k: v for k, v in run.data.items() if k not in ("name", "groups")}
  found = data.load(run.data["name"], **{"seed": run.seed, **given})
  return compose.ranked(run, found)


def module_of(run: schema.Config, population: data.Population) -> Any:
  """The model without adapters."""
  classes = {"classes": len(population.classes)} if population.classes else {}
  given = {"seed": run.seed, **classes, **run.model.options}
  if run.model.loss == "next_token":
    given.pop("classes", None)
  return models.load(run.model.name, **given)


def adapted(run: schema.Config, module: Any, rank: int, where: str) -> Any:
  """The module with the config's adapters, of a rank, in a part of it."""
  if run.model.quantize != "no":
    module = peft.quantize_base(module, run.model.quantize)
  for i, changed in enumerate(in_part(run.model.peft, rank, where)):
    at = f"model.peft.{i}"
    method, rest = compose.named(build.PEFT, changed, "method", at)
    given: dict[str, Any] = {"module": module}
    if "seed" in inspect.signature(method).parameters and "seed" not in rest:
      given["seed"] = run.seed
    module = config.call(method, rest, at, **given)
  return module


def _federate(run: schema.Config, population: data.Population):
  """What is cut: the config's algorithm."""

  def made(model, local, placement, uplink):
    chosen = dataclasses.replace(run, placement={**placement, **run.placement})
    if uplink is not None:
      chosen = dataclasses.replace(chosen, uplink=({"link": "weigh"},))
    found = compose.algorithm_of(
      chosen, population, model, local, optax.sgd(1.0)
    )
    if found.tiers[0].size != 1:
      raise ValueError(
        "advice is for clients of one cell, got an algorithm with "
        f"{found.tiers[0].size} nodes in tier '{found.tiers[0].name}'; leave "
        "algorithm out"
      )
    return found

  return made


def _place(run: schema.Config, population: data.Population) -> trial.Place:
  """Devices, links and server."""
  clients, radio = len(population), adaptation.cell(scene.links_of(run))
  stand = config.call(
    station.stations, run.network.stations, "network.stations"
  )
  metres = station.distance(stand, clients, 1, radio.radius, run.seed)(0.0)
  seen = np.flatnonzero(population.seen)
  return trial.Place(
    scene.fleet_of(run, clients),
    radio,
    metres[:, 0],
    serving.server(run.split.server_flops, shared=run.split.server == "shared"),
    seen,
    min(run.cohort.size, seen.size),
    run.seed,
  )
