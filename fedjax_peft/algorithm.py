"""Algorithms: a round as a pure function of state, cohort and key.

`federated` folds one mechanism over the tiers: what is below sends messages,
the tier reduces them, a server optimizer applies the result, and the new model
goes down. State in, state out, key in; nothing here touches the host.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import (
  executor,
  hierarchy,
  ingredients,
  link,
  placement,
  rounds,
  validate,
  work,
)


class Algorithm(NamedTuple):
  """State in, state out.

  Attributes:
    init: (params=None, *, clients=N, cohort=most senders) -> State.
    begin: (state, base, cohort, key, *, shape=(G, K), width=W, whole) ->
      (state, Common, Flight); axis D leads the flight. `whole` is that of an
      `executor.Spread`.
    segments: ((Common, shared, number), (Flight, Schedule)) -> Flight, for
      ONE device; the executor maps it over the devices.
    absorb: (Common, shared, Flight, slots [W]) -> Flight; folds what the
      flight's buffer holds into its sums.
    finish: (state, Common, Flight, cohort, *, whole) -> (state, Outcome).
    bytes: (cohort, *, traits, round) -> {name: bytes of one message at each
      boundary}, for a client with these traits.
    work: what clients do.
    tiers: the receivers, lowest first.
    specialize: (data) -> (Algorithm, note): the same algorithm in the form
      that is fastest for these data, and what was chosen and why.
    wraps: (Algorithm) -> Algorithm each: how this one was made of what
      `federated` gives; see `wrapped`.
  """

  init: Callable
  begin: Callable
  segments: Callable
  absorb: Callable
  finish: Callable
  bytes: Callable
  work: work.Work
  tiers: tuple[hierarchy.Tier, ...]
  specialize: Callable | None = None
  wraps: tuple[Callable, ...] = ()

  def round(self, state, base, cohort, key, *, shape=(1, 1), spread=None):
    """One round, as a pure function of its arguments.

    Args:
      state: State.
      base: frozen weights.
      cohort: `executor.Cohort`.
      key: random key of the run; the round is folded in.
      shape: (blocks, lanes of a block) on each device, as in the schedule.
      spread: an `executor.Spread` over the devices; None takes one after
        another.

    Returns:
      (State, Outcome).
    """
    spread = executor.Spread(executor.one_by_one) if spread is None else spread
    cohort = jax.tree.map(jnp.asarray, cohort)
    width = cohort.schedule.slots.shape[-1]
    state, common, flight = self.begin(
      state,
      base,
      cohort,
      key,
      shape=shape,
      width=width,
      whole=spread.whole,
    )
    shared = state.nodes[0].shared
    flight = spread.split(self.segments)(
      (common, shared, cohort.segments), (flight, cohort.schedule)
    )
    return self.finish(state, common, flight, cohort, whole=spread.whole)


def federated(
  job: work.Work,
  tiers: Sequence[hierarchy.Tier],
  *,
  notes: Sequence[ingredients.Note] = (),
  pool: int = 0,
  updates: int = 1,
) -> Algorithm:
  """Clients work, tiers reduce what they send, the model goes down.

  Args:
    job: what clients do; its placement names the tiers.
    tiers: receivers, lowest first; the last has size 1.
    notes: what clients tell of themselves beside their message.
    pool: how many earlier models are kept, for clients that report after the
      model has moved on.
    updates: how often the model moves in a round, at most: reports are then
      applied in groups, one after another, though their clients work side by
      side. For one tier of one node, and a pool.

  Returns:
    The algorithm.

  Raises:
    ValueError: if the tiers do not nest, a name comes twice, or a leaf is
      placed at a tier that does not exist.
  """
  tiers = tuple(tiers)
  _check(job, tiers)
  simple = len(tiers) == 1 and not link.parts_of(tiers[0].down)
  if updates > 1 and not (simple and pool):
    raise ValueError(
      "several updates in a round need one receiver, a pool of earlier models "
      f"and a downlink that sends the model as it is: got {updates=} {pool=} "
      f"and tiers {[t.name for t in tiers]}; use updates=1"
    )
  names = [t.name for t in tiers]

  def labelled(*labels):
    return {k for k, v in job.placement.items() if v in labels}

  setup = ingredients.Setup(
    job,
    # What crosses a boundary: the leaves placed at its tier or higher.
    tuple(
      hierarchy.boundary(t, labelled(*names[i:], placement.SERVED))
      for i, t in enumerate(tiers)
    ),
    tuple(sorted(labelled(placement.FROZEN))),
    tuple(sorted(labelled(placement.DEVICE))),
    tuple(sorted(labelled(placement.SERVED))),
    tuple(notes),
    pool,
    updates,
  )

  def bind(fun):
    return functools.partial(fun, setup)

  return Algorithm(
    init=bind(rounds.init),
    begin=bind(rounds.begin),
    segments=bind(rounds.segments),
    absorb=bind(rounds.absorb),
    finish=bind(rounds.finish),
    bytes=bind(ingredients.message_bytes),
    work=job,
    tiers=tiers,
  )


def wrapped(
  made: Algorithm, wrap: Callable[[Algorithm], Algorithm]
) -> Algorithm:
  """An algorithm with parts exchanged, such that it can still be extended.

  Args:
    made: any algorithm.
    wrap: (Algorithm) -> the same with other functions in place of some.
  """
  return wrap(made)._replace(wraps=(*made.wraps, wrap))


def extended(
  made: Algorithm,
  *,
  job: work.Work | None = None,
  tiers: Sequence[hierarchy.Tier] | None = None,
  notes: Sequence[ingredients.Note] = (),
  pool: int = 0,
  updates: int = 1,
) -> Algorithm:
  """The same algorithm with other parts, notes or a pool of earlier models.

  Args:
    made: an algorithm in the form that will run (`specialize` comes before).
    job: in place of its work.
    tiers: in place of its tiers.
    notes: see `federated`.
    pool: see `federated`.
    updates: see `federated`.

  Raises:
    ValueError: if earlier models are wanted of an algorithm whose receivers
      change leaves that are not reported (residuals), since those belong to
      one round.
  """
  job = made.work if job is None else job
  if pool and placement.SERVED in job.placement.values():
    raise ValueError(
      "clients that report late start from earlier models, but residuals "
      "belong to one round: use a rule without residuals (fedit, "
      "ffa, fedsa, flexlora) or synchronous rounds"
    )
  fresh = federated(
    job,
    made.tiers if tiers is None else tiers,
    notes=notes,
    pool=pool,
    updates=updates,
  )
  for wrap in made.wraps:
    fresh = wrapped(fresh, wrap)
  return fresh


def _check(job, tiers):
  """Raises ValueError if tiers and placement do not fit together."""
  names = [t.name for t in tiers]
  if not tiers or tiers[-1].size != 1:
    raise ValueError(
      "the last tier must have one node: got "
      f"{[(t.name, t.size) for t in tiers]}; end with tier('cloud')"
    )
  if len(set(names)) < len(names):
    raise ValueError(f"tiers must have different names: got {names}")
  if tiers[0].period != 1:
    raise ValueError(
      f"clients report every round: got period={tiers[0].period} at tier "
      f"'{names[0]}'; set the period of a higher tier"
    )
  for low, high in itertools.pairwise(tiers):
    if low.size % high.size:
      raise ValueError(
        f"the size of tier '{low.name}' must be a multiple of that of "
        f"'{high.name}': got {low.size} and {high.size}"
      )
  for leaf, label in job.placement.items():
    others = (placement.DEVICE, placement.FROZEN, placement.SERVED)
    if label not in (*names, *others):
      raise ValueError(
        f"'{leaf}' is placed at {label!r}, but the tiers are {names}"
        f"{validate.near(label, names)}"
      )
