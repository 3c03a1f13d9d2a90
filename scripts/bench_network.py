"""Measures the simulated network: timelines alone, and beside training.

  python scripts/bench_network.py --json      all of it, about five minutes
  python scripts/bench_network.py --quick     small, to try the script

Timelines: every one of 100,000 devices is asked in each of 1,000 rounds, over a
cell, with time of day, dropout, stragglers and batteries, and charged for it.
Beside training: the host's time for a turn of W2 (LoRA on a MiniLM encoder, 32
clients) as a share of its round, and rounds with and without a network, one
after the other.
"""

import argparse
import json
import statistics
import sys
import time

import bench_library
import jax
import numpy as np

import fedjax_peft as fp
from fedjax_peft import plan
from fedjax_peft.network import (
  availability,
  clock,
  fault,
  ledger,
  profile,
  radio,
  selection,
  station,
  timeline,
  world,
)


def place(clients: int, *, flops: float, bytes: int, examples=None):
  """A world of phones and gateways that come and go, drop out and dawdle."""
  stand = station.stations()
  air = radio.cell()

  def load(ids, number, steps):
    return ledger.Load(
      np.full(len(ids), flops),
      np.full(len(ids), bytes),
      np.full(len(ids), bytes),
    )

  return world.World(
    seed=0,
    examples=np.ones(clients, np.int64) if examples is None else examples,
    seen=np.ones(clients, bool),
    fleet=profile.fleet({"phone": 0.8, "gateway": 0.2}, clients, 0, spread=0.5),
    radio=air,
    distance=station.distance(stand, clients, 1, air.radius, 0),
    load=load,
    needs=np.full(clients, 1e8),
    fault=fault.compose(fault.dropout(0.1), fault.stragglers(0.1, 10.0)),
    available=availability.diurnal(low=0.9, high=1.0),
    select=selection.uniform(),
    recharge=5.0,
  )


def timelines(clients: int, rounds: int) -> dict:
  """Seconds for so many rounds of all clients, nobody training."""
  where = place(clients, flops=1e9, bytes=100_000)
  every = selection.Selection("all", lambda rng, some, size, round: some.ids)
  made = timeline.plan(
    where._replace(select=every), clock.synchronous(3600.0), clients // 2
  )
  memory, asked = made.init(), 0
  begun, own = time.perf_counter(), time.process_time()
  for number in range(rounds):
    turn, memory = made.turn(memory, number, {})
    asked += turn.record["device/asked"]
  seconds = time.perf_counter() - begun
  return {
    "devices": clients,
    "rounds": rounds,
    "timelines": asked,
    "seconds": seconds,
    "cpu_seconds": time.process_time() - own,
    "per_second": asked / seconds,
  }


def beside(rounds: int, quick: bool) -> dict:
  """What a network adds to a round of W2."""
  algorithm, model, data = bench_library.w2_parts(quick)
  clients = size = len(data)
  where = place(
    clients,
    flops=1e11,
    bytes=600_000,
    examples=data.train.sizes.astype("int64"),
  )
  # Nobody is lost, so that as many train as without a network.
  where = where._replace(
    fault=fault.stragglers(0.1, 10.0),
    radio=radio.cell(packet_m=0.0, p_gb=0.0),
    available=availability.always(),
  )
  simulated = timeline.plan(where, clock.synchronous(), size)
  plain = plan.sampled(fp.sample.uniform(size), data, 0)
  memory, turns = simulated.init(), []
  for number in range(50):
    begun = time.perf_counter()
    _, memory = simulated.turn(memory, number, {})
    turns.append(time.perf_counter() - begun)
  runs = {}
  for name, cohort in (("plain", plain), ("simulated", simulated)):
    runs[name] = fp.run(
      algorithm, model, data, cohort=cohort, rounds=rounds + 1, seed=0
    )
    next(runs[name])  # compiles
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(rounds):
    for name, ran in runs.items():
      begun = time.perf_counter()
      jax.block_until_ready(next(ran)[0].nodes)
      seconds[name].append(time.perf_counter() - begun)
  median = {name: statistics.median(values) for name, values in seconds.items()}
  turn = statistics.median(turns)
  return {
    "round_seconds": median,
    "spread": {
      name: float(np.subtract(*np.percentile(values, [75, 25])))
      for name, values in seconds.items()
    },
    "turn_seconds": turn,
    "turn_share": turn / median["plain"],
    "added_share": median["simulated"] / median["plain"] - 1,
  }


def main():
  """Measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__.split("\n")[0],
    epilog=__doc__.split("\n", 2)[2],
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--json", action="store_true", help="JSON on the last line")
  add("--quick", action="store_true", help="small sizes, to try the script")
  options = parser.parse_args()
  size = (1_000, 20) if options.quick else (100_000, 1_000)
  found = {"timelines": timelines(*size)}
  one = found["timelines"]
  print(
    f"{one['devices']:,} devices, {one['rounds']:,} rounds: "
    f"{one['seconds']:.1f} s ({one['cpu_seconds']:.1f} s of one core), "
    f"{one['per_second'] / 1e6:.2f} million timelines "
    "a second",
    flush=True,
  )
  found["beside"] = two = beside(3 if options.quick else 15, options.quick)
  print(
    f"a round of training takes {two['round_seconds']['plain']:.3f} s, with a "
    f"network {two['round_seconds']['simulated']:.3f} s "
    f"({two['added_share']:+.1%}); planning it {two['turn_seconds'] * 1e3:.2f} "
    f"ms ({two['turn_share']:.2%})"
  )
  if options.json:
    print(json.dumps(found))


if __name__ == "__main__":
  try:
    main()
  except ValueError as error:
    sys.exit(f"bench_network: error: {error}")
