"""Restricting: a link for some leaves of a message; the others stay put.

In split training a client's report holds leaves of two kinds. Those of the
layers that it computes cross its uplink. Those of the layers that a server
computes for it are at the server already: they are averaged with the others,
but nothing quantizes, clips or masks them, and no byte of them is counted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedjax_peft import link

_WHOLE = ("weigh", link.COUNT)  # how much a sender counts is true of all leaves


class Parted(NamedTuple):
  """A wire, and what does not cross.

  Attributes:
    wire: of the leaves that cross.
    rest: the message, None in place of the leaves that cross.
  """

  wire: Any
  rest: Any


def only(links: link.Link, where: Callable[[str], bool]) -> link.Link:
  """The same links, for the leaves whose name says so.

  Args:
    links: any link or chain. `weigh` and `count` in it are for all leaves.
    where: (key of a message's dict) -> whether it crosses. What is under no
      key, such as a weight, does.

  Returns:
    The chain of the restricted links. Bounds are those of what crosses.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_peft import links
    >>> mine = only(links.int8(), lambda name: name == "mine")
    >>> x = {"mine": jnp.ones(2), "rest": jnp.full(2, 0.3)}
    >>> wire, _, _ = mine.send(x, ((),), ((),), link.alone())
    >>> wire.rest["rest"].dtype, wire.wire["mine"].packed.dtype
    (dtype('float32'), dtype('int8'))
  """
  return link.chain(
    *(
      part if part.name in _WHOLE else _restricted(part, where)
      for part in link.parts_of(links)
    )
  )


def _restricted(part: link.Link, where) -> link.Link:
  """One link, for some leaves."""

  def init(spec):
    return part.init(spec._replace(message=_divide(spec.message, where).wire))

  def send(message, mine, shared, ctx):
    here = _divide(message, where)
    wire, mine, stats = part.send(here.wire, mine, shared, ctx)
    return Parted(wire, here.rest), mine, stats

  def receive(wire, shared, roster, key):
    here, shared = part.receive(wire.wire, shared, roster, key)
    return _join(here, wire.rest), shared

  def after(spec):
    here = _divide(spec.message, where)
    after = part.after(spec._replace(message=here.wire))
    return after._replace(message=Parted(after.message, here.rest))

  return link.Link(
    name=part.name,
    init=init,
    send=send,
    receive=receive,
    after=after,
    receive_on=part.receive_on,
    factored=part.factored,
  )


def _divide(message, where) -> Parted:
  """A message twice, each time with None for the leaves of the other kind."""

  def crosses(path):
    keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
    return all(where(str(key)) for key in keys)

  def keep(kind):
    return jax.tree_util.tree_map_with_path(
      lambda path, x: x if crosses(path) == kind else None, message
    )

  return Parted(keep(True), keep(False))


def _join(wire, rest):
  """The two halves of a message together, and what the link added to it."""
  if isinstance(wire, dict):
    added = {k: v for k, v in wire.items() if k not in rest}
    return added | {k: _join(wire[k], v) for k, v in rest.items()}
  return jax.tree.map(
    lambda a, b: b if a is None else a, wire, rest, is_leaf=lambda x: x is None
  )
