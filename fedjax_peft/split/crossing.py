"""Crossings: bytes of what crosses the wires of a pipeline.

Bytes are those of the arrays that a wire holds for a batch, with what the loss
reads where no data are.

Where the first part is remembered (`prefix_of`), what it hands on of an example
and what the loss reads of it stay at the server: they cross once, before the
client's first step, and never in a step. So the server draws the batches.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from fedjax_peft import link, tree
from fedjax_peft.split import cutting

PyTree = Any


class Crossing(NamedTuple):
  """What crosses wires in a step on a batch.

  Attributes:
    names: of the parts.
    wires: between them.
    messages: specs of what comes to each wire, and behind the last.
    told: specs of the examples that the loss reads where no data are.
    kept: whether what crosses the first wire, and what is told, is at the
      server since before the client's first step.
  """

  names: tuple[str, ...]
  wires: Sequence[cutting.Wire]
  messages: Sequence[PyTree]
  told: Sequence[Any]
  kept: bool = False


def in_step(crossing: Crossing, rows: int) -> tuple[int, int]:
  """(up, down), bytes of a step on so many examples."""
  total = {"up": 0, "down": 0}
  home = [cutting.is_at_home(name) for name in crossing.names]
  for i, wire in enumerate(crossing.wires):
    if home[i] == home[i + 1] or (crossing.kept and not i):
      continue  # between servers, on the device, or there already
    there, back = ("up", "down") if home[i] else ("down", "up")
    total[there] += _message(wire, crossing.messages[i], rows)
    if wire.down is not None:
      floats, _ = cutting.divide(_few(crossing.messages[i], rows))
      total[back] += _sent(wire.down, floats)
  if not crossing.kept:
    total["up"] += tree.nbytes(_few(crossing.told, rows))
  return total["up"], total["down"]


def before(crossing: Crossing) -> int:
  """Bytes of an example that cross up once, alone; 0 if none do."""
  if not crossing.kept:
    return 0
  message = _message(crossing.wires[0], crossing.messages[0], 1)
  return message + tree.nbytes(_few(crossing.told, 1))


def _message(wire, batch, rows):
  """Bytes of so many examples' message on its way on."""
  floats, rest = cutting.divide(_few(batch, rows))
  return _sent(wire.up, floats) + tree.nbytes(rest)


def _few(batch: PyTree, rows: int) -> PyTree:
  """Specs of so many examples, of specs of a batch; axis B leads."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch
  )


def _sent(links: link.Link, message: Mapping[str, Any]) -> int:
  """Bytes on the wire of a message."""
  return _on_wire(links, tuple(sorted(message.items())))


@functools.lru_cache(maxsize=4096)
def _on_wire(links, items):
  """The same of {name: spec} as pairs; tracing a link takes a while."""
  return tree.nbytes(links.after(link.Spec(dict(items))).message)
