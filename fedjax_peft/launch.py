"""Launching: rounds on the machine that is there.

One interface, several executors. `shard_map` runs a round as one compiled
program, its lane blocks spread over the devices; `stream` does the same a
segment at a time, for examples that do not fit on the device; `pmap` maps the
segments the old way; `debug` takes one client after another, eagerly, and
names the one that fails. On a CPU the devices are streams, one a core.
"""

import functools
import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import data as data_lib
from fedjax_peft import debugging, executor, plan, validate, work
from fedjax_peft import settings as settings_lib
from fedjax_peft.data import schedule
from fedjax_peft.settings import Settings


def seat(
  rows: data_lib.Ragged,
  turn: plan.Turn | np.ndarray,
  job: work.Work,
  settings: Settings,
  *,
  examples: dict,
  traits: Mapping[str, np.ndarray] = types.MappingProxyType({}),
  nodes: int = 1,
  updates: int = 1,
  seed: int = 0,
  round: int = 0,
) -> executor.Cohort:
  """Gives every client of a cohort its place, its lane and its batches.

  Args:
    rows: the examples of all clients.
    turn: who takes part, or just their ids, int [C].
    job: its batches and epochs.
    settings: lanes and segments.
    examples: what the rows point into.
    traits: {name: [N]}, facts about all clients.
    nodes: size of the lowest tier.
    updates: how often the model moves in a round, at most.
    seed: of the run.
    round: of the run.
  """
  turn = turn if isinstance(turn, plan.Turn) else plan.Turn(turn)
  ids = turn.clients
  unknown = sorted(set(job.traits) - set(traits) - set(turn.traits))
  if unknown:
    raise ValueError(
      f"what clients do depends on their trait {unknown[0]!r}, which is not "
      f"known: the traits are {sorted(traits)}; write "
      f"data.with_traits({unknown[0]}=[...]), one number for each client"
    )
  how = job.local
  gone = np.zeros(len(ids), bool) if turn.lost is None else turn.lost
  batches = schedule.batches(
    rows,
    np.where(gone, -1, ids),
    batch=how.batch,
    epochs=how.epochs,
    steps=how.steps if turn.steps is None else turn.steps,
    shuffle=how.shuffle,
    drop_remainder=how.drop_remainder,
    seed=(seed, round),
  )
  layout, members = schedule.build(
    batches.strided(job.stride),
    devices=settings.devices,
    blocks=settings.blocks,
    width=settings.width,
    segment=settings.segment,
  )
  for c in np.flatnonzero(gone):  # a place, but nothing to do
    d = min(range(len(members)), key=lambda i: len(members[i]))
    members[d] = np.append(members[d], c)
  even = -(-len(ids) // settings.devices)
  places = schedule.bucket(max(even, *(len(m) for m in members), 1))
  place = np.full((settings.devices, places), -1, np.int64)  # in the turn
  for d, member in enumerate(members):
    place[d, : len(member)] = member
  here = place >= 0

  def seated(values, empty=0):
    if not len(ids):
      return np.full(place.shape, empty, np.int32)
    return np.where(here, np.asarray(values)[place], empty)

  clients = seated(ids, -1).astype(np.int32)
  at = clients % nodes if turn.nodes is None else seated(turn.nodes)
  version = np.zeros_like(clients)
  if turn.version is not None:
    version = seated(turn.version).astype(np.int32)
  update = np.zeros_like(clients)
  if turn.update is not None:
    update = seated(turn.update)
  keep = np.full(updates, np.iinfo(np.int32).max, np.int32)
  for u, kept in enumerate(turn.keep):
    keep[u] = kept if kept >= 0 else keep[u]
  facts = {k: v[np.maximum(clients, 0)] for k, v in traits.items()}
  facts |= {k: seated(v) for k, v in turn.traits.items()}
  used = (layout.slots >= 0).any(axis=(0, 2))  # a segment ends as clients do
  last = int(np.flatnonzero(used)[-1]) + 1 if used.any() else 0
  return executor.Cohort(
    clients=clients,
    weights=seated(rows.sizes[ids]).astype(np.int32),
    nodes=np.where(here, at, 0).astype(np.int32),
    schedule=layout,
    segments=np.int32(last),
    examples=examples,
    traits=facts,
    version=version,
    keep=keep,
    update=update.astype(np.int32),
  )


class Launcher(NamedTuple):
  """A round, ready to run.

  Attributes:
    run: (state, base, cohort, key) -> (state, Outcome). The rows of the state
      that live on the clients are updated in place: use what comes back.
    programs: () -> how many programs were compiled so far.
  """

  run: Callable
  programs: Callable[[], int]


def launcher(
  algorithm: algorithm_lib.Algorithm, settings: Settings
) -> Launcher:
  """Compiles a round for the settings."""
  validate.one_of(settings_lib.EXECUTORS, executor=settings.executor)
  shape = (settings.blocks, settings.width)
  if settings.executor == "shard_map":
    mesh = settings_lib.mesh_of(settings)
    spread = executor.over(mesh)
    # Pinned, so that a round's output has the sharding of its input and the
    # second round does not compile again.
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    @functools.partial(jax.jit, donate_argnums=1, out_shardings=whole)
    def fused(state, rows, base, cohort, key):
      state = state._replace(clients=rows)
      return algorithm.round(
        state, base, cohort, key, shape=shape, spread=spread
      )

    def run(state, base, cohort, key):
      rest = state._replace(clients=())
      return fused(rest, state.clients, base, cohort, key)

    return Launcher(run, lambda: _programs(fused))
  return _in_pieces(algorithm, settings, shape)


def _in_pieces(algorithm, settings, shape):
  """A round whose segments are launched from the host, one after another."""
  spread = executor.over(settings_lib.mesh_of(settings))
  begin = jax.jit(
    functools.partial(
      algorithm.begin,
      shape=shape,
      width=settings.segment,
      whole=spread.whole,
    )
  )
  finish = jax.jit(functools.partial(algorithm.finish, whole=spread.whole))
  if settings.executor == "pmap":
    segments = _by_pmap(algorithm.segments, settings_lib.mesh_of(settings))
  elif settings.executor == "debug":
    segments = debugging.one_by_one(algorithm)
  else:
    segments = jax.jit(spread.split(algorithm.segments))

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

  return Launcher(run, lambda: _programs(begin, segments, finish))


def _programs(*jitted) -> int:
  """Programs compiled so far by jitted functions."""
  return sum(getattr(f, "_cache_size", lambda: 0)() for f in jitted)


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
