"""Plans: who takes part in each round, where, from which model, at what cost.

A plan is made on the host, a round ahead of the devices where it can be. A
sampler is the simplest plan: a draw for every round. A simulated network is
another one: there a turn says who arrived in time, and what it cost.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import data as data_lib
from fedjax_peft import first, notes, rounds, sampling


class Turn(NamedTuple):
  """What is planned for one round; axis C, the clients that the others know of.

  Attributes:
    clients: int32 [C] ids, all different.
    nodes: int32 [C], the lowest tier's node that each talks to; None is its id
      modulo the number of nodes.
    version: int32 [C], the model each starts from, see `executor.Cohort`;
      None: all from that of now.
    keep: places of the pool that the model before each of the round's updates
      is put into, -1 for none.
    update: int32 [C], which of the round's updates each report is part of; None
      is the first.
    steps: int [C], local steps of each; None is what the local work says.
    traits: {name: [C]}, facts about them that hold in this round.
    record: {name: number or sentence}, for the round's record.
    table: {column: [any]}, one row for each client that spent anything.
    lost: bool [C], who is one of them but never reports: others may have
      hidden what they say with it; None: everyone reports.
  """

  clients: np.ndarray
  nodes: np.ndarray | None = None
  version: np.ndarray | None = None
  keep: tuple[int, ...] = ()
  update: np.ndarray | None = None
  steps: np.ndarray | None = None
  traits: Mapping[str, np.ndarray] = {}
  record: Mapping[str, Any] = {}
  table: Mapping[str, np.ndarray] = {}
  lost: np.ndarray | None = None


Memory = dict[str, np.ndarray]


class Plan(NamedTuple):
  """Who takes part in every round.

  Attributes:
    name: for records and messages.
    init: () -> memory, {name: array} of fixed shapes, before the first round.
    turn: (memory, round, told) -> (Turn, memory). A pure function. `told` is
      what clients told of themselves, {name: [N, ...]}.
    most: the most clients of a turn.
    hears: names of the notes that it reads.
    pool: earlier models that have to be kept.
    updates: how often the model moves in a round, at most.
    waits: whether a turn depends on the state after the round before, beside
      the notes. Otherwise, and where it reads no notes, it is planned while
      the devices work on that round.
  """

  name: str
  init: Callable[[], Memory]
  turn: Callable[[Memory, int, Mapping[str, Any]], tuple[Turn, Memory]]
  most: int
  hears: frozenset[str] = frozenset()
  pool: int = 0
  updates: int = 1
  waits: bool = False


def sampled(
  sampler: sampling.Sampler,
  data: data_lib.Population,
  seed: int,
  *,
  before: np.ndarray | None = None,
) -> Plan:
  """A draw of the sampler for every round.

  Args:
    sampler: whom it draws.
    data: from whom.
    seed: of the run.
    before: float64 [N], bytes that each client sends up when it takes part
      for the first time and never again, see `traffic.before`.
  """

  def turn(memory, number, told):
    ids = sampling.cohort_of(sampler, data, seed, number)
    memory, record = first.done(before, memory, ids)
    return Turn(ids, record=record), memory

  def init():
    return first.start(before)

  return Plan(sampler.name, init, turn, sampler.most(data))


def _stay(state, nodes, number):
  """Nobody moves, and no cluster splits."""
  return state, nodes


class Grouping(NamedTuple):
  """Who talks to which node.

  Attributes:
    name: for records and messages.
    first: int32 [N], before the first round.
    before: (state, nodes [N], round) -> (state, nodes), between two rounds.
    join: (state, ids [C]) -> int32 [C], asked of the clients of a round; None
      asks nobody.
    hears: notes that `before` reads.
  """

  name: str
  first: np.ndarray
  before: Callable[[rounds.State, np.ndarray, int], tuple[Any, np.ndarray]] = (
    _stay
  )
  join: Callable[[rounds.State, np.ndarray], np.ndarray] | None = None
  hears: frozenset[str] = frozenset()


def grouped(made: Plan, how: Grouping) -> Plan:
  """The plan, remembering whom each client talks to and hearing what it must.

  Args:
    made: of the rounds.
    how: who talks to whom; hand it to `run` as well.
  """
  if "nodes" in made.init():
    raise ValueError(
      "clients talk to the edge that they are near or to the cluster that they "
      "belong to: got both stations and a grouping; leave one out"
    )
  hears = made.hears | how.hears
  # A turn is then planned after the round before, whose reports it needs.
  changes = how.join is not None or how.before is not _stay

  def init():
    return made.init() | {"nodes": how.first.copy()}

  def turn(memory, number, told):
    nodes = memory["nodes"]
    rest = {k: v for k, v in memory.items() if k != "nodes"}
    found, rest = made.turn(rest, number, told)
    return found._replace(nodes=nodes[found.clients]), rest | {"nodes": nodes}

  return made._replace(
    init=init, turn=turn, hears=hears, waits=made.waits or changes
  )


def prepared(
  plan: Plan, algorithm: algorithm_lib.Algorithm
) -> algorithm_lib.Algorithm:
  """The algorithm with the notes and the earlier models that a plan needs.

  Args:
    plan: of the rounds.
    algorithm: in the form that will run.
  """
  return algorithm_lib.extended(
    algorithm,
    notes=[notes.NOTES[name] for name in sorted(plan.hears)],
    pool=plan.pool,
    updates=plan.updates,
  )
