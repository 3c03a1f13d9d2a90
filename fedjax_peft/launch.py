"""Launching: rounds on the machine that is there.

One interface, several executors. `shard_map` runs a round as one compiled
program, its lane blocks spread over the devices; `stream` does the same a
segment at a time, for examples that do not fit on the device; `pmap` maps the
segments the old way; `debug` takes one client after another, eagerly, and
names the one that fails. On a CPU the devices are streams, one a core.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import data as data_lib
from fedjax_peft import debugging, executor, tree, validate, work
from fedjax_peft.data import schedule

PyTree = Any

EXECUTORS = ("shard_map", "stream", "pmap", "debug")


class Settings(NamedTuple):
  """How rounds are executed. A run records these and keeps them on resume.

  Attributes:
    executor: one of "shard_map", "stream", "pmap", "debug".
    devices: D, how many devices share the lanes.
    blocks: G, blocks of lanes on a device, one after another.
    width: K, lanes of a block, vmapped. A client's bits depend on it.
    segment: W, clients that finish on a device before they are reduced.
  """

  executor: str = "shard_map"
  devices: int = 1
  blocks: int = 1
  width: int = 1
  segment: int = 1


def mesh_of(settings: Settings) -> jax.sharding.Mesh:
  """The devices of the settings, axis `clients`."""
  here = jax.devices()
  if settings.devices > len(here):
    raise ValueError(
      f"the settings want {settings.devices} devices, but {len(here)} are "
      f"here; use devices={len(here)}, or on a CPU start with "
      f"XLA_FLAGS=--xla_force_host_platform_device_count={settings.devices}"
    )
  return jax.sharding.Mesh(
    np.array(here[: settings.devices]),
    ("clients",),
    axis_types=(jax.sharding.AxisType.Auto,),
  )


def everywhere(value: PyTree, settings: Settings) -> PyTree:
  """Puts a pytree on every device of the settings."""
  spec = jax.sharding.PartitionSpec()
  sharding = jax.sharding.NamedSharding(mesh_of(settings), spec)
  return jax.device_put(value, sharding)


def seat(
  rows: data_lib.Ragged,
  ids: np.ndarray,
  how: work.Local,
  settings: Settings,
  *,
  examples: dict,
  nodes: int = 1,
  seed: int = 0,
  round: int = 0,
) -> executor.Cohort:
  """Gives every client of a cohort its place, its lane and its batches.

  Args:
    rows: the examples of all clients.
    ids: int [C].
    how: batches and epochs.
    settings: lanes and segments.
    examples: what the rows point into.
    nodes: size of the lowest tier; client i talks to node i modulo this.
    seed: of the run.
    round: of the run.
  """
  batches = schedule.batches(
    rows,
    ids,
    batch=how.batch,
    epochs=how.epochs,
    steps=how.steps,
    shuffle=how.shuffle,
    drop_remainder=how.drop_remainder,
    seed=(seed, round),
  )
  plan, members = schedule.build(
    batches,
    devices=settings.devices,
    blocks=settings.blocks,
    width=settings.width,
    segment=settings.segment,
  )
  even = -(-len(ids) // settings.devices)
  places = schedule.bucket(max(even, *(len(m) for m in members), 1))
  clients = np.full((settings.devices, places), -1, np.int32)
  weights = np.zeros((settings.devices, places), np.int32)
  for d, member in enumerate(members):
    clients[d, : len(member)] = ids[member]
    weights[d, : len(member)] = rows.sizes[ids[member]]
  used = plan.ticks.any(axis=(0, 2))
  last = int(np.flatnonzero(used)[-1]) + 1 if used.any() else 0
  return executor.Cohort(
    clients=clients,
    weights=weights,
    nodes=np.where(clients >= 0, clients % nodes, 0).astype(np.int32),
    schedule=plan,
    segments=np.int32(last),
    examples=examples,
  )


def launcher(
  algorithm: algorithm_lib.Algorithm, settings: Settings
) -> Callable:
  """Compiles a round for the settings.

  Returns:
    (state, base, cohort, key) -> (state, Outcome). The rows of the state
    that live on the clients are updated in place: use what comes back.
  """
  validate.one_of(EXECUTORS, executor=settings.executor)
  shape = (settings.blocks, settings.width)
  if settings.executor == "shard_map":
    spread = executor.over(mesh_of(settings))

    @functools.partial(jax.jit, donate_argnums=1)
    def fused(state, rows, base, cohort, key):
      state = state._replace(clients=rows)
      return algorithm.round(
        state, base, cohort, key, shape=shape, spread=spread
      )

    def run(state, base, cohort, key):
      rest = state._replace(clients=())
      return fused(rest, state.clients, base, cohort, key)

    return run
  return _in_pieces(algorithm, settings, shape)


def _in_pieces(algorithm, settings, shape):
  """A round whose segments are launched from the host, one after another."""
  begin = jax.jit(
    functools.partial(algorithm.begin, shape=shape, width=settings.segment)
  )
  finish = jax.jit(algorithm.finish)
  if settings.executor == "pmap":
    segments = _by_pmap(algorithm.segments, mesh_of(settings))
  elif settings.executor == "debug":
    segments = debugging.one_by_one(algorithm)
  else:
    spread = executor.over(mesh_of(settings))
    segments = jax.jit(spread(algorithm.segments))

  def run(state, base, cohort, key):
    if settings.executor == "debug":
      here = cohort.examples
    else:
      here = {k: np.asarray(v[:1]) for k, v in cohort.examples.items()}
    few = cohort._replace(examples=here, schedule=None)
    state, common, flight = begin(state, base, few, key)
    shared = state.nodes[0].shared
    if settings.executor != "stream":
      whole = common._replace(examples=cohort.examples)
      number = jnp.int32(cohort.segments)
      flight = segments((whole, shared, number), (flight, cohort.schedule))
    else:
      for s in range(int(cohort.segments)):
        plan = jax.tree.map(lambda x, s=s: x[:, s : s + 1], cohort.schedule)
        plan, examples = _window(plan, cohort.examples)
        part = common._replace(examples=examples)
        flight = segments((part, shared, jnp.int32(1)), (flight, plan))
    return finish(state, common, flight, few)

  return run


def _window(plan, examples):
  """The examples that one segment needs, and rows that point into them.

  Padded to a bucket, so that few shapes are compiled. The next window is
  gathered on the host while the devices still work on this one.
  """
  used, place = np.unique(plan.rows, return_inverse=True)
  offset = int(used[0] < 0)  # padding stays -1
  rows = (place.reshape(plan.rows.shape) - offset).astype(np.int32)
  used = used[offset:]
  size = schedule.bucket(max(used.size, 1))
  pick = np.zeros(size, np.int64)
  pick[: used.size] = used
  return plan._replace(rows=rows), {
    k: np.asarray(v)[pick] for k, v in examples.items()
  }


def _by_pmap(fun, mesh):
  """Maps fun(shared, split) over devices with `jax.pmap`."""
  devices = mesh.devices.tolist()
  mapped = jax.pmap(fun, in_axes=(None, 0), devices=devices)
  split_over = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec("clients")
  )

  def run(shared, split):
    return mapped(shared, jax.device_put(split, split_over))

  return run


def choose(
  algorithm: algorithm_lib.Algorithm,
  base: PyTree,
  examples: dict,
  cohort: int,
  *,
  executor_name: Literal["shard_map", "stream", "pmap", "debug"] | None = None,
  devices: int | None = None,
  blocks: int = 1,
  width: int | None = None,
  segment: int | None = None,
) -> Settings:
  """Chooses lanes and segments from the compiler's own memory analysis.

  What one lane needs is read from a compiled step. A CPU core gets as many
  lanes as its cache holds, since few lanes beat many there; an accelerator as
  many as fit in a third of its free memory. A segment holds as many finished
  clients as a tenth of that, and at least one for each lane.

  Args:
    algorithm: what will run.
    base: frozen weights.
    examples: {feature: [M, ...]}.
    cohort: most clients in a round.
    executor_name: None streams where the examples do not fit, else shard_map.
    devices: None takes all there are.
    blocks: blocks of lanes on a device.
    width: None chooses.
    segment: None chooses.
  """
  devices = len(jax.devices()) if devices is None else devices
  room = _room()
  most = max(1, -(-cohort // (devices * blocks)))
  if width is None:
    lane = max(_lane_bytes(algorithm.work, base, examples), 1)
    budget = room.cache if room.cache else room.memory // 3
    width = _power_below(min(max(budget // lane, 1), most))
  message = tree.nbytes(algorithm.work.params)
  if segment is None:
    fit = max(room.memory // 10 // max(message, 1), 1)
    segment = min(schedule.bucket(most * blocks), 64, fit)
  segment = max(segment, width * blocks)
  if executor_name is None:
    fits = tree.nbytes(examples) <= room.memory // 3
    executor_name = "shard_map" if fits else "stream"
  return Settings(executor_name, devices, blocks, width, segment)


class _Room(NamedTuple):
  """Bytes of a device: its memory, and its cache (0 = not a CPU)."""

  memory: int
  cache: int


# What one core's lanes may need at once. Measured on two x86 servers: four
# lanes of a MiniLM with 4 x 32 tokens (57 MiB) were the fastest, eight lost
# 10 %, sixteen more.
_CPU_LANES = 64 * 2**20


def _room() -> _Room:
  device = jax.devices()[0]
  if device.platform == "cpu":
    with open("/proc/meminfo") as file:
      total = int(file.readline().split()[1]) * 1024
    return _Room(total // len(jax.devices()), _CPU_LANES)
  stats = device.memory_stats() or {}
  limit = stats.get("bytes_limit", 8 * 2**30)
  return _Room(limit - stats.get("bytes_in_use", 0), 0)


def _power_below(n: int) -> int:
  """The largest power of two that is not above n."""
  return 1 << (max(n, 1).bit_length() - 1)


def _lane_bytes(job: work.Work, base: PyTree, examples: dict) -> int:
  """Temporary bytes of one client's step, from the compiler."""

  def one(base, rows):
    sent = work.Sent(
      {k: jnp.asarray(v) for k, v in job.params.items()},
      {"round": jnp.int32(0)},
    )
    owned = {
      k: v for k, v in job.params.items() if job.placement.get(k) == "device"
    }
    key = jax.random.key(0)
    batch = work.Batch(rows, jnp.ones(job.local.batch), key)
    carry = job.init(sent, base, owned, key)
    return job.step(carry, sent, base, batch)

  rows = {
    k: jax.ShapeDtypeStruct((job.local.batch, *v.shape[1:]), v.dtype)
    for k, v in examples.items()
  }
  compiled = jax.jit(one).lower(tree.spec(base), rows).compile()
  memory = compiled.memory_analysis()
  return math.ceil(memory.temp_size_in_bytes + memory.output_size_in_bytes)


def for_each_client(
  job: work.Work,
  data: data_lib.Population,
  ids: np.ndarray | None = None,
  *,
  params: dict | None = None,
  base: PyTree = None,
  local: dict | None = None,
  rows: data_lib.Ragged | None = None,
  settings: Settings | None = None,
  seed: int = 0,
  round: int = 0,
) -> tuple[PyTree, dict]:
  """Does a job for every client, vectorized, and reduces nothing.

  Args:
    job: init, step and finish; see `work.Work`.
    data: the population.
    ids: int [C], which clients; None takes all that have examples.
    params: what they start from; None takes the job's.
    base: frozen weights.
    local: rows [N, ...] of the leaves that live on the clients.
    rows: whose examples: None takes `data.train`.
    settings: lanes; None runs one lane a device.
    seed: of the clients' keys.
    round: of the clients' keys.

  Returns:
    (messages, stats): numpy pytrees whose leading axis [C] follows `ids`;
    stats are {name: (numerator, denominator)}. A client without examples gets
    zeros.
  """
  rows = data.train if rows is None else rows
  ids = np.flatnonzero(rows.sizes > 0) if ids is None else np.asarray(ids)
  here = len(jax.devices())
  settings = settings or Settings("shard_map", here, 1, 1, 16)
  params = job.params if params is None else params
  cohort = seat(
    rows, ids, job.local, settings, examples=data.examples, seed=seed,
    round=round,
  )
  key = jax.random.fold_in(jax.random.key(seed), round)
  sent = work.Sent(dict(params), {"round": np.int32(round)})
  step = _collector(job, settings)
  common = executor.Common(sent, base, None, key)
  common = everywhere(common, settings)
  examples = everywhere(dict(data.examples), settings)
  common = common._replace(examples=examples)
  owned = {} if local is None else local
  seats = np.maximum(cohort.clients, 0)
  group = executor.Group(
    cohort.clients,
    cohort.weights,
    None,
    jax.tree.map(lambda x: jnp.asarray(x)[seats], owned),
  )
  lanes = None
  found: list = []
  for s in range(int(cohort.segments)):
    plan = jax.tree.map(lambda x, s=s: x[:, s], cohort.schedule)
    lanes, buffer = step(common, group, lanes, plan)
    found.append((plan.slots, buffer))
  return _collect(found, cohort.clients, ids)


def _collector(job, settings):
  """Compiles one segment that hands its buffer back."""
  spread = executor.over(mesh_of(settings))
  shape = (settings.blocks, settings.width)

  def one(shared, split):
    group, lanes, plan = split
    width = plan.slots.shape[0]
    empty, buffer = executor.empty(job, shared, group, shape, width)
    lanes = empty if lanes is None else lanes
    return executor.segment(job, shared, group, lanes, buffer, plan)

  @jax.jit
  def step(common, group, lanes, plan):
    return spread(one)(common, (group, lanes, plan))

  return step


def _collect(found, clients, ids):
  """Rows of all segments' buffers, in the order of `ids`."""
  where = {int(c): i for i, c in enumerate(ids)}
  result = None
  for slots, buffer in found:
    value = jax.tree.map(np.asarray, (buffer.message, buffer.stats))
    if result is None:
      result = jax.tree.map(
        lambda x: np.zeros((len(ids), *x.shape[2:]), x.dtype), value
      )
    for d, w in zip(*np.nonzero(slots >= 0), strict=True):
      i = where[int(clients[d, slots[d, w]])]
      for out, x in zip(
        jax.tree.leaves(result), jax.tree.leaves(value), strict=True
      ):
        out[i] = x[d, w]
  return result if result is not None else ({}, {})
