"""Charging: every round's epsilon in its record, before the round is run.

The plan of a run is wrapped: what a round will release is written into the
plan's memory, which is saved with the run, so that a resumed run goes on
counting where it was.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedjax_peft import plan as plan_lib
from fedjax_peft.privacy import accounting, events

EPSILON = "privacy/epsilon"
_RELEASED = "privacy/released"


def charged(
  made: plan_lib.Plan,
  event: events.Event,
  delta_dp: float,
  *,
  accountant: accounting.Accountant = "rdp",
  count: Callable[[int], int] = lambda rounds: rounds,
  releases: Callable[[plan_lib.Turn], bool] = lambda turn: True,
) -> plan_lib.Plan:
  """The plan, with epsilon in the record of every round.

  Args:
    made: of the rounds, all of which release the same event.
    event: what is released about one client (or example).
    delta_dp: at which epsilon is told.
    accountant: "rdp" is quick, "pld" tighter and about a second a round.
    count: released rounds -> how often the event has happened to one client.
    releases: whether anything is released in a round; one that fails releases
      nothing.

  Returns:
    A plan whose records hold `privacy/epsilon` (infinity without noise),
    `privacy/delta` and `privacy/released`, the number of rounds that count.

  Raises:
    ValueError: if the plan reads what clients tell in the clear, which no
      noise covers.
  """
  if made.hears:
    raise ValueError(
      "clients of a private run tell nothing beside their noisy sum, but the "
      f"plan reads {sorted(made.hears)}; choose clients without it (uniform, "
      "poisson), and no adaptive steps or clusters"
    )
  spent(event, delta_dp, 1, accountant)  # refuses what it cannot tell

  def init():
    return {**made.init(), _RELEASED: np.zeros((), np.int64)}

  def turn(memory, number: int, told: Mapping[str, Any]):
    rest = {k: v for k, v in memory.items() if k != _RELEASED}
    found, rest = made.turn(rest, number, told)
    done = memory[_RELEASED] + int(releases(found))
    record = {
      EPSILON: spent(event, delta_dp, count(int(done)), accountant),
      "privacy/delta": delta_dp,
      _RELEASED: int(done),
    }
    rest = rest | {_RELEASED: np.asarray(done, np.int64)}
    return found._replace(record={**found.record, **record}), rest

  return made._replace(init=init, turn=turn)


def spent(
  event: events.Event,
  delta_dp: float,
  rounds: int,
  accountant: accounting.Accountant,
) -> float:
  """Epsilon of so many rounds; 0 of none."""
  if rounds == 0:
    return 0.0
  return accounting.epsilon(
    event, delta_dp, rounds=rounds, accountant=accountant
  )
