"""Measures split training beside undivided training, and allocation.

  python scripts/bench_split.py --json       all of it, about five minutes
  python scripts/bench_split.py --quick      small, to try the script

W2 (LoRA on a MiniLM encoder) with one cut in the middle whose wires change
nothing, with wires of 8 bits both ways, and undivided; and with adapters in
the last two of six layers, where the frozen first four are computed once. All
variants run one round after the other, in one process.
"""

import argparse
import json
import os
import statistics
import sys
import time

STREAMS = {
  "NPROC": "1",
  "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
}


def main():
  """Measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--json", action="store_true", help="JSON on the last line")
  add("--quick", action="store_true", help="small, to try the script")
  add("--rounds", type=int, default=12, help="of each variant (%(default)s)")
  add("--clients", type=int, default=32, help="of W2 (%(default)s)")
  options = parser.parse_args()
  if "NPROC" not in os.environ:  # one stream a core, before jax is imported
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | STREAMS)
  found = {"w2": rounds(options), "allocation": allocation(options.quick)}
  for name, seconds in found["w2"]["round_seconds"].items():
    spread = found["w2"]["spread"][name]
    ratio = found["w2"]["to_undivided"][name]
    print(f"{name:24}{seconds:9.4f} s  +-{spread:.4f}  x {ratio:.3f}")
  for clients, seconds in found["allocation"].items():
    print(f"allocation, {clients} clients: {seconds:.3f} s")
  if options.json:
    print(json.dumps(found))


def variants(quick: bool, clients: int):
  """Each variant of W2: its algorithm, its model, its data."""
  import bench_library
  import bench_workload as workload
  import optax

  import fedjax_peft as fp

  shape = workload.w2(quick)._replace(clients=clients)
  data = bench_library.w2_data(shape)
  local = fp.local(optax.sgd(shape.rate), batch=shape.batch)
  half = f"layers/{shape.depth // 2 - 1}"
  late = f"layers/{max(shape.depth - 3, 0)}"

  def tuned(module, where=r".*/(query|value)"):
    module = fp.peft.lora(
      module, rank=shape.rank, where=where, alpha=shape.scale * shape.rank
    )
    return fp.peft.tune(module, where=r"(.*/)?head/.*")

  def cut(end, wire=fp.split.cutting.PLAIN):
    ends = {"device": end, "server": None}
    return fp.split.pipeline(bench_library.w2_encoder(shape), ends, wire)

  def made(module, people, is_cut=True):
    model = fp.model(module, fp.losses.classification)
    algorithm = fp.fedavg(model, local)
    if is_cut:
      algorithm = fp.split.splitfed(algorithm, model, people.examples)
    return algorithm, model, people

  eight = fp.links.affine(8)
  yield "undivided", made(tuned(bench_library.w2_encoder(shape)), data, False)
  yield "cut", made(tuned(cut(half)), data)
  yield "cut, 8 bits", made(tuned(cut(half, fp.split.Wire(eight, eight))), data)
  last = tuned(cut(late), where=r"server/.*/(query|value)")
  yield "last two layers", made(last, data)
  for dtype in ("float32", "bfloat16"):
    first = fp.split.prefix_of(last, dtype=dtype)
    begun = time.perf_counter()
    people = first.remembered(data)
    print(f"prefix in {dtype}: {time.perf_counter() - begun:.2f} s", flush=True)
    yield f"last two, {dtype} cache", made(first.rest, people)


def rounds(options) -> dict:
  """Seconds of a round of each variant."""
  import jax
  import numpy as np

  import fedjax_peft as fp

  size = 4 if options.quick else options.clients
  runs = {}
  for name, (algorithm, model, people) in variants(options.quick, size):
    runs[name] = fp.run(
      algorithm,
      model,
      people,
      cohort=fp.sample.uniform(len(people)),
      rounds=options.rounds + 2,
    )
    next(runs[name])  # compiles
    next(runs[name])
    print(f"{name} is compiled", flush=True)
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(options.rounds):
    for name, ran in runs.items():
      begun = time.perf_counter()
      jax.block_until_ready(next(ran)[0].nodes)
      seconds[name].append(time.perf_counter() - begun)
  median = {name: statistics.median(values) for name, values in seconds.items()}
  return {
    "clients": size,
    "round_seconds": median,
    "spread": {
      name: float(np.subtract(*np.percentile(values, [75, 25])))
      for name, values in seconds.items()
    },
    "to_undivided": {k: v / median["undivided"] for k, v in median.items()},
  }


def allocation(quick: bool) -> dict[int, float]:
  """Seconds of a joint allocation for so many clients, median of three."""
  import study_allocation

  from fedjax_peft.split import allocate

  found = {}
  for clients in (10,) if quick else (100, 1000):
    taken = []
    for seed in range(3):
      problem = study_allocation.posed("vit", clients, seed)
      begun = time.perf_counter()
      allocate.optimize(problem)
      taken.append(time.perf_counter() - begun)
    found[clients] = statistics.median(taken)
  return found


if __name__ == "__main__":
  main()
