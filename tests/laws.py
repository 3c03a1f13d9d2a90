"""Laws: what every link and every reduction promises, as functions.

A law takes a member and raises AssertionError where it is broken; test_laws.py
runs every law over every member. Two members are written here as a user would
write them: a link with memory, and a reduction that is not linear.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_peft as fp
from fedjax_peft import link as link_lib
from fedjax_peft import reduce as reduce_lib
from fedjax_peft import tree
from fedjax_peft.links import Weighed
from tolerance import tol

WEIGHTS = (1, 3, 20, 2, 5)  # of the senders; one is above max_weight
_SENDERS = len(WEIGHTS)
BOUND = 2.0  # of the L2 norm of what they send
SHAPES = {
  "bias": jax.ShapeDtypeStruct((5,), jnp.float32),
  "gain": jax.ShapeDtypeStruct((), jnp.float32),
  "kernel": jax.ShapeDtypeStruct((6, 5), jnp.float32),
}


class Member(NamedTuple):
  """A link, and what it says of itself that its type does not.

  Attributes:
    link: the link.
    weights: what each sender's message counts, or None for a plain sum.
    error: most that decoding may err in one value of one sender.
  """

  link: fp.Link
  weights: tuple[int, ...] | None = None
  error: float = 0.0


def feedback(step: float = 0.125) -> fp.Link:
  """A link with memory: rounds to a grid, and sends the rest next time."""

  def send(message, mine, shared, ctx):
    whole = jax.tree.map(jnp.add, message, mine)
    wire = jax.tree.map(lambda x: jnp.round(x / step) * step, whole)
    return wire, jax.tree.map(jnp.subtract, whole, wire), {}

  def after(spec):
    room = step * math.sqrt(tree.size(spec.message))
    return spec._replace(bound=spec.bound + room)

  return fp.Link(
    name="feedback",
    init=lambda spec: (tree.zeros_like(spec.message), ()),
    send=send,
    receive=lambda wire, shared, roster, key: (wire, shared),
    after=after,
  )


def members() -> dict[str, Member]:
  """Every link of the library, alone and in the chains it is made for."""
  capped = tuple(min(w, 8) for w in WEIGHTS)
  each = (1,) * len(WEIGHTS)

  def grid(bits, bound=BOUND):
    limit = (2 ** (bits - 1) - 1) // len(WEIGHTS)
    return bound / (limit - 0.5) / 2

  coarse = BOUND / 127  # one step of int8, a block's maximum being <= BOUND
  weighed, clipped = fp.weigh(max_weight=8), fp.clip(BOUND)

  def fixed(bits):
    link = fp.chain(clipped, fp.fixed_point(bits))
    return Member(link, None, grid(bits))

  return {
    "identity": Member(fp.chain()),
    "clip": Member(clipped),
    "weigh": Member(weighed, capped),
    "weigh_clients": Member(fp.weigh("clients"), each),
    "clip_fixed_point_8": fixed(8),
    "clip_fixed_point_16": fixed(16),
    "clip_fixed_point_32": fixed(32),
    "int8": Member(fp.int8(block=16), None, coarse),
    "int8_nearest": Member(fp.int8(stochastic=False), None, coarse / 2),
    "feedback": Member(feedback(), None, 0.0625),
    "clip_weigh_fixed_point": Member(
      fp.chain(clipped, weighed, fp.fixed_point(32)),
      capped,
      grid(32, 8 * BOUND),
    ),
    "weigh_int8": Member(fp.chain(weighed, fp.int8()), capped, 8 * coarse),
    "feedback_weigh": Member(fp.chain(feedback(), weighed), capped, 0.5),
  }


def median(capacity: int) -> fp.Reduce:
  """The coordinatewise median, as a user would write it.

  Of the messages in an accumulator, `count` are there; the rest is inf, so
  that it sorts behind them.
  """

  def init(spec):
    rows = jax.tree.map(
      lambda x: jnp.full((capacity, *x.shape), jnp.inf, x.dtype), spec
    )
    return rows, jnp.zeros((), jnp.int32)

  def update(acc, messages, present):
    rows, count = acc
    place = count + jnp.cumsum(present) - 1
    place = jnp.where(present, place, capacity)
    rows = jax.tree.map(
      lambda r, x: r.at[place].set(x, mode="drop"), rows, messages
    )
    return rows, count + jnp.sum(present, dtype=jnp.int32)

  def merge(a, b):
    present = jnp.arange(capacity) < b[1]
    return update(a, b[0], present)

  def finalize(acc):
    rows, count = acc

    def middle(x):
      x = jnp.sort(x, axis=0)
      low, high = x[(count - 1) // 2], x[count // 2]
      return jnp.where(count > 0, low + (high - low) / 2, 0)

    return jax.tree.map(middle, rows)

  return fp.Reduce(
    "median", init, update, merge, finalize, linear=False, memory="cohort"
  )


# Senders and their messages.


def messages(seed: int = 0, norm: float = 1.0, shapes: Any = None):
  """Random messages of all senders, each of the given norm."""
  rng = np.random.default_rng(seed)
  shapes = SHAPES if shapes is None else shapes
  senders = []
  for _ in WEIGHTS:
    leaves, treedef = jax.tree.flatten(shapes)
    drawn = [rng.normal(size=x.shape) for x in leaves]
    length = math.sqrt(sum(np.sum(x**2) for x in drawn))
    senders.append(
      jax.tree.unflatten(
        treedef,
        [
          jnp.asarray(x * norm / length).astype(s.dtype)
          for x, s in zip(drawn, leaves, strict=True)
        ],
      )
    )
  return jax.tree.map(lambda *x: jnp.stack(x), *senders)


def contexts(weights=WEIGHTS, ids=None, seed: int = 0) -> fp.Context:
  """What the senders know; axis C leads all but the roster."""
  ids = jnp.arange(len(weights)) if ids is None else jnp.asarray(ids)
  ids = ids.astype(jnp.int32)
  weights = jnp.asarray(weights, jnp.int32)
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(ids)
  return fp.Context(keys, ids, weights, {}, fp.Roster(ids, weights))


def sender(ctx: fp.Context, i: int) -> fp.Context:
  """The context of one sender."""
  return ctx._replace(
    key=ctx.key[i], client=ctx.client[i], weight=ctx.weight[i]
  )


def spec(shapes=None, senders=_SENDERS) -> fp.Spec:
  """What is known of the messages before they are sent."""
  return fp.Spec(SHAPES if shapes is None else shapes, BOUND, senders=senders)


def send_all(link, sent, ctx, mine, shared):
  """Sends the messages of all senders, as a round does."""
  axes = fp.Context(0, 0, 0, None, None)
  return jax.vmap(link.send, (0, 0, None, axes))(sent, mine, shared, ctx)


def start(link, like):
  """(the state of every sender, the state of the receiver)."""
  mine, shared = link.init(like)
  repeat = functools.partial(jnp.stack, axis=0)
  return jax.tree.map(lambda x: repeat([x] * len(WEIGHTS)), mine), shared


def exchanged(link, sent, ctx, present=None, reduce=None):
  """(what the receiver ends up with, the wires, the senders' states)."""
  ex = link_lib.exchange(link, reduce or reduce_lib.sum())
  mine, shared = start(ex.link, spec())
  wires, mine, _ = send_all(ex.link, sent, ctx, mine, shared)
  key = jax.random.key(1)
  decoded = ex.decode(wires, shared, ctx.roster, key)
  present = ctx.weight > 0 if present is None else present
  acc = ex.reduce.update(ex.zeros(spec()), decoded, present)
  return ex.finish(acc, shared, ctx.roster, key)[0], wires, mine


def one(rows, i):
  """Row i of every leaf."""
  return jax.tree.map(lambda x: x[i], rows)


def decoded(link, wire, shared, ctx):
  """What one wire says; what needs the sum stays as it was sent."""
  parts, states = link_lib.parts_of(link), shared
  if link.parts is None:
    states = (shared,)
  for part, state in reversed(list(zip(parts, states, strict=True))):
    if part.receive_on != "sum":
      wire, _ = part.receive(wire, state, ctx.roster, ctx.key)
  return wire


def norm(message) -> float:
  """L2 norm of the float leaves, in float64."""
  leaves = [np.asarray(x) for x in jax.tree.leaves(message) if tree.is_float(x)]
  return math.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in leaves))


def near(a, b, error: float = 0.0, n: int = len(WEIGHTS)) -> None:
  """Equal trees: integers exactly, floats within `error` and rounding."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    if tree.is_float(x):
      eps = tol(x.dtype, n)
      x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
      np.testing.assert_allclose(x, y, rtol=eps, atol=eps + error)
    else:
      np.testing.assert_array_equal(x, y)


# Laws of a link.

EXTREMES = (0.0, 1e-30, 1e-42, 1e30, 3e38, -3e38, np.nan, np.inf, -np.inf)


def shapes_hold_for_any_values(member: Member) -> None:
  """The wire has the shapes and dtypes of `after`, whatever is sent."""
  link, shapes = member.link, SHAPES | {"half": SHAPES["bias"]}
  shapes["half"] = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
  like = spec(shapes)
  mine, shared = link.init(like)
  ctx = link_lib.alone(3)

  @jax.jit
  def cross(message, mine, shared):
    wire, mine, stats = link.send(message, mine, shared, ctx)
    back, shared = link.receive(wire, shared, ctx.roster, ctx.key)
    return wire, mine, back, shared, stats

  for value in EXTREMES:
    message = jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), shapes)
    message["kernel"] = message["kernel"].at[0].set(1)
    *found, stats = cross(message, mine, shared)
    wanted = link.after(like).message, mine, shapes, shared
    assert jax.tree.flatten(tree.spec(tuple(found))) == jax.tree.flatten(
      tree.spec(wanted)
    )
    assert all(jnp.shape(x) == () for x in stats.values())


def jit_and_vmap_equal_eager(member: Member) -> None:
  """At most one grid step on at most 1e-4 of the integers; floats round."""
  link = member.link
  shapes = {"kernel": jax.ShapeDtypeStruct((160, 125), jnp.float32)}
  mine, shared = start(link, spec(shapes))
  sent, ctx = messages(shapes=shapes), contexts()
  args = one(sent, 2), one(mine, 2), shared, sender(ctx, 2)
  eager = link.send(*args)[0]

  @jax.jit
  def compiled(args, everyone):
    return link.send(*args)[0], send_all(link, *everyone)[0]

  alone, together = compiled(args, (sent, ctx, mine, shared))
  _steps_apart(eager, alone)
  _steps_apart(eager, one(together, 2))


def _steps_apart(a, b) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if tree.is_float(x):
      eps = tol(x.dtype)
      np.testing.assert_allclose(x, y, rtol=eps, atol=eps)
    else:
      apart = np.abs(np.asarray(x, np.int64) - np.asarray(y, np.int64))
      assert apart.max() <= 1
      assert np.mean(apart > 0) <= 1e-4


def receives_add_up(member: Member) -> None:
  """The sum of the wires decodes to the sum of what each decodes to."""
  link = member.link
  if link.receive_on != "any":
    return
  ctx = contexts()
  mine, shared = start(link, spec())
  wires, _, _ = send_all(link, messages(), ctx, mine, shared)
  total = jax.tree.map(lambda x: jnp.sum(x, 0, dtype=x.dtype), wires)
  whole, _ = link.receive(total, shared, ctx.roster, ctx.key[0])
  each = [
    link.receive(one(wires, i), shared, ctx.roster, ctx.key[0])[0]
    for i in range(len(WEIGHTS))
  ]
  near(whole, jax.tree.map(lambda *x: sum(x[1:], x[0]), *each))


def the_exchange_has_its_value(member: Member) -> None:
  """sum(w m) / sum(w) where it weighs, else sum(m)."""
  sent = messages()
  found, _, _ = exchanged(member.link, sent, contexts())
  if member.weights is None:
    error = member.error * len(WEIGHTS)
    wanted = jax.tree.map(lambda x: np.asarray(x, np.float64).sum(0), sent)
  else:
    weights = np.array(member.weights, np.float64)
    error = member.error * len(WEIGHTS) / weights.sum()
    wanted = jax.tree.map(
      lambda x: np.tensordot(weights / weights.sum(), x, 1), sent
    )
  wanted = jax.tree.map(lambda x: np.asarray(x, np.float32), wanted)
  near(found, wanted, error)


def the_bound_holds(member: Member) -> None:
  """What a sender's wire decodes to has a norm within `after(spec).bound`."""
  link = member.link
  bound = link.after(spec()).bound
  ctx = contexts()
  mine, shared = start(link, spec())
  clips = any(p.name == "clip" for p in link_lib.parts_of(link))
  sizes = (BOUND, 1e-20, *((1e4, 1e30) if clips else ()))
  for seed, size in enumerate(sizes):
    sent = messages(seed, norm=size)
    wires, _, _ = send_all(link, sent, ctx, mine, shared)
    for i in range(len(WEIGHTS)):
      said = decoded(link, one(wires, i), shared, sender(ctx, i))
      assert norm(said) <= bound * (1 + tol(jnp.float32))


def silence_decodes_to_zero(member: Member) -> None:
  """A message of zeros with weight zero says zero, and adds zero."""
  sent = tree.zeros_like(messages())
  ctx = contexts(weights=[0] * len(WEIGHTS))
  present = jnp.ones(len(WEIGHTS), bool)
  found, _, _ = exchanged(member.link, sent, ctx, present)
  near(found, one(sent, 0))
  assert norm(found) == 0


def a_sender_without_weight_changes_nothing(member: Member) -> None:
  """Neither an absent sender, whatever it holds, nor a silent one."""
  sent, ctx = messages(), contexts((1, 3, 20, 2, 0))
  silent = jax.tree.map(lambda x: x.at[-1].set(0), sent)
  broken = jax.tree.map(lambda x: x.at[-1].set(jnp.nan), sent)
  here = jnp.array([True] * (len(WEIGHTS) - 1) + [False])
  without, _, _ = exchanged(member.link, silent, ctx, here)
  absent, _, _ = exchanged(member.link, broken, ctx, here)
  heard, _, _ = exchanged(member.link, silent, ctx, ~here | here)
  for other in (absent, heard):
    jax.tree.map(np.testing.assert_array_equal, without, other)


def the_order_of_senders_does_not_matter(member: Member) -> None:
  """Their wires and states change places; the result stays."""
  order = np.array([3, 0, 4, 1, 2])
  sent = messages()
  weights = np.array(WEIGHTS)
  found, wires, mine = exchanged(member.link, sent, contexts())
  swapped, moved, own = exchanged(
    member.link, one(sent, order), contexts(weights[order], order)
  )
  jax.tree.map(np.testing.assert_array_equal, one(wires, order), moved)
  jax.tree.map(np.testing.assert_array_equal, one(mine, order), own)
  floats = any(tree.is_float(x) for x in jax.tree.leaves(wires))
  if floats:
    near(found, swapped)
  else:  # integers crossed the wire
    jax.tree.map(np.testing.assert_array_equal, found, swapped)


def bytes_are_those_of_the_buffers(member: Member) -> None:
  """Counted bytes equal the bytes of the device buffers of a real wire."""
  link = member.link
  mine, shared = link.init(spec())
  ctx = link_lib.alone(3)
  wire, _, _ = link.send(one(messages(), 0), mine, shared, ctx)
  counted = tree.nbytes(link.after(spec()).message)
  held = [x.addressable_data(0) for x in jax.tree.leaves(wire)]
  assert counted == sum(x.nbytes for x in held)
  assert counted == sum(len(np.asarray(x).tobytes()) for x in held)


def integers_stay_within_their_bound(member: Member) -> None:
  """The weights on a wire are at most `after(spec).integer_bound`."""
  after = member.link.after(spec())
  mine, shared = start(member.link, spec())
  wires, _, _ = send_all(member.link, messages(), contexts(), mine, shared)
  if isinstance(wires, Weighed):
    assert int(jnp.max(wires.weight)) <= after.integer_bound


LINK_LAWS = (
  shapes_hold_for_any_values,
  jit_and_vmap_equal_eager,
  receives_add_up,
  the_exchange_has_its_value,
  the_bound_holds,
  silence_decodes_to_zero,
  a_sender_without_weight_changes_nothing,
  the_order_of_senders_does_not_matter,
  bytes_are_those_of_the_buffers,
  integers_stay_within_their_bound,
)


def bias(link, message, draws: int) -> float:
  """Largest |mean error| over all values, in standard errors.

  Of an unbiased link it is above 4 with probability 6.3e-5 times the number
  of values (two-sided, normal).
  """
  mine, shared = link.init(fp.Spec(tree.spec(message)))

  def once(key):
    ctx = link_lib.alone()._replace(key=key)
    wire, _, _ = link.send(message, mine, shared, ctx)
    back, _ = link.receive(wire, shared, ctx.roster, key)
    return jax.tree.map(jnp.subtract, back, message)

  errors = jax.jit(jax.vmap(once))(jax.random.split(jax.random.key(0), draws))
  worst = 0.0
  for x, y in zip(
    jax.tree.leaves(errors), jax.tree.leaves(message), strict=True
  ):
    x = np.asarray(x, np.float64)
    spread = x.std(0, ddof=1) / math.sqrt(draws)
    rounding = tol(jnp.float32) * np.max(np.abs(y))  # of a value on the grid
    worst = max(worst, np.max(np.abs(x.mean(0)) / np.maximum(spread, rounding)))
  return worst


# Laws of a reduction.


def pieces_of_any_size_give_the_same(reduce: fp.Reduce) -> None:
  """Segments and devices: update in pieces, merge, and it is the same."""
  sent, here = messages(), jnp.ones(len(WEIGHTS), bool)
  zero = reduce.init(SHAPES)
  whole = reduce.finalize(reduce.update(zero, sent, here))
  left = reduce.update(zero, one(sent, slice(0, 2)), here[:2])
  right = reduce.update(zero, one(sent, slice(2, 3)), here[2:3])
  right = reduce.update(right, one(sent, slice(3, 5)), here[3:])
  near(reduce.finalize(reduce.merge(left, right)), whole)
  near(reduce.finalize(reduce.merge(right, left)), whole)
  near(reduce.finalize(reduce.merge(zero, reduce.merge(left, right))), whole)


def absent_rows_count_for_nothing(reduce: fp.Reduce) -> None:
  """Whatever they hold."""
  sent = messages()
  broken = jax.tree.map(lambda x: x.at[1].set(jnp.nan), sent)
  here = jnp.array([True, False, True, True, True])
  zero = reduce.init(SHAPES)
  with_gap = reduce.finalize(reduce.update(zero, broken, here))
  rest = one(sent, np.array([0, 2, 3, 4]))
  near(with_gap, reduce.finalize(reduce.update(zero, rest, here[here])))


def order_does_not_matter(reduce: fp.Reduce) -> None:
  """A reduction is over a set."""
  sent, here = messages(), jnp.ones(len(WEIGHTS), bool)
  zero = reduce.init(SHAPES)
  found = reduce.finalize(reduce.update(zero, sent, here))
  swapped = one(sent, np.array([4, 2, 0, 1, 3]))
  near(found, reduce.finalize(reduce.update(zero, swapped, here)))


def nobody_gives_zero(reduce: fp.Reduce) -> None:
  """A round without senders moves nothing."""
  assert norm(reduce.finalize(reduce.init(SHAPES))) == 0


def linear_means_the_sum(reduce: fp.Reduce) -> None:
  """`linear` is true if and only if the result is the sum."""
  sent, here = messages(), jnp.ones(len(WEIGHTS), bool)
  found = reduce.finalize(reduce.update(reduce.init(SHAPES), sent, here))
  total = jax.tree.map(lambda x: jnp.sum(x, 0), sent)
  same = all(
    np.allclose(x, y, rtol=0, atol=tol(jnp.float32, 5))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(total), strict=True)
  )
  assert same == reduce.linear


def memory_is_as_declared(reduce: fp.Reduce) -> None:
  """A flat accumulator is no larger than one message."""
  held = tree.nbytes(jax.eval_shape(lambda: reduce.init(SHAPES)))
  assert (held <= tree.nbytes(SHAPES)) == (reduce.memory == "flat")


REDUCE_LAWS = (
  pieces_of_any_size_give_the_same,
  absent_rows_count_for_nothing,
  order_does_not_matter,
  nobody_gives_zero,
  linear_means_the_sum,
  memory_is_as_declared,
)
