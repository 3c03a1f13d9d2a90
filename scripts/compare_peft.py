"""Compares ways to fine-tune across clients, side by side.

  python scripts/compare_peft.py --json              the small setting
  python scripts/compare_peft.py --rounds 30 --cohort 64 --seeds 3

Adapters beside full fine-tuning, everyone alone, and all data in one place:
accuracy on what clients held out (all together, and the worst tenth of them),
bytes of a client in a round, FLOPs and memory of a client's step. The task is
that of configs/quickstart.toml: the era of a paragraph of a presidential
message, on a pretrained MiniLM.
"""

import argparse
import json
import statistics
import sys
import time

import jax

from fedjax_peft import (
  build,
  config,
  evaluate,
  one_step,
  runner,
  schema,
  tree,
)
from fedjax_peft import settings as settings_lib

HEAD = {"method": "tune", "where": "head/.*"}
QV = ".*/(query|value)"
# name: (adapters, learning rate of the server's Adam, algorithm). The rates are
# the best of those tried (0.0003 to 0.1, a factor of three apart, around each)
# in six rounds with seed 0.
METHODS = {
  "lora": ([{"method": "lora", "rank": 8, "where": QV}, HEAD], 0.01, {}),
  "dora": ([{"method": "dora", "rank": 8, "where": QV}, HEAD], 0.01, {}),
  "ia3": ([{"method": "ia3"}, HEAD], 0.1, {}),
  "bottleneck": ([{"method": "bottleneck", "size": 16}, HEAD], 0.01, {}),
  "prefix": ([{"method": "prefix", "length": 8}, HEAD], 0.1, {}),
  "bitfit": ([{"method": "bitfit"}, HEAD], 0.003, {}),
  "head": ([HEAD], 0.1, {}),
  "full": ([], 0.0003, {}),
  "vera": ([{"method": "vera", "rank": 64, "where": QV}, HEAD], 0.1, {}),
  "core": ([{"method": "core", "rank": 16, "where": QV}, HEAD], 0.03, {}),
  "ravan": ([{"method": "ravan", "rank": 8, "where": QV}, HEAD], 0.03, {}),
  "prompt": ([{"method": "prompt", "length": 8}, HEAD], 0.1, {}),
  "deep_prompt": ([{"method": "deep_prompt", "length": 8}, HEAD], 0.1, {}),
  "norms": ([{"method": "norms"}, HEAD], 0.01, {}),
  "last": ([{"method": "last", "layers": 1}, HEAD], 0.001, {}),
  "sparse": ([{"method": "sparse", "density": 0.01}, HEAD], 0.003, {}),
  "lora, alone": (
    [{"method": "lora", "rank": 8, "where": QV}, HEAD],
    None,
    {"name": "local_only"},
  ),
  "lora, centralized": (
    [{"method": "lora", "rank": 8, "where": QV}, HEAD],
    None,
    {"name": "centralized"},
  ),
}
# What is compared unless --only says otherwise: one of each family, and what
# they are compared with, in less than ten minutes.
FEW = (
  *("lora", "ia3", "bottleneck", "prefix", "bitfit", "head", "full"),
  *("lora, alone", "lora, centralized"),
)
REAL = {"name": "minilm"}
TINY = {"name": "encoder", "options": {"vocab": 30522, "width": 32, "heads": 2}}


def config_of(name: str, options: argparse.Namespace, seed: int):
  """The config of one method."""
  adapters, rate, algorithm = METHODS[name]
  rate = rate and (options.rate or rate)
  server = {"optimizer": "sgd"}
  if rate is not None:
    server = {"optimizer": "adam", "learning_rate": rate, "eps": 1e-5}
  return config.parse(
    {
      "seed": seed,
      "rounds": options.rounds,
      "model": {**(TINY if options.quick else REAL), "peft": adapters},
      "data": {
        "name": "sotu",
        "clients": 1000,
        "alpha": 0.3,
        "tokens": options.tokens,
      },
      "algorithm": algorithm,
      "client": {"learning_rate": 0.05, "batch": 4, "steps": 2},
      "server": server,
      "cohort": {"size": options.cohort},
    }
  )


def run_one(run: schema.Config, options: argparse.Namespace) -> dict:
  """Trains and scores one method."""
  begun = time.perf_counter()
  parts = build.build(run)
  settings = build.settings(run, parts)
  score = evaluate.evaluation(
    parts.algorithm,
    parts.model,
    parts.data,
    batch=16,
    clients=options.test_clients,
    settings=settings,
  )
  last: dict = {}
  for _, record in runner.run(
    parts.algorithm,
    parts.model,
    parts.data,
    cohort=parts.cohort,
    rounds=run.rounds,
    seed=run.seed,
    settings=settings,
    evaluate=score,
    every=run.rounds,
  ):
    last = record
  job = parts.algorithm.work
  jax.clear_caches()  # nothing of one method is used by the next
  return {
    "accuracy": last["eval/accuracy"],
    "worst_tenth": last.get("eval/accuracy_worst10", float("nan")),
    "trained": tree.size(parts.model.params),
    "up_bytes": last["up_bytes_client"],
    "down_bytes": last["down_bytes_client"],
    "step_flops": one_step.flops_of(job, parts.model.base, parts.data.examples),
    "step_bytes": settings_lib.lane_bytes(
      job, parts.model.base, parts.data.examples
    ),
    "seconds": time.perf_counter() - begun,
  }


def main():
  """Runs every method and prints a table."""
  parser = argparse.ArgumentParser(
    description=__doc__.split("\n")[0],
    epilog="needs: fedjax-peft models prepare minilm; "
    "fedjax-peft data prepare sotu",
  )
  add = parser.add_argument
  add("--json", action="store_true", help="JSON on the last line")
  add("--quick", action="store_true", help="a tiny model, to try the script")
  add("--rounds", type=int, default=6, help="server updates (%(default)s)")
  add("--cohort", type=int, default=16, help="clients a round (%(default)s)")
  add("--seeds", type=int, default=1, help="runs of each (%(default)s)")
  add("--tokens", type=int, default=64, help="of a paragraph (%(default)s)")
  add("--test-clients", type=int, default=100, help="tested (%(default)s)")
  add("--rate", type=float, help="the server's, in place of each method's own")
  add(
    "--only",
    nargs="+",
    choices=["all", *METHODS],
    default=FEW,
    help="these methods, or all (one of each family)",
  )
  options = parser.parse_args()
  result: dict[str, list] = {}
  print(
    f"{'':18}{'accuracy':>14}{'worst 10 %':>11}{'trained':>12}"
    f"{'up, kB':>9}{'down, kB':>10}{'GFLOP':>8}{'MiB':>7}{'s':>7}"
  )
  for name in METHODS if "all" in options.only else options.only:
    runs = [
      run_one(config_of(name, options, seed), options)
      for seed in range(options.seeds)
    ]
    result[name] = runs
    found = [r["accuracy"] for r in runs]
    tail = statistics.mean(r["worst_tenth"] for r in runs)
    spread = f"{statistics.mean(found):.3f}"
    if len(found) > 1:
      spread += f" +-{statistics.stdev(found):.3f}"
    one = runs[0]
    seconds = statistics.mean(r["seconds"] for r in runs)
    print(
      f"{name:18}{spread:>14}{tail:11.3f}{one['trained']:12,}"
      f"{one['up_bytes'] / 1e3:9.1f}{one['down_bytes'] / 1e3:10.1f}"
      f"{one['step_flops'] / 1e9:8.2f}{one['step_bytes'] / 2**20:7.1f}"
      f"{seconds:7.1f}",
      flush=True,
    )
  if options.json:
    print(json.dumps({"setting": vars(options), "methods": result}))


if __name__ == "__main__":
  try:
    main()
  except (FileNotFoundError, ValueError) as error:
    sys.exit(f"compare_peft: error: {error}")
