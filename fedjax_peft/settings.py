"""Settings: how rounds are executed, chosen from what the compiler says.

A run records its settings and keeps them on resume, since a client's bits
depend on the width of the lane blocks.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import one_step, tree, work
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
  lanes as its own cache holds, and at least a few, since its matrix products
  want rows: few lanes beat many there. What they finish is reduced at once,
  while it is in the cache. An accelerator gets as many lanes as fit in a third
  of its free memory, and a segment holds as many finished clients as a tenth
  of it, and at least one for each lane.

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

  Raises:
    ValueError: as `checked`.
  """
  lanes = algorithm.work.lanes
  if lanes != "any":
    devices = 1 if devices is None else devices
    width = (1 if lanes == "one" else cohort) if width is None else width
  devices = len(jax.devices()) if devices is None else devices
  room = _room()
  most = max(1, -(-cohort // (devices * blocks)))
  if width is None:
    lane = max(lane_bytes(algorithm.work, base, examples), 1)
    fit = max(room.memory // 3 // lane, 1)
    if room.cache:
      fit = min(fit, max(room.cache // lane, _CPU_LANES))
    width = _power_below(min(fit, most))
  message = tree.nbytes(algorithm.work.params)
  if segment is None:
    fit = 0 if room.cache else room.memory // 10 // max(message, 1)
    segment = min(schedule.bucket(most * blocks), 64, fit)
  segment = max(segment, width * blocks)
  if executor_name is None:
    fits = tree.nbytes(examples) <= room.memory // 3
    executor_name = "shard_map" if fits else "stream"
  return checked(
    Settings(executor_name, devices, blocks, width, segment), lanes, cohort
  )


def checked(settings: Settings, lanes: str, cohort: int) -> Settings:
  """The settings, if clients can work with these lanes.

  Args:
    settings: chosen or made by hand.
    lanes: as `Work.lanes` says how clients work.
    cohort: most clients in a round.

  Raises:
    ValueError: if clients who work one after another would have several lanes,
      or clients who take every step together not one block with a lane for
      each.

  Example:
    >>> checked(Settings(width=4), "any", 9).width
    4
    >>> checked(Settings(width=4), "one", 9)
    Traceback (most recent call last):
    ValueError: clients who work one after another have one lane, ...
  """
  _, devices, blocks, width, _ = settings
  got = f"got {devices=} {blocks=} {width=}"
  if lanes == "one" and (devices, blocks, width) != (1, 1, 1):
    raise ValueError(
      f"clients who work one after another have one lane, on one device in one "
      f"block: {got}; use devices=1 blocks=1 width=1, or leave them out"
    )
  if lanes == "all" and ((devices, blocks) != (1, 1) or width < cohort):
    raise ValueError(
      f"clients who take every step together have a lane each, on one device "
      f"in one block: {got} for {cohort} of them; use devices=1 blocks=1 "
      f"width={cohort}, or leave them out"
    )
  return settings


class _Room(NamedTuple):
  """Bytes of a device: its memory, and its cache (0 = not a CPU)."""

  memory: int
  cache: int


# A CPU core's own cache, and the least lanes it gets. Measured on an x86 server
# with bench_engine's workloads: two to eight lanes are within 5 % of each other
# for perceptrons and encoders alike (one loses 15 %, sixteen 15 %); of a model
# so small that many more fit into the cache, many more are faster.
_CPU_CACHE = 2**20
_CPU_LANES = 4


def _room() -> _Room:
  device = jax.devices()[0]
  if device.platform == "cpu":
    with open("/proc/meminfo") as file:
      total = int(file.readline().split()[1]) * 1024
    return _Room(total // len(jax.devices()), _CPU_CACHE)
  stats = device.memory_stats() or {}
  limit = stats.get("bytes_limit", 8 * 2**30)
  return _Room(limit - stats.get("bytes_in_use", 0), 0)


def _power_below(n: int) -> int:
  """The largest power of two that is not above n."""
  return 1 << (max(n, 1).bit_length() - 1)


def lane_bytes(job: work.Work, base: PyTree, examples: dict) -> int:
  """Bytes that one client's step needs beside the base, from the compiler."""
  made = jax.jit(one_step.function(job))
  compiled = made.lower(tree.spec(base), one_step.rows(job, examples)).compile()
  memory: Any = compiled.memory_analysis()
  return math.ceil(memory.temp_size_in_bytes + memory.output_size_in_bytes)
