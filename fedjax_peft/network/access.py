"""Access: which of several links a message takes, and how much of it.

Axis L counts the links that one client could use, axis E the base stations
that many clients choose from.
"""

import numpy as np
import numpy.typing as npt


def split(
  bytes: npt.ArrayLike, rates: npt.ArrayLike, latency: npt.ArrayLike = 0.0
) -> tuple[np.ndarray, np.ndarray]:
  """Splits messages over links so that all parts arrive together.

  With equal latencies a link gets D_b = D r_b / sum(r), and it takes
  D / sum(r). Otherwise link l carries r_l (T - latency_l) bits, where T is
  such that all are carried (water filling); a link that could not deliver
  before T carries nothing.

  Args:
    bytes: integers [...], of each message.
    rates: [..., L] bits per second; 0 = a link that cannot be used.
    latency: [..., L] seconds, or one for all links.

  Returns:
    (shares, int64 [..., L] bytes that sum to the message exactly; seconds,
    float64 [...]). Where no link works: nothing, and inf.

  Example:
    >>> shares, seconds = split(1000, [3e3, 1e3])
    >>> shares, float(seconds)
    (array([750, 250]), 2.0)
  """
  speed = np.asarray(rates, np.float64)
  whole = np.asarray(bytes, np.int64)
  shape = np.broadcast_shapes(speed.shape, np.shape(latency), (*whole.shape, 1))
  speed = np.broadcast_to(speed, shape)
  late = np.where(speed > 0, np.broadcast_to(latency, shape), np.inf)
  order = np.argsort(late, -1, kind="stable")
  r = np.take_along_axis(speed, order, -1)
  begin = np.where(r > 0, np.take_along_axis(late, order, -1), 0)
  # The finish with the first m links, and it is soonest with the right m.
  bits = 8.0 * whole[..., None]
  with np.errstate(divide="ignore", invalid="ignore"):
    finish = (bits + np.cumsum(r * begin, -1)) / np.cumsum(r, -1)
  seconds = np.min(np.where(np.cumsum(r, -1) > 0, finish, np.inf), -1)
  works = np.isfinite(seconds)
  upto = np.where(works, seconds, 0)[..., None]
  part = speed * np.maximum(upto - np.where(speed > 0, late, 0), 0)
  return _whole(part, np.where(works, whole, 0)), seconds


def _whole(part: np.ndarray, total: np.ndarray) -> np.ndarray:
  """Integers in proportion to the parts, that sum to the totals exactly."""
  ends = np.cumsum(part, -1)
  most = ends[..., -1:]
  fraction = np.divide(ends, most, out=np.zeros_like(ends), where=most > 0)
  ends = np.rint(fraction * total[..., None]).astype(np.int64)
  return np.diff(ends, axis=-1, prepend=0)


def switch(
  current: npt.ArrayLike, rates: npt.ArrayLike, *, margin: float = 0.25
) -> np.ndarray:
  """Which link to use: the present one, until another is clearly better.

  Args:
    current: integers [C], the links in use; -1 = none yet.
    rates: [C, L] bits per second.
    margin: by how much of its rate the present link must be beaten, so that
      nobody goes back and forth between two that are alike.

  Returns:
    int32 [C].

  Raises:
    ValueError: if the margin is negative.
  """
  if not 0 <= margin < np.inf:
    raise ValueError(f"margin must be a number of at least 0, got {margin=}")
  speed = np.asarray(rates, np.float64)
  now = np.asarray(current, np.int32)
  best = np.argmax(speed, -1).astype(np.int32)
  mine = np.take_along_axis(speed, np.maximum(now, 0)[..., None], -1)[..., 0]
  peak = np.max(speed, -1)
  return np.where((now < 0) | (peak > (1 + margin) * mine), best, now)


def associate(rates: npt.ArrayLike, bytes: npt.ArrayLike = 1) -> np.ndarray:
  """Which base station to use, by rate and by load.

  A station serves its clients in turn, so it is done after the sum of their
  times. Clients join where they would be done soonest, those who take longest
  first; if the last station then is done later than when everyone takes the
  fastest link, they take that.

  Args:
    rates: [C, E] bits per second; 0 = out of reach.
    bytes: integers [C] of each client's message, or one for all.

  Returns:
    int32 [C], -1 for a client that reaches no station.
  """
  speed = np.asarray(rates, np.float64)
  bits = np.broadcast_to(8.0 * np.asarray(bytes), speed.shape[:1])
  with np.errstate(divide="ignore"):
    times = bits[:, None] / speed  # [C, E]
  reach = speed.max(-1, initial=0) > 0
  fastest = np.where(reach, np.argmax(speed, -1), -1).astype(np.int32)
  chosen = np.full_like(fastest, -1)
  busy = np.zeros(speed.shape[1])
  shortest = np.min(times, -1, initial=np.inf)
  for c in np.argsort(-shortest, kind="stable"):
    if reach[c]:
      e = int(np.argmin(busy + times[c]))
      chosen[c], busy[e] = e, busy[e] + times[c, e]
  better = busy.max(initial=0) <= station_seconds(fastest, times).max(initial=0)
  return chosen if better else fastest


def station_seconds(station: npt.ArrayLike, times: npt.ArrayLike) -> np.ndarray:
  """When each base station is done with its clients, one after another.

  Args:
    station: int [C], whose station each client uses, -1 = none.
    times: [C, E] seconds that a client takes at a station.

  Returns:
    float64 [E].
  """
  which, seconds = np.asarray(station), np.asarray(times, np.float64)
  c = np.flatnonzero(which >= 0)
  mine = seconds[c, which[c]]
  return np.bincount(which[c], mine, minlength=seconds.shape[1])
