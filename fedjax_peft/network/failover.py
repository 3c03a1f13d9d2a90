"""Failover: which edge a client talks to when edges die, fill up or come near.

All functions are pure: they take distances and return edges, so that the same
round gives the same answer however a run came to it. An edge is -1 for who has
none.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedjax_peft import validate


def assign(
  distance: np.ndarray,
  alive: npt.ArrayLike | None = None,
  capacity: npt.ArrayLike | None = None,
) -> np.ndarray:
  """Sends every client to the nearest edge that lives and has room.

  Guarantees:
    Ties go to the lower edge and, for room, to the lower client. Without
    capacities, the death of an edge moves nobody but its own clients. With
    them the assignment is stable: no client is nearer to an edge than one of
    those that the edge has taken and would itself rather be there. Since both
    sides prefer what is near there is one such assignment (Gale and Shapley,
    College admissions and the stability of marriage, 1962).

  Args:
    distance: float [N, E], or any other cost; inf = out of reach.
    alive: bool [E]; None means all.
    capacity: clients that an edge takes, an int or int [E]; None takes all.

  Returns:
    int32 [N], -1 for who finds no living edge in reach with room.

  Raises:
    ValueError: if a shape does not fit, a distance is nan or a capacity is
      negative.

  Example:
    >>> distance = np.array([[1.0, 5.0], [2.0, 3.0], [9.0, 4.0]])
    >>> assign(distance), assign(distance, [False, True])
    (array([0, 0, 1], dtype=int32), array([1, 1, 1], dtype=int32))
    >>> assign(distance, capacity=[1, 2])
    array([0, 1, 1], dtype=int32)
  """
  cost = _distances(distance)
  edges = cost.shape[1]
  living = _of_edges("alive", True if alive is None else alive, edges)
  cost = np.where(living.astype(bool), cost, np.inf)
  if capacity is None:
    return _nearest(cost)
  room = _of_edges("capacity", capacity, edges)
  if room.dtype.kind not in "iu" or room.min(initial=0) < 0:
    raise ValueError(
      f"capacity must be whole numbers from 0 on: got {capacity}; write "
      "capacity=None for edges that take all"
    )
  # Deferred acceptance: whom an edge turns away asks the next nearest. Every
  # turn strikes at least one pair out, and few turns are needed.
  while True:
    choice = _nearest(cost)
    asks = np.flatnonzero(choice >= 0)
    order = asks[np.lexsort((asks, cost[asks, choice[asks]], choice[asks]))]
    taken = choice[order]
    place = np.arange(taken.size) - np.searchsorted(taken, taken)
    away = order[place >= room[taken]]
    if not away.size:
      return choice
    cost[away, choice[away]] = np.inf


def handover(
  previous: npt.ArrayLike,
  distance: np.ndarray,
  hysteresis: float = 0.0,
  alive: npt.ArrayLike | None = None,
) -> np.ndarray:
  """Moves a client only where another edge is nearer by a margin.

  So a client on the border between two edges does not go to and fro.

  Args:
    previous: int [N], the edges until now; -1 = none.
    distance: float [N, E]; inf = out of reach.
    hysteresis: by how much another edge must be nearer, in the unit of the
      distance, >= 0; 0 takes the nearest, and stays on a tie.
    alive: bool [E]; None means all. Clients of a dead edge go to the nearest.

  Returns:
    int32 [N], -1 for who reaches no living edge.

  Raises:
    ValueError: if a shape, an edge or the hysteresis is out of range.
  """
  cost = _distances(distance)
  clients, edges = cost.shape
  before = np.asarray(previous)
  if before.shape != (clients,) or before.dtype.kind not in "iu":
    raise ValueError(
      f"previous must be an edge for each of {clients} clients: got "
      f"{before.dtype} {list(before.shape)}; write -1 for who has none"
    )
  if before.size and not (before.min() >= -1 and before.max() < edges):
    raise ValueError(
      f"previous must be edges in 0..{edges - 1}, or -1: got "
      f"{before.min()}..{before.max()}"
    )
  if not hysteresis >= 0:
    raise ValueError(f"hysteresis must be at least 0, got {hysteresis=}")
  living = _of_edges("alive", True if alive is None else alive, edges)
  cost = np.where(living.astype(bool), cost, np.inf)
  best = _nearest(cost)
  at = np.arange(clients)
  now = np.where(before >= 0, cost[at, before], np.inf)
  there = np.where(best >= 0, cost[at, best], np.inf)
  stays = np.isfinite(now) & ~(there + hysteresis < now)
  return np.where(stays, before, best).astype(np.int32)


def outages(
  edges: int, schedule: Mapping[Any, Iterable] | None = None
) -> Callable[[int], np.ndarray]:
  """Which edges live in a round, from a table of when they do not.

  Args:
    edges: E.
    schedule: {edge: (from_round, to_round)} or {edge: [(from, to), ...]}: the
      edge is dead in rounds from <= r < to. An edge may be written as text, as
      the keys of a TOML table are.

  Returns:
    (round) -> bool [E], True = alive.

  Raises:
    ValueError: if an edge does not exist or a window is empty.

  Example:
    >>> alive = outages(3, {1: (2, 4)})
    >>> alive(1), alive(3)
    (array([ True,  True,  True]), array([ True, False,  True]))
  """
  validate.at_least(1, edges=edges)
  windows: list[tuple[int, int, int]] = []
  for edge, when in (schedule or {}).items():
    number = int(edge) if str(edge).isdecimal() else -1
    if not 0 <= number < edges:
      raise ValueError(
        f"an outage must be of an edge in 0..{edges - 1}: got {edge!r}"
      )
    spans = list(when)
    spans = [spans] if spans and np.ndim(spans[0]) == 0 else spans
    for span in spans:
      if len(span) != 2 or not 0 <= span[0] < span[1]:
        raise ValueError(
          f"an outage must be (from_round, to_round) with 0 <= from < to: got "
          f"{tuple(span)} for edge {edge}"
        )
      windows.append((number, int(span[0]), int(span[1])))

  def alive(round: int) -> np.ndarray:
    living = np.ones(edges, bool)
    for edge, begin, end in windows:
      living[edge] &= not begin <= round < end
    return living

  return alive


def _distances(distance: np.ndarray) -> np.ndarray:
  """Distances as a float64 copy [N, E], checked."""
  cost = np.array(distance, np.float64)
  if cost.ndim != 2 or not cost.shape[1] or np.isnan(cost).any():
    raise ValueError(
      "distance must be numbers [N, E], none of them nan: got "
      f"{list(cost.shape)}; write inf for an edge out of reach"
    )
  return cost


def _of_edges(name: str, value: npt.ArrayLike, edges: int) -> np.ndarray:
  """One entry an edge, [E]."""
  array = np.asarray(value)
  if array.shape not in ((), (edges,)):
    raise ValueError(
      f"{name} must be one value, or one for each of {edges} edges: got "
      f"{list(array.shape)}"
    )
  return np.broadcast_to(array, (edges,))


def _nearest(cost: np.ndarray) -> np.ndarray:
  """int32 [N], the first edge of least cost, -1 where none is finite."""
  best = np.argmin(cost, axis=1)
  finite = np.isfinite(np.min(cost, axis=1, initial=np.inf))
  return np.where(finite, best, -1).astype(np.int32)
