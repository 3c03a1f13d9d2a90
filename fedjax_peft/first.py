"""First rounds: what a client sends once in the whole run, and never again.

Where a server keeps what a frozen part of a model makes of each example, that
crosses in the midst of a client's first steps. It has crossed when the steps
are done; of a client that is lost before, the server keeps nothing, and all
crosses anew. Plans remember who has sent it, with a network or without.
"""

from collections.abc import Mapping

import numpy as np

BYTES = "cut/first_up_bytes"  # of a record: what crossed once for all
SENT = "sent"  # bool [N] of a memory, who has sent it

Memory = dict[str, np.ndarray]


def start(before: np.ndarray | None) -> Memory:
  """What is remembered before the first round.

  Args:
    before: float64 [N], bytes of each client, see `traffic.before`; None:
      nobody sends any.
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


def done(
  before: np.ndarray | None, memory: Mapping[str, np.ndarray], ids: np.ndarray
) -> tuple[Memory, dict[str, float]]:
  """Remembers that clients have sent it.

  Args:
    before: as in `start`.
    memory: before the round.
    ids: int [C], whose steps are done.

  Returns:
    (what is to be remembered, the round's part of the record).
  """
  if before is None:
    return {}, {}
  ids = np.unique(ids)
  crossed = int(left(before, memory, ids).sum())
  sent = memory[SENT].copy()
  sent[ids] = True
  return {SENT: sent}, {BYTES: crossed}
