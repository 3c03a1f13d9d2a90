"""Securing: rounds whose reports are summed without being seen.

A plan whose every turn says who is lost on the way, and what the secure sum
costs beside the reports. Where too few are left nobody reports, or others are
asked.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjax_peft import first, plan
from fedjax_peft.privacy import client, dropout

_RING = ("neighbours", "threshold")
# Traits: the step from which on a client is lost, and `dropout.number`.
LATE, SESSION = "secure/late", "secure/session"


def secured(
  made: plan.Plan,
  wanted: dropout.Risk,
  *,
  seed: int,
  again: Sequence[plan.Plan] = (),
  wires: tuple[int, int] = (0, 0),
  fewest: int = 1,
) -> plan.Plan:
  """The plan, every round of it a secure sum that clients drop out of.

  Of a round whose sum cannot be unmasked nothing is released: it has no
  clients, and leaves the model as it was. Its record says `secure/failed`, and
  `secure/why`.

  A round's record gets `secure/asked`, `secure/survived`,
  `secure/neighbours`, `secure/threshold` (of its last attempt),
  `secure/failed` (attempts without a sum) and, over all attempts,
  `secure/STEP_up_bytes` for each of `client.STEPS`, `secure/STEP_down_bytes`
  for each of `conversation.DOWN`: what crosses beside the values and the
  model; `secure/lost_up_bytes` and `secure/lost_down_bytes` for those of them
  that crossed in vain. Its traits get what `conversing` plays out: `LATE` and
  `SESSION`.

  Args:
    made: of rounds with one receiver.
    wanted: what may happen in a round.
    seed: of the run.
    again: plans that a round whose attempt failed asks in turn, such as
      `plan.sampled` with other seeds; with none it is given up at once.
    wires: see `dropout.attempt`.
    fewest: see `dropout.attempt`.

  Raises:
    ValueError: if not even the largest cohort can be safe, or if rounds are
      not sums of one receiver that can be made anew.
  """
  plans = (made, *again)
  for one in plans:
    _expect_sums(one)
  dropout.ring(wanted, max(one.most for one in plans))

  def turn(memory, number, told):
    total: dict[str, Any] = {"failed": 0}
    for i, one in enumerate(plans):
      found, memory = one.turn(memory, number, told)
      _expect_one_sum(found, len(plans) > 1)
      late, draw = None, (seed, number, i)
      if found.lost is not None:
        late = np.where(found.lost, dropout.MASK, len(client.STEPS))
      tried = dropout.attempt(
        wanted,
        found.clients,
        draw,
        late=late,
        wires=wires,
        fewest=fewest,
      )
      for name, value in tried.record.items():
        total[name] = value + (0 if name in _RING else total.get(name, 0))
      if tried.why is None:
        break
      total["failed"] += 1
    found = found._replace(
      lost=tried.lost,
      traits={**found.traits, **_script(found.clients, draw, tried)},
    )
    if tried.why is not None:
      found = _nobody(found)
      total["why"] = tried.why
    record = {f"secure/{name}": value for name, value in total.items()}
    return found._replace(record={**found.record, **record}), memory

  return made._replace(
    turn=turn,
    most=max(one.most for one in plans),
    hears=frozenset().union(*(one.hears for one in plans)),
    waits=any(one.waits for one in plans),
  )


def _script(ids, draw, tried):
  """What is needed to play a sum out, see `conversing`."""
  session = np.full(len(ids), dropout.number(draw), np.int32)
  return {LATE: tried.late.astype(np.int32), SESSION: session}


def _nobody(turn: plan.Turn) -> plan.Turn:
  """The turn without its clients; what was spent stays spent."""

  def none(values):
    return None if values is None else values[:0]

  return turn._replace(
    clients=turn.clients[:0],
    nodes=none(turn.nodes),
    version=none(turn.version),
    update=none(turn.update),
    steps=none(turn.steps),
    traits={k: v[:0] for k, v in turn.traits.items()},
    lost=none(turn.lost),
  )


def _expect_sums(made: plan.Plan) -> None:
  """Raises ValueError unless a plan's rounds can be secure sums."""
  if made.updates > 1 or "nodes" in made.init():
    raise ValueError(
      "a secure sum is one receiver's in one round: got the plan "
      f"{made.name!r}, whose reports go into several sums; use rounds that "
      "close and one tier of size 1"
    )
  if first.SENT in made.init():
    raise ValueError(
      "a secure sum does not hide what crosses a cut: got the plan "
      f"{made.name!r} of a model that is cut; leave the cut or the secure sum "
      "out"
    )


def _expect_one_sum(turn: plan.Turn, retries: bool) -> None:
  """Raises ValueError unless a turn's reports go into one sum."""
  if turn.nodes is not None and np.unique(turn.nodes).size > 1:
    raise ValueError(
      "a secure sum has one receiver: got clients of nodes "
      f"{np.unique(turn.nodes).tolist()}; use one tier of size 1"
    )
  if retries and turn.table:
    raise ValueError(
      "what clients spent in an attempt that failed cannot be put beside what "
      "others spent in the next: got a plan that counts costs; leave `again` "
      "empty, so that a failed round is given up"
    )
