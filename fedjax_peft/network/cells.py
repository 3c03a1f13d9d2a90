"""Cells: the clients that talk to one node, and share its band.

Links are made cell by cell, and so is decided what clients of a cell do.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_peft.network import adaptation, ledger, multi, profile, serving
from fedjax_peft.network import radio as radio_lib
from fedjax_peft.network.adaptation import Adapted


class Cell(NamedTuple):
  """Clients of one node.

  Attributes:
    places: int [c], among the C clients of a round.
    metres: float64 [c], to the node.
  """

  places: np.ndarray
  metres: np.ndarray


class Moment(NamedTuple):
  """A round that begins for C clients.

  Attributes:
    cells: who talks to whom; together they are all clients.
    ids: int [C].
    number: of the round.
    seed: of the run.
    now: simulated seconds.
  """

  cells: Sequence[Cell]
  ids: np.ndarray
  number: int
  seed: int
  now: float


def cells(distance: np.ndarray, nodes: np.ndarray | None) -> list[Cell]:
  """Clients by the node that they talk to.

  Args:
    distance: float64 [C, E], metres to each node.
    nodes: int [C]; None: there is one.
  """
  if nodes is None:
    return [Cell(np.arange(len(distance)), distance[:, 0])]
  each = ((e, np.flatnonzero(nodes == e)) for e in np.unique(nodes))
  return [Cell(here, distance[here, e]) for e, here in each]


def signals(
  links: multi.Links, moment: Moment, chosen: Adapted = adaptation.UNCHANGED
) -> radio_lib.Signal:
  """The links of clients, each in its cell.

  Args:
    links: of all cells.
    moment: whose links.
    chosen: shares and powers, if they were decided.
  """
  ids = moment.ids
  found = radio_lib.Signal(
    np.zeros(ids.size),
    np.zeros(ids.size),
    np.zeros(ids.size, bool),
    np.zeros(ids.size, bool),
  )
  for at, metres in moment.cells:
    part = multi.links(
      links,
      metres,
      ids[at],
      moment.number,
      moment.seed,
      moment.now,
      share=None if chosen.band is None else chosen.band[at],
      watts=None if chosen.watts is None else chosen.watts[at],
    )
    for whole, some in zip(found, part, strict=True):
      whole[at] = some
  return found


def decide(
  adapt: adaptation.Adaptation,
  links: multi.Links,
  moment: Moment,
  machines: profile.Fleet,
  signal: radio_lib.Signal,
  back: np.ndarray,
  server: serving.Server | None,
  load: Callable[[np.ndarray, Mapping[str, np.ndarray]], ledger.Load],
) -> Adapted:
  """What is decided for clients, cell by cell.

  Args:
    adapt: how.
    links: of all cells.
    moment: whose round begins.
    machines: of the C clients.
    signal: their links if nothing is decided.
    back: float64 [C], bits per second at which answers come in steps.
    server: of all; of one that is shared a cell has as large a part as its
      clients are of all.
    load: (places [k], {trait: int32 [k]}) -> what the round would ask of each
      by itself; a client may be there with several traits.

  Raises:
    ValueError: if there is not one radio whose rates follow from the band.
  """
  radio, parts = adaptation.cell(links), []
  for at, metres in moment.cells:
    if server is not None and server.shared:
      part = at.size / moment.ids.size
      own: Any = server._replace(flops=server.flops * part)
    else:
      own = server

    def asked(choices, at=at):
      count = max((len(v) for v in choices.values()), default=1)
      each = {
        k: np.repeat(np.asarray(v, np.int32), at.size)
        for k, v in choices.items()
      }
      found = load(np.tile(at, count), each)
      shape = (count, at.size)
      rows = (np.broadcast_to(x, count * at.size) for x in found)
      return ledger.Load(*(x.reshape(shape) for x in rows))

    ids = moment.ids[at]
    _, gains = radio_lib.gains(radio, metres, ids, moment.number, moment.seed)
    known = adaptation.Known(
      ids,
      moment.number,
      machines.take(at),
      gains,
      signal.on[at],
      signal.down[at],
      back[at],
      radio,
      own,
      asked,
    )
    parts.append((at, adapt.decide(known)))
  return _merged(parts, moment.ids.size)


def _merged(parts, clients):
  """What was decided for the places of each part, as one."""
  if len(parts) == 1:
    return parts[0][1]
  said = [part for _, part in parts]

  def whole(values):
    if values[0] is None:
      return None
    found = np.zeros(clients, np.asarray(values[0]).dtype)
    for (places, _), value in zip(parts, values, strict=True):
      found[places] = value
    return found

  names = Adapted._fields[1:]
  traits = {k: whole([x.traits[k] for x in said]) for k in said[0].traits}
  return Adapted(traits, *(whole([getattr(x, k) for x in said]) for k in names))
