"""Vectorizing: any function over clients, without aggregation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import data as data_lib
from fedjax_peft import executor, launch, work
from fedjax_peft import settings as settings_lib

PyTree = Any


def for_each_client(
  job: work.Work,
  data: data_lib.Population,
  ids: np.ndarray | None = None,
  *,
  params: dict | None = None,
  base: PyTree = None,
  local: dict | None = None,
  rows: data_lib.Ragged | None = None,
  settings: settings_lib.Settings | None = None,
  step: Callable | None = None,
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
    step: what `compiled` returned for this job and these settings, for who
      calls more than once; None compiles anew.
    seed: of the clients' keys.
    round: of the clients' keys.

  Returns:
    (messages, stats): numpy pytrees whose leading axis [C] follows `ids`;
    stats are {name: (numerator, denominator)}. A client without examples gets
    zeros.

  Raises:
    ValueError: if an id comes twice or is no client.
  """
  rows = data.train if rows is None else rows
  ids = np.flatnonzero(rows.sizes > 0) if ids is None else np.asarray(ids)
  if ids.size and (ids.min() < 0 or ids.max() >= len(rows)):
    raise ValueError(
      f"ids must be clients in 0..{len(rows) - 1}: got {ids.min()}..{ids.max()}"
    )
  if np.unique(ids).size < ids.size:
    raise ValueError("every client can be asked for once: got an id twice")
  here = len(jax.devices())
  settings = settings or settings_lib.Settings("shard_map", here, 1, 1, 16)
  params = job.params if params is None else params
  cohort = launch.seat(
    rows,
    ids,
    job,
    settings,
    examples=data.examples,
    traits=data.traits,
    seed=seed,
    round=round,
  )
  key = jax.random.fold_in(jax.random.key(seed), round)
  sent = work.Sent(dict(params), {"round": np.int32(round)})
  step = compiled(job, settings) if step is None else step
  common = executor.Common(sent, base, None, key)
  common = settings_lib.everywhere(common, settings)
  examples = settings_lib.everywhere(dict(data.examples), settings)
  common = common._replace(examples=examples)
  owned = {} if local is None else local
  seats = np.maximum(cohort.clients, 0)
  group = executor.Group(
    cohort.clients,
    cohort.weights,
    None,
    jax.tree.map(lambda x: jnp.asarray(x)[seats], owned),
    cohort.traits,
  )
  lanes = None
  found: list = []
  for s in range(int(cohort.segments)):
    plan = jax.tree.map(lambda x, s=s: x[:, s], cohort.schedule)
    lanes, buffer = step(common, group, lanes, plan)
    found.append((plan.slots, buffer))
  return _collect(found, cohort.clients, ids)


def compiled(job: work.Work, settings: settings_lib.Settings) -> Callable:
  """One segment of a job, to be compiled once: `step` of `for_each_client`."""
  spread = executor.over(settings_lib.mesh_of(settings))
  shape = (settings.blocks, settings.width)

  def one(shared, split):
    group, lanes, plan = split
    width = plan.slots.shape[0]
    empty, buffer = executor.empty(job, shared, group, shape, width)
    lanes = empty if lanes is None else lanes
    return executor.segment(job, shared, group, lanes, buffer, plan)

  @jax.jit
  def step(common, group, lanes, plan):
    return spread.split(one)(common, (group, lanes, plan))

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
