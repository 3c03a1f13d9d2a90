"""Offers: the ways in which a model could be trained, and what each asks.

| scheme | who computes what |
| --- | --- |
| federated | every device the whole model |
| splitfed | each device as many stages as it is told, a server the rest |
| frozen | devices remember what first stages make, which nobody trains |
| sequential | as splitfed with one cut, one client after another |

Everything is read from the traced model, and what depends on a cut is traced
when it is asked for. A round is each client's first: what frozen stages make
crosses in it. That devices compute it once, before, is not counted; that they
must hold these stages then is.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from fedjax_peft import (
  algorithm,
  alias,
  data,
  demand,
  link,
  links,
  objective,
  split,
  traffic,
  tree,
  work,
)
from fedjax_peft.split import cost, cutting, moving, prefix, trial
from fedjax_peft.split.moving import BITS, CUT

FROZEN = {"crossing/.*": "frozen"}  # a client's own cut and bits
SERVER = "server/"  # in front of names of what a server holds


def plain(
  model: objective.Model,
  local: work.Local,
  placement: Mapping[str, str],
  uplink: link.Link | None = None,
) -> algorithm.Algorithm:
  """Federated averaging; see `Workload.federate`."""
  return alias.fedavg(model, local, placement=placement, uplink=uplink)


class Workload(NamedTuple):
  """What is to be trained, on what, and how.

  Attributes:
    module: a model that offers stages, without adapters.
    adapt: (module, rank, where) -> the module with adapters of that rank; the
      names of its layers begin with `where`, "" or "server/", and only these
      get any. ValueError where there is nothing to adapt.
    loss: as for `fp.model`.
    local: batches and steps of a client.
    data: the population.
    cohort: clients of a round.
    federate: (model, local, placement, uplink) -> the algorithm that is cut;
      an uplink of None is its own.
    precision: of frozen products.
  """

  module: Any
  adapt: Callable[[Any, int, str], Any]
  loss: Callable
  local: work.Local
  data: data.Population
  cohort: int
  federate: Callable[..., algorithm.Algorithm] = plain
  precision: Any = "bf16"


def offers(
  task: Workload,
  ranks: Sequence[int],
  schemes: Sequence[str] = ("federated", "splitfed", "frozen", "sequential"),
) -> list[trial.Offer]:
  """All ways to train a model, for `split.advising.advise`.

  Args:
    task: what is to be trained.
    ranks: of adapters, to choose among.
    schemes: that are wanted; the federated one is always offered.

  Raises:
    ValueError: if the model offers no stages, or adapters do not fit it.
  """
  if not hasattr(task.module, "stages"):
    raise ValueError(
      "advice is for a model that can be cut, got a "
      f"{type(task.module).__name__} without `stages`; put its layers into "
      "split.Modules"
    )
  found: list[trial.Offer] = []
  for rank in ranks:
    moved = _moving(task, rank)
    found += [x for x in moved if x.scheme in ("federated", *schemes)]
    if "frozen" in schemes:
      found += _remembered(task, rank)
  return found


def _moving(task: Workload, rank: int) -> list[trial.Offer]:
  """Schemes whose every cut is that of one model whose cut moves."""
  module = split.movable(task.module, bits=True)
  model = objective.model(
    task.adapt(module, rank, ""), task.loss, precision=task.precision
  )
  examples = task.data.examples
  made = task.federate(model, task.local, FROZEN, None)
  whole = moving.hybrid(made, model, examples)
  # Who hands on to the next client sends leaves as they are, and its weight.
  exact = task.federate(model, task.local, FROZEN, links.weigh())
  turns = algorithm.extended(exact, job=whole.work)
  placed = whole.work.placement
  learns = {
    k: v
    for k, v in model.params.items()
    if placed.get(k) not in ("frozen", "served") and k not in model.mutable
  }
  names = tuple(stage.name for stage in task.module.stages())
  measured: Any = whole.work.split
  found = []
  for scheme, cuts, over in (
    ("federated", (len(names),), whole),
    ("splitfed", (*range(1, len(names) + 1),), whole),
    ("sequential", (*range(1, len(names)),), turns),
  ):
    load = demand.load(
      over.work, model, task.data, traffic.sizes(over, task.cohort)
    )
    found.append(
      trial.Offer(
        scheme,
        rank,
        names,
        cuts,
        functools.partial(_asked, load),
        lambda cut: measured.memory({CUT: cut}),
        lambda cut: tree.size(learns),
      )
    )
  return found


def _asked(load, ids, told):
  """What the first round asks."""
  return load(ids, 0, None, told)


class _Remembered(NamedTuple):
  """What is trained where first stages are frozen, by one cut."""

  load: Callable
  memory: float
  values: int


def _remembered(task: Workload, rank: int) -> list[trial.Offer]:
  """Frozen first stages, whose messages are features of the data."""
  names = tuple(stage.name for stage in task.module.stages())
  at = functools.cache(lambda cut: _cached(task, rank, cut))
  cuts = [c for c in range(1, len(names)) if _adapted(task, rank, c)]
  if not cuts:
    return []

  def load(ids, told):
    """Of clients by their cut, though they are usually of one."""
    cut = np.asarray(told[CUT])
    (one,) = np.unique(cut)
    return at(int(one)).load(ids, 0, None, {BITS: told[BITS]})

  return [
    trial.Offer(
      "frozen",
      rank,
      names,
      tuple(cuts),
      load,
      lambda cut: at(cut).memory,
      lambda cut: at(cut).values,
    )
  ]


def _adapted(task, rank, cut) -> nnx.Module | None:
  """The pipeline with adapters behind a cut; None if nothing is there."""
  pipe = split.pipeline(task.module, {"device": cut, "server": None}, SILENT)
  try:
    return task.adapt(pipe, rank, SERVER)
  except ValueError:
    return None


SILENT = cutting.Wire(down=None)  # nothing before the cut learns


def _cached(task: Workload, rank: int, cut: int) -> _Remembered:
  """The work of clients behind a cut."""
  pipe: Any = _adapted(task, rank, cut)
  first, rest = pipe.parts()[0], nnx.clone(pipe)
  rest.device = prefix.Recall()
  graph, state = nnx.split(first)
  features = {
    k: jax.ShapeDtypeStruct(v.shape, v.dtype)
    for k, v in task.data.examples.items()
  }
  given = {k: v for k, v in features.items() if k != "label"}
  message = jax.eval_shape(
    lambda state, given: nnx.merge(graph, state)(**given), state, given
  )
  examples = features | {f"cut/{k}": v for k, v in message.items()}
  model = objective.model(rest, task.loss, precision=task.precision)
  whole = task.federate(model, task.local, {}, None)
  made = split.splitfed(whole, model, examples)
  measured: Any = cost.measure(
    whole.work,
    model,
    examples,
    lambda module, facts: module,
    wires_of=lambda facts: [up(int(facts[BITS]))],
    of_wires=(BITS,),
  )
  job = made.work._replace(split=measured, traits=(*made.work.traits, BITS))
  asked = demand.load(job, model, task.data, traffic.sizes(made, task.cohort))
  examples_of = task.data.train.sizes

  def load(ids, number, count, told):
    found = asked(ids, number, count, told)
    traits = demand.traits_of(job, task.data, ids) | told
    first: Any = traffic.before(job, examples_of[ids], traits)
    return found._replace(stream_up=found.stream_up + first)

  held = tree.nbytes(jax.tree.leaves(nnx.state(first, nnx.Param)))
  return _Remembered(
    load,
    held + measured.memory({BITS: trial.FLOATS}),
    tree.size(
      {k: v for k, v in model.params.items() if k not in model.mutable}
    ),
  )


@functools.cache
def up(bits: int) -> cutting.Wire:
  """A wire of so many bits a value, over which no gradient comes back."""
  return cutting.Wire(links.affine(bits, per="token"), None)
