"""Links: what happens to a message between its sender and its receiver.

Clip, weigh, quantize, mask: each is a Link, and a chain of links is a link.
Everything that travels crosses one: adapter updates, activations inside a cut
model, the model going down. So bytes, sensitivity and exactness are answered
in one place, and the order of links is checked when they are put together.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from fedjax_peft import reduce as reduce_lib
from fedjax_peft import tree
from fedjax_peft.context import Context as Context
from fedjax_peft.context import Roster as Roster
from fedjax_peft.context import alone as alone

PyTree = Any

COUNT = "count"  # the link that says how many examples a message stands for
NOISE = "noise"  # the link that adds noise to the sum, even of nobody
MASK = "mask"  # the link whose wires mean something only all together
_LINEAR = (
  "reduce.sum() with a method that is linear (fedit, ffa, fedsa, rolora, "
  "fed_sb, ravan)"
)


class Spec(NamedTuple):
  """What is known about a message before any is sent.

  Attributes:
    message: pytree of `jax.ShapeDtypeStruct`.
    bound: L2 bound over the float leaves of one sender's message.
    integer_bound: bound on the absolute value of its integer leaves.
    senders: how many messages are added up at most.
  """

  message: PyTree
  bound: float = math.inf
  integer_bound: float = math.inf
  senders: int = 1


class Link(NamedTuple):
  """A pair of pure functions, one for each end of a connection.

  Attributes:
    name: for messages and records.
    init: (Spec) -> (mine, shared), state of one sender and of the receiver.
      Raises ValueError if such a message cannot cross.
    send: (message, mine, shared, ctx) -> (wire, mine, stats). Vmapped over
      senders. `stats` are scalars that go into the record and nowhere else.
    receive: (wire, shared, roster, key) -> (message, shared).
    after: (Spec) -> Spec of the wire: its shapes, the L2 bound of what it
      decodes to, and the bound of its integer leaves.
    receive_on: "each" must see every wire alone, "any" commutes with the sum,
      "sum" means something only on the sum of the wires.
    factored: whether `Factored` leaves can be sent without expanding them.
    parts: the links of a chain; None for a link that is not a chain.
    fold: (sum of messages, wires [W, ...], present bool [W]) -> sum; receives
      wires and adds what they say, where one pass over them all is faster
      than one after the other. None: there is no such pass.
  """

  name: str
  init: Callable
  send: Callable
  receive: Callable
  after: Callable[[Spec], Spec]
  receive_on: Literal["each", "any", "sum"] = "any"
  factored: bool = False
  parts: tuple["Link", ...] | None = None
  fold: Callable | None = None


def stateless(
  name: str,
  send: Callable,
  receive: Callable | None = None,
  *,
  bound: Callable[[float, Spec], float] | None = None,
  receive_on: Literal["each", "any", "sum"] = "any",
  factored: bool = False,
  fold: Callable | None = None,
) -> Link:
  """A link without state, from send(message, ctx) and receive(wire, roster).

  Args:
    name: for messages and records.
    send: (message, ctx) -> (wire, stats).
    receive: (wire, roster) -> message; None returns the wire.
    bound: (bound, spec) -> L2 bound after this link; None keeps it.
    receive_on: see `Link`.
    factored: see `Link`.
    fold: see `Link`.
  """

  def send_(message, mine, shared, ctx):
    wire, stats = send(message, ctx)
    return wire, mine, stats

  def receive_(wire, shared, roster, key):
    return (receive(wire, roster) if receive else wire), shared

  def after(spec):
    wire = wire_shape(spec.message, lambda m, ctx: send(m, ctx)[0])
    limit = bound(spec.bound, spec) if bound else spec.bound
    return spec._replace(message=wire, bound=limit)

  return Link(
    name=name,
    init=lambda spec: ((), ()),
    send=send_,
    receive=receive_,
    after=after,
    receive_on=receive_on,
    factored=factored,
    fold=fold,
  )


def wire_shape(message: PyTree, send: Callable[[PyTree, Context], Any]):
  """Shapes that send(message, ctx) returns, without computing anything."""
  return jax.eval_shape(lambda m: send(m, alone()), message)


def parts_of(link: Link) -> tuple[Link, ...]:
  """The links of a chain, or the link itself."""
  return (link,) if link.parts is None else link.parts


def chain(*links: Link) -> Link:
  """Sends from left to right and receives from right to left.

  Nested chains are flattened, so chaining is associative; `chain()` is the
  identity.

  Raises:
    ValueError: if a link that must see every wire alone ("each") stands left
      of one that means something only on the sum ("sum").
  """
  parts = tuple(part for link in links for part in parts_of(link))
  each = next((p for p in parts if p.receive_on == "each"), None)
  if each is not None:
    for part in parts[parts.index(each) :]:
      if part.receive_on == "sum" and each.name == COUNT:
        raise ValueError(
          f"'{COUNT}' is for reductions that hear every message alone, but "
          f"'{part.name}' shows them the sum only; use {_LINEAR}, and weigh() "
          f"in place of '{COUNT}'"
        )
      if part.receive_on == "sum":
        raise ValueError(
          f"'{part.name}' works on the sum of all wires, but '{each.name}' at "
          "its left must decode every wire alone; use fixed_point in place of "
          f"'{each.name}', or put '{part.name}' left of it"
        )

  def init(spec):
    mine, shared = [], []
    for part in parts:
      m, s = part.init(spec)
      mine.append(m)
      shared.append(s)
      spec = part.after(spec)
    return tuple(mine), tuple(shared)

  def send(message, mine, shared, ctx):
    stats, new = {}, []
    for i, (part, m, s) in enumerate(zip(parts, mine, shared, strict=True)):
      own = ctx._replace(key=jax.random.fold_in(ctx.key, i))
      message, m, more = part.send(message, m, s, own)
      new.append(m)
      stats |= more
    return message, tuple(new), stats

  def receive(wire, shared, roster, key):
    return _receive(parts, range(len(parts)), wire, shared, roster, key)

  def after(spec):
    for part in parts:
      spec = part.after(spec)
    return spec

  kinds = {p.receive_on for p in parts}
  return Link(
    name=" > ".join(p.name for p in parts) or "identity",
    init=init,
    send=send,
    receive=receive,
    after=after,
    receive_on="each"
    if "each" in kinds
    else "sum"
    if "sum" in kinds
    else "any",
    factored=all(p.factored for p in parts),
    parts=parts,
  )


def _receive(parts, which, wire, shared, roster, key):
  """Receives the parts numbered `which`, from the last to the first."""
  shared = list(shared)
  for i in reversed(which):
    own = jax.random.fold_in(key, i)
    wire, shared[i] = parts[i].receive(wire, shared[i], roster, own)
  return wire, tuple(shared)


class Exchange(NamedTuple):
  """Many messages become one: a link and a reduction, put together.

  Attributes:
    init: (Spec) -> (mine, shared), as `Link.init` of the chain.
    zeros: (Spec, places) -> the accumulator before anyone has sent, with room
      for so many senders.
    send: as `Link.send` of the chain.
    decode: (wires, shared, roster, key) -> messages; undoes for every wire
      alone what cannot wait for the sum. Axis W leads.
    fold: (accumulator, wires, present bool [W], shared, roster, key) ->
      accumulator; decodes wires and reduces them.
    finish: (accumulator, shared, roster, key) -> (message, shared).
    link: the chain.
    reduce: the reduction.
  """

  init: Callable
  zeros: Callable
  send: Callable
  decode: Callable
  fold: Callable
  finish: Callable
  link: Link
  reduce: reduce_lib.Reduce


def exchange(link: Link, reduce: reduce_lib.Reduce) -> Exchange:
  """Joins a link and a reduction; the first 'each' link splits the chain.

  That link and all to its right are received on every wire alone, then comes
  the reduction, then the links to its left are received on the result.

  Raises:
    ValueError: if the reduction is not linear and the link needs the sum.
  """
  whole = chain(link)
  parts = whole.parts or ()
  counts = [i for i, p in enumerate(parts) if p.name == COUNT]
  if counts != [0] * (reduce.weighs == "count"):
    raise ValueError(
      f"reduction '{reduce.name}' weighs by examples itself: start the link "
      f"with count(), got '{whole.name}'"
      if reduce.weighs == "count"
      else f"'{COUNT}' is for reductions that weigh by examples themselves, "
      f"'{reduce.name}' does not; use weigh() in its place, or leave it out"
    )
  kinds = [p.receive_on for p in parts]
  if not reduce.linear:
    for part in parts:
      if part.receive_on == "sum":
        raise ValueError(
          f"'{part.name}' means something only on a sum, but the reduction "
          f"'{reduce.name}' is not linear; use {_LINEAR}, or leave "
          f"'{part.name}' out"
        )
    split = 0
  else:
    split = kinds.index("each") if "each" in kinds else len(parts)

  def decode(wires, shared, roster, key):
    late = range(split, len(parts))
    return jax.vmap(lambda w: _receive(parts, late, w, shared, roster, key)[0])(
      wires
    )

  at_once = None
  if reduce.name == "sum" and split == len(parts) - 1:
    at_once = parts[split].fold

  def fold(acc, wires, present, shared, roster, key):
    if at_once is not None:
      return at_once(acc, wires, present)
    return reduce.update(acc, decode(wires, shared, roster, key), present)

  def finish(acc, shared, roster, key):
    total = reduce.finalize(acc)
    return _receive(parts, range(split), total, shared, roster, key)

  def zeros(spec, places):
    def decoded(wire):
      wires = jax.tree.map(lambda x: x[None], wire)
      shared = whole.init(spec)[1]
      ctx = alone()
      return jax.tree.map(
        lambda x: x[0], decode(wires, shared, ctx.roster, ctx.key)
      )

    shape = jax.eval_shape(decoded, whole.after(spec).message)
    return reduce.init(shape, places)

  return Exchange(
    whole.init, zeros, whole.send, decode, fold, finish, whole, reduce
  )


def broadcast(link: Link) -> Callable:
  """One message to many receivers: the model going down.

  Returns:
    (message, mine, shared, ctx) -> (received, mine, shared, wire).

  Raises:
    ValueError: if the link means something only on a sum of wires.
  """
  refuse_sums(link, "a message from one sender to many receivers")

  def transmit(message, mine, shared, ctx):
    wire, mine, _ = link.send(message, mine, shared, ctx)
    received, shared = link.receive(wire, shared, ctx.roster, ctx.key)
    return received, mine, shared, wire

  return transmit


def cut(up: Link, down: Link) -> Callable:
  """One sender to one receiver inside a model.

  The value crosses `up`; in the backward pass its cotangent crosses `down`,
  whatever `up` did to the value (straight through).

  Returns:
    (value, key) -> value as received, differentiable.
  """
  refuse_sums(up, "a cut")
  refuse_sums(down, "a cut")

  def cross(link, message, key):
    mine, shared = link.init(Spec(tree.spec(message)))
    ctx = alone()._replace(key=key)
    wire, _, _ = link.send(message, mine, shared, ctx)
    received, _ = link.receive(wire, shared, ctx.roster, key)
    return received

  @jax.custom_vjp
  def boundary(value, key):
    return cross(up, value, jax.random.fold_in(key, 0))

  def forward(value, key):
    return boundary(value, key), key

  def backward(key, cotangent):
    return cross(down, cotangent, jax.random.fold_in(key, 1)), None

  boundary.defvjp(forward, backward)
  return boundary


def refuse_sums(link: Link, what: str) -> None:
  """Raises ValueError if a part of the link needs the sum of many wires."""
  for part in parts_of(link):
    if part.receive_on == "sum":
      raise ValueError(
        f"'{part.name}' means something only on the sum of many wires and "
        f"cannot be used for {what}; leave it out"
      )
