"""Watching: every report of a run is searched for canaries.

The search is part of the compiled round. It reads what a client says before
its first link, since links scale, round and mask, and what is on the wire after
the last. A report that holds a canary is dropped like one that never came, and
the run ends before the state of that round is handed out.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import ingredients, link, objective
from fedjax_peft import rounds as round_lib
from fedjax_peft.split import cutting, prefix
from fedjax_peft.trust import boundary, canary, cuts, pattern, search
from fedjax_peft.trust.violation import Violation

PyTree = Any


class Watch(NamedTuple):
  """What looks at what crosses, for `Work.watch`.

  Attributes:
    look: (pytree, axis K leads) -> int32 [K, 2], see `search.searcher`.
    before: (state, base) -> None, before a round; raises a Violation if a cut
      would hand examples on.
    refuse: (state after the round, Outcome, ids [D, C], record) -> None; raises
      a Violation if a report of the round held a canary.
  """

  look: Callable[[PyTree], jax.Array]
  before: Callable[[round_lib.State, PyTree], None]
  refuse: Callable[[round_lib.State, Any, Any, Mapping], None]


def watched(
  made: algorithm_lib.Algorithm,
  planted: canary.Canaries,
  *,
  model: objective.Model | None = None,
) -> algorithm_lib.Algorithm:
  """The algorithm, whose reports are searched for canaries.

  A report that holds none has the same bits as without the search. Low-rank
  local SGD is not chosen for it: that sends inputs as factors of a product.

  Args:
    made: any algorithm; its notes, pool and updates come after.
    planted: what `canary.plant` planted in the data.
    model: what is trained; if it is a pipeline whose first part computes, that
      is asked whether it hands examples on (`cuts`) before every round.

  Raises:
    ValueError: if the canaries have too few values to be found.
  """
  seen = pattern.patterns(planted)
  said = ingredients.message(made.work)
  wire = made.tiers[0].link.after(link.Spec(said)).message
  watch = Watch(
    look=search.searcher(seen),
    before=_asks(model, planted) if model is not None else _asks_nothing,
    refuse=_refuses(
      made.tiers[0].name,
      boundary.keys_of(said),
      boundary.keys_of(wire),
      planted,
    ),
  )
  return algorithm_lib.extended(made, job=made.work._replace(watch=watch))


def _asks_nothing(state, base):
  """No cut that could hand examples on."""


def _asks(model: objective.Model, planted: canary.Canaries):
  """Asks the devices' parts of a pipeline, with the weights of the moment."""
  pipe = model.origin
  if not isinstance(pipe, cutting.Pipeline):
    return _asks_nothing
  if isinstance(pipe.parts()[0], prefix.Recall):
    return _asks_nothing  # it was asked before its messages were remembered
  asked = cuts.pairs(dict(_ranges(planted)))

  @jax.jit
  def ask(params, base, examples):
    said = cuts.crossing(model.module(params, base))(examples)
    return {k: jax.tree.map(cuts.gives_away, v) for k, v in said.items()}

  def before(state, base):
    owner = int(planted.clients[0])
    own = {k: v[owner] for k, v in state.clients.local.items()}
    params = {k: v[0] for k, v in state.nodes[0].params.items()}
    params = state.params | params | own
    for each in asked:
      cuts.refuse_given(functools.partial(ask, params, base), each)

  return before


def _ranges(planted):
  """Canaries' features, with the ends of their ranges as two more rows."""
  for name, leaf in planted.examples.items():
    ends = leaf[:1], leaf[:1]
    if name in planted.spans:
      span = planted.spans[name]
      ends = np.full_like(leaf[:1], span.low), np.full_like(leaf[:1], span.high)
    yield name, np.concatenate([leaf, *ends])


def _refuses(tier, said, wire, planted):
  """Says in which leaf of whose report a canary was."""

  def refuse(state, outcome, clients, record):
    seen, clients = np.asarray(outcome.seen), np.asarray(clients)
    hits = np.argwhere(seen[..., 0] != 0)
    if not len(hits):
      return
    at = tuple(hits[0])
    number, which = (int(x) for x in seen[at])
    names = [*said, *(f"note {name}" for name in sorted(state.clients.told))]
    where = "message"
    if number < 0:
      names, where = wire, "wire"
    raise Violation(
      f"uplink to '{tier}' must carry no examples: got one of client "
      f"{planted.clients[which]} in leaf '{names[abs(number) - 1]}' of the "
      f"{where} of client {clients[at]} in round {int(state.round)}; the "
      "message was not used; send what was learned, not what it was learned "
      "from",
      dict(record),
    )

  return refuse
