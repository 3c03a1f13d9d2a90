"""Together: several updates of an asynchronous run in one round.

Where the model moves with every report a round would train one client. Clients
that started before the first of several updates do not depend on them, so they
are trained side by side, and their reports applied one after another. What
happens is the same; only the rounds are fewer and wider.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedjax_peft import plan as plan_lib
from fedjax_peft import validate


def together(made: plan_lib.Plan, most: int) -> plan_lib.Plan:
  """Puts as many turns into one as do not depend on each other.

  A turn joins the ones before it if all its clients started from models that
  were there before the first, and none of them is in it already.

  Args:
    made: of an open clock; its turns have the trait `staleness`.
    most: turns at most, U.

  Returns:
    The plan. Its record is that of the last turn, with the sums of what the
    others cost; `clock/updates` says how many there were.
  """
  validate.at_least(1, most=most)
  if most == 1:
    return made

  def init():
    return made.init() | {"clock/update": np.zeros((), np.int64)}

  def turn(memory: dict, number: int, told: Mapping[str, Any]):
    done = int(memory["clock/update"])
    rest = {k: v for k, v in memory.items() if k != "clock/update"}
    first, rest = made.turn(rest, done, told)
    turns = [first]
    while len(turns) < most:
      one, later = made.turn(rest, done + len(turns), told)
      behind = (one.traits["staleness"] < len(turns)).any()
      twice = any(np.isin(one.clients, t.clients).any() for t in turns)
      if behind or twice:
        break
      turns.append(one)
      rest = later
    update = np.asarray(done + len(turns), np.int64)
    return _one(turns), rest | {"clock/update": update}

  return made._replace(
    init=init, turn=turn, most=most * made.most, updates=most
  )


def _one(turns: list[plan_lib.Turn]) -> plan_lib.Turn:
  """Several turns as one."""
  sizes = [t.clients.size for t in turns]

  def joined(values):
    return None if values[0] is None else np.concatenate(values)

  records = [t.record for t in turns]
  record = dict(records[-1])
  for name in record:
    adds = name.startswith(("cut/", "device/", "round/", "server/"))
    if adds and name != "device/excluded":
      record[name] = sum(r[name] for r in records)
  record["clock/updates"] = len(turns)
  return plan_lib.Turn(
    clients=np.concatenate([t.clients for t in turns]),
    nodes=joined([t.nodes for t in turns]),
    version=joined([t.version for t in turns]),
    keep=tuple(t.keep[0] for t in turns),
    update=np.repeat(np.arange(len(turns)), sizes),
    steps=joined([t.steps for t in turns]),
    traits={
      k: np.concatenate([t.traits[k] for t in turns]) for k in turns[0].traits
    },
    record=record,
    table={
      k: np.concatenate([np.asarray(t.table[k]) for t in turns])
      for k in turns[0].table
    },
  )
