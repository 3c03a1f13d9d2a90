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
from fedjax_peft import links, tree
from fedjax_peft import reduce as reduce_lib
from fedjax_peft.links import Weighed
from tolerance import tol

WEIGHTS = (1, 3, 20, 2, 5)  # of the senders; one is above max_weight
STALENESS = (0, 3, 8, 0, 1)  # of the senders, by id
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
    scale: what each sender's message is multiplied by, its weight is not.
  """

  link: fp.Link
  weights: tuple[int, ...] | None = None
  error: float = 0.0
  scale: tuple[float, ...] = (1.0,) * _SENDERS


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


QUIET = 100.0  # dB: noise of 3e-6 a value, for laws about the sum


def deviation(
  snr_db: float,
  threshold: float = 1.0,
  bound: float = BOUND,
  n: int = tree.size(SHAPES),
) -> float:
  """Standard deviation of the noise in a value that was sent over the air."""
  return bound / math.sqrt(n * 10 ** (snr_db / 10) * threshold)


def members() -> dict[str, Member]:
  """Every link of the library, alone and in the chains it is made for."""
  capped = tuple(min(w, 8) for w in WEIGHTS)
  each = (1,) * len(WEIGHTS)

  def grid(bits, bound=BOUND):
    limit = (2 ** (bits - 1) - 1) // len(WEIGHTS)
    return bound / (limit - 0.5) / 2

  coarse = BOUND / 127  # one step of int8, a block's maximum being <= BOUND
  wide = math.sqrt(2) * BOUND  # what affine's range is at most
  weighed, clipped = fp.weigh(max_weight=8), fp.clip(BOUND)

  def fixed(bits):
    link = fp.chain(clipped, fp.fixed_point(bits))
    return Member(link, None, grid(bits))

  # The laws allow `error` in every sender's value, and noise is added once.
  # Nobody is silent at a threshold of 0.001.
  on_air = fp.air(QUIET, fading="none")
  faded = fp.chain(clipped, weighed, fp.air(QUIET, threshold=1e-3))
  stale = tuple((1 + d) ** -0.5 for d in STALENESS)

  return {
    "identity": Member(fp.chain()),
    "clip": Member(clipped),
    "weigh": Member(weighed, capped),
    "air": Member(on_air, None, 6 * deviation(QUIET)),
    "clip_weigh_air": Member(
      faded, capped, 6 * deviation(QUIET, 1e-3, 8 * BOUND)
    ),
    "discount": Member(fp.discount(), scale=stale),
    "discount_constant": Member(fp.discount("constant")),
    "discount_hinge": Member(
      fp.discount("hinge", power=0.5, start=2.0),
      scale=tuple(1 / (0.5 * max(d - 2, 0) + 1) for d in STALENESS),
    ),
    "discount_weigh_int8": Member(
      fp.chain(fp.discount(), weighed, fp.int8()),
      capped,
      8 * coarse,
      stale,
    ),
    "weigh_clients": Member(fp.weigh("clients"), each),
    "average": Member(
      links.average(4.0, max_weight=8), scale=tuple(w / 4 for w in capped)
    ),
    "adaptive_clip": Member(links.adaptive_clip(BOUND)),
    "noise": Member(links.noise(0.01), None, 0.06),
    "local_noise": Member(links.local_noise(0.01), None, 0.06),
    "clip_average_noise_fixed_point_mask": Member(
      fp.chain(
        clipped,
        links.average(4.0),
        links.noise(1e-4),
        fp.fixed_point(32),
        fp.mask(2),
      ),
      None,
      1e-3,
      (0.25,) * _SENDERS,
    ),
    "clip_fixed_point_8": fixed(8),
    "clip_fixed_point_16": fixed(16),
    "clip_fixed_point_32": fixed(32),
    "int8": Member(fp.int8(block=128), None, coarse),
    "int8_nearest": Member(fp.int8(stochastic=False), None, coarse / 2),
    "int4": Member(fp.int4(), None, BOUND / 7),
    "quantize_1": Member(fp.quantize(1), None, 2 * BOUND),
    "quantize_2": Member(fp.quantize(2), None, BOUND),
    "quantize_16": Member(fp.quantize(16), None, BOUND / 32767),
    "affine_1": Member(links.affine(1), None, wide),
    "affine_5_channel": Member(links.affine(5, per="channel"), None, wide / 31),
    "affine_12_token_nearest": Member(
      links.affine(12, per="token", stochastic=False), None, wide / 4095 / 2
    ),
    "affine_32": Member(links.affine(32)),
    "weigh_affine_8": Member(
      fp.chain(weighed, links.affine(8)), capped, 8 * wide / 255
    ),
    "sign": Member(fp.sign(), None, 2 * BOUND),
    "rotate": Member(fp.rotate(), None, 4e-6),
    "clip_rotate_fixed_point": Member(
      fp.chain(clipped, fp.rotate(128), fp.fixed_point(32)), None, 4e-6
    ),
    "top_k": Member(fp.top_k(0.2), None, BOUND),
    "rand_k": Member(fp.rand_k(0.5), None, 2 * BOUND),
    "lowrank": Member(fp.lowrank(2), None, BOUND),
    "error_feedback": Member(fp.error_feedback(fp.top_k(0.3)), None, BOUND),
    "weigh_error_feedback_int4": Member(
      fp.chain(weighed, fp.error_feedback(fp.int4())), capped, 8 * BOUND / 7
    ),
    "clip_weigh_fixed_point_mask": Member(
      fp.chain(clipped, weighed, fp.fixed_point(32), fp.mask(2)),
      capped,
      grid(32, 8 * BOUND),
    ),
    "clip_rand_k_fixed_point_mask": Member(
      fp.chain(clipped, fp.rand_k(0.5), fp.fixed_point(16), fp.mask(4)),
      None,
      2 * BOUND,
    ),
    "feedback": Member(feedback(), None, 0.0625),
    "clip_weigh_fixed_point": Member(
      fp.chain(clipped, weighed, fp.fixed_point(32)),
      capped,
      grid(32, 8 * BOUND),
    ),
    "weigh_int8": Member(fp.chain(weighed, fp.int8()), capped, 8 * coarse),
    "feedback_weigh": Member(fp.chain(feedback(), weighed), capped, 0.5),
  }


def median() -> fp.Reduce:
  """The coordinatewise median, as a user would write it."""

  def finish(rows, present):
    count = jnp.sum(present, dtype=jnp.int32)

    def one(x):
      here = present.reshape(-1, *(1,) * (x.ndim - 1))
      ordered = jnp.sort(jnp.where(here, x, jnp.inf), axis=0)
      low, high = ordered[(count - 1) // 2], ordered[count // 2]
      return jnp.where(count > 0, (low + high) / 2, 0)

    return jax.tree.map(one, rows)

  return reduce_lib.collect("median", finish)


# Senders and their messages. What is worked out on them is numpy's.


def messages(seed: int = 0, norm: float = 1.0, shapes: Any = None):
  """Random messages of all senders, each of the given norm; axis C leads."""
  rng = np.random.default_rng(seed)
  leaves, treedef = jax.tree.flatten(SHAPES if shapes is None else shapes)
  drawn = [rng.normal(size=(len(WEIGHTS), *x.shape)) for x in leaves]
  flat = np.concatenate([x.reshape(len(WEIGHTS), -1) for x in drawn], axis=1)
  factor = norm / np.linalg.norm(flat, axis=1)
  return jax.tree.unflatten(
    treedef,
    [
      np.asarray(x.T * factor, s.dtype).T
      for x, s in zip(drawn, leaves, strict=True)
    ],
  )


def contexts(weights, ids) -> fp.Context:
  """What the senders know; axis C leads all but the roster."""
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(ids)
  roster = fp.Roster(ids, weights, jax.random.key(1))
  traits = {"staleness": jnp.array(STALENESS, jnp.int32)[ids]}
  return fp.Context(keys, ids, weights, traits, roster)


def spec(shapes=None, senders=_SENDERS) -> fp.Spec:
  """What is known of the messages before they are sent."""
  return fp.Spec(SHAPES if shapes is None else shapes, BOUND, senders=senders)


class Crossing(NamedTuple):
  """What becomes of messages that cross a link; axis C leads all but two.

  Attributes:
    result: what the receiver ends up with.
    wires: what was sent.
    mine: the senders' states.
    said: what each wire says; what needs the sum stays as it was sent.
    each: every wire received alone.
    together: their sum received.
  """

  result: Any
  wires: Any
  mine: Any
  said: Any
  each: Any
  together: Any


@functools.cache
def _crossing(link, reduce):
  """Compiles the whole exchange of a link, and of each of its wires."""
  ex = link_lib.exchange(link, reduce)
  axes = fp.Context(0, 0, 0, 0, None)

  def alone(wire, shared, ctx):
    parts = list(zip(ex.link.parts, shared, strict=True))
    for part, state in reversed(parts):
      if part.receive_on != "sum":
        wire, _ = part.receive(wire, state, ctx.roster, ctx.key)
    return wire

  @jax.jit
  def cross(sent, weights, ids, present):
    ctx, key = contexts(weights, ids), jax.random.key(1)
    one_of, shared = ex.link.init(spec())
    mine = jax.tree.map(lambda x: jnp.stack([x] * len(weights)), one_of)
    wires, mine, _ = jax.vmap(ex.send, (0, 0, None, axes))(
      sent, mine, shared, ctx
    )
    decoded = ex.decode(wires, shared, ctx.roster, key)
    acc = ex.reduce.update(ex.zeros(spec(), _SENDERS), decoded, present)
    total = jax.tree.map(lambda x: jnp.sum(x, 0, dtype=x.dtype), wires)

    def receive(wire):
      return ex.link.receive(wire, shared, ctx.roster, key)[0]

    return Crossing(
      ex.finish(acc, shared, ctx.roster, key)[0],
      wires,
      mine,
      jax.vmap(alone, (0, None, axes))(wires, shared, ctx),
      jax.vmap(receive)(wires),
      receive(total),
    )

  return cross


def exchanged(
  link, sent, weights=WEIGHTS, ids=None, present=None, reduce=None
) -> Crossing:
  """Sends messages, receives them, and looks at what is in between."""
  weights = np.asarray(weights, np.int32)
  ids = np.arange(len(weights)) if ids is None else ids
  present = weights > 0 if present is None else present
  cross = _crossing(link, reduce or _SUM)
  return cross(sent, weights, np.asarray(ids, np.int32), np.array(present))


_SUM = reduce_lib.sum()


def one(rows, i):
  """Row i of every leaf."""
  return jax.tree.map(lambda x: np.asarray(x)[i], rows)


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


def same(a, b) -> None:
  """Equal trees, exactly."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


# Laws of a link.

EXTREMES = (0.0, 1e-30, 1e-42, 1e30, 3e38, -3e38, np.nan, np.inf, -np.inf)


def shapes_hold_for_any_values(member: Member) -> None:
  """The wire has the shapes and dtypes of `after`, whatever is sent."""
  link = member.link
  shapes = SHAPES | {"half": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}
  like = spec(shapes)
  mine, shared = link.init(like)
  ctx = link_lib.alone(3)

  @jax.jit
  def cross(message, mine, shared):
    wire, mine, stats = link.send(message, mine, shared, ctx)
    back, shared = link.receive(wire, shared, ctx.roster, ctx.key)
    return wire, mine, back, shared, stats

  for value in EXTREMES:
    message = {k: np.full(x.shape, value, x.dtype) for k, x in shapes.items()}
    message["kernel"][0] = 1
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
  mine, shared = link.init(spec(shapes))
  sent, ctx = messages(shapes=shapes), link_lib.alone(3)
  eager = link.send(jax.tree.map(jnp.asarray, one(sent, 2)), mine, shared, ctx)

  @jax.jit
  def compiled(sent, mine, shared, ctx):
    axes = (0, None, None, None)
    together = jax.vmap(link.send, axes)(sent, mine, shared, ctx)
    two = jax.tree.map(lambda x: x[2], sent)
    return link.send(two, mine, shared, ctx)[0], together[0]

  alone, together = compiled(sent, mine, shared, ctx)
  _steps_apart(eager[0], alone)
  _steps_apart(eager[0], one(together, 2))


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
  if member.link.receive_on == "any":
    found = exchanged(member.link, messages())
    total = jax.tree.map(lambda x: np.asarray(x).sum(0, x.dtype), found.each)
    near(found.together, total, member.error)


def the_exchange_has_its_value(member: Member) -> None:
  """sum(w s m) / sum(w) where it weighs, else sum(s m), s of the sender."""
  sent = messages()
  found = exchanged(member.link, sent).result
  weights = np.ones(len(WEIGHTS)) if member.weights is None else member.weights
  total = 1 if member.weights is None else np.sum(weights)
  weights = np.multiply(weights, member.scale)
  wanted = jax.tree.map(
    lambda x: np.asarray(np.tensordot(weights, x, 1) / total, np.float32), sent
  )
  near(found, wanted, member.error * len(WEIGHTS) / total)


def the_bound_holds(member: Member) -> None:
  """What a sender's wire decodes to has a norm within `after(spec).bound`."""
  link = member.link
  if any(p.name == "mask" for p in link_lib.parts_of(link)):
    return  # a masked wire alone says nothing: test_masking.py
  bound = link.after(spec()).bound
  clips = any(p.name == "clip" for p in link_lib.parts_of(link))
  sizes = (BOUND, 1e-20, *((1e4, 1e30, 1e38) if clips else ()))
  for seed, size in enumerate(sizes):
    said = exchanged(link, messages(seed, norm=size)).said
    for i in range(len(WEIGHTS)):
      assert norm(one(said, i)) <= bound * (1 + tol(jnp.float32))


def silence_decodes_to_zero(member: Member) -> None:
  """A message of zeros with weight zero says zero, and adds zero."""
  nothing = jax.tree.map(np.zeros_like, messages())
  nobody, here = [0] * len(WEIGHTS), [True] * len(WEIGHTS)
  found = exchanged(member.link, nothing, nobody, present=here).result
  if link_lib.NOISE in [part.name for part in link_lib.parts_of(member.link)]:
    # The noise of nobody is that of anybody.
    gone = exchanged(member.link, nothing, nobody, present=nobody).result
    same(found, gone)
  else:
    same(jax.tree.map(np.asarray, found), one(nothing, 0))


def a_sender_without_weight_changes_nothing(member: Member) -> None:
  """Neither an absent sender, whatever it holds, nor a silent one."""
  weights = (1, 3, 20, 2, 0)
  silent, broken = messages(), messages()
  for k in SHAPES:
    silent[k][-1], broken[k][-1] = 0, np.nan
  here, gone = [True] * 5, [True] * 4 + [False]
  without = exchanged(member.link, silent, weights, present=gone).result
  same(exchanged(member.link, broken, weights, present=gone).result, without)
  same(exchanged(member.link, silent, weights, present=here).result, without)


def the_order_of_senders_does_not_matter(member: Member) -> None:
  """Their wires and states change places; the result stays."""
  order, weights = np.array([3, 0, 4, 1, 2]), np.array(WEIGHTS)
  sent = messages()
  found = exchanged(member.link, sent)
  moved = exchanged(member.link, one(sent, order), weights[order], order)
  same(one(found.wires, order), moved.wires)
  same(one(found.mine, order), moved.mine)
  floats = any(tree.is_float(x) for x in jax.tree.leaves(found.wires))
  if floats:
    near(found.result, moved.result)
  else:  # integers crossed the wire
    same(found.result, moved.result)


def bytes_are_those_of_the_buffers(member: Member) -> None:
  """Counted bytes equal the bytes of the device buffers of real wires."""
  wires = jax.tree.leaves(exchanged(member.link, messages()).wires)
  held = [x.addressable_data(0) for x in wires]
  counted = tree.nbytes(member.link.after(spec()).message) * len(WEIGHTS)
  assert counted == sum(x.nbytes for x in held)
  assert counted == sum(len(np.asarray(x).tobytes()) for x in held)


def integers_stay_within_their_bound(member: Member) -> None:
  """The weights on a wire are at most `after(spec).integer_bound`."""
  wires = exchanged(member.link, messages()).wires
  if isinstance(wires, Weighed):
    most = member.link.after(spec()).integer_bound
    assert np.max(wires.weight) <= most


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

HERE = (True,) * len(WEIGHTS)


@functools.cache
def _reduced(reduce, pieces):
  """Compiles: fold pieces in, one after another or apart and merged."""

  @jax.jit
  def run(sent, present):
    parts = []
    for i, piece in enumerate(pieces):
      rows = jax.tree.map(lambda x, p=piece: x[slice(*p)], sent)
      here = present[slice(*piece)]
      last = parts.pop() if i % 2 else reduce.init(SHAPES, _SENDERS)
      parts.append(reduce.update(last, rows, here))
    return reduce.finalize(functools.reduce(reduce.merge, parts))

  return run


def reduced(reduce, sent, present=HERE, pieces=((0, 5),)):
  """The result of a reduction, folded in pieces: two a device."""
  return _reduced(reduce, pieces)(sent, np.array(present))


def pieces_of_any_size_give_the_same(reduce: fp.Reduce) -> None:
  """Segments and devices: update in pieces, merge, and it is the same."""
  sent = messages()
  whole = reduced(reduce, sent)
  near(reduced(reduce, sent, pieces=((0, 2), (2, 3), (3, 5))), whole)
  near(reduced(reduce, sent, pieces=((3, 5), (3, 3), (0, 1), (1, 3))), whole)


def absent_rows_count_for_nothing(reduce: fp.Reduce) -> None:
  """Whatever they hold."""
  sent, rest = messages(), np.array([0, 2, 3, 4])
  broken = messages()
  for k in SHAPES:
    broken[k][1] = np.nan
  found = reduced(reduce, broken, (True, False, True, True, True))
  near(found, reduced(reduce, one(sent, rest), HERE[:4], ((0, 4),)))


def order_does_not_matter(reduce: fp.Reduce) -> None:
  """A reduction is over a set."""
  sent, order = messages(), np.array([4, 2, 0, 1, 3])
  near(reduced(reduce, sent), reduced(reduce, one(sent, order)))


def nobody_gives_zero(reduce: fp.Reduce) -> None:
  """A round without senders moves nothing."""
  assert norm(reduced(reduce, messages(), (False,) * len(WEIGHTS))) == 0


def linear_means_the_sum(reduce: fp.Reduce) -> None:
  """`linear` is true if and only if the result is the sum."""
  sent = messages()
  found = reduced(reduce, sent)
  is_sum = all(
    np.allclose(found[k], sent[k].sum(0), rtol=0, atol=tol(jnp.float32, 5))
    for k in SHAPES
  )
  assert is_sum == reduce.linear


def memory_is_as_declared(reduce: fp.Reduce) -> None:
  """A flat accumulator is no larger than one message."""
  held = tree.nbytes(jax.eval_shape(lambda: reduce.init(SHAPES, _SENDERS)))
  assert (held <= tree.nbytes(SHAPES)) == (reduce.memory == "flat")


REDUCE_LAWS = (
  pieces_of_any_size_give_the_same,
  absent_rows_count_for_nothing,
  order_does_not_matter,
  nobody_gives_zero,
  linear_means_the_sum,
  memory_is_as_declared,
)
