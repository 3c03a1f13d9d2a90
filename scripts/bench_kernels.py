"""The kernels' benchmark: native beside reference, OpenSSL and the machine.

python scripts/bench_kernels.py                # a table, about three minutes
python scripts/bench_kernels.py --json         # and one JSON object, last line
python scripts/bench_kernels.py --with-flower  # beside Flower's SecAgg+
python scripts/bench_kernels.py --only mask,sums --seconds 5

Every measurement is a process of its own; what is compared takes turns in it
(`bench_kernel.py`). Run it on a machine that does nothing else; the load
before each measurement is recorded. The read roofline is the rate at which as
many threads read memory and do nothing else, in the same process.
"""

import argparse
import json
import sys

import bench_engine as engine

PARTS = ("mask", "sums", "quantize", "pairs", "shapes")

# What must hold, as (key, at least).
TARGETS = (
  ("mask.ratio_to_openssl", 0.9),
  ("mask.scaling", 1.6),
  ("weighted_sum_int8.fraction_of_roofline", 0.6),
  ("weighted_sum_int4.fraction_of_roofline", 0.35),
  ("uint32_sum.fraction_of_roofline", 0.8),
  ("quantize.gb_per_second", 3.0),
)


def main() -> int:
  """Runs the measurements, prints the table, and with --json the object."""
  options = _options()
  found, failed = {}, {}
  for job in jobs(options):
    print(f"{job.name} ...", end=" ", file=sys.stderr, flush=True)
    try:
      found[job.name] = engine.measure(job)
      print("done", file=sys.stderr)
    except ValueError as error:
      failed[job.name] = str(error)
      print(error, file=sys.stderr)
  result = {"machine": engine.machine(), **summary(found)}
  result |= {"measurements": found, "failed": failed}
  print(table(result))
  if options.json:
    print(json.dumps(result))
  return int(any(not name.startswith("flower") for name in failed))


def _options():
  """What the user wants."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--only", default=",".join(PARTS), help="parts, separated by commas"
  )
  parser.add_argument(
    "--seconds", type=float, default=3.0, help="for each implementation"
  )
  parser.add_argument(
    "--with-flower", action="store_true", help="install and measure Flower"
  )
  parser.add_argument(
    "--quick", action="store_true", help="tiny sizes: does it run at all?"
  )
  parser.add_argument(
    "--json", action="store_true", help="end with one line of JSON"
  )
  options = parser.parse_args()
  unknown = sorted(set(options.only.split(",")) - set(PARTS))
  if unknown:
    parser.error(f"--only takes {', '.join(PARTS)}: got {unknown[0]!r}")
  return options


def jobs(options: argparse.Namespace) -> list[engine.Job]:
  """The measurements, each with its number of threads."""
  seconds = 0.0 if options.quick else options.seconds
  more = (f"--seconds={seconds}", *(("--quick",) if options.quick else ()))
  one, two, all_threads = {"NPROC": "1"}, {"NPROC": "2"}, {}
  found = {
    "mask.one_thread": one,
    "mask.two_threads": two,
    "sums.one_thread": one,
    "sums.all_threads": all_threads,
    "quantize.one_thread": one,
    "pairs.cohort": all_threads,
    "pairs.client": one,
    "shapes": all_threads,
  }
  here = [
    engine.Job(name, ("bench_kernel.py", name, *more), environment)
    for name, environment in found.items()
    if name.split(".")[0] in options.only.split(",")
  ]
  if options.with_flower:
    command = ("peers/with_flower.py", *more)
    here.append(engine.Job("flower", command, {}, "flower"))
  return here


def summary(found: dict) -> dict:
  """What the measurements say, as flat as it gets."""
  parts: dict = {}
  if "mask.one_thread" in found:
    of = found["mask.one_thread"]
    rates = {k: of[k]["gb_per_second"] for k in of if isinstance(of[k], dict)}
    parts["mask"] = {f"{k}_gb_per_second": rate for k, rate in rates.items()}
    fastest = rates.get("native", rates["reference"])
    parts["mask"]["ratio_to_openssl"] = fastest / rates["openssl"]
    two = found.get("mask.two_threads", {}).get("native")
    if two:
      parts["mask"]["two_threads_gb_per_second"] = two["gb_per_second"]
      parts["mask"]["scaling"] = two["gb_per_second"] / fastest
  for name, where in (("", "one_thread"), ("_all_threads", "all_threads")):
    parts |= _sums(found.get(f"sums.{where}", {}), name)
  if "quantize.one_thread" in found:
    for kind in ("quantize", "dequantize"):
      of = found["quantize.one_thread"]
      rates = {
        name: of[f"{kind}.{name}"]["gb_per_second"]
        for name in ("native", "reference")
        if f"{kind}.{name}" in of
      }
      best = rates.get("native", rates["reference"])
      parts[kind] = {"gb_per_second": best, **rates}
  if "pairs.cohort" in found:
    parts["pairs"] = _pairs(found)
  return {**parts, "targets": _targets(parts)}


def _sums(of, suffix):
  """Rates of the sums, and what part of the read roofline they are."""
  parts = {}
  for kind, name in (
    ("int8", "weighted_sum_int8"),
    ("int4", "weighted_sum_int4"),
    ("uint32", "uint32_sum"),
  ):
    rates = {
      key: of[f"{kind}.{key}"]["gb_per_second"]
      for key in ("native", "reference")
      if f"{kind}.{key}" in of
    }
    if rates:
      best = rates.get("native", rates["reference"])
      roofline = of["read"]["gb_per_second"]
      parts[name + suffix] = {
        "gb_per_second": best,
        "roofline_gb_per_second": roofline,
        "fraction_of_roofline": best / roofline,
        "reference_gb_per_second": rates["reference"],
      }
  return parts


def _pairs(found):
  """Seconds of masking a round, and of Flower's arithmetic for the same."""
  of = found["pairs.cohort"]
  part = {key: of[key] for key in ("clients", "values", "neighbours", "pairs")}
  part["round_seconds"] = of["milliseconds"] / 1e3
  if "pairs.client" in found:
    part["client_milliseconds"] = found["pairs.client"]["milliseconds"]
  if "flower" in found:
    theirs = found["flower"]["milliseconds"]
    part["flower_client_milliseconds"] = theirs
    rounds = theirs / 1e3 * of["clients"] / of["cores"]
    part["flower_round_seconds"] = rounds
    part["ratio_to_flower"] = theirs / part["client_milliseconds"]
    part["round_ratio_to_flower"] = rounds / part["round_seconds"]
  return part


def _targets(parts):
  """{key: value, target, met} of those targets that were measured."""
  found = {}
  for key, least in TARGETS:
    part, name = key.split(".")
    value = parts.get(part, {}).get(name)
    if value is not None:
      found[key] = {"value": value, "at_least": least, "met": value >= least}
  return found


def table(result: dict) -> str:
  """The result for people."""
  facts, found = result["machine"], result["measurements"]
  lines = [
    f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, "
    f"{' '.join(facts['isa'])}; jax {facts['jax']}",
  ]
  lines += _rates(found) + _shapes(found.get("shapes", {}))
  if "pairs" in result:
    lines += _masking(result["pairs"])
  if result["targets"]:
    lines += ["", f"{'target':44}{'value':>10}{'at least':>10}"]
  for key, target in result["targets"].items():
    lines.append(
      f"{key:44}{target['value']:10.3f}{target['at_least']:10.3f}"
      f"  {'met' if target['met'] else 'MISSED'}"
    )
  lines += [f"failed: {n}: {why}" for n, why in result["failed"].items()]
  return "\n".join(lines)


def _rates(found):
  """Rows of what is measured in GB/s."""
  rows = []
  for name, of in found.items():
    for key, got in of.items():
      if isinstance(got, dict) and "gb_per_second" in got:
        roofline = of.get("read", {}).get("gb_per_second")
        part = got["gb_per_second"] / roofline if roofline else None
        size = got.get("bytes", of.get("bytes"))
        rows.append(
          f"{name + ' ' + key:40}{size / 1e6:10.1f}"
          f"{got['gb_per_second']:9.2f}{got['min']:9.2f}{got['max']:9.2f}"
          f"{got['n']:6}{f'{part:9.2f}' if part else '':9}{of['load']:7.2f}"
        )
  head = (
    f"{'GB per second':40}{'MB':>10}{'median':>9}{'min':>9}{'max':>9}{'n':>6}"
    f"{'of read':>9}{'load':>7}"
  )
  return ["", head, *rows] if rows else []


def _shapes(of):
  """Rows of the kernels on their own shapes."""
  rows = []
  for name, got in of.items():
    if not isinstance(got, dict):
      continue
    for key in ("native", "reference"):
      if key in got:
        time = got[key]["microseconds"]
        mark = "*" if key == got["chosen"] else " "
        rows.append(
          f"{name:58.58}{key:>10}{mark}{time:11.1f}{got[key]['min']:11.1f}"
          f"{got[key]['max']:11.1f}{got['bytes'] / 1e6:9.2f}"
          f"{got['bytes'] / time / 1e3:9.2f}"
        )
  head = (
    f"{'microseconds (* runs by default)':58}{'':11}{'median':>11}{'min':>11}"
    f"{'max':>11}{'MB':>9}{'GB/s':>9}"
  )
  return ["", head, *rows] if rows else []


def _masking(part):
  """Rows of a round's masks."""
  rows = [
    "",
    f"masking a round: {part['clients']} clients x {part['values']} values, "
    f"{part['neighbours']} neighbours each, {part['pairs']} pairs",
    f"{'all clients, all threads':36}{part['round_seconds']:10.3f} s",
    f"{'one client, one thread':36}{part['client_milliseconds']:10.3f} ms",
  ]
  if "flower_round_seconds" not in part:
    return [
      *rows,
      "Flower's SecAgg+ was not measured: --with-flower installs it, in an "
      "environment of its own",
    ]
  return [
    *rows,
    f"{'all clients, Flower, all cores':36}"
    f"{part['flower_round_seconds']:10.3f} s",
    f"{'one client, Flower':36}{part['flower_client_milliseconds']:10.3f} ms",
  ]


if __name__ == "__main__":
  sys.exit(main())
