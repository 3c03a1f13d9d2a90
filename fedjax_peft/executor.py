"""The executor: lanes, ticks, segments.

Lanes are vmapped; a loop runs over ticks; each lane works through several
clients, one after another. Lanes come in blocks of one fixed width, the only
shape a matrix product ever sees, so a client's bits do not depend on who
trains beside it. What is finished in a segment is encoded and reduced before
the next segment starts: memory is that of the lanes and one segment, however
large the cohort.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import link, tree, work
from fedjax_peft.data import schedule as schedule_lib

PyTree = Any
Array = jax.Array | np.ndarray


class Cohort(NamedTuple):
  """Who takes part in a round, on which device, and when.

  Axes: D devices, C places on a device (some empty).

  Attributes:
    clients: int32 [D, C] ids, -1 = empty.
    weights: int32 [D, C] examples trained on, 0 = empty.
    nodes: int32 [D, C], the lowest tier's node that each client talks to.
    schedule: see `data.schedule`.
    segments: int32 scalar, how many segments hold work; see `static`.
    examples: {feature: [M, ...]}, what the schedule's rows point into.
    traits: {name: [D, C]}, read-only facts about the clients.
    version: int32 [D, C], from which model each starts: 0 is that of now,
      1 + p that in place p of the pool. None: all from that of now.
    keep: int32 [U], place of the pool that the model before each of a round's
      updates is put into; past its end for none.
    update: int32 [D, C], which of the round's updates each report is part of;
      None: there is one.
  """

  clients: Array
  weights: Array
  nodes: Array
  schedule: schedule_lib.Schedule
  segments: Any
  examples: dict[str, Any]
  traits: Mapping[str, Any] = {}
  version: Array | None = None
  keep: Any = None
  update: Array | None = None

  def static(self) -> "Cohort":
    """The same cohort with loops of fixed length, to differentiate through.

    Loops then run over all ticks and segments that the schedule has room for;
    those that hold no work change nothing.
    """
    plan = self.schedule._replace(ticks=None)
    return self._replace(schedule=plan, segments=None)


class Lane(NamedTuple):
  """What a lane holds between two ticks; axes [G, K] lead."""

  carry: PyTree
  stats: PyTree
  step: jax.Array


class Buffer(NamedTuple):
  """What clients leave when they finish; axis W (a segment's width) leads."""

  message: PyTree
  local: PyTree
  stats: PyTree


class Common(NamedTuple):
  """What every lane of every device sees; no client axis anywhere.

  Attributes:
    sent: what clients start from; leaves have an axis in front when there are
      several models (see `Group.source`).
    base: frozen weights.
    examples: {feature: [M, ...]}.
    key: random key of (seed, round).
    roster: who takes part, on all devices; None where nobody reports.
  """

  sent: work.Sent
  base: PyTree
  examples: Any
  key: jax.Array
  roster: link.Roster | None = None


class Group(NamedTuple):
  """The clients of one device; axis C leads.

  Attributes:
    clients: int32 [C] ids, -1 = empty.
    weights: int32 [C].
    nodes: int32 [C], or None if the lowest tier has one node.
    local: rows of the leaves that live on the clients.
    traits: {name: [C]}.
    source: int32 [C], which of the models that are sent each starts from;
      None if there is one.
    update: int32 [C], which of the round's updates each report is part of;
      None if there is one.
  """

  clients: Array
  weights: Array
  nodes: Array | None
  local: PyTree
  traits: Mapping[str, Any] = {}
  source: Array | None = None
  update: Array | None = None

  def client(self, key: jax.Array, place: jax.Array) -> work.Client:
    """Who is at a place; `key` is that of the round."""
    traits = {k: jnp.asarray(v)[place] for k, v in self.traits.items()}
    id = self.clients[place]
    return work.Client(client_key(key, id), id, self.weights[place], traits)


def client_key(key: jax.Array, client: jax.Array) -> jax.Array:
  """Key of one client in one round, from (seed, round, client id) alone."""
  return jax.random.fold_in(key, client)


def step_key(key: jax.Array, tick: jax.Array, stride: int) -> jax.Array:
  """Key of a client's tick: that of its step, or [stride] of them."""
  if stride == 1:
    return jax.random.fold_in(key, tick)
  steps = tick * stride + jnp.arange(stride)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, steps)


def empty(
  job: work.Work, common: Common, group: Group, shape: tuple, width: int
) -> tuple[Lane, Buffer]:
  """Lanes that hold nothing yet, and a buffer that nobody has written to.

  Args:
    job: what clients do.
    common: as in a segment.
    group: as in a segment.
    shape: (G, K).
    width: W, rows of the buffer.
  """

  def one():
    sent = _own(common.sent, group.source, jnp.int32(0))
    rows = jax.tree.map(lambda x: x[0], group.local)
    pick = jnp.zeros(job.rows, jnp.int32)
    examples = {k: v[pick] for k, v in common.examples.items()}
    key = step_key(common.key, jnp.int32(0), job.stride)
    batch = work.Batch(examples, jnp.ones(job.rows), key)
    client = group.client(common.key, jnp.int32(0))
    carry = job.init(sent, common.base, rows, client)
    carry, stats = alone(job.step)(carry, sent, common.base, batch)
    message, local = job.finish(carry, sent)
    return Lane(carry, stats, jnp.int32(0)), Buffer(message, local, stats)

  lane, buffer = jax.eval_shape(one)

  def zeros(lead, like):
    return jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), x.dtype), like)

  return zeros(shape, lane), zeros((width,), buffer)


def alone(step: Callable) -> Callable:
  """A step of one client, in a block of its own."""

  def run(*arguments):
    lead = jax.tree.map(lambda x: jnp.asarray(x)[None], arguments)
    out = jax.vmap(step, axis_name=work.LANES)(*lead)
    return jax.tree.map(lambda x: x[0], out)

  return run


def _own(sent: work.Sent, source, slot):
  """What the client in a slot was sent, if not all are sent the same."""
  if source is None:
    return sent
  which = source[slot]
  return sent._replace(params={k: v[which] for k, v in sent.params.items()})


def segment(
  job: work.Work,
  common: Common,
  group: Group,
  lanes: Lane,
  buffer: Buffer,
  plan: schedule_lib.Schedule,
) -> tuple[Lane, Buffer]:
  """Runs one segment of one device's schedule.

  Blocks run one after another; each runs its own number of ticks, so the tail
  behind one long client costs one block, not all of them.

  Args:
    job: what clients do.
    common: what all share.
    group: the device's clients.
    lanes: as the last segment left them.
    buffer: of W rows; what it holds does not matter.
    plan: the segment's part of the schedule: rows [G, T, K, B], slot, first
      and out [G, T, K], slots [W], ticks [G] or None for all.

  Returns:
    (lanes, buffer): the lanes as they are now, and what the clients left that
    finished in this segment, in the rows that `plan.slots` names.
  """
  width, (blocks, length) = plan.slots.shape[0], plan.rows.shape[:2]
  chex.assert_shape(plan.rows, (blocks, length, None, job.rows))
  chex.assert_equal_shape([plan.slot, plan.first, plan.out])
  chex.assert_equal_shape_prefix([plan.slot, plan.rows], 3)
  chex.assert_equal_shape([group.clients, group.weights])
  chex.assert_tree_shape_prefix(lanes, (blocks, plan.slot.shape[2]))
  chex.assert_tree_shape_prefix(buffer, (width,))
  differ = group.source is not None

  def tick(lane, buffer, rows, slot, first, out):
    place = jnp.maximum(slot, 0)
    # Padding repeats the batch's own first row: no other client's data, whose
    # gradient may be nan even where its loss counts zero.
    real = jnp.maximum(jnp.where(rows < 0, rows[..., :1], rows), 0)
    examples = {k: v[real] for k, v in common.examples.items()}
    mask = (rows >= 0).astype(jnp.float32)
    clients = jax.vmap(group.client, (None, 0))(common.key, place)
    count = jnp.where(first, 0, lane.step)
    step_keys = jax.vmap(lambda k, n: step_key(k, n, job.stride))(
      clients.key, count
    )
    batch = work.Batch(examples, mask, step_keys)
    sent = _own(common.sent, group.source, place)
    axis: Any = work.Sent(cast(Any, 0 if differ else None), cast(Any, None))
    local = jax.tree.map(lambda x: x[place], group.local)
    fresh = jax.vmap(job.init, (axis, None, 0, 0))(
      sent, common.base, local, clients
    )
    if job.handover is not None:
      fresh = jax.vmap(job.handover)(fresh, lane.carry)
    carry = tree.where(first, fresh, lane.carry)
    carry, stats = jax.vmap(job.step, (0, axis, None, 0), axis_name=work.LANES)(
      carry, sent, common.base, batch
    )
    stats = jax.tree.map(
      lambda new, old: new + jnp.where(first, 0, old), stats, lane.stats
    )

    def write(buffer):
      message, rows = jax.vmap(job.finish, (0, axis))(carry, sent)
      done = Buffer(message, rows, stats)
      return jax.tree.map(
        lambda b, x: b.at[out].set(x, mode="drop"), buffer, done
      )

    # One branch runs: no vmap is above this.
    buffer = jax.lax.cond(jnp.any(out < width), write, lambda b: b, buffer)
    return Lane(carry, stats, count + 1), buffer

  def block(g, state):
    lanes, buffer = state
    lane = jax.tree.map(lambda x: x[g], lanes)

    def one(t, state):
      parts = (plan.rows, plan.slot, plan.first, plan.out)
      return tick(*state, *(x[g, t] for x in parts))

    ticks = length if plan.ticks is None else plan.ticks[g]
    lane, buffer = jax.lax.fori_loop(0, ticks, one, (lane, buffer))
    lanes = jax.tree.map(lambda x, y: x.at[g].set(y), lanes, lane)
    return lanes, buffer

  if blocks == 1:
    return block(0, (lanes, buffer))
  return jax.lax.fori_loop(0, blocks, block, (lanes, buffer))


def one_by_one(fun: Callable) -> Callable:
  """Maps fun(shared, split) over the leading axis of split, in a loop."""

  def run(shared, split):
    return jax.lax.map(lambda x: fun(shared, x), split)

  return run


def as_it_is(fun: Callable) -> Callable:
  """The function: on one device nothing is partitioned."""
  return fun


class Spread(NamedTuple):
  """How the parts of a round meet the devices, for use under jit.

  Attributes:
    split: (fun) -> fun(shared, split) over the leading axis of split, one
      entry for each device.
    whole: (fun) -> the same function of what every device has. Kernels for
      accelerators cannot be partitioned by the compiler: what uses one has to
      be told that there is nothing to partition.
  """

  split: Callable
  whole: Callable = as_it_is


def over(mesh: jax.sharding.Mesh) -> Spread:
  """Spreads over a mesh's devices, axis `clients`."""
  split_over = jax.sharding.PartitionSpec("clients")
  everywhere = jax.sharding.PartitionSpec()

  def split(fun):
    def local(shared, split):
      out = fun(shared, jax.tree.map(lambda x: x[0], split))
      return jax.tree.map(lambda x: x[None], out)

    return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(everywhere, split_over),
      out_specs=split_over,
      check_vma=False,
    )

  def whole(fun):
    return jax.shard_map(
      fun,
      mesh=mesh,
      in_specs=everywhere,
      out_specs=everywhere,
      check_vma=False,
    )

  return Spread(split, whole)
