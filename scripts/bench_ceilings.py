"""Ceilings: what the machine gives a program that only multiplies or copies.

Each product is tried with one device and all threads, and as one stream a
core; the larger figure is the ceiling.
"""

import argparse
import time

import bench_workload as workload
import jax
import jax.numpy as jnp
import numpy as np

SHAPES = {
  "512x384x1536": (512, 384, 1536),
  "4096x384x1536": (4096, 384, 1536),
  "2048x2048x2048": (2048, 2048, 2048),
}


def main() -> None:
  """Prints GFLOP/s of each product, and GB/s of a copy, as one line."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--seconds", type=float, default=1.0)
  parser.add_argument("--copy", action="store_true", help="and a memory copy")
  parser.add_argument("--quick", action="store_true")
  options = parser.parse_args()
  result = {}
  for name, shape in SHAPES.items():
    rows, inner, columns = (n // 16 if options.quick else n for n in shape)
    flop = 2 * rows * inner * columns * len(jax.devices())
    for precision in ("float32", "bf16"):
      seconds = product_seconds(
        (rows, inner, columns), jnp.dtype(_DTYPES[precision]), options.seconds
      )
      rates = workload.spread(flop / seconds / 1e9, "gflops")
      result[f"{precision}_{name}"] = rates
  if options.copy:
    mib = 8 if options.quick else 256
    seconds = copy_seconds(mib, options.seconds)
    rates = workload.spread(mib * 2**20 / seconds / 1e9, "gb_per_second")
    result["copy"] = rates
  workload.report(result)


_DTYPES = {"float32": jnp.float32, "bf16": jnp.bfloat16}


def product_seconds(shape, dtype, seconds) -> np.ndarray:
  """Seconds of x @ w, each device its own, float32 out."""
  rows, inner, columns = shape
  devices = jax.devices()
  mesh = jax.make_mesh(
    (len(devices),), ("d",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec

  def local(x, w):
    return jnp.dot(x, w, preferred_element_type=jnp.float32)

  multiply = jax.jit(
    jax.shard_map(
      local, mesh=mesh, in_specs=(spec("d"), spec()), out_specs=spec("d")
    )
  )
  rng = np.random.default_rng(0)

  def put(where, *size):
    draw = jnp.asarray(rng.standard_normal(size, dtype=np.float32), dtype)
    return jax.device_put(draw, jax.sharding.NamedSharding(mesh, where))

  x = put(spec("d"), rows * len(devices), inner)
  w = put(spec(), inner, columns)
  return _repeat(lambda: jax.block_until_ready(multiply(x, w)), seconds)


def copy_seconds(mib, seconds) -> np.ndarray:
  """Seconds of a copy of so many MiB, one thread; reads and writes each."""
  source = np.ones(mib * 2**18, np.float32)
  target = np.zeros_like(source)
  return _repeat(lambda: np.copyto(target, source), seconds)


def _repeat(fun, seconds):
  """Seconds of each call, at least ten, once it is warm."""
  fun()
  fun()
  times = []
  while len(times) < 10 or sum(times) < seconds:
    begun = time.perf_counter()
    fun()
    times.append(time.perf_counter() - begun)
  return np.array(times)


if __name__ == "__main__":
  main()
