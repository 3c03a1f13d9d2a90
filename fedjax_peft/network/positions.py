"""Positions: where clients are on a plane, and the stations near them.

A position is a function of (seed, time, client): nobody has to be followed
from the beginning. Points are float64 [..., 2] in metres.

Camp, Boleng and Davies, A Survey of Mobility Models for Ad Hoc Network
Research, 2002, https://doi.org/10.1002/wcm.72 (random waypoints)
"""

import math

import numpy as np
import numpy.typing as npt

from fedjax_peft import validate
from fedjax_peft.network import draw

# Mean distance of two points of a disc of radius 1.
_APART = 128 / (45 * math.pi)


def disc(
  ids: npt.ArrayLike,
  seed: int,
  *,
  radius: float,
  center: npt.ArrayLike = (0.0, 0.0),
  number: npt.ArrayLike = 0,
) -> np.ndarray:
  """Places clients uniformly on a disc.

  Args:
    ids: integers [C].
    seed: of the run.
    radius: metres.
    center: [2], or [C, 2] for clients of several cells.
    number: another one gives other places.

  Returns:
    float64 [C, 2].

  Raises:
    ValueError: if the radius is not positive.
  """
  validate.positive(radius=radius)
  away = radius * np.sqrt(draw.uniform(seed, "place/radius", number, ids))
  angle = 2 * math.pi * draw.uniform(seed, "place/angle", number, ids)
  point = np.stack([away * np.cos(angle), away * np.sin(angle)], -1)
  return point + np.asarray(center, np.float64)


def grid(stations: int, spacing: float) -> np.ndarray:
  """Base stations on a square grid around the origin, row after row.

  Returns:
    float64 [E, 2].

  Raises:
    ValueError: if there is none, or the spacing is not positive.

  Example:
    >>> grid(4, 100.0).tolist()
    [[-50.0, -50.0], [50.0, -50.0], [-50.0, 50.0], [50.0, 50.0]]
  """
  validate.at_least(1, stations=stations)
  validate.positive(spacing=spacing)
  side = math.isqrt(stations - 1) + 1
  row, column = np.divmod(np.arange(stations), side)
  point = np.stack([column, row], -1) * spacing
  return point - (point.max(0) + point.min(0)) / 2


def waypoint(
  ids: npt.ArrayLike,
  time: npt.ArrayLike,
  seed: int,
  *,
  radius: float,
  speed: float,
  pause: float = 0.0,
  center: npt.ArrayLike = (0.0, 0.0),
) -> np.ndarray:
  """Where clients are that walk from one random point of a disc to the next.

  Every leg takes as long as the mean leg at `speed`, so a client's speed
  varies from leg to leg around it, and where it is at any time follows from
  two draws. Clients set out at different times. As with all random waypoints
  they are more often in the middle than at the edge.

  Args:
    ids: integers [C].
    time: seconds, >= 0, [C] or one for all.
    seed: of the run.
    radius: metres.
    speed: metres per second while walking, on average; 0 = they stay.
    pause: seconds at every point.
    center: [2] or [C, 2].

  Returns:
    float64 [C, 2].

  Raises:
    ValueError: if the radius is not positive, or the speed or pause negative.
  """
  validate.positive(radius=radius)
  for name, value in (("speed", speed), ("pause", pause)):
    if not 0 <= value < math.inf:
      raise ValueError(f"{name} must be at least 0, got {name}={value}")
  if speed == 0:
    return disc(ids, seed, radius=radius, center=center)
  walk = _APART * radius / speed
  leg = walk + pause
  clock = np.asarray(time, np.float64) / leg
  clock = clock + draw.uniform(seed, "waypoint/start", 0, ids)
  number = np.floor(clock).astype(np.int64)
  done = np.minimum((clock - number) * (leg / walk), 1)[..., None]
  old, new = (
    disc(ids, seed, radius=radius, center=center, number=number + i)
    for i in (0, 1)
  )
  return old + done * (new - old)


def nearest(
  points: npt.ArrayLike, stations: npt.ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
  """The nearest base station of every client; the first of several.

  Args:
    points: [C, 2] metres.
    stations: [E, 2] metres.

  Returns:
    (int32 [C] stations, float64 [C] metres to them).

  Raises:
    ValueError: if there is no station.
  """
  points = np.asarray(points, np.float64)
  if not len(np.asarray(stations)):
    raise ValueError("stations must hold at least one point, got none")
  station = np.zeros(points.shape[:-1], np.int32)
  best = np.full(points.shape[:-1], np.inf)
  # One station after another: memory stays that of the clients.
  for e, at in enumerate(np.asarray(stations, np.float64)):
    metres = np.hypot(points[..., 0] - at[0], points[..., 1] - at[1])
    station[metres < best] = e
    best = np.minimum(best, metres)
  return station, best


def distances(points: npt.ArrayLike, stations: npt.ArrayLike) -> np.ndarray:
  """Metres from every client to every station, float64 [C, E]."""
  apart = np.asarray(points, np.float64)[..., None, :] - np.asarray(stations)
  return np.hypot(apart[..., 0], apart[..., 1])
