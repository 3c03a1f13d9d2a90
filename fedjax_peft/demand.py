"""Demand: what a round asks of clients' machines and links.

Bytes of what crosses, FLOPs of local steps and the memory that training takes,
of each client by what it is; a simulated network turns them into time, energy
and money.
"""

import types
from collections.abc import Callable

import numpy as np

from fedjax_peft import (
  data,
  factored,
  objective,
  one_step,
  settings,
  traffic,
  tree,
  work,
)
from fedjax_peft.algorithms import peers
from fedjax_peft.network import ledger


def load(
  job: work.Work,
  model: objective.Model,
  population: data.Population,
  sizes: traffic.Sizes,
  more: tuple[int, int] = (0, 0),
  mixing: np.ndarray | None = None,
) -> Callable[..., ledger.Load]:
  """What a round asks of clients; see `World.load`.

  Traits that are decided for a round ({name: [C]}) take the place of their own.

  Args:
    job: what they do. Where it is split, batches that are not full count as
      what they hold; else each step is one on a whole batch.
    model: what is trained.
    population: who there is.
    sizes: bytes of their messages.
    more: bytes that each sends and is sent beside them.
    mixing: [N, N] under gossip, where a client sends to each of its neighbours
      that take part, and hears from each.
  """
  steps = _streamed if job.split is not None else _computed
  asked = steps(job, model, population)

  def of(ids, number, count, decided=types.MappingProxyType({})):
    traits = traits_of(job, population, ids) | {"client": ids, **decided}
    each = sizes(traits, number)
    copies = 1 if mixing is None else peers.messages(mixing, ids)
    return asked(ids, count, traits)._replace(
      up=each["up_bytes"] * copies + more[0],
      down=each["down_bytes"] * copies + more[1],
    )

  return of


def before(job: work.Work, population: data.Population) -> np.ndarray | None:
  """Bytes [N] that each client sends up once in the whole run, if any do."""
  clients = np.arange(len(population))
  traits = traits_of(job, population, clients)
  return traffic.before(job, population.train.sizes, traits)


def traits_of(job: work.Work, population: data.Population, ids) -> dict:
  """{name: [C]} of the traits that the work reads, 0 where none is said."""
  none = np.zeros(len(population))
  return {k: population.traits.get(k, none)[ids] for k in job.traits}


def _computed(job, model, population):
  """The steps of clients whose device does all."""
  step = one_step.flops_of(job, model.base, population.examples)
  usual = factored.steps_of(job.local, population.train.sizes)

  def asked(ids, count, traits):
    count = usual[ids] if count is None else count
    none = np.zeros(len(ids), np.int64)
    return ledger.Load(np.asarray(count, np.float64) * step, none, none)

  return asked


def _streamed(job, model, population):
  """The steps of clients for whom a server computes a part."""
  stream, sizes = traffic.stream(job), population.train.sizes.astype(np.int64)

  def asked(ids, count, traits):
    found = stream(sizes[ids], count, traits)
    none = np.zeros(len(ids), np.int64)
    return ledger.Load(
      found.device, none, none, found.up, found.down, found.server
    )

  return asked


def needs(
  job: work.Work, model: objective.Model, population: data.Population
) -> np.ndarray:
  """Bytes [N] that training takes: the base, and what a step holds.

  Of smaller ranks, less: weights, gradients and reports are cut. Where a server
  has a part of the model, it is what the device's part takes.
  """
  clients = np.arange(len(population))
  if job.split is not None and job.split.memory is not None:
    traits = traits_of(job, population, clients) | {"client": clients}
    some, which = traffic.kinds(job.traits, traits)
    named = [dict(zip(job.traits, kind, strict=True)) for kind in some]
    return np.array([job.split.memory(x) for x in named], np.float64)[which]
  step = settings.lane_bytes(job, model.base, population.examples)
  found = np.full(clients.size, float(tree.nbytes(model.base) + step))
  if "rank" in job.traits:
    rank = population.traits["rank"]
    cut = {k: v for k, v in job.params.items() if "/lora_" in k}
    found -= 3 * tree.nbytes(cut) * (1 - rank / _full_rank(cut))
  return found


def _full_rank(cut) -> int:
  """The rank that the arrays have room for."""
  return max(v.shape[-1] for k, v in cut.items() if k.endswith("lora_a"))
