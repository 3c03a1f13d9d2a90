"""Explanation: what each client got, where its time and energy go, and why."""

from typing import NamedTuple

import numpy as np
import rich.table

from fedjax_peft.split import outcome
from fedjax_peft.split.problem import Problem, load

_LIMIT = 1e-6  # closer than that a power is at its limit, relative


class Row(NamedTuple):
  """One client's part of an allocation.

  Attributes:
    client: its place.
    cut: name of the cut.
    bits: name of the number of bits.
    hertz: of the band.
    watts: it sends with.
    device_seconds: of its steps, and of a server of its own if it has one.
    up_seconds: of sending.
    server_seconds: with its share of the server.
    down_seconds: of receiving.
    seconds: until it is done.
    compute_joules: of its steps.
    send_joules: of sending.
    limits: what it has come to the end of: "power", it sends with all that it
      can; "memory", the next cut does not fit; "depth", the cut before is not
      private enough.
  """

  client: int
  cut: str
  bits: str
  hertz: float
  watts: float
  device_seconds: float
  up_seconds: float
  server_seconds: float
  down_seconds: float
  seconds: float
  compute_joules: float
  send_joules: float
  limits: tuple[str, ...]


def rows(problem: Problem, allocation: outcome.Allocation) -> list[Row]:
  """A row for each client; seconds and joules add up to the allocation's."""
  a, client = allocation, np.arange(len(problem))
  asks = load(problem, a.cut, a.bits)
  down = problem.down_seconds[client, a.cut, a.bits]
  server = np.divide(
    asks.flops, a.speed, out=np.zeros_like(asks.flops), where=asks.flops > 0
  )
  columns = (
    client,
    np.array([str(c) for c in problem.cuts])[a.cut],
    np.array([str(b) for b in problem.bits])[a.bits],
    a.width,
    a.watts,
    asks.seconds - down,
    a.seconds - asks.seconds - server,
    server,
    down,
    a.seconds,
    asks.joules,
    a.joules - asks.joules,
  )
  listed = (column.tolist() for column in columns)
  limits = _limits(problem, a)
  return [Row(*x) for x in zip(*listed, limits, strict=True)]


def format(rows: list[Row]) -> rich.table.Table:
  """The rows as a table for the command line."""
  shown = rich.table.Table(box=None, pad_edge=False)
  shown.add_column("client")
  titles = ["cut", "bits", "kHz", "mW", "device s", "up s", "server s"]
  titles += ["down s", "all s", "compute J", "send J"]
  for title in titles:
    shown.add_column(title, justify="right")
  shown.add_column("at its limit of")
  for row in rows:
    figures = (1e-3 * row.hertz, 1e3 * row.watts, *row[5:12])
    values = (f"{figure:.4g}" for figure in figures)
    shown.add_row(
      str(row.client), row.cut, row.bits, *values, ", ".join(row.limits)
    )
  return shown


def _limits(problem: Problem, a: outcome.Allocation) -> list[tuple[str, ...]]:
  """What each client has come to the end of."""
  client, last = np.arange(len(problem)), problem.memory.shape[1] - 1
  following = problem.memory[client, np.minimum(a.cut + 1, last)]
  reached = {
    "power": a.watts >= (1 - _LIMIT) * problem.power_max,
    "memory": (a.cut < last) & (following > problem.memory_max),
    "depth": (a.cut == problem.least_cut) & (a.cut > 0),
  }
  return [
    tuple(name for name, where in reached.items() if where[k]) for k in client
  ]
