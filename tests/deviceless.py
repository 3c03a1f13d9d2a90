"""Compilers of accelerators that are not there.

They read their settings from the environment before jax is imported, so each
program of `tests/aot/` runs in a process of its own and prints what it found.
"""

import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent

TPUS = {
  "v4": "v4:2x2x1",
  "v5e": "v5e:2x2",
  "v5p": "v5p:2x2x1",
  "v6e": "v6e:2x2",
  "tpu7x": "tpu7x:2x2x1",
}
# Cores, lanes of one, KiB of shared memory (all, of a block), MiB of L2, GB/s,
# GHz, GiB: https://developer.nvidia.com/cuda-gpus and the white papers.
GPUS = {
  "sm_80": ("A100-SXM4-80GB", 108, 64, 164, 163, 40, 2039, 1.41, 80),
  "sm_90": ("H100 80GB HBM3", 132, 128, 228, 227, 50, 3352, 1.98, 80),
  "sm_100": ("B200", 148, 128, 228, 227, 126, 8000, 1.965, 178),
}
TARGETS = (*TPUS, *GPUS)

_CONFIG = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {core}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {lanes}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
  l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory}
  shared_memory_per_block_optin: {block}
  cuda_compute_capability {{ major: {major} minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "NVIDIA {name}" """


def run(script: str, targets: str, *rest: str, dump: str = "") -> dict:
  """What a program of `tests/aot/` prints on its last line.

  Args:
    script: its name.
    targets: what it compiles for.
    *rest: its other arguments.
    dump: folder where the compiler for TPUs leaves what it made on the way,
      of every program that it compiles; that takes its time.
  """
  done = subprocess.run(
    [sys.executable, HERE / "aot" / script, targets, *rest],
    env=os.environ | _environment(dump),
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    raise RuntimeError(f"{script} {targets} failed:\n{done.stderr[-3000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def _environment(dump):
  """What must be set before jax is imported."""
  flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
  return {
    "JAX_PLATFORMS": "cpu",  # else jax looks for the devices
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # one process must not lock out others
    "LIBTPU_INIT_ARGS": flags if dump else "",
    "XLA_FLAGS": "",
    "PYTHONPATH": str(HERE),
    "PYTHONDONTWRITEBYTECODE": "1",
  }


def platform(target: str) -> str:
  """tpu or gpu."""
  return "gpu" if target in GPUS else "tpu"


def devices(target: str, count: int = 1) -> list:
  """Devices of a machine that is not there.

  Args:
    target: one of `TARGETS`, or a TPU topology such as "v5e:16x16".
    count: how many, if it is a GPU.
  """
  from jax.experimental import topologies

  if target not in GPUS:
    name = TPUS.get(target, target)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    return topology.devices
  name, cores, lanes, core, block, cache, bandwidth, clock, memory = GPUS[
    target
  ]
  config = _CONFIG.format(
    name=name,
    major=int(target.removeprefix("sm_")) // 10,
    cores=cores,
    lanes=lanes,
    core=core << 10,
    block=block << 10,
    cache=cache << 20,
    bandwidth=bandwidth * 10**9,
    clock=clock,
    memory=memory << 30,
  )
  return topologies.get_topology_desc(
    platform="cuda",
    topology_name=target,
    target_config=config,
    topology=f"1x{count}x1",
  ).devices


def mesh(devices: list, axis: str):
  """A mesh of one axis over these devices."""
  import jax
  import numpy as np

  return jax.sharding.Mesh(np.array(devices), (axis,))


def pallas(text: str) -> list[str]:
  """Names of the Pallas kernels in a lowered program."""
  on_tpu = r'@tpu_custom_call.* kernel_name = "(\w+)"'
  on_gpu = r'@__gpu\$xla\.gpu\.triton.* name = "(\w+)", num_stages'
  return sorted(set(re.findall(on_tpu, text)) | set(re.findall(on_gpu, text)))


def ptxas() -> str | None:
  """The assembler that comes with nvidia-cuda-nvcc, if it is installed."""
  try:
    files = importlib.metadata.files("nvidia-cuda-nvcc") or []
  except importlib.metadata.PackageNotFoundError:
    return None
  here = [str(f.locate()) for f in files if f.name == "ptxas"]
  return here[0] if here else None
