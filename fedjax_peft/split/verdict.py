"""Verdicts: what each scheme comes to, and why it was not taken."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import rich.table

from fedjax_peft.split.trial import Candidate, Place, Trial

LATE, MEMORY, CUTS = "late", "memory", "cuts"


class Row(NamedTuple):
  """The best of a scheme; numbers are nan where nothing was tried.

  Attributes:
    scheme: its name.
    rank: of the adapters.
    cuts: stages on the device, "2" or "1-4".
    bits: of a value that crosses, likewise.
    values: that train.
    seconds: of a round.
    joules: of all devices in a round.
    bytes: over a device's link in a round, both ways, a mean.
    memory: bytes on a device, the most.
    fit: devices that have the memory.
    devices: all that were asked.
    cost: the objective.
    lacking: bytes, the most that a device has too few.
    reason: "" if it keeps within the limits; "late", "memory", or "cuts" if no
      cut is private and small enough.
  """

  scheme: str
  rank: int
  cuts: str
  bits: str
  values: int
  seconds: float
  joules: float
  bytes: float
  memory: float
  fit: int
  devices: int
  cost: float
  lacking: float
  reason: str


def judge(
  scheme: str,
  judged: Sequence[tuple[float, Trial]],
  lacks: Sequence[Candidate],
  place: Place,
  deadline: float,
) -> Row:
  """The best of a scheme, or what it fails by.

  Args:
    scheme: its name.
    judged: (cost, trial) of all that enough devices have the memory for.
    lacks: the others.
    place: of the devices.
    deadline: seconds.
  """
  if judged:
    some = [x for x in judged if x[1].seconds <= deadline]
    if some:
      return _row(*min(some, key=lambda x: x[0]), place, "")
    return _row(*min(judged, key=lambda x: x[1].seconds), place, LATE)
  if not lacks:
    return _none(scheme, 0, "", math.nan, 0, place, 0.0, CUTS)
  least = min(lacks, key=lambda x: x.memory.min())
  need = float(least.memory.min())
  lacking = float((need - place.fleet.memory[place.ids]).max())
  fit, cuts = int(place.fits(least).sum()), _span(least.cuts)
  rank = least.offer.rank
  return _none(scheme, rank, cuts, need, fit, place, lacking, MEMORY)


def _none(scheme, rank, cuts, memory, fit, place, lacking, reason) -> Row:
  """Of a scheme that was not tried."""
  n, nan = place.ids.size, math.nan
  numbers = (nan, nan, nan, memory, fit, n, nan, lacking)
  return Row(scheme, rank, cuts, "", 0, *numbers, reason)


def _row(cost: float, tried: Trial, place: Place, reason: str) -> Row:
  """Of a scheme that was tried."""
  offer, columns = tried.candidate.offer, tried.columns
  crosses = columns["cut"] < len(offer.stages)
  need = tried.candidate.memory.min() - place.fleet.memory[place.ids]
  return Row(
    offer.scheme,
    offer.rank,
    _span(columns["cut"]),
    _span(columns["bits"][crosses]),
    offer.trained(tried.candidate.cuts[0]),
    tried.seconds,
    tried.joules,
    float(columns["bytes"].mean()),
    float(columns["memory"].max()),
    int(place.fits(tried.candidate).sum()),
    place.ids.size,
    cost,
    max(float(need.max()), 0.0),
    reason,
  )


def _span(values) -> str:
  """Least and most, "2-32"; "" of none."""
  some = np.unique(values)
  if not some.size:
    return ""
  return f"{some[0]}" if some.size == 1 else f"{some[0]}-{some[-1]}"


def sentence(row: Row, best: Row) -> str:
  """Why it was not taken."""
  if row.reason:
    return f"{row.scheme}: {_failure(row)}"
  parts = [
    f"{mine / theirs:.3g} times the {what}"
    for what, mine, theirs in (
      ("seconds", row.seconds, best.seconds),
      ("joules", row.joules, best.joules),
      ("values that train", row.values, best.values),
    )
    if theirs > 0
  ]
  return (
    f"{row.scheme}: costs {row.cost:.4g} where {best.scheme} costs "
    f"{best.cost:.4g}: {', '.join(parts)}"
  )


def _failure(row: Row) -> str:
  """Which limit it does not keep."""
  if row.reason == LATE:
    return f"a round takes {row.seconds:.4g} s, longer than the deadline"
  if row.reason == CUTS:
    return "no cut leaves enough stages on a device in the memory it may take"
  count = row.devices - row.fit
  return f"{count} of {row.devices} devices lack up to {_mega(row.lacking)}"


def nothing(rows: Sequence[Row]) -> str:
  """What would have to change where no scheme keeps within the limits."""
  failures = "; ".join(f"{row.scheme}: {_failure(row)}" for row in rows)
  changes = []
  late = [row for row in rows if row.reason == LATE]
  if late:
    soonest = min(late, key=lambda row: row.seconds)
    changes.append(
      f"allow {soonest.seconds:.4g} s for a round ({soonest.scheme})"
    )
  lack = [row for row in rows if row.reason == MEMORY]
  if lack:
    least = min(lack, key=lambda row: row.memory)
    share = least.fit / least.devices
    change = f"use devices with {_mega(least.memory)} ({least.scheme})"
    if least.fit:
      change += f" or a coverage of {math.floor(1e4 * share) / 1e4:g}"
    changes.append(change)
  if not changes:
    changes.append("ask for fewer stages on the device, or allow more memory")
  return (
    f"no scheme keeps within the limits: {failures}. To change that, "
    f"{', or '.join(changes)}"
  )


def _mega(count: float) -> str:
  """Bytes, in the unit that suits."""
  unit, size = ("MB", 1e6) if count >= 1e5 else ("kB", 1e3)
  return f"{count / size:.3g} {unit}"


def format(rows: Sequence[Row]) -> rich.table.Table:
  """The rows as a table for the command line, the best first."""
  shown = rich.table.Table(box=None, pad_edge=False, collapse_padding=True)
  shown.add_column("scheme")
  titles = ("rank", "cut", "bits", "trained", "seconds", "joules")
  for title in (*titles, "bytes", "memory", "fit", "cost"):
    shown.add_column(title, justify="right", no_wrap=True)
  for row in rows:
    known = not math.isnan(row.seconds)
    shown.add_row(
      row.scheme,
      str(row.rank or ""),
      row.cuts,
      row.bits,
      f"{row.values:,}" if known else "",
      f"{row.seconds:.3g}" if known else "",
      f"{row.joules:.3g}" if known else "",
      _mega(row.bytes) if known else "",
      "" if math.isnan(row.memory) else _mega(row.memory),
      f"{row.fit}/{row.devices}",
      row.reason or f"{row.cost:.3g}",
    )
  return shown
