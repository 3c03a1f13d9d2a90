"""Conversing: the secure sum of a compiled round, message by message.

In place of masks that follow from the round's key (`links.mask`), the wires of
a round are kept one by one, and clients and server say to each other on the
host whatever the protocol has them say. The sum is the same, bit for bit; it
takes seconds, memory for all wires, and shows that the short cut is none.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_peft import link, reduce
from fedjax_peft.links import gridding
from fedjax_peft.privacy import (
  client,
  conversation,
  dropout,
  keys,
  securing,
  terms,
)


class Ends(NamedTuple):
  """Both ends of a boundary whose sum is a conversation.

  Attributes:
    link: the last link of the chain, where `mask` would be.
    reduce: the reduction of the tier.
  """

  link: link.Link
  reduce: reduce.Reduce


def conversing(wanted: dropout.Risk, scheme: keys.Scheme) -> Ends:
  """A secure sum by `conversation.hold`, in a round of `securing.secured`.

  Guarantees:
    the sum of all wires that arrived, modulo their width, bit for bit that of
    `links.mask`; who drops at which step is what the plan says.

  On several devices, each holds the same conversation.

  Args:
    wanted: as that of the plan.
    scheme: `keys.real()` or `keys.simulated(key)`.

  Returns:
    (link, reduction), for one tier and one receiver. The link's `init` raises
    ValueError if the wire does not hold unsigned integers. A round raises if
    the plan is not a secured one, or if too few are left: then a message was
    not finite, since the plan leaves out what fails.
  """

  def init(spec):
    gridding.expect(spec.message, "conversing")
    return (), ()

  def receive(wires, shared, roster, key):
    if not isinstance(wires, reduce.Collected):
      raise ValueError(
        "a conversation needs every wire: got their sum; use the reduction "
        "that comes with the link, conversing(...).reduce"
      )
    if securing.LATE not in roster.traits or roster.nodes is not None:
      raise ValueError(
        "a conversation needs a plan that says who drops when, and one "
        f"receiver: got the traits {sorted(roster.traits)}; use "
        "securing.secured, and one tier of size 1"
      )
    leaves, treedef = jax.tree.flatten(wires.rows)
    spec = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in leaves]

    def talk(present, members, *rows):
      return _talk(wanted, scheme, present, members, rows)

    members = _Members(
      roster.clients,
      roster.weights > 0,
      roster.arrived,
      roster.traits[securing.LATE],
      roster.traits[securing.SESSION],
    )
    total = jax.pure_callback(
      talk, spec, wires.present, members, *leaves, vmap_method="sequential"
    )
    return jax.tree.unflatten(treedef, total), shared

  made = link.Link(
    name=link.MASK,
    init=init,
    send=lambda message, mine, shared, ctx: (message, mine, {}),
    receive=receive,
    after=lambda spec: spec,
    receive_on="sum",
  )
  kept = reduce.collect("conversation", reduce.Collected)
  # Taken together with the link it is a sum.
  return Ends(made, kept._replace(linear=True))


class _Members(NamedTuple):
  """Who is in the roster; axis C, some places are empty."""

  clients: Any
  here: Any
  arrived: Any
  late: Any
  session: Any


def _talk(wanted, scheme, present, members, rows):
  """The sum of all rows that are present, by a conversation on the host."""
  present, rows = np.asarray(present), [np.asarray(x) for x in rows]
  members = _Members(*map(np.asarray, members))
  # Rows come in the order in which clients finish, which is that of places.
  sender = np.flatnonzero(members.arrived)
  row = np.flatnonzero(present)
  if not row.size:
    return [np.zeros(x.shape[1:], x.dtype) for x in rows]
  values = np.zeros((members.here.size, sum(x[0].size for x in rows)), "u4")
  flat = [x.reshape(len(x), -1).astype(np.uint32) for x in rows]
  values[sender] = np.concatenate(flat, axis=1)[row]
  places = np.flatnonzero(members.here)
  places = places[np.argsort(members.clients[places])]
  late = members.late[places]
  # What is not finite is never sent.
  late = np.where(members.arrived[places], late, np.minimum(late, dropout.MASK))
  total = _hold(wanted, scheme, values[places], late, members.session[places])
  ends = np.cumsum([x[0].size for x in rows])[:-1]
  return [
    part.astype(x.dtype).reshape(x.shape[1:])
    for part, x in zip(np.split(total, ends), rows, strict=True)
  ]


def _hold(wanted, scheme, values, late, session):
  """The sum of the rows whose client is not lost before they arrive."""
  n, size = values.shape
  near, enough = dropout.ring(wanted, n)
  number = int(session[0])
  secrets = [scheme.draw(f"identity/{number}/{i}", 32) for i in range(n)]
  known = terms.agree(
    dropout.session(number),
    tuple(map(scheme.identity, secrets)),
    neighbours=near,
    threshold=enough,
    size=size,
  )

  def carry(step, i, data):
    is_up = step in client.STEPS
    return () if is_up and client.STEPS.index(step) >= late[i] else (data,)

  outcome = conversation.hold(known, scheme, secrets, values, carry)
  expected = set(np.flatnonzero(late > dropout.MASK).tolist())
  if outcome.survivors != expected:
    raise terms.TooFewError(
      f"clients {sorted(expected - outcome.survivors)} had too few neighbours "
      "left to say anything, but the plan did not know"
    )
  return outcome.total
