"""Trail: a run that writes down what it does, signed, while it does it.

The log is written before the checkpoint of a round is begun, so that every
checkpoint has its line. A run that is stopped and resumed repeats rounds; the
log says so and goes on, it never goes back.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fedjax_peft import rounds as round_lib
from fedjax_peft.governance import history, log, signing, version

# What a round's line tells of its record, where the record has it.
_TOLD = {
  "cohort": "gate/cohort",
  "clients": "train/clients",
  "epsilon": "privacy/epsilon",
  "why": "gate/why",
}


class Trail:
  """The audit log of one run under way.

  A class, since the end of a log and the version in force have to be
  remembered from one line to the next.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    state: round_lib.State,
    *,
    config: str,
    signer: signing.Signer | None = None,
    drift: bool = False,
  ):
    """Starts a log, or goes on with the one that is there.

    Args:
      path: the log.
      state: that the run starts from, or goes on from.
      config: digest of the config.
      signer: who signs; None for nobody.
      drift: whether rounds that are repeated may come out otherwise.

    Raises:
      ValueError: if the log was changed, was signed by another key, is not
        that of this run, or the state is not the version it should be.
      OSError: if it cannot be read or written.
    """
    self.path, self.signer, self.config = path, signer, config
    torn = log.cut_unfinished(path)
    found = log.verify(path, None if signer is None else signer.identity)
    entries = [] if found else log.read(path)
    past, odd = history.follow(entries)
    if found or odd:
      line, why = found or odd  # type: ignore[misc]
      raise ValueError(
        f"the audit log {os.fspath(path)} goes on as it was written, but line "
        f"{line} is broken: {why}; restore the log (and its head and key), or "
        "use --out for a new run"
      )
    self.end = log.End()
    if past is not None:
      self.end = log.End(entries[-1]["number"], entries[-1]["hash"])
    self.round, digest = int(state.round), version.of_state(state)
    if past is None:
      self._start(digest)
    else:
      self._resume(past, digest, drift, torn)

  def _start(self, digest: str) -> None:
    """The first line."""
    if self.round:
      raise ValueError(
        f"a run has an audit log from its first round on: got {self.round} "
        f"rounds without {os.fspath(self.path)}; restore the log, or use --out "
        "for a new run"
      )
    self.version = version.first(digest, self.config)
    signed = version.to_dict(version.sign(self.version, self.signer))
    who = None if self.signer is None else self.signer.identity
    self._write("start", {"identity": who, "signed": signed})

  def _resume(self, past, digest, drift, torn) -> None:
    """A line on what is about to be repeated."""
    number = self.round
    now = past.at.get(number)
    if (past.identity is None) != (self.signer is None):
      raise ValueError(
        "a run is resumed with the signatures it was started with: the log's "
        f"identity is {past.identity}; use the same governance.sign"
      )
    if now is None or now.state != digest:
      raise ValueError(
        f"the state of round {number} must be a version that the audit log "
        f"has, got {digest[:12]}... for "
        f"{'none' if now is None else now.state[:12] + '...'}; remove that "
        "checkpoint to continue from the one before it"
      )
    self.version = now
    repeats = [number + 1, past.round] if past.round > number else []
    facts = {"round": number, "version": now.number, "repeats": repeats}
    facts |= {"config": self.config, "drift": drift, "unfinished_bytes": torn}
    self._write("resume", facts)

  def note(self, state: round_lib.State, record: Mapping[str, Any]) -> None:
    """Writes down a round, and the way back if it was rejected.

    Args:
      state: after the round.
      record: of the round, with what the gate says in it.

    Raises:
      ValueError: if a rejected round did not go back to the version in force.
      OSError: if it cannot be written.
    """
    number, digest = record["round"], version.of_state(state)
    self.round = number
    rejected = bool(record["gate/rejected"])
    facts = {k: record[name] for k, name in _TOLD.items() if name in record}
    facts |= {"round": number, "rejected": rejected}
    facts |= {
      "measured": {
        k.removeprefix("gate/"): v
        for k, v in record.items()
        if k.startswith("gate/") and isinstance(v, float)
      }
    }
    if not rejected:
      self.version = version.following(
        self.version, number, digest, self.config
      )
      signed = version.sign(self.version, self.signer)
      facts["signed"] = version.to_dict(signed)
    self._write("round", facts)
    if not rejected:
      return
    if digest != self.version.state:
      raise ValueError(
        f"round {number} was rejected and must go back to version "
        f"{self.version.number}, {self.version.state[:12]}...: got "
        f"{digest[:12]}...; resume from the last checkpoint"
      )
    back = {"version": self.version.number, "state": digest}
    self._write("rollback", back | {"round": number})

  def stop(self, why: str) -> None:
    """Writes down that the run ends with the last round.

    Args:
      why: "done", "interrupted", or why the record says.
    """
    self._write("stop", {"round": self.round, "why": why})

  def _write(self, kind: str, facts: dict[str, Any]) -> None:
    """One line."""
    entry = {"kind": kind, **facts}
    self.end = log.append(self.path, self.end, entry, self.signer)


def noted(
  rounds: Iterable[tuple[round_lib.State, dict]], trail: Trail
) -> Iterator[tuple[round_lib.State, dict]]:
  """The rounds of `runner.run(..., gate=...)`, each written down as it ends.

  Args:
    rounds: (state, record) of every round.
    trail: where to.
  """
  why = "done"
  for state, record in rounds:
    trail.note(state, record)
    why = record.get("stopped", why)
    yield state, record
  trail.stop(why)
