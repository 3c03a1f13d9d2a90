"""Serving: what a server computes for clients in the midst of their steps.

Where a model is cut, a step is computed in two places. Device and server wait
for each other, so a client's steps take, over all of its batches,

  T = FLOPs / f + up bits / r_up + server FLOPs / f_s + down bits / r_down.

Activations and gradients differ from client to client: nothing of them is
broadcast. Where the server answers all clients with one gradient, that goes
down once for all of them, as a model does over such links; each receives it. A
device that learns without an answer goes on while the server works, and waits
at the end for what that needs longer.
"""

import math
from typing import NamedTuple

import numpy as np

from fedjax_peft import validate
from fedjax_peft.network import ledger, phases, profile, radio


class Server(NamedTuple):
  """What computes for the clients of a round.

  Attributes:
    flops: FLOP/s that it sustains; inf takes no time.
    shared: whether the clients at work at one time divide it, those that need
      it at all; else each has so much of its own.
    waits: whether a device waits for its answer in every step.
    common: whether that is the same for all clients of a round, so that it goes
      down as a model does: once, where links broadcast.
  """

  flops: float = math.inf
  shared: bool = False
  waits: bool = True
  common: bool = False

  def among(self, clients: int) -> "Server":
    """What each of so many at work at one time has."""
    share = max(clients, 1) if self.shared else 1
    return self._replace(flops=self.flops / share, shared=False)


def server(
  flops: float = math.inf,
  *,
  shared: bool = False,
  waits: bool = True,
  common: bool = False,
) -> Server:
  """A server, checked.

  Args:
    flops: FLOP/s that it sustains, > 0.
    shared: whether the clients of a round divide it.
    waits: whether a device waits for its answer in every step.
    common: whether all clients of a round get the same answer.

  Raises:
    ValueError: if it computes nothing.

  Example:
    >>> server(1e12, shared=True).among(4).flops
    250000000000.0
  """
  if flops != math.inf:
    validate.positive(flops=flops)
  return Server(flops, shared, waits, common)


def timed(
  load: ledger.Load,
  machines: profile.Fleet,
  signal: radio.Signal,
  server: Server | None = None,
  back: np.ndarray | None = None,
  speed: np.ndarray | None = None,
) -> tuple[phases.Phases, phases.Parts | None]:
  """How long rounds of clients take where nothing goes wrong.

  Args:
    load: what a round asks of device, links and server.
    machines: of these clients.
    signal: their links; where one is on, its client is at work.
    server: what computes the rest of their steps; None: there is no rest.
    back: float64 [C], bits per second at which a client's answers come.
    speed: float64 [C], FLOP/s of the server for each; None is as `server` says.

  Returns:
    (the phases, what the steps in them are made of or None).

  Raises:
    ValueError: if steps are computed in two places, but there is no server.
  """
  parts, compute = None, load.flops / machines.flops
  if server is not None and back is not None:
    parts = _parts(load, compute, signal, server, back, speed)
    compute = parts.seconds
  elif np.any(load.server) or np.any(load.stream_up):
    raise ValueError(
      "steps that are computed in two places need a server: got none; write "
      "World(server=serving.server(1e13))"
    )
  down = phases.transfer(load.down, signal.down)
  return phases.timed(down, compute, phases.transfer(load.up, signal.up)), parts


def _parts(load, device, signal, server, back, speed):
  """What the steps of clients are made of, whose devices take seconds [C]."""
  if speed is None:
    busy = np.count_nonzero(signal.on & np.greater(load.server, 0))
    speed = server.among(busy).flops
  up = phases.transfer(load.stream_up, signal.up)
  with np.errstate(divide="ignore", invalid="ignore"):
    wait = np.where(np.greater(load.server, 0), load.server / speed, 0.0)
  wait = np.broadcast_to(wait, device.shape)
  if not server.waits:  # it has worked all the while
    wait = np.maximum(wait - device - up, 0.0)
  return phases.Parts(device, up, wait, phases.transfer(load.stream_down, back))
