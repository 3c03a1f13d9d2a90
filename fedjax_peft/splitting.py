"""Splitting: from the `split` table of a config to a model that is cut."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from fedjax_peft import (
  algorithm,
  compose,
  config,
  data,
  objective,
  remembering,
  schema,
  split,
  work,
)
from fedjax_peft.network import adaptation, multi
from fedjax_peft.split import adapting, offline

WHOLE = "whole"  # a client that is not cut


def is_split(run: schema.Config) -> bool:
  """Whether a config cuts its model.

  Raises:
    ValueError: if it says how, but not where, or what does not go together.
  """
  table = run.split
  remembering.refuse(run)
  if table.ends and table.cuts:
    raise ValueError(
      "split.ends cuts all clients' model in one place, split.cuts each "
      "client's in its own: got both; remove one of them"
    )
  if not table.ends and not table.cuts:
    odd = table != schema.Split()
    if odd:
      raise ValueError(
        "the split table must say where the model is cut: got neither ends nor "
        "cuts; write --set 'split.ends={device=\"embeddings\"}'"
      )
    return False
  if table.bits and (not table.cuts or table.up or table.down):
    raise ValueError(
      "split.bits says what crosses cuts that move: got "
      f"cuts={dict(table.cuts)} up={list(table.up)} down={list(table.down)}; "
      "write split.cuts, and leave up and down out"
    )
  if table.bits and not run.network.allocate:
    raise ValueError(
      "split.bits leaves the bits of a value to network.allocate, which says "
      "nothing: write --set 'network.allocate={by=\"joint\"}'"
    )
  if table.cuts and (table.scheme != "splitfed" or table.cache != "no"):
    raise ValueError(
      "clients cut in different places have copies of the server's parts: got "
      f"split.cuts with scheme={table.scheme!r} cache={table.cache!r}; use "
      "split.ends, or leave these out"
    )
  return True


def module_of(
  run: schema.Config, module: Any, population: data.Population
) -> nnx.Module:
  """The module, cut; adapters come after."""
  table = run.split
  if table.cuts:
    (wire,) = _wires(run, 1)
    return split.movable(module, wire, bits=table.bits, seed=run.seed)
  ends = dict(table.ends)
  stages = module.stages()
  done = list(ends.values())[-1]
  if done not in (len(stages), stages[-1].name):
    if "server" in ends:
      raise ValueError(
        "the last part of split.ends must reach the model's end, since "
        f"'server' is taken: got {ends}; write home = {stages[-1].name!r}"
      )
    ends["server"] = None
  wires = _wires(run, len(ends) - 1)
  pipe = split.pipeline(module, ends, wires, seed=run.seed)
  if table.scheme == "local_loss":
    return _with_head(run, pipe, population)
  return pipe


def _with_head(run, pipe, population):
  """The pipeline, with a head at the device."""
  classes = len(population.classes)
  if run.model.loss == "next_token" or not classes:
    raise ValueError(
      "a device with a loss of its own says the class of an example: got "
      f"model.loss={run.model.loss!r} and data of {classes} classes; use "
      "another split.scheme"
    )
  features = {
    k: jax.ShapeDtypeStruct((1, *v.shape), v.dtype)
    for k, v in population.spec.items()
    if k != "label"
  }
  graph, state = nnx.split(pipe.parts()[0])
  message = jax.eval_shape(
    lambda state, given: nnx.merge(graph, state)(**given), state, features
  )
  width = message["x"].shape[-1]
  return split.with_head(pipe, width, classes, seed=run.seed)


def _wires(run: schema.Config, count: int) -> list[split.Wire]:
  """What crosses each cut; to a device's own part maybe no gradient."""
  table = run.split
  up = compose.chain_of(table.up, "split.up")
  down = compose.chain_of(table.down, "split.down")
  wire = split.Wire(up, down, common=table.scheme == "one_gradient")
  if table.gradient and table.scheme != "local_loss" and table.cache == "no":
    return [wire] * count
  if table.down and count == 1:
    raise ValueError(
      "split.down says what gradients cross, but none come back: leave "
      f"split.down out, got {list(table.down)}"
    )
  return [wire._replace(down=None), *[wire] * (count - 1)]


def population_of(
  run: schema.Config, module: Any, population: data.Population
) -> data.Population:
  """The clients, who know where they are cut."""
  population = remembering.population_of(run, population)
  if not run.split.cuts:
    return population
  names = [stage.name for stage in module.stages()]
  shares = {
    place_of(cut, names, "split.cuts"): share
    for cut, share in run.split.cuts.items()
  }
  which = compose.drawn(shares, len(population), run.seed, "split.cuts", 5)
  known = {"cut": np.asarray(which)}
  if run.split.bits:
    known["bits"] = np.full(len(population), 32)
  return population.with_traits(**known)


def place_of(cut: str | int, names: Sequence[str], where: str) -> int:
  """How many stages a device computes, as a config calls it.

  Args:
    cut: a stage, a number of stages, or "whole".
    names: of the stages.
    where: dotted key, for messages.
  """
  text = str(cut)
  if text == WHOLE:
    return len(names)
  if text in names:
    return names.index(text) + 1
  if text.isdecimal() and 1 <= int(text) <= len(names):
    return int(text)
  raise ValueError(
    f"{where} must name stages ({', '.join(names)}), numbers of them, "
    f"or {WHOLE!r}: got {cut!r}"
  )


def adapt_of(
  run: schema.Config,
  model: objective.Model,
  job: work.Work,
  links: multi.Links,
  is_open: bool,
) -> adaptation.Adaptation | None:
  """What the server decides for clients in every round of a network.

  Args:
    run: the config.
    model: what is trained.
    job: what clients do.
    links: of all, before an open clock divides them.
    is_open: whether the clock is.

  Raises:
    ValueError: if that needs another split, other links or another clock.
  """
  where, table = "network.allocate", run.network.allocate
  if not table:
    return None
  make, rest = compose.named(adapting.POLICIES, table, "by", where)
  adaptation.cell(links)
  if make is adapting.bandwidth and is_open:
    raise ValueError(
      f"{where}: under an open clock clients begin at different times, each "
      f"with a part of the band: got by='bandwidth' and network.clock="
      f"{run.network.clock}; use a synchronous clock, or by='joint'"
    )
  given: dict[str, Any] = {}
  if make in (adapting.cut, adapting.joint):
    given = _movable(run, model, job, make, rest, where)
  elif run.split.bits:
    raise ValueError(
      f"split.bits needs a {where} that chooses bits: got {dict(table)}; use "
      "by='joint' or by='cut', or leave split.bits out"
    )
  return config.call(make, rest, where, **given)


def _movable(run, model, job, make, rest, where) -> dict[str, Any]:
  """What policies know of the model; its stages in `rest` become numbers."""
  table = run.split
  lacks = [k for k in ("cuts", "bits", "least_cut") if k in rest]
  if not table.cuts and (make is adapting.cut or lacks):
    raise ValueError(
      f"{where} chooses cuts and bits of a model whose cut moves: got "
      f"{lacks or make.__name__} without split.cuts; write "
      "--set 'split.cuts={1=1.0}' for where clients begin, or by='bandwidth'"
    )
  if "bits" in rest and not table.bits:
    raise ValueError(
      f"{where}.bits are for values whose bits move: got {rest['bits']}; write "
      "--set split.bits=true"
    )
  if not table.cuts:
    return {"split": None, "stages": 0}
  names = [stage.name for stage in model.origin.stages()]
  if isinstance(rest.get("cuts"), list):
    at = f"{where}.cuts"
    rest["cuts"] = [place_of(x, names, at) for x in rest["cuts"]]
  if "least_cut" in rest:
    rest["least_cut"] = place_of(rest["least_cut"], names, f"{where}.least_cut")
  given = {"split": job.split, "stages": len(names)}
  return given if table.bits else {**given, "bits": ()}


def remembered(
  run: schema.Config, module: Any, population: data.Population
) -> tuple[nnx.Module, data.Population]:
  """Module and data as they are trained on.

  A frozen first part has been computed, and clients have memories; adapters
  come before.
  """
  if run.split.cache != "no":
    first = split.prefix_of(
      module, precision=run.execution.precision, dtype=run.split.cache
    )
    return first.rest, first.remembered(population)
  return remembering.module_of(run, module, population), population


def loss_of(run: schema.Config, loss: Callable) -> Callable:
  """The loss, and that of the devices where they have their own."""
  if remembering.has_outage(run):
    return offline.gated(loss)
  if run.split.scheme != "local_loss":
    return loss
  return split.local_loss(loss)


IN_TURN = {"shared_server": "server", "sequential": "all"}
LOCKSTEP = ("lockstep", "one_gradient")


def algorithm_of(
  run: schema.Config,
  population: data.Population,
  model: objective.Model,
  how: work.Local,
  server: optax.GradientTransformation,
) -> algorithm.Algorithm:
  """What clients and servers do with a model that is cut."""
  run, how = remembering.local_of(run, how)
  scheme, examples = run.split.scheme, population.examples
  if scheme not in IN_TURN and scheme not in LOCKSTEP:
    made = compose.algorithm_of(run, population, model, how, server)
    over = split.hybrid if run.split.cuts else split.splitfed
    made = over(made, model, examples)
    return offline.tolerant(made) if remembering.has_outage(run) else made
  odd = [
    name
    for name in ("algorithm", "aggregate", "attack")
    if getattr(run, name) != getattr(compose.PLAIN, name)
  ]
  if run.client.proximal:
    raise ValueError(
      f"split.scheme {scheme!r} has no proximal term: got client.proximal="
      f"{run.client.proximal}; leave it out, or use scheme 'splitfed'"
    )
  if odd:
    raise ValueError(
      f"split.scheme {scheme!r} says itself what clients and servers do: got "
      f"{odd[0]}={getattr(run, odd[0])}; leave '{odd[0]}' out, or use "
      "scheme 'splitfed'"
    )
  given: dict[str, Any] = {
    "server": server,
    "downlink": compose.chain_of(run.downlink, "downlink"),
    "placement": run.placement,
  }
  if run.uplink != compose.PLAIN.uplink:
    given["uplink"] = compose.chain_of(run.uplink, "uplink")
  if scheme in LOCKSTEP:
    return split.lockstep(model, how, examples, **given)
  shared: Any = IN_TURN[scheme]
  return split.in_turn(model, how, examples, shared=shared, **given)
