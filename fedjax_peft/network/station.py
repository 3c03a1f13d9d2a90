"""Stations: where edges stand, and which of them hears each client."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fedjax_peft import validate
from fedjax_peft.network import failover, positions


class Stations(NamedTuple):
  """Where edges are, and how clients move among them; see `stations`."""

  spacing: float | None
  speed: float
  pause: float
  hysteresis: float
  capacity: int | None
  outages: Mapping[str, Any]


def stations(
  *,
  spacing: float | None = None,
  speed: float = 0.0,
  pause: float = 0.0,
  hysteresis: float = 0.0,
  capacity: int | None = None,
  outages: dict[str, Any] | None = None,
) -> Stations:
  """Where edges are, and how clients move among them.

  Args:
    spacing: metres between two edges; None is 1.5 times a cell's radius.
    speed: metres a second at which clients walk, on average; see
      `positions.waypoint`.
    pause: seconds that they stay at a point.
    hysteresis: metres by which another edge must be nearer to take over.
    capacity: the most clients of an edge; they are then dealt out by distance.
    outages: {edge: [from_round, to_round]}; see `failover.outages`.

  Raises:
    ValueError: if an option is out of range.
  """
  if spacing is not None:
    validate.positive(spacing=spacing)
  if capacity is not None:
    validate.at_least(1, capacity=capacity)
  for name, value in (
    ("speed", speed),
    ("pause", pause),
    ("hysteresis", hysteresis),
  ):
    if not 0 <= value < np.inf:
      raise ValueError(
        f"{name} must be a number of at least 0, got {name}={value}"
      )
  return Stations(spacing, speed, pause, hysteresis, capacity, outages or {})


def distance(
  how: Stations, clients: int, edges: int, radius: float, seed: int
) -> Callable[[float], np.ndarray]:
  """Where clients are, as a function of time.

  Args:
    how: stations.
    clients: N.
    edges: E.
    radius: metres, of a cell.
    seed: of the run.

  Returns:
    (seconds) -> float64 [N, E], metres to every edge, at least 1.
  """
  ids = np.arange(clients)
  sites = positions.grid(edges, how.spacing or 1.5 * radius)
  reach = radius if edges == 1 else radius + np.hypot(*sites.T).max()

  @functools.lru_cache(maxsize=2)
  def at(seconds):
    points = positions.waypoint(
      ids, seconds, seed, radius=reach, speed=how.speed, pause=how.pause
    )
    return np.maximum(positions.distances(points, sites), 1.0)

  return at if how.speed else (lambda seconds: at(0.0))


def home(
  how: Stations, edges: int
) -> Callable[[np.ndarray, int, np.ndarray], np.ndarray] | None:
  """Which edge hears each client.

  Args:
    how: stations.
    edges: E.

  Returns:
    See `world.World.home`; None where there is one edge.

  Raises:
    ValueError: if an outage is of no edge; the function: if in a round no edge
      is alive, or none has room.
  """
  if edges == 1:
    return None
  alive = failover.outages(edges, how.outages)

  def find(distance, number, before):
    here = alive(number)
    if not here.any():
      raise ValueError(
        f"outages leave no edge alive in round {number}; keep one of {edges}"
      )
    if how.capacity is not None:
      found = failover.assign(distance, here, how.capacity)
    else:
      found = failover.handover(before, distance, how.hysteresis, here)
    if (found < 0).any():
      raise ValueError(
        f"{int((found < 0).sum())} clients find no edge with room in round "
        f"{number}; raise capacity={how.capacity}"
      )
    return found

  return find
