"""Attacks what crosses each boundary, beside what the accountant promises.

  python scripts/audit.py --json       all of it, some minutes
  python scripts/audit.py --quick      fewer clients and runs, within a minute

A tiny convolutional network on Fashion-MNIST images of 14 x 14 pixels. Each
boundary is attacked by a search for the one image of a client (decibels of the
best found, beside those of a guess that saw the label only), by a test of
membership (AUC, 0.5 is chance), by a probe of the class that most of a
client's examples are of (accuracy, 0.1 is chance), and by a canary, which
proves that epsilon is at least as large as said, with a confidence of 95 %.
Epsilon is of one message, at a delta of 1e-5.
"""

import argparse
import json
import os
import sys
import time

# Programs run once or a few times: they are compiled in a hurry.
HURRY = "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false"
PIXELS, IMAGES = 2, 6000  # side of a square that becomes a pixel; used


def main():
  """Attacks and prints."""
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS") or HURRY
  from fedjax_peft import audit
  from fedjax_peft.audit import table, tiny

  parser = argparse.ArgumentParser(
    description=__doc__.split("\n")[0],
    epilog="needs: fedjax-peft data prepare fashion_mnist",
  )
  add = parser.add_argument
  add("--json", action="store_true", help="JSON on the last line")
  add("--quick", action="store_true", help="fewer clients and runs")
  add("--seed", type=int, default=0, help="of everything (%(default)s)")
  add("--cohort", type=int, help="clients of a sum (16, quick: 8)")
  add("--multiplier", type=float, default=4.0, help="noise (%(default)s)")
  add("--only", nargs="+", choices=audit.BOUNDARIES, help="these boundaries")
  options = parser.parse_args()
  pool = images()
  subject = tiny.subject(
    pool,
    cohort=options.cohort or (8 if options.quick else 16),
    multiplier=options.multiplier,
    seed=options.seed,
  )
  sizes = table.QUICK if options.quick else table.Sizes()
  print(HEAD, flush=True)
  rows = {}
  for name in options.only or audit.BOUNDARIES:
    begun = time.perf_counter()
    seen = audit.find(name, subject)
    rows[name] = table.audit(seen, pool, sizes, options.seed)
    rows[name]["seconds"] = time.perf_counter() - begun
    print(line(name, rows[name]), flush=True)
  if options.json:
    print(json.dumps({"setting": vars(options), "boundaries": rows}))


def images():
  """The images that clients have some of."""
  from fedjax_peft import data
  from fedjax_peft.audit import deal

  whole = data.load("fashion_mnist", clients=1, partition="iid", dtype="uint8")
  image = whole.examples["image"][:IMAGES].astype("float32") / 255
  label = whole.examples["label"][:IMAGES]
  return deal.Pool(deal.shrunk(image, PIXELS), label, len(whole.classes))


HEAD = (
  f"{'':16}{'inversion, dB':>15}{'membership AUC':>22}{'property':>22}"
  f"{'epsilon >=':>12}{'accounted':>11}{'s':>7}"
)


def line(name: str, row: dict) -> str:
  """A row of the table."""
  found, best = row["inversion"], row["membership"]["alignment"]
  guess = row["property"]
  promised = row["epsilon_accounted"]
  return (
    f"{name:16}{found['psnr']:8.1f} ({found['psnr_guess']:4.1f})"
    f"{between(best):>22}{between(guess):>22}"
    f"{row['epsilon_lower']:12.2f}"
    f"{'none' if promised is None else f'{promised:.2f}':>11}"
    f"{row['seconds']:7.1f}"
  )


def between(found: dict) -> str:
  """An estimate with its interval."""
  return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


if __name__ == "__main__":
  try:
    main()
  except (FileNotFoundError, ValueError) as error:
    sys.exit(f"audit: error: {error}")
