"""Dropout: who is lost in a secure sum, and what then becomes of the round.

A round's clients agree on masks before they know who will be there. Here it is
drawn from which step on each is lost. Whoever is lost before its values have
arrived stays a member of the round, since its neighbours have hidden theirs
with it. Where too few are left to take the masks off, nothing is known of the
sum.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.special

from fedjax_peft import validate
from fedjax_peft.data import hashing
from fedjax_peft.privacy import client, conversation, degree, simulation, terms

_LOST, _SESSION = 0x6C6F7374, 0x73657373  # set draws apart from others
MASK = client.STEPS.index("mask")  # whose message holds the values


class Risk(NamedTuple):
  """What may happen in a round, and how rarely it may end badly; see `risk`.

  Attributes:
    lost: probabilities [5] that a client is lost from each step on.
    corrupt: the largest fraction that colludes with the server.
    security: probability that more than the sum is revealed, at most.
    correctness: probability that a round fails, at most.
    lying: see `degree.parameters`.
  """

  lost: tuple[float, ...]
  corrupt: float
  security: float
  correctness: float
  lying: bool


def risk(
  dropout: float | Sequence[float],
  *,
  corrupt: float = 0.1,
  security: float = 2**-40,
  correctness: float = 2**-20,
  lying: bool = False,
) -> Risk:
  """Checks what may happen in a round.

  Args:
    dropout: probability that a client is lost during a round, in any of the
      five steps alike; or of each step, in the order of `client.STEPS`.
    corrupt: the largest fraction that colludes with the server.
    security: probability that more than the sum is revealed, at most.
    correctness: probability that a round fails, at most: that more are lost
      than was planned for, or that those who are left cannot unmask the sum.
    lying: see `degree.parameters`.

  Raises:
    ValueError: if a probability is none, or the steps are not five.

  Example:
    >>> sum(risk(0.25).lost)
    0.25
  """
  steps = len(client.STEPS)
  if isinstance(dropout, int | float):
    lost = (dropout / steps,) * steps
  else:
    lost = tuple(dropout)
  if len(lost) != steps or min(lost) < 0 or not sum(lost) < 1:
    raise ValueError(
      "dropout must be one probability in [0, 1), or one of each of the steps "
      f"{', '.join(client.STEPS)}, below 1 together: got {dropout}"
    )
  if not 0 <= corrupt < 1:
    raise ValueError(f"corrupt must be in [0, 1), got {corrupt=}")
  validate.positive(security=security, correctness=correctness)
  return Risk(lost, corrupt, security, correctness, lying)


@functools.lru_cache(maxsize=1024)
def ring(wanted: Risk, clients: int) -> tuple[int, int]:
  """Neighbours and threshold of a round.

  Half of the failure probability is for more clients to be lost than the ring
  is made for, half for those that it is made for to be lost in a row.

  Args:
    wanted: what may happen.
    clients: n.

  Returns:
    (k, t).

  Raises:
    ValueError: if so many clients cannot be safe.

  Example:
    >>> ring(risk(0.05), 1000)
    (44, 26)
  """
  validate.at_least(3, clients=clients)
  return degree.parameters(
    clients,
    most_lost(wanted, clients) / clients,
    wanted.corrupt,
    wanted.security,
    wanted.correctness / 2,
    lying=wanted.lying,
  )


def most_lost(wanted: Risk, clients: int) -> int:
  """More clients are lost with half of the failure probability at most.

  Args:
    wanted: what may happen.
    clients: n.

  Raises:
    ValueError: if all of them may be lost.

  Example:
    >>> most_lost(risk(0.05), 1000)
    87
  """
  half = wanted.correctness / 2
  counts = np.arange(clients)
  beyond = scipy.special.bdtrc(counts, clients, sum(wanted.lost))
  if beyond[-1] > half:
    raise ValueError(
      f"{clients=} may all be lost with probability {beyond[-1]:.2g}, more "
      f"than half of {wanted.correctness=}; expect less dropout, or take more "
      "clients"
    )
  return int(counts[beyond <= half][0])


def beside(wanted: Risk, clients: int) -> tuple[int, int]:
  """Bytes that a client sends and is sent beside its values and the model.

  Where nobody is lost; a client's place in the ring makes no difference.

  Args:
    wanted: what may happen.
    clients: n.

  Raises:
    ValueError: if so many clients cannot be safe.

  Example:
    >>> beside(risk(0.05), 1000)
    (6021, 12809)
  """
  ids = np.arange(clients)
  known = _terms(ids, *ring(wanted, clients), session(0))
  heard = simulation.listen(known, np.full(clients, len(client.STEPS)))
  ways = simulation.traffic(known._replace(size=0), heard)
  up, down = (sum(way.values()) // clients for way in ways)
  return up, down


class Attempt(NamedTuple):
  """What became of one secure sum.

  Attributes:
    lost: bool [n], whose values did not arrive; everyone where it failed.
    why: why nothing is known of the sum; None: it is known.
    record: {name: number}, see `securing.secured`, there with a prefix.
    late: int [n], the step from which on each was lost, 5 for never.
  """

  lost: np.ndarray
  why: str | None
  record: dict[str, float]
  late: np.ndarray


def attempt(
  wanted: Risk,
  ids: np.ndarray,
  draw: tuple[int, int, int],
  *,
  late: np.ndarray | None = None,
  wires: tuple[int, int] = (0, 0),
  fewest: int = 1,
) -> Attempt:
  """Who is lost in one secure sum, and what crosses beside its wires.

  Args:
    wanted: what may happen.
    ids: int [n] clients, all different.
    draw: (seed of the run, round, number of the attempt): all draws follow
      from it and from the ids.
    late: int [n], the step at which each is lost at the latest, 5 for never;
      None: nothing but the draw loses anyone.
    wires: bytes of one client's values and of the model that it gets; they are
      counted where the round does not: of values that are lost on their way,
      and of an attempt that failed.
    fewest: clients that the sum must hold, whose noise hides each of them.
  """
  steps = drawn(wanted, ids, draw)
  steps = steps if late is None else np.minimum(steps, late)
  record: dict[str, float] = dict.fromkeys(_names(), 0)
  try:
    k, t = ring(wanted, len(ids))
  except ValueError as error:  # known before anyone is asked
    return Attempt(np.ones(len(ids), bool), str(error), record, steps)
  known = _terms(ids, k, t, session(number(draw)))
  order = np.argsort(ids)  # places are in the order of ids
  heard, why = simulation.listen(known, steps[order]), None
  try:
    simulation.enough(known, heard)
  except terms.TooFewError as error:
    why = str(error)
  if why is None and (left := int(heard.arrived[MASK].sum())) < fewest:
    why = f"reports in the sum: {fewest} are needed, {left} are there"
  here = heard.arrived[MASK] & (why is None)
  record |= {"asked": len(ids), "survived": int(here.sum())}
  record |= {"neighbours": k, "threshold": t}
  # The values themselves are the round's own wires, if they come to anything.
  up, down = simulation.traffic(known._replace(size=0), heard)
  up["lost"] = wires[0] * int((heard.sent[MASK] & ~here).sum())
  down["lost"] = 0 if why is None else wires[1] * len(ids)
  record |= {f"{step}_up_bytes": size for step, size in up.items()}
  record |= {f"{step}_down_bytes": size for step, size in down.items()}
  lost = np.ones(len(ids), bool)
  lost[order[here]] = False
  return Attempt(lost, why, record, steps)


def _terms(ids, neighbours, threshold, session):
  """What the clients of a sum agree on; how many values is left open."""
  return terms.agree(
    session,
    tuple(int(i).to_bytes(32, "little") for i in np.sort(ids)),
    neighbours=neighbours,
    threshold=threshold,
    size=1,
  )


def number(draw: tuple[int, int, int]) -> int:
  """The number of a secure sum, below 2^31; that of another is another.

  Args:
    draw: as in `attempt`.
  """
  return int(hashing.mix(*draw, _SESSION) >> np.uint64(33))


def session(number: int) -> bytes:
  """The session of a secure sum with this number, 16 bytes."""
  of = hashlib.sha256(str(number).encode())
  return of.digest()[: terms.SESSION_BYTES]


def drawn(
  wanted: Risk, ids: np.ndarray, draw: tuple[int, int, int]
) -> np.ndarray:
  """The step from which on each client is lost, int [n]; 5 is never.

  Args:
    wanted: what may happen.
    ids: int [n].
    draw: as in `attempt`.
  """
  uniform = hashing.mix(*draw, _LOST, ids) / 2.0**64
  return np.searchsorted(np.cumsum(wanted.lost), uniform, side="right")


def _names():
  """What is recorded of an attempt."""
  yield from ("asked", "survived", "neighbours", "threshold")
  yield from (f"{step}_up_bytes" for step in (*client.STEPS, "lost"))
  yield from (f"{step}_down_bytes" for step in (*conversation.DOWN, "lost"))
