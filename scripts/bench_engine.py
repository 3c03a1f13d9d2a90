"""The engine's benchmark: rounds, ceilings, packing and memory of one machine.

python scripts/bench_engine.py                # a table, about three minutes
python scripts/bench_engine.py --json         # and one JSON object, last line
python scripts/bench_engine.py --with-peers   # beside FedJAX, DrJAX, PyTorch
python scripts/bench_engine.py --only w2,ceilings --seconds 30

Every measurement is a process of its own, one after another, so that none
inherits another's settings, memory or compiled programs. Run it on a machine
that does nothing else; the load before each measurement is recorded.

W1 is a perceptron 784-128-62 with all weights trained, 1,000 clients a round
of 20 examples; W2 is LoRA of rank 8 on an encoder of MiniLM's shape, 32
clients a round of 8 texts of 32 tokens (`bench_workload.py`). A bare loop is
the same round written by hand (`bench_bare.py`).
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import NamedTuple

import bench_peers as peers
import bench_workload as workload

HERE = pathlib.Path(__file__).resolve().parent
PARTS = ("w1", "w2", "ceilings", "packing", "memory")
MORE = ("rules",)  # measured when asked for with --only
RULES = (
  "fedit",
  "ffa",
  "fedsa",
  "rolora",
  "flora",
  "flexlora",
  "hetlora",
  "fedex",
  "fair",
  "fedsvd",
  "fedrot",
)
COHORTS = (100, 1000, 10000)
GEMM = "4096x384x1536"  # the product that W2 is measured against

# What must hold, as (key, at least); ratios are to the fastest peer.
TARGETS = (
  ("w1.ratio.lowrank", 10.0),
  ("w1.ratio.general", 1.25),
  ("w2.ratio.bf16", 2.8),
  ("w2.ratio.float32", 1.4),
  ("w1.of_bare.general", 0.85),
  ("w1.of_bare.lowrank", 0.85),
  ("w2.of_bare.bf16", 0.85),
  ("w2.of_bare.float32", 0.85),
  ("rules.slowest", 0.95),
  ("packing.useful_fraction", 0.97),
  ("packing.ratio_to_bound", 0.97),
  ("memory.flatness", 1 / 1.1),
)


class Job(NamedTuple):
  """One measurement.

  Attributes:
    name: where its result goes.
    command: arguments after the Python, the first one a script.
    environment: {name: value} on top of a clean one.
    peer: whose Python runs it; "" is this one.
  """

  name: str
  command: tuple[str, ...]
  environment: dict[str, str]
  peer: str = ""


def main() -> int:
  """Runs the measurements, prints the table, and with --json the object."""
  options = _options()
  only = options.only.split(",")
  found, failed = {}, {}
  for job in jobs(only, options):
    print(f"{job.name} ...", end=" ", file=sys.stderr, flush=True)
    try:
      found[job.name] = measure(job)
      rate = found[job.name].get("clients_per_second")
      print(f"{rate} clients/s" if rate else "done", file=sys.stderr)
    except ValueError as error:
      failed[job.name] = str(error)
      print(error, file=sys.stderr)
  result = {"machine": machine(), **summary(found, options.quick)}
  result |= {"measurements": found, "failed": failed}
  print(table(result))
  if options.json:
    print(json.dumps(result))
  return int(any(not name.startswith("peers.") for name in failed))


def _options():
  """What the user wants."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--only",
    default=",".join(PARTS),
    help="parts, separated by commas; rules: W2 under every rule",
  )
  parser.add_argument(
    "--seconds", type=float, default=10.0, help="steady state of each rate"
  )
  parser.add_argument(
    "--with-peers",
    nargs="?",
    const=",".join(peers.PEERS),
    default="",
    metavar="PEERS",
    help="install and measure these; all if none is named",
  )
  parser.add_argument(
    "--quick", action="store_true", help="tiny sizes: does it run at all?"
  )
  parser.add_argument(
    "--json", action="store_true", help="end with one line of JSON"
  )
  options = parser.parse_args()
  for flag, given, known in (
    ("--only", options.only, (*PARTS, *MORE)),
    ("--with-peers", options.with_peers, peers.PEERS),
  ):
    unknown = sorted(set(filter(None, given.split(","))) - set(known))
    if unknown:
      parser.error(f"{flag} takes {', '.join(known)}: got {unknown[0]!r}")
  return options


def jobs(only: list[str], options: argparse.Namespace) -> list[Job]:
  """The measurements, those to be compared next to each other."""
  cores = len(os.sched_getaffinity(0))
  streams = {  # as the library's own command starts itself
    "NPROC": "1",
    "MALLOC_ARENA_MAX": "2",  # else each thread keeps what it has freed
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={cores}",
  }
  held = {  # what a bare loop needs for its barriers
    **streams,
    "XLA_FLAGS": f"{streams['XLA_FLAGS']} "
    "--xla_disable_hlo_passes=cse_barrier_expander",
  }
  seconds = 0.0 if options.quick else options.seconds
  more = (f"--seconds={seconds}", *(("--quick",) if options.quick else ()))
  library, bare, found = "bench_library.py", "bench_bare.py", []

  def add(name, script, *arguments, environment=streams):
    found.append(Job(name, (script, *arguments, *more), environment))

  if "ceilings" in only:
    add("ceilings.threads", "bench_ceilings.py", "--copy", environment={})
    add("ceilings.streams", "bench_ceilings.py")
  if "w1" in only:
    add("w1.auto", library, "w1")
    for path in ("general", "lowrank"):
      add(f"w1.{path}", library, "w1", f"--path={path}")
      add(f"w1.bare_{path}", bare, f"w1_{path}")
  if "w2" in only:
    for precision in ("bf16", "float32"):
      choice = f"--precision={precision}"
      add(f"w2.{precision}", library, "w2", choice)
      add(f"w2.bare_{precision}", bare, "w2", choice, environment=held)
  if "rules" in only:
    add("rules.none", library, "w2")
    for name in RULES:
      add(f"rules.{name}", library, "w2", f"--rule={name}")
  for name in filter(None, options.with_peers.split(",")):
    for variant, (workloads, arguments) in peers.PEERS[name].options.items():
      for which in sorted(set(workloads) & set(only)):
        command = (f"peers/{peers.PEERS[name].script}", which, *arguments)
        found.append(
          Job(f"peers.{which}.{variant}", (*command, *more), {}, name)
        )
  if "packing" in only:
    add("packing", library, "packing")
  if "memory" in only:
    for clients in COHORTS:
      add(f"memory.{clients}", library, "memory", f"--clients={clients}")
  return found


def measure(job: Job) -> dict:
  """Runs a measurement in a process of its own.

  Raises:
    ValueError: if it fails, with the last line of what it said.
  """
  binary = peers.python(job.peer) if job.peer else sys.executable
  inherited = {
    k: v
    for k, v in os.environ.items()
    if not k.startswith(("XLA_", "JAX_", "OMP_", "MKL_")) and k != "NPROC"
  }
  paths = [HERE] if job.peer else [HERE, HERE.parent]
  environment = {
    **inherited,
    **job.environment,
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join(map(str, paths)),
    "PYTHONDONTWRITEBYTECODE": "1",
  }
  load = os.getloadavg()[0]
  got = subprocess.run(
    [binary, HERE / job.command[0], *job.command[1:]],
    env=environment,
    capture_output=True,
    text=True,
  )
  if got.returncode:
    said = got.stderr.strip().splitlines() or ["no message"]
    raise ValueError(f"{' '.join(job.command)} failed: {said[-1]}")
  return {**json.loads(got.stdout.splitlines()[-1]), "load": round(load, 2)}


def machine() -> dict:
  """What it was measured on."""
  text = pathlib.Path("/proc/cpuinfo").read_text()
  facts = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
  facts = {k.strip(): v.strip() for k, v in facts.items()}
  wanted = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
  flags = facts.get("flags", "").split()
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return {
    "cpu": facts.get("model name", platform.machine()),
    "cores": len(os.sched_getaffinity(0)),
    "isa": [flag for flag in wanted if flag in flags],
    "memory_gib": round(memory / 2**30, 1),
    "python": platform.python_version(),
    **{k: importlib.metadata.version(k) for k in ("jax", "jaxlib", "flax")},
  }


def summary(found: dict, quick: bool = False) -> dict:
  """What the measurements say, as flat as it gets.

  Args:
    found: {name of a job: its result}; what is missing is left out.
    quick: whether they were of the tiny sizes.
  """
  rates = {
    name: result["clients_per_second"]
    for name, result in found.items()
    if "clients_per_second" in result
  }
  parts = {
    "w1": _rates("w1", ("general", "lowrank"), rates),
    "w2": _rates("w2", ("bf16", "float32"), rates),
    "ceilings": _ceilings(found),
    "rules": _of_plain(rates),
    "packing": {
      k: v for k, v in found.get("packing", {}).items() if k != "load"
    },
    "memory": _memory(found),
  }
  if "w1.auto" in rates:
    parts["w1"]["clients_per_second"] = rates["w1.auto"]
    parts["w1"]["path"] = found["w1.auto"]["path"]
  if "w2.bf16" in rates:
    parts["w2"]["clients_per_second"] = rates["w2.bf16"]
  ceiling = parts["ceilings"].get(f"bf16_{GEMM}")
  if ceiling and "w2.bf16" in rates:
    gflops = workload.w2(quick).gflop * rates["w2.bf16"]
    parts["w2"]["fraction_of_gemm_ceiling"] = gflops / ceiling
  parts = {name: part for name, part in parts.items() if part}
  return {**parts, "targets": _targets(parts)}


def _rates(which, variants, rates):
  """The library's rates of a workload, and what they are compared with."""
  part = {v: rates[f"{which}.{v}"] for v in variants if f"{which}.{v}" in rates}
  if not part:
    return {}
  bare = {
    v: rates[f"{which}.bare_{v}"] for v in part if f"{which}.bare_{v}" in rates
  }
  prefix = f"peers.{which}."
  others = {
    name.removeprefix(prefix): rate
    for name, rate in rates.items()
    if name.startswith(prefix)
  }
  compared = {
    "bare": bare,
    "of_bare": {v: part[v] / bare[v] for v in bare},
  }
  if others:
    fastest = max(others, key=others.get)
    compared |= {
      "peers": others,
      "fastest_peer": fastest,
      "ratio": {v: part[v] / others[fastest] for v in part},
    }
  return {**part, **compared}


def _of_plain(rates):
  """W2 under each rule, as a part of what it is without any."""
  plain = rates.get("rules.none")
  found = {k: rates[f"rules.{k}"] for k in RULES if f"rules.{k}" in rates}
  if not plain or not found:
    return {}
  parts = {k: rate / plain for k, rate in found.items()}
  return {**parts, "slowest": min(parts.values())}


def _ceilings(found):
  """The better of one device with all threads and one stream a core."""
  best = {}
  for way in ("threads", "streams"):
    for name, rates in found.get(f"ceilings.{way}", {}).items():
      if name == "copy":
        best["copy_gb_per_second"] = rates["gb_per_second"]
      elif name != "load":
        best[name] = max(best.get(name, 0), rates["gflops"])
  return best


def _memory(found):
  """Peaks, and how flat they are beyond the data themselves."""
  here = {n: found[f"memory.{n}"] for n in COHORTS if f"memory.{n}" in found}
  if not here:
    return {}
  beyond = {n: r["peak_mib"] - r["data_mib"] for n, r in here.items()}
  return {
    "peak_mib": {str(n): r["peak_mib"] for n, r in here.items()},
    "data_mib": {str(n): r["data_mib"] for n, r in here.items()},
    "beyond_data_mib": {str(n): round(v, 1) for n, v in beyond.items()},
    "flatness": min(beyond.values()) / max(beyond.values()),
  }


def _targets(parts):
  """{key: value, target, met} of those targets that were measured."""
  found = {}
  for key, least in TARGETS:
    value = parts
    for name in key.split("."):
      value = value.get(name, {})
    if value != {}:
      found[key] = {"value": value, "at_least": least, "met": value >= least}
  return found


def table(result: dict) -> str:
  """The result for people."""
  facts = result["machine"]
  lines = [
    f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, "
    f"{' '.join(facts['isa'])}; jax {facts['jax']}, flax {facts['flax']}",
    "",
    f"{'clients per second':26}{'median':>10}{'min':>10}{'max':>10}{'n':>6}"
    f"{'first s':>9}{'cpu s':>9}{'MiB':>7}{'load':>6}",
  ]
  for name, got in result["measurements"].items():
    if "clients_per_second" not in got:
      continue
    values = [got[k] for k in ("clients_per_second", "min", "max")]
    lines.append(
      f"{name:26}{''.join(f'{v:10.2f}' for v in values)}{got['n']:6}"
      f"{got['first_seconds']:9.1f}{got['cpu_seconds']:9.3f}"
      f"{got['peak_mib']:7.0f}{got['load']:6.2f}"
    )
  for part in ("rules", "ceilings", "packing", "memory"):
    for key, value in result.get(part, {}).items():
      values = value if isinstance(value, dict) else {"": value}
      text = "  ".join(f"{k} {v:.4g}".strip() for k, v in values.items())
      lines.append(f"{part + '.' + key:38}{text}")
  if "fraction_of_gemm_ceiling" in result.get("w2", {}):
    fraction = result["w2"]["fraction_of_gemm_ceiling"]
    lines.append(f"{'w2.fraction_of_gemm_ceiling':38}{fraction:.3f}")
  if result["targets"]:
    lines += ["", f"{'target':26}{'value':>10}{'at least':>10}"]
  for key, target in result["targets"].items():
    lines.append(
      f"{key:26}{target['value']:10.3f}{target['at_least']:10.3f}"
      f"  {'met' if target['met'] else 'MISSED'}"
    )
  lines += [f"failed: {n}: {why}" for n, why in result["failed"].items()]
  return "\n".join(lines)


if __name__ == "__main__":
  sys.exit(main())
