"""Compares ways to fine-tune across clients, side by side.

  python scripts/compare_peft.py --json              the small setting
  python scripts/compare_peft.py --rounds 30 --cohort 64 --seeds 3

Adapters beside full fine-tuning, everyone alone, and all data in one place:
accuracy on what clients held out (all together, and the worst tenth of them),
bytes of a client in a round, FLOPs and memory of a client's step. The task, the
rounds and the rest are those of configs/sotu_minilm.toml, whose first lines
hold what was measured.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
import tomllib

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
# they are compared with, in about ten minutes.
FEW = (
  "lora",
  "ia3",
  "prefix",
  "head",
  "full",
  "lora, alone",
  "lora, centralized",
)
CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "sotu_minilm.toml"
TINY = {"name": "encoder", "options": {"vocab": 30522, "width": 32, "heads": 2}}

# Options that replace a value of the file: (table, key).
GIVEN = {
  "rounds": ("", "rounds"),
  "cohort": ("cohort", "size"),
  "tokens": ("data", "tokens"),
  "test_clients": ("evaluate", "clients"),
}


def config_of(name: str, options: argparse.Namespace, seed: int):
  """The config of one method: the file's, with what is the method's own."""
  tree = tomllib.loads(CONFIG.read_text())
  adapters, rate, algorithm = METHODS[name]
  tree |= {"seed": seed, "algorithm": algorithm}
  model = TINY if options.quick else tree["model"]
  tree["model"] = {**model, "peft": adapters}
  for given, (table, key) in GIVEN.items():
    value = getattr(options, given)
    if value is not None:
      (tree[table] if table else tree)[key] = value
  if rate is None:
    tree["server"] = {"optimizer": "sgd"}
  else:
    tree["server"]["learning_rate"] = options.rate or rate
  return config.parse(tree)


def run_one(run: schema.Config) -> dict:
  """Trains and scores one method."""
  begun = time.perf_counter()
  parts = build.build(run)
  settings = build.settings(run, parts)
  score = evaluate.evaluation(
    parts.algorithm,
    parts.model,
    parts.data,
    batch=run.evaluate.batch,
    clients=run.evaluate.clients,
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
    epilog=f"what is not given is that of {CONFIG.name}; needs: fedjax-peft "
    "models prepare minilm; fedjax-peft data prepare sotu",
  )
  add = parser.add_argument
  add("--json", action="store_true", help="JSON on the last line")
  add("--quick", action="store_true", help="a tiny model, to try the script")
  add("--rounds", type=int, help="server updates")
  add("--cohort", type=int, help="clients a round")
  add("--seeds", type=int, default=1, help="runs of each (%(default)s)")
  add("--tokens", type=int, help="of a paragraph")
  add("--test-clients", type=int, help="tested")
  add("--rate", type=float, help="the server's, in place of each method's own")
  add(
    "--only",
    nargs="+",
    choices=["all", *METHODS],
    default=FEW,
    help="these methods, or all (without: one of each family)",
  )
  options = parser.parse_args()
  result: dict[str, list] = {}
  print(
    f"{'':18}{'accuracy':>14}{'worst 10 %':>11}{'trained':>12}"
    f"{'up, kB':>9}{'down, kB':>10}{'GFLOP':>8}{'MiB':>7}{'s':>7}"
  )
  for name in METHODS if "all" in options.only else options.only:
    runs = [
      run_one(config_of(name, options, seed)) for seed in range(options.seeds)
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
