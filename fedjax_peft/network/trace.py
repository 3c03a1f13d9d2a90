"""Traces: rates of links that somebody measured, over time."""

import os
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedjax_peft import validate
from fedjax_peft.network import table


class Trace(NamedTuple):
  """Rates of clients' links, which hold from one time to the next; see `trace`.

  Attributes:
    clients: int64 [N] ids, sorted.
    first: int64 [N], a client's first row.
    times: float64 [U], all times at which some rate changes, sorted.
    keys: int64 [M], sorted; (place of the client, place of the time) as one
      number.
    up: float64 [M], bits per second.
    down: float64 [M], bits per second.
    period: seconds after which everything begins again; inf = never.
  """

  clients: np.ndarray
  first: np.ndarray
  times: np.ndarray
  keys: np.ndarray
  up: np.ndarray
  down: np.ndarray
  period: float

  def rates(
    self, ids: npt.ArrayLike, time: npt.ArrayLike
  ) -> tuple[np.ndarray, np.ndarray]:
    """The rates of clients at a time.

    Args:
      ids: integers [C].
      time: float64 seconds, [C] or one for all. Before a client's first row
        its first rates hold, after its last row the last ones.

    Returns:
      (up, down), float64 [C] bits per second.

    Raises:
      ValueError: if a client has no row.
    """
    ids = np.asarray(ids, np.int64)
    place = np.searchsorted(self.clients, ids)
    place = np.minimum(place, self.clients.size - 1)
    strange = ids[self.clients[place] != ids]
    if strange.size:
      raise ValueError(
        f"every client must have a row in the trace, got none of client "
        f"{strange.flat[0]}"
      )
    time = np.asarray(time, np.float64)
    if np.isfinite(self.period):
      time = time % self.period
    when = np.searchsorted(self.times, time, "right")  # times up to now
    width = self.times.size + 1
    row = np.searchsorted(self.keys, place * width + when, "right") - 1
    row = np.maximum(row, self.first[place])
    return self.up[row], self.down[row]


def trace(
  client: npt.ArrayLike,
  time: npt.ArrayLike,
  up: npt.ArrayLike,
  down: npt.ArrayLike,
  *,
  period: float | None = None,
) -> Trace:
  """A trace from its rows, in any order.

  Args:
    client: integers [M].
    time: [M] seconds, from when on the row's rates hold.
    up: [M] bits per second, 0 = no connection.
    down: [M] bits per second.
    period: seconds after which the trace begins again; None = never.

  Raises:
    ValueError: if there is no row, a value is not a number in its range, or a
      client has two rows of the same time.

  Example:
    >>> both = trace([0, 0, 1], [0.0, 10.0, 0.0], [1e6, 2e6, 3e6], [0, 0, 0])
    >>> both.rates([0, 1], 12.0)[0]
    array([2000000., 3000000.])
  """
  if period is not None:
    validate.positive(period=period)
  ids = np.asarray(client, np.int64)
  columns = [np.asarray(x, np.float64) for x in (time, up, down)]
  if not ids.size or any(x.shape != ids.shape for x in columns):
    raise ValueError(
      "a trace must have as many clients, times and rates, and at least one: "
      f"got {[x.size for x in (ids, *columns)]}"
    )
  for name, x in zip(("time", "up", "down"), columns, strict=True):
    if not np.all((x >= 0) & np.isfinite(x)):
      raise ValueError(
        f"column {name!r} of a trace must be numbers of at least 0, got "
        f"{x[~((x >= 0) & np.isfinite(x))][0]}"
      )
  order = np.lexsort((columns[0], ids))
  ids, (time, up, down) = ids[order], (x[order] for x in columns)
  clients, first, place = np.unique(ids, return_index=True, return_inverse=True)
  times, when = np.unique(time, return_inverse=True)
  keys = place * (times.size + 1) + when + 1
  twice = np.flatnonzero(keys[1:] == keys[:-1])
  if twice.size:
    raise ValueError(
      "a client must have one row at a time, got two of client "
      f"{ids[twice[0]]} at {time[twice[0]]} s"
    )
  until = np.inf if period is None else float(period)
  return Trace(clients, first, times, keys, up, down, until)


def read_trace(
  path: str | os.PathLike, *, period: float | None = None
) -> Trace:
  """Reads a CSV with the columns client, time, up and down; see `trace`.

  Raises:
    ValueError: if a column is missing or not known, or as `trace` does.
  """
  columns = table.read(
    path,
    {
      "client": pa.int64(),
      "time": pa.float64(),
      "up": pa.float64(),
      "down": pa.float64(),
    },
  )
  try:
    return trace(**columns, period=period)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
