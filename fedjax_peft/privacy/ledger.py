"""Ledger: which rounds a run has released, kept across resume.

Abadi et al., Deep Learning with Differential Privacy, 2016,
https://arxiv.org/abs/1607.00133, keep such a list of moments; this one keeps
the events, from which any accountant can tell epsilon.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedjax_peft import validate
from fedjax_peft.privacy import events, grid_events


class Ledger(NamedTuple):
  """What has been released: events, and how many rounds of each.

  Attributes:
    entries: ((event, rounds), ...), each event once.
  """

  entries: tuple[tuple[events.Event, int], ...] = ()


def charge(ledger: Ledger, event: events.Event, rounds: int = 1) -> Ledger:
  """Writes rounds into a ledger, to be done before they are released.

  Raises:
    ValueError: if `rounds` is below 1, or the event is about other neighbours
      than those before, so that no one statement covers both.
  """
  validate.at_least(1, rounds=rounds)
  for other, _ in ledger.entries:
    if events.relation(other) is not events.relation(event):
      raise ValueError(
        f"a ledger of {type(other).__name__} rounds cannot hold a "
        f"{type(event).__name__} round: their guarantees are about different "
        f"neighbours, {events.neighbours(other)} and "
        f"{events.neighbours(event)}; sample in one way, or keep two ledgers "
        "and report both"
      )
  entries = dict(ledger.entries)
  entries[event] = entries.get(event, 0) + rounds
  return Ledger(tuple(entries.items()))


def to_dict(ledger: Ledger) -> dict[str, Any]:
  """A ledger as a dict for JSON; `from_dict` gives it back, bit for bit."""
  entries = [
    {"sampling": _NAMES[type(event)], **event._asdict(), "rounds": rounds}
    for event, rounds in ledger.entries
  ]
  return {"entries": entries}


def from_dict(saved: Mapping[str, Any]) -> Ledger:
  """The ledger that `to_dict` wrote.

  Raises:
    ValueError: if a field is missing, unknown or out of its range: a ledger
      that cannot be read must not start again from zero.
  """
  ledger = Ledger()
  for entry in _fields(saved, {"entries"}, "a ledger")["entries"]:
    validate.one_of(_MAKERS, sampling=entry.get("sampling"))
    make, kind = _MAKERS[entry["sampling"]]
    fields = {"sampling", "rounds", *kind._fields}
    entry = dict(_fields(entry, fields, f"a {entry['sampling']} entry"))
    del entry["sampling"]
    rounds = entry.pop("rounds")
    ledger = charge(ledger, make(**entry), rounds)
  return ledger


def _fields(got: Mapping, wanted: set[str], what: str) -> Mapping:
  """The mapping, if its keys are the wanted ones."""
  if set(got) != wanted:
    raise ValueError(
      f"{what} has the fields {sorted(wanted)}, got {sorted(got)}; "
      "was it written by another version?"
    )
  return got


_MAKERS: dict[str, tuple[Callable[..., events.Event], Any]] = {
  "poisson": (events.poisson, events.Poisson),
  "fixed_size": (events.fixed_size, events.FixedSize),
  "concentrated": (events.concentrated, events.Concentrated),
  "skellam": (grid_events.skellam, events.Skellam),
}
_NAMES = {kind: name for name, (_, kind) in _MAKERS.items()}
