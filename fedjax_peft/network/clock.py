"""Clocks: when a round ends, and whose reports are in it.

Two kinds. In a closed round everybody asked starts together, and what comes
too late is lost: synchronous rounds, deadlines, over-selection; or clients
take turns, and the round is over when the last had its own. In an open one
a number of clients is always at work, and the model moves on when enough have
reported (a buffer, FedBuff; of one, FedAsync) or when time is up
(semi-synchronous); late reports count, by how stale they are.

| clock | the model moves when | source |
| --- | --- | --- |
| `synchronous` | all have reported | McMahan et al., arXiv 1602.05629 |
| `deadline` | enough have, or time is up | Bonawitz et al., arXiv 1902.01046 |
| `in_turn` | each has, one after another | Gupta, Raskar, arXiv 1810.06060 |
| `buffered` | so many have | Nguyen et al., FedBuff, arXiv 2106.06639 |
| `asynchronous` | one has | Xie et al., FedAsync, arXiv 1903.03934 |
| `periodic` | time is up | semi-synchronous |
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedjax_peft import validate


class Clock(NamedTuple):
  """When rounds end.

  Attributes:
    name: for records and messages.
    over: in a closed round, the share of clients asked above those wanted.
    seconds: at the latest, from its start.
    concurrency: clients at work at all times; 0 for closed rounds.
    buffer: reports that end an open round; 0 = only time does.
    together: rounds that are trained side by side where they do not depend on
      each other, at most (`together.together`).
    serial: whether in a closed round a client begins when the one before it
      has reported or was lost.
  """

  name: str
  over: float = 0.0
  seconds: float = math.inf
  concurrency: int = 0
  buffer: int = 0
  together: int = 1
  serial: bool = False

  @property
  def is_open(self) -> bool:
    """Whether clients go on working while the model moves."""
    return self.concurrency > 0

  def asked(self, wanted: int) -> int:
    """How many are asked for a closed round that wants so many."""
    return math.ceil(wanted * (1 + self.over) - 1e-9)


def synchronous(timeout: float = math.inf) -> Clock:
  """A round waits for all that it asked.

  Args:
    timeout: seconds after which it waits no longer, > 0.
  """
  _positive(timeout=timeout)
  return Clock("synchronous", seconds=timeout)


def deadline(seconds: float = math.inf, *, over: float = 0.3) -> Clock:
  """More are asked than wanted; the round ends when enough are there.

  Args:
    seconds: it ends at the latest, > 0.
    over: share that is asked above those wanted, >= 0.
  """
  _positive(seconds=seconds)
  if not 0 <= over < math.inf:
    raise ValueError(
      f"over must be at least 0, got {over=}; 0.3 asks 30 % more"
    )
  return Clock(f"deadline({seconds:g}, {over:g})", over=over, seconds=seconds)


def in_turn() -> Clock:
  """Clients of a round work one after another, each with all of the band.

  So it is where a client goes on from what the one before it left, as in split
  learning with one server. The server hears one before it asks the next, and
  waits for everybody.
  """
  return Clock("in_turn", serial=True)


def buffered(*, concurrency: int, buffer: int, together: int = 1) -> Clock:
  """The model moves whenever so many reports have come (FedBuff).

  Args:
    concurrency: clients at work at all times.
    buffer: reports of a round, at most as many.
    together: updates of the model that one round of the run may hold.
  """
  validate.at_least(
    1, concurrency=concurrency, buffer=buffer, together=together
  )
  if buffer > concurrency:
    raise ValueError(
      f"a buffer cannot hold more than who is at work: got {buffer=} "
      f"{concurrency=}; use buffer={concurrency} or less"
    )
  name = f"buffered({concurrency}, {buffer})"
  return Clock(name, concurrency=concurrency, buffer=buffer, together=together)


def asynchronous(*, concurrency: int, together: int = 1) -> Clock:
  """The model moves with every report (FedAsync).

  Args:
    concurrency: clients at work at all times.
    together: updates of the model that one round of the run may hold, so that
      their clients are trained side by side.
  """
  made = buffered(concurrency=concurrency, buffer=1, together=together)
  return made._replace(name=f"asynchronous({concurrency})")


def periodic(*, concurrency: int, seconds: float) -> Clock:
  """The model moves every so many seconds, with what has come since.

  Args:
    concurrency: clients at work at all times.
    seconds: of a round, > 0.
  """
  validate.at_least(1, concurrency=concurrency)
  validate.positive(seconds=seconds)
  name = f"periodic({concurrency}, {seconds:g})"
  return Clock(name, concurrency=concurrency, seconds=seconds)


CLOCKS: dict[str, Callable[..., Clock]] = {
  "asynchronous": asynchronous,
  "buffered": buffered,
  "deadline": deadline,
  "in_turn": in_turn,
  "periodic": periodic,
  "synchronous": synchronous,
}


def close(
  clock: Clock, seconds: np.ndarray, arrived: np.ndarray, wanted: int
) -> tuple[np.ndarray, float]:
  """Ends a closed round.

  Args:
    clock: of closed rounds.
    seconds: float64 [C], from its start until each has reported or was lost;
      where clients take turns, from each one's own start.
    arrived: bool [C], whether the report comes at all.
    wanted: how many reports are enough.

  Returns:
    (bool [C], whose reports are used; seconds of the round). Of reports that
    come at the same time, the earlier places are used.
  """
  if clock.serial:
    return arrived, float(seconds[np.isfinite(seconds)].sum())
  used = arrived & (seconds <= clock.seconds)
  if clock.over:
    there = np.flatnonzero(used)
    first = there[np.argsort(seconds[there], kind="stable")[:wanted]]
    used = np.zeros(seconds.size, bool)
    used[first] = True
    if first.size == wanted:  # enough are there
      return used, float(seconds[first[-1]])
  finite = seconds[np.isfinite(seconds)]
  last = float(finite.max(initial=0.0))
  # Whose link is dead is waited for until the time is up, if it ever is.
  if math.isfinite(clock.seconds) and not np.isfinite(seconds).all():
    last = clock.seconds
  return used, min(last, clock.seconds)


def _positive(**values: float) -> None:
  """Raises ValueError unless every value is above zero; inf is allowed."""
  for name, value in values.items():
    if not value > 0:
      raise ValueError(f"{name} must be above 0 seconds, got {name}={value}")
