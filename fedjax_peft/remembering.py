"""Remembering: memories of clients, as configs say them.

`split.feedback` says later what a wire could not say at once, and the fault
`outage` lets devices go on with the last gradient that came (`split.memory`).
"""

import dataclasses
from typing import Any

import numpy as np
from flax import nnx

from fedjax_peft import data, schema, tailoring, work
from fedjax_peft.split import feedback, memory, offline


def has_outage(run: schema.Config) -> bool:
  """Whether links of clients are cut in the midst of their steps."""
  return any(table.get("fault") == "outage" for table in run.network.faults)


def refuse(run: schema.Config) -> None:
  """Raises ValueError if the model is not cut as a memory needs it."""
  _refuse_outage(run)
  _refuse_feedback(run.split)


def _refuse_outage(run):
  """Raises ValueError if links are cut that nobody can go on without."""
  table = run.split
  answered = table.gradient and table.cache == "no"
  if has_outage(run) and not (
    table.ends and table.scheme == "splitfed" and answered
  ):
    raise ValueError(
      "the fault 'outage' is for devices that go on with the last gradient "
      "that a server sent them, each with a server's copy of its own: got "
      f"split.ends={dict(table.ends)} cuts={dict(table.cuts)} "
      f"scheme={table.scheme!r} gradient={table.gradient} "
      f"cache={table.cache!r}; write split.ends with scheme='splitfed', or use "
      "the fault 'dropout'"
    )


def _refuse_feedback(table):
  """Raises ValueError if wires cannot say later what they could not say."""
  if not table.feedback:
    return
  odd = {
    "cuts": bool(table.cuts),
    "cache": table.cache != "no",
    "scheme": table.scheme == "one_gradient",
  }
  said = [k for k, is_odd in odd.items() if is_odd]
  if said:
    raise ValueError(
      "split.feedback keeps for each client what the wires of its own batches "
      f"lost, which is not for moving cuts, a cache or one common gradient: "
      f"got split.{said[0]}={getattr(table, said[0])!r}; leave split.feedback "
      "out"
    )


def population_of(
  run: schema.Config, population: data.Population
) -> data.Population:
  """The clients, who have a link in all steps where no outage is drawn."""
  if not has_outage(run):
    return population
  always = np.full(len(population), tailoring.ALWAYS)
  return population.with_traits(**{tailoring.ONLINE: always})


def module_of(
  run: schema.Config, module: Any, population: data.Population
) -> nnx.Module:
  """The module, cut and with its adapters, and the memories it needs."""
  given = run.client.batch, population.examples
  if run.split.feedback:
    module = feedback.with_memory(module, *given)
  if has_outage(run):
    module = offline.with_memory(module, *given)
  return module


def local_of(
  run: schema.Config, how: work.Local
) -> tuple[schema.Config, work.Local]:
  """The config and local training, which leave memories where they are.

  Raises:
    ValueError: if the algorithm would do something to a memory.
  """
  gone = has_outage(run)
  if not gone and not run.split.feedback:
    return run, how
  if run.algorithm.get("name", "fedavg") != "fedavg":
    what = "the fault 'outage'" if gone else "split.feedback"
    raise ValueError(
      f"{what} gives clients a memory, which no algorithm but fedavg leaves "
      f"alone: got algorithm={run.algorithm}; leave 'algorithm' out"
    )
  places = offline.PLACEMENT if gone else memory.PLACEMENT
  placed = dataclasses.replace(run, placement={**places, **run.placement})
  return placed, memory.remembering(how)
