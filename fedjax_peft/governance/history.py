"""History: what an audit log tells, and whether it can have happened.

Rounds follow each other, good ones make versions, bad ones do not; a resumed
run goes back to a round that was there and repeats what came after, to the
same bits. A chain of lines that are each authentic may still tell what cannot
be; this is found here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedjax_peft.governance import log, version


class History(NamedTuple):
  """What happened, repeated rounds counted once.

  Attributes:
    at: {round: the version in force after it}, with round 0.
    identity: who signs, None for nobody.
    config: digest of the config.
    made: {number: version}, those that were repeated included.
    bad: whether the last round was rejected.
    rejected: rounds that were rejected.
  """

  at: dict[int, version.Version]
  identity: str | None
  config: str
  made: dict[int, version.Version]
  bad: bool = False
  rejected: frozenset[int] = frozenset()

  @property
  def round(self) -> int:
    """The last round."""
    return max(self.at)


def follow(
  entries: Sequence[Mapping[str, Any]],
) -> tuple[History | None, log.Broken | None]:
  """What a log tells.

  Args:
    entries: of a log that `log.verify` found to be whole.

  Returns:
    (history, the first line that cannot have happened, or None); the history
    goes up to there, None before the first line.
  """
  history = None
  for number, entry in enumerate(entries, start=1):
    try:
      history = _next(history, entry)
    except (ValueError, KeyError, TypeError) as error:
      return history, log.Broken(number, str(error))
  return history, None


def _next(history: History | None, entry: Mapping[str, Any]) -> History:
  """The history with one more entry."""
  kind = entry["kind"]
  if history is None or kind == "start":
    return _start(history, entry)
  step = {"round": _round, "rollback": _rollback, "resume": _resume}.get(kind)
  if step is not None:
    return step(history, entry)
  if kind != "stop":
    raise ValueError(f"an entry of kind {kind!r} is not known")
  return history


def _start(history, entry):
  """The first line, and no other."""
  if history is not None or entry["kind"] != "start":
    raise ValueError("a log must start once, with its first line")
  identity = entry["identity"]
  signed = version.from_dict(entry["signed"])
  made = version.check(signed, identity, None)
  return History({0: made}, identity, made.config, {0: made})


def _round(history, entry):
  """A round: a version more, or the same as before."""
  number, now = entry["round"], history.at[history.round]
  if number != history.round + 1:
    raise ValueError(
      f"round {history.round + 1} is expected next, got round {number}"
    )
  if entry["rejected"]:
    return history._replace(
      at=history.at | {number: now},
      bad=True,
      rejected=history.rejected | {number},
    )
  signed = version.from_dict(entry["signed"])
  made = version.check(signed, history.identity, now, history.config)
  if made.round != number:
    raise ValueError(f"a version of round {made.round} in round {number}")
  before = history.made.get(made.number)
  if before is not None and before != made:
    raise ValueError(
      f"round {number} was repeated and made another version {made.number} "
      "than before"
    )
  return history._replace(
    at=history.at | {number: made},
    made=history.made | {made.number: made},
    bad=False,
    rejected=history.rejected - {number},
  )


def _rollback(history, entry):
  """Back to the version in force, after a round that was rejected."""
  now = history.at[history.round]
  told = (entry["version"], entry["state"])
  if not history.bad or told != (now.number, now.state):
    raise ValueError(
      f"a rejected round goes back to version {now.number}, got a rollback to "
      f"version {entry['version']}"
    )
  return history


def _resume(history, entry):
  """Back to a round that was there."""
  number = entry["round"]
  now = history.at.get(number)
  if now is None or entry["version"] != now.number:
    raise ValueError(
      f"a run can be resumed after a round up to {history.round}, got round "
      f"{number} with version {entry['version']}"
    )
  at = {k: v for k, v in history.at.items() if k <= number}
  made = history.made
  if entry["drift"]:  # what is repeated may come out otherwise
    made = {k: v for k, v in made.items() if k <= now.number}
  return history._replace(
    at=at,
    config=entry["config"],
    made=made,
    bad=False,
    rejected=frozenset(r for r in history.rejected if r <= number),
  )
