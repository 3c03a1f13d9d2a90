"""One measurement of the kernels; `bench_kernels.py` runs them all.

Implementations that are compared take turns in one process, so that whatever
else the machine does meets all of them alike.
"""

import argparse
import functools
import importlib
import os
import pathlib
import time
from collections.abc import Callable

import bench_workload as workload
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import kernels
from fedjax_peft.kernels import dispatch, native
from fedjax_peft.kernels.mask import api as mask
from fedjax_peft.kernels.quantization import api as quantize
from fedjax_peft.kernels.summation import api as sums

Step = Callable[[], object]


def main() -> None:
  """Prints the result of one measurement as one line."""
  parser = argparse.ArgumentParser()
  parser.add_argument("what", choices=sorted(PARTS))
  parser.add_argument("--seconds", type=float, default=1.0)
  parser.add_argument("--quick", action="store_true")
  options = parser.parse_args()
  workload.report(PARTS[options.what](options))


def take_turns(steps: dict[str, Step], seconds: float) -> dict[str, np.ndarray]:
  """Seconds of each step, in turns, until each was given so many seconds.

  At least five turns; the two before them are not counted.
  """
  times: dict[str, list[float]] = {name: [] for name in steps}
  total = 0.0
  for turn in range(10_000):
    for name, step in steps.items():
      begun = time.perf_counter()
      step()
      took = time.perf_counter() - begun
      if turn >= 2:
        times[name].append(took)
        total += took
    if turn >= 6 and total >= seconds * len(steps):
      break
  return {name: np.array(taken) for name, taken in times.items()}


def rates(times: np.ndarray, amount: float, unit: str) -> dict:
  """Amount per second, scaled by 1e9: median, min, max, n."""
  return workload.spread(amount / times / 1e9, unit)


def in_place(fun: Callable, state, *rest) -> Step:
  """A step that replaces its first argument, in the memory of it."""
  run, held = jax.jit(fun, donate_argnums=0), [jnp.array(state)]
  rest = tuple(jnp.asarray(x) for x in rest)

  def step():
    held[0] = jax.block_until_ready(run(held[0], *rest))

  return step


def fresh(fun: Callable, *arrays) -> Step:
  """A step that makes its result anew."""
  run, arrays = jax.jit(fun), tuple(jnp.asarray(x) for x in arrays)
  return lambda: jax.block_until_ready(run(*arrays))


def read_probe(mib: int) -> tuple[Step, int]:
  """A step that reads memory with every thread and does nothing else."""
  words = np.ones(mib << 18, np.uint32)
  if native.missing("weighted_sum"):
    return lambda: np.bitwise_xor.reduce(words), words.nbytes
  result = jax.ShapeDtypeStruct((), jnp.uint32)
  probe = fresh(
    lambda x: native.call("weighted_sum.ReadProbe", result, x), words
  )
  return probe, words.nbytes


def named(fun: Callable, kernel: dispatch.Kernel) -> dict[str, Callable]:
  """A function with each implementation that runs on a CPU."""
  here = ["reference"]
  if kernel.native is not None and not native.missing(kernel.library):
    here = ["native", "reference"]

  def bind(name):
    return functools.partial(fun, implementation=name)

  return {name: bind(name) for name in here}


def masking(options) -> dict:
  """A mask of one key, in place, beside OpenSSL's keystream."""
  values = (1 << 16) if options.quick else (8 << 20)
  keys = np.arange(8, dtype=np.uint32)[None]
  row, nonce = np.zeros(1, np.int32), np.zeros(3, np.uint32)
  arrays = (np.zeros((1, values), np.uint32), keys, row, row - 1, nonce)
  steps = {
    name: in_place(fun, *arrays)
    for name, fun in named(mask.mask_add, mask.KERNEL).items()
  }
  if options.what == "mask.one_thread":
    steps["openssl"] = _openssl(4 * values)
  else:
    steps.pop("reference")
  times = take_turns(steps, options.seconds)
  return {
    "bytes": 4 * values,
    **{k: rates(t, 4 * values, "gb_per_second") for k, t in times.items()},
  }


def _openssl(size):
  """A step in which OpenSSL makes so many bytes of keystream."""
  from cryptography.hazmat.primitives import ciphers

  algorithm = ciphers.algorithms.ChaCha20(bytes(32), bytes(16))
  plain, wire = bytes(size), bytearray(size)

  def step():
    ciphers.Cipher(algorithm, None).encryptor().update_into(plain, wire)

  return step


def summing(options) -> dict:
  """Weighted sums of packed wires, and sums modulo 2^32, beside a read."""
  mib = 4 if options.quick else 512
  values = (1 << 14) if options.quick else (1 << 20)
  rng = np.random.default_rng(0)
  probe, read = read_probe(mib)
  steps, moved = {"read": probe}, {"read": read}
  acc = np.zeros(values, np.float32)
  for bits in (8, 4):
    lay = quantize.layout(values, bits=bits)
    clients = (mib << 20) // lay.length
    dtype = np.int8 if bits == 8 else np.uint8
    packed = rng.integers(0, 100, lay.length, dtype)
    packed = np.tile(packed, (clients, 1))
    scale = rng.random((clients, lay.blocks), np.float32)
    weight = np.ones(clients, np.float32)
    for name, fun in named(sums.weighted_sum, sums.KERNEL).items():
      key = f"int{bits}.{name}"
      steps[key] = in_place(
        lambda *x, fun=fun, bits=bits: fun(*x, bits=bits),
        acc,
        packed,
        scale,
        weight,
      )
      moved[key] = packed.nbytes
  rows = rng.integers(0, 2**32, values, np.uint32)
  rows = np.tile(rows, ((mib << 18) // values, 1))
  for name, fun in named(sums.add_rows, sums.ROWS).items():
    present = np.ones(len(rows), bool)
    steps[f"uint32.{name}"] = in_place(fun, rows[0], rows, present)
    moved[f"uint32.{name}"] = rows.nbytes
  times = take_turns(steps, options.seconds)
  return {
    k: {"bytes": moved[k], **rates(t, moved[k], "gb_per_second")}
    for k, t in times.items()
  }


def quantizing(options) -> dict:
  """Stochastic rounding to int8 and back, of a large float message."""
  values = (1 << 14) if options.quick else (1 << 20)
  x = np.random.default_rng(0).standard_normal(values).astype(np.float32)
  key = np.array([1, 2], np.uint32)
  packed, scale = jax.jit(lambda x: quantize.quantize(x, key, bits=8))(x)
  steps = {}
  for name, fun in named(quantize.quantize, quantize.KERNEL).items():
    steps[f"quantize.{name}"] = fresh(
      lambda x, key, fun=fun: fun(x, key, bits=8), x, key
    )
  for name, fun in named(quantize.dequantize, quantize.DEQUANTIZE).items():
    steps[f"dequantize.{name}"] = fresh(
      lambda q, s, fun=fun: fun(q, s, bits=8, size=values), packed, scale
    )
  times = take_turns(steps, options.seconds)
  return {
    k: {"bytes": x.nbytes, **rates(t, x.nbytes, "gb_per_second")}
    for k, t in times.items()
  }


def pairs(options) -> dict:
  """Every pair's mask of a cohort at once, or one client's own masks."""
  clients, values, half = 1000, 100_000, 20
  if options.quick:
    clients, values, half = 16, 1000, 4
  side = np.arange(2 * half) < half
  if options.what == "pairs.client":
    rows = 1
    plus = np.where(side, 0, -1).astype(np.int32)
    minus = np.where(side, -1, 0).astype(np.int32)
  else:  # each with the next ones on a ring
    rows = clients
    plus = np.repeat(np.arange(clients, dtype=np.int32), half)
    minus = (plus + np.tile(1 + np.arange(half), clients)) % clients
  rng = np.random.default_rng(0)
  step = in_place(
    mask.mask_add,
    np.zeros((rows, values), np.uint32),
    rng.integers(0, 2**32, (plus.size, 8), np.uint32),
    plus,
    minus.astype(np.int32),
    np.zeros(3, np.uint32),
  )
  (times,) = take_turns({"": step}, options.seconds).values()
  return {
    "clients": rows,
    "values": values,
    "neighbours": 2 * half,
    "pairs": plus.size,
    "cores": len(os.sched_getaffinity(0)),
    **workload.spread(1e3 * times, "milliseconds"),
  }


def shapes(options) -> dict:
  """Every kernel over its own shapes, each implementation beside the others."""
  found = {}
  for path in sorted(pathlib.Path(kernels.__path__[0]).glob("*/specs.py")):
    folder = f"fedjax_peft.kernels.{path.parent.name}"
    api, specs = (
      importlib.import_module(f"{folder}.{name}") for name in ("api", "specs")
    )
    for name, kernel in vars(api).items():
      if not isinstance(kernel, dispatch.Kernel):
        continue
      own = "SPECS" if name == "KERNEL" else f"{name}_SPECS"
      measured = [spec for spec in getattr(specs, own) if spec.bench]
      for spec in measured[:1] if options.quick else measured:
        found[f"{kernel.name}: {spec.name}"] = _shape(kernel, spec, options)
  return found


def _shape(kernel, spec, options):
  """One kernel on one shape."""
  arrays = spec.draw(np.random.default_rng(0))

  def call(*arrays, implementation):
    return dispatch.call(
      kernel, *arrays, implementation=implementation, **spec.static
    )

  implementations = named(call, kernel)
  out = jax.eval_shape(implementations["reference"], *arrays)
  make = in_place if kernel.in_place else fresh
  times = take_turns(
    {name: make(fun, *arrays) for name, fun in implementations.items()},
    options.seconds / 4,
  )
  moved = sum(x.nbytes for x in arrays)
  moved += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(out))
  found = {
    name: workload.spread(1e6 * t, "microseconds") for name, t in times.items()
  }
  is_native = "native" in implementations and "cpu" not in kernel.why
  chosen = "native" if is_native else "reference"
  return {"bytes": moved, "chosen": chosen, **found}


PARTS = {
  "mask.one_thread": masking,
  "mask.two_threads": masking,
  "sums.one_thread": summing,
  "sums.all_threads": summing,
  "quantize.one_thread": quantizing,
  "pairs.cohort": pairs,
  "pairs.client": pairs,
  "shapes": shapes,
}


if __name__ == "__main__":
  main()
