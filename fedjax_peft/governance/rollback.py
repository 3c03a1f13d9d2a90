"""Rollback: the state before a round, and the way back to it.

A round does not touch the arrays of the state that it starts from, but for the
rows of clients, which it updates in place. Only rows of the cohort change, so
that these are all that has to be copied.
"""

from typing import NamedTuple

import jax
import numpy as np

from fedjax_peft import rounds as round_lib


class Kept(NamedTuple):
  """What a round can be taken back to.

  Attributes:
    state: without the clients.
    clients: int [C], whose rows may change.
    rows: these rows, copied, axis C.
  """

  state: round_lib.State
  clients: np.ndarray
  rows: round_lib.Rows


def keep(state: round_lib.State, clients: np.ndarray) -> Kept:
  """Keeps what a round is about to change.

  Args:
    state: before the round.
    clients: int, ids of the cohort in any shape; below 0 is an empty seat.
  """
  ids = np.maximum(np.asarray(clients), 0).reshape(-1)
  rows = jax.tree.map(lambda x: x[ids], state.clients)
  rest = state._replace(clients=round_lib.Rows({}, ()))
  return Kept(rest, ids, rows)


def take_back(kept: Kept, state: round_lib.State) -> round_lib.State:
  """The state before a round, bit for bit; the number of rounds goes on.

  What the round drew is never drawn again, since all draws depend on the
  number of the round.

  Args:
    kept: before the round.
    state: after it; what `kept` does not have is taken from here.
  """
  clients = jax.tree.map(
    lambda x, old: x.at[kept.clients].set(old), state.clients, kept.rows
  )
  return kept.state._replace(
    round=state.round, clients=clients, plan=state.plan
  )
