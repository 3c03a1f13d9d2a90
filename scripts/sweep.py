r"""Runs variants of a config side by side, over seeds, and prints a table.

  python scripts/sweep.py configs/async_stragglers.toml --seeds 3 \
    --variant buffered \
    --variant synchronous 'network.clock={kind="synchronous"}' \
    --target 0.7

  python scripts/sweep.py configs/wireless_hierarchical.toml --scenarios

For each variant: the last accuracy (mean and deviation over seeds), what was
spent by then, and with --target what it took to get there. --scenarios adds
what each fault scenario cost in accuracy and, with --target, in time.
"""

import argparse
import collections
import json
import statistics
import sys

import jax

from fedjax_peft import budget, build, config, evaluate, runner, summary
from fedjax_peft.network import scenario

COSTS = ("spent/seconds", "spent/bytes", "spent/joules", "spent/dollars")


def run_one(path: str, sets: list[str], seed: int) -> list[dict]:
  """The records of one run."""
  run = config.load(path, [*sets, f"seed={seed}"])
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
  limits = budget.Budget(**vars(run.budget))
  records, so_far = [], collections.Counter()
  for _, record in runner.run(
    parts.algorithm,
    parts.model,
    parts.data,
    cohort=parts.cohort,
    rounds=run.rounds,
    seed=run.seed,
    settings=settings,
    evaluate=score,
    every=run.evaluate.every,
    stop=(lambda r: budget.exceeded(limits, r)) if limits.limits else None,
    group=parts.group,
  ):
    ways = ("/up_bytes", "/down_bytes")
    so_far.update({k: v for k, v in record.items() if k.endswith(ways)})
    total = {f"total/{k}": v for k, v in so_far.items()}
    # Without a network only bytes of reports are counted.
    records.append({"spent/bytes": sum(so_far.values()), **total, **record})
  jax.clear_caches()
  return records


def spread(values: list[float]) -> str:
  """Mean and deviation, as text."""
  if any(v is None for v in values):
    reached = [v for v in values if v is not None]
    return f"{len(reached)} of {len(values)}"
  text = f"{statistics.mean(values):.4g}"
  return text + (
    f" +-{statistics.stdev(values):.2g}" if len(values) > 1 else ""
  )


def main():
  """Runs every variant with every seed."""
  parser = argparse.ArgumentParser(
    description=__doc__.split("\n")[0],
    epilog=__doc__.split("\n", 2)[2],
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("config", help="a TOML file")
  add(
    "--variant",
    nargs="+",
    action="append",
    metavar=("NAME", "KEY=VALUE"),
    default=[],
    help="a name, and what differs from the file",
  )
  add("--set", nargs="+", default=[], help="KEY=VALUE for all variants")
  add("--seeds", type=int, default=3, help="runs of each (%(default)s)")
  add(
    "--scenarios",
    action="store_true",
    help="one variant for each fault scenario, beside the clean run",
  )
  add("--metric", default="eval/accuracy", help="compared (%(default)s)")
  add("--target", type=float, help="value of the metric to be reached")
  add("--costs", nargs="+", default=COSTS, help="running totals to show")
  add("--json", action="store_true", help="JSON on the last line")
  options = parser.parse_args()
  variants = options.variant or [["as it is"]]
  if options.scenarios:
    variants = [
      [name, f'network.scenario={{name="{name}"}}']
      for name in scenario.SCENARIOS
    ]
  found = {}
  columns = [options.metric.split("/")[-1]]
  columns += [c.split("/", 1)[1] for c in options.costs]
  if options.target is not None:
    for cost in options.costs[:2]:
      columns.append(f"{cost.split('/', 1)[1]} to {options.target:g}")
  if options.scenarios:
    columns += ["lost", "slower by"]
  clean = None
  width = max(16, *(len(v[0]) + 2 for v in variants))
  print(f"{'':{width}}" + "".join(f"{c:>20}" for c in columns), flush=True)
  for name, *sets in variants:
    runs = [
      run_one(options.config, [*options.set, *sets], seed)
      for seed in range(options.seeds)
    ]
    row = [[summary.final_quality(r, options.metric) for r in runs]]
    row += [[r[-1].get(cost, 0.0) for r in runs] for cost in options.costs]
    if options.target is not None:
      row += [
        [
          summary.cost_to_target(r, options.metric, options.target, cost)
          if cost in r[-1]
          else None
          for r in runs
        ]
        for cost in options.costs[:2]
      ]
    if options.scenarios:
      clean = clean or runs
      beside = [
        summary.robustness(
          one,
          other,
          options.metric,
          target=options.target,
          key="spent/seconds",
        )
        for one, other in zip(clean, runs, strict=True)
      ]
      row += [[b.drop for b in beside], [b.slowdown for b in beside]]
    found[name] = dict(zip(columns, row, strict=True))
    text = "".join(f"{spread(values):>20}" for values in row)
    print(f"{name:{width}}{text}", flush=True)
  if options.json:
    print(json.dumps({"config": options.config, "variants": found}))


if __name__ == "__main__":
  try:
    main()
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f"sweep: error: {error}")
