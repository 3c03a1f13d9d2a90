"""Availability: who can be reached at a simulated time.

A pure function of (seed, client, time): to be asked about any moment, in any
order, of any clients.

  nightly = availability.diurnal(low=0.05, high=0.8)
  here = nightly.at(seed, ids, seconds)  # bool [C]
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from fedjax_peft import validate
from fedjax_peft.network import draw, spell, table

_HOUR = 3600.0
_DAY = 24 * _HOUR


class Availability(NamedTuple):
  """Who can be reached.

  Attributes:
    name: for records and messages.
    at: (seed, ids, time) -> bool, shaped like the broadcast of `ids` and
      `time`; time is seconds >= 0 since the run began, at midnight UTC.
  """

  name: str
  at: Callable[[int, ArrayLike, ArrayLike], np.ndarray]


def always() -> Availability:
  """Everybody, at all times."""

  def at(seed, ids, time):
    return np.ones(np.broadcast_shapes(np.shape(ids), np.shape(time)), bool)

  return Availability("always", at)


def diurnal(
  *,
  low: float = 0.1,
  high: float = 0.9,
  peak: float = 2.0,
  hours: float | None = None,
  zones: Sequence[float] = tuple(range(24)),
  hold: float = 600.0,
) -> Availability:
  """Devices that are there mostly at night, when they charge.

  A client's time zone is drawn once, from its id. At the local hour h it is
  there with probability low + (high - low) (1 + cos(2 pi (h - peak) / 24)) / 2;
  or, with `hours`, `high` within a window of so many hours around the peak and
  `low` outside.

  Args:
    low: probability at the worst hour.
    high: probability at the best.
    peak: local hour of the best, in [0, 24).
    hours: width of the window, in (0, 24]; None is the cosine.
    zones: offsets from UTC in hours, which clients have with equal
      probability; [0] puts all in one.
    hold: seconds, > 0, after which a client is drawn anew.

  Raises:
    ValueError: if an argument is out of range.
  """
  if not 0 <= low <= high <= 1:
    raise ValueError(
      "low and high must be probabilities, low <= high: got "
      f"low={low} high={high}"
    )
  if not 0 <= peak < 24:
    raise ValueError(f"peak must be an hour in [0, 24), got peak={peak}")
  if hours is not None and not 0 < hours <= 24:
    raise ValueError(f"hours must be in (0, 24] or None, got hours={hours}")
  validate.positive(hold=hold)
  offsets = np.asarray(zones, np.float64)
  if offsets.ndim != 1 or not offsets.size or not np.isfinite(offsets).all():
    raise ValueError(f"zones must be one or more hours, got zones={zones!r}")

  def chance(hour):
    away = np.abs((hour - peak + 12) % 24 - 12)  # in [0, 12]
    if hours is None:
      return low + (high - low) * (1 + np.cos(np.pi * away / 12)) / 2
    return np.where(away <= hours / 2, high, low)

  def at(seed, ids, time):
    time = np.asarray(time, np.float64)
    zone = draw.uniform(seed, "availability/zone", 0, ids) * offsets.size
    hour = time / _HOUR + offsets[zone.astype(np.int64)]
    block = np.floor(time / hold).astype(np.int64)
    drawn = draw.uniform(seed, "availability/diurnal", block, ids)
    return drawn < chance(hour)

  return Availability("diurnal", at)


def markov(
  *, on: float = 3600.0, off: float = 1800.0, step: float = 60.0
) -> Availability:
  """Clients that come and go, in spells of exponential length.

  The two-state Markov process in continuous time, looked at every `step`
  seconds and held between.

  Args:
    on: mean seconds that a client stays, > 0.
    off: mean seconds that it stays away, > 0.
    step: seconds, > 0; well below both.

  Raises:
    ValueError: if a time is not positive.
  """
  validate.positive(on=on, off=off, step=step)
  share, stay = on / (on + off), math.exp(-step * (1 / on + 1 / off))

  def at(seed, ids, time):
    number = np.floor(np.asarray(time, np.float64) / step).astype(np.int64)
    return spell.inside(
      seed, "availability/markov", number, ids, share=share, stay=stay
    )

  return Availability("markov", at)


def trace(
  path: str | os.PathLike, *, period: float | None = None
) -> Availability:
  """Clients that are there when a file says so.

  Args:
    path: CSV with the columns `client` (its id), `start` and `end` (seconds);
      a client is there from a start, and no longer at the end. Rows may be
      in any order and overlap. Clients that have no row are never there.
    period: seconds after which the file begins anew, None = never.

  Raises:
    ValueError: if a column is missing, or a row is not a spell.
    OSError: if the file cannot be read.
  """
  if period is not None:
    validate.positive(period=period)
  clients, starts, ends = _merged(*_read(path))
  # A spell's place in the order of all (client, start): integers, exact.
  times = np.unique(starts)
  keys = clients * (times.size + 1) + np.searchsorted(times, starts) + 1

  def at(seed, ids, time):
    ids, time = np.broadcast_arrays(ids, np.asarray(time, np.float64))
    time = time % period if period is not None else time
    begun = np.searchsorted(times, time, side="right")
    wanted = ids.astype(np.int64) * (times.size + 1) + begun
    place = np.searchsorted(keys, wanted, side="right") - 1
    last = np.maximum(place, 0)
    return (place >= 0) & (clients[last] == ids) & (time < ends[last])

  return Availability(f"trace({os.fspath(path)})", at)


def every(*parts: Availability) -> Availability:
  """Clients that are there by every part; of no part, everybody."""

  def at(seed, ids, time):
    here = always().at(seed, ids, time)
    for part in parts:
      here = here & part.at(seed, ids, time)
    return here

  return Availability(" and ".join(p.name for p in parts) or "always", at)


def wait(
  available: Availability,
  seed: int,
  ids: np.ndarray,
  time: float,
  *,
  count: int = 1,
  step: float = 60.0,
  most: float = 7 * _DAY,
) -> float:
  """Seconds until enough clients are there.

  Args:
    available: who is there when.
    seed: of the run.
    ids: int [C], whom it may be.
    time: now, in seconds.
    count: how many are needed, 1 <= count <= C.
    step: seconds between two looks.
    most: seconds after which it gives up.

  Returns:
    0 if they are there now, else a multiple of `step`.

  Raises:
    ValueError: if they do not come within `most` seconds.
  """
  validate.at_least(1, count=count)
  validate.positive(step=step)
  for number in range(math.floor(most / step) + 1):
    if available.at(seed, ids, time + number * step).sum() >= count:
      return number * step
  raise ValueError(
    f"{count} of {len(ids)} clients must be there within {most:.0f} s of "
    f"second {time:.0f}: by '{available.name}' they never are; ask for fewer "
    "or make them available for longer"
  )


def _read(path):
  """Columns of a trace: int64, float64 and float64 [M], M >= 1."""
  seconds = pa.float64()
  columns = table.read(
    path, {"client": pa.int64(), "start": seconds, "end": seconds}
  )
  clients, starts, ends = (columns[k] for k in ("client", "start", "end"))
  good = (clients >= 0) & (starts >= 0) & (starts < ends)
  if not good.all():
    odd = int(np.flatnonzero(~good)[0])
    raise ValueError(
      f"{path}: a row must be a client's id and seconds 0 <= start < end, got "
      f"client={clients[odd]} start={starts[odd]} end={ends[odd]}"
    )
  if not good.size:
    raise ValueError(f"{path}: a trace must have at least one row, got none")
  return clients, starts, ends


def _merged(clients, starts, ends):
  """The same spells in order, those that touch made one."""
  order = np.lexsort((starts, clients))
  kept: list[list] = []
  for client, start, end in zip(clients[order], starts[order], ends[order]):
    if kept and kept[-1][0] == client and start <= kept[-1][2]:
      kept[-1][2] = max(kept[-1][2], end)
    else:
      kept.append([client, start, end])
  columns = zip(*kept)
  return tuple(np.array(x) for x in columns)


AVAILABILITIES: dict[str, Callable[..., Availability]] = {
  "always": always,
  "diurnal": diurnal,
  "markov": markov,
  "trace": trace,
}
