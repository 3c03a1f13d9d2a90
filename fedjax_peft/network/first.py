"""First rounds: what a client sends once in the whole run, and never again.

Where a server keeps what a frozen part of a model makes of each example, that
crosses in the midst of a client's first steps. It has crossed when the steps
are done; of a client that is lost before, the server keeps nothing, and all
crosses anew.
"""

from collections.abc import Mapping

import numpy as np

from fedjax_peft import plan
from fedjax_peft.network import ledger, phases

Memory = dict[str, np.ndarray]
SENT = "sent"  # bool [N] of a memory, who has sent it


def start(before: np.ndarray | None) -> Memory:
  """What is remembered before the first round.

  Args:
    before: float64 [N], bytes of each client; None: nobody sends any.
  """
  return {} if before is None else {SENT: np.zeros(before.size, bool)}


def left(
  before: np.ndarray | None, memory: Mapping[str, np.ndarray], ids: np.ndarray
) -> np.ndarray:
  """Bytes that clients have yet to send, float64 [C].

  Args:
    before: as in `start`.
    memory: what is remembered.
    ids: int [C].
  """
  if before is None:
    return np.zeros(ids.size)
  return np.where(memory[SENT][ids], 0.0, before[ids])


def settle(
  before: np.ndarray | None,
  memory: Mapping[str, np.ndarray],
  costs: ledger.Costs,
) -> tuple[Memory, dict[str, float]]:
  """Remembers who has sent it now.

  Args:
    before: as in `start`.
    memory: before the round.
    costs: of the round.

  Returns:
    (what is to be remembered, the round's part of the record).
  """
  if before is None:
    return {}, {}
  done = np.isin(costs.lost, (phases.ARRIVES, phases.UP))
  ids = np.unique(costs.client[done])
  crossed = int(left(before, memory, ids).sum())
  sent = memory[SENT].copy()
  sent[ids] = True
  return {SENT: sent}, {plan.FIRST: crossed}
