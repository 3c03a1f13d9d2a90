"""What privacy costs: secure sums beside their masks, and noise beside none.

  python scripts/bench_privacy.py --json      all of it
  python scripts/bench_privacy.py --quick     small, to try the script
  python scripts/bench_privacy.py --only simulated,protocol

simulated: a secure sum of 1,000 clients and 100,000 values of which 5 % drop,
as `simulation.hold` makes it, in turns with the kernel that makes its masks
and nothing else. protocol: a conversation of 100 clients with real keys, same
values. noise: rounds of W2 (LoRA on a MiniLM encoder), with client-level
differential privacy and without, in turns. Each is a process of its own; the
load before it is recorded.
"""

import argparse
import functools
import json
import statistics
import sys
import time

import bench_engine as engine

STREAMS = {
  "NPROC": "1",
  "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
}
# Seconds of what is measured to those of what it is put beside, at most.
TARGETS = (
  ("simulated", "to_masks", 2.0),
  ("protocol", "seconds", 10.0),
  ("noise", "to_plain", 1.1),
)
DROPOUT = 0.05


def main() -> int:
  """Runs the measurements and prints them."""
  options = _options()
  if options.part:
    print(json.dumps(PARTS[options.part](options)))
    return 0
  found, failed = {}, {}
  more = [f"--seconds={options.seconds}"] + ["--quick"] * options.quick
  for name in options.only.split(","):
    command = ("bench_privacy.py", f"--part={name}", *more)
    environment = STREAMS if name == "noise" else {}
    try:
      found[name] = engine.measure(engine.Job(name, command, environment))
      print(f"{name}: {_said(found[name])}", flush=True)
    except ValueError as error:
      failed[name] = str(error)
      print(error, file=sys.stderr)
  targets = {
    f"{part}.{key}": {
      "value": found[part][key],
      "at_most": most,
      "met": found[part][key] <= most,
    }
    for part, key, most in TARGETS
    if part in found
  }
  for name, target in targets.items():
    print(f"{name:24}{target['value']:10.3f}{target['at_most']:8.1f} at most")
  if options.json:
    result = {"machine": engine.machine(), **found}
    print(json.dumps({**result, "targets": targets, "failed": failed}))
  return int(bool(failed))


def _options():
  """What the user wants."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--json", action="store_true", help="JSON on the last line")
  add("--quick", action="store_true", help="small, to try the script")
  add("--only", default=",".join(PARTS), help="parts, separated by commas")
  add("--seconds", type=float, default=20.0, help="of each (%(default)s)")
  add("--part", choices=PARTS, help=argparse.SUPPRESS)
  options = parser.parse_args()
  unknown = sorted(set(options.only.split(",")) - set(PARTS))
  if unknown:
    parser.error(f"--only takes {', '.join(PARTS)}: got {unknown[0]!r}")
  return options


def _said(found):
  """The numbers of a measurement on one line."""
  return "  ".join(f"{k} {v:g}" for k, v in found.items())


def simulated(options) -> dict:
  """A secure sum without messages, in turns with its masks alone."""
  import bench_kernel
  import bench_workload as workload
  import numpy as np

  from fedjax_peft.kernels.mask import api as mask
  from fedjax_peft.privacy import client, simulation

  n, size = (60, 1000) if options.quick else (1000, 100_000)
  known, late = _terms(n, size, [i.to_bytes(32, "little") for i in range(n)])
  values = np.random.default_rng(0).integers(0, 2**32, (n, size), np.uint32)
  around = simulation.listen(known, late).around
  one, other = np.repeat(np.arange(n), known.neighbours), around.ravel()
  one, other = one[one < other], other[one < other]
  # Everyone's own stream, and one for each pair.
  plus = np.concatenate([np.arange(n), one]).astype(np.int32)
  minus = np.concatenate([np.full(n, -1), other]).astype(np.int32)
  words = np.random.default_rng(1).integers(0, 2**32, (plus.size, 8), np.uint32)
  nonce = np.zeros(3, np.uint32)
  times = bench_kernel.take_turns(
    {
      "masks": bench_kernel.in_place(
        mask.mask_add, values, words, plus, minus, nonce
      ),
      "sum": lambda: simulation.hold(known, b"key", values, late),
    },
    0.0 if options.quick else options.seconds,
  )
  seconds = {name: float(np.median(took)) for name, took in times.items()}
  return {
    "clients": n,
    "values": size,
    "lost": int((late < len(client.STEPS)).sum()),
    "neighbours": known.neighbours,
    "threshold": known.threshold,
    "streams": int(plus.size),
    "seconds": seconds["sum"],
    "spread": _spread(times["sum"]),
    "mask_seconds": seconds["masks"],
    "mask_spread": _spread(times["masks"]),
    "to_masks": float(np.median(times["sum"] / times["masks"])),
    "peak_mib": round(workload.peak_mib(), 1),
  }


def protocol(options) -> dict:
  """A conversation with real keys."""
  import bench_workload as workload
  import numpy as np

  from fedjax_peft.privacy import client, conversation, keys

  n, size = (12, 1000) if options.quick else (100, 100_000)
  scheme = keys.real()
  values = np.random.default_rng(0).integers(0, 2**32, (n, size), np.uint32)
  took = []
  for turn in range(2 if options.quick else 6):
    secrets = [scheme.draw("identity", 32) for _ in range(n)]
    known, late = _terms(n, size, list(map(scheme.identity, secrets)))

    def carry(step, i, data, late=late):
      is_up = step in client.STEPS
      is_lost = is_up and client.STEPS.index(step) >= late[i]
      return () if is_lost else (data,)

    begun = time.perf_counter()
    outcome = conversation.hold(known, scheme, secrets, values, carry)
    if turn:  # the first compiles
      took.append(time.perf_counter() - begun)
    here = sorted(outcome.survivors)
    expected = values[here].sum(0, dtype=np.uint32)
    np.testing.assert_array_equal(outcome.total, expected)
  return {
    "clients": n,
    "values": size,
    "lost": n - len(outcome.survivors),
    "neighbours": known.neighbours,
    "threshold": known.threshold,
    "seconds": statistics.median(took),
    "spread": _spread(took),
    "up_bytes": sum(outcome.up_bytes.values()),
    "down_bytes": sum(outcome.down_bytes.values()),
    "peak_mib": round(workload.peak_mib(), 1),
  }


def noise(options) -> dict:
  """Rounds of W2 with client-level privacy and without, in turns."""
  import bench_library
  import bench_workload as workload
  import jax

  import fedjax_peft as fp
  from fedjax_peft import algorithm, ingredients, link, links, plan
  from fedjax_peft.privacy import charging, events, mechanism

  plain, model, data = bench_library.w2_parts(options.quick)
  size = len(data)
  made = mechanism.mechanism(
    link.Spec(ingredients.message(plain.work), senders=size),
    clip=links.clip(0.5),
    total=float(size),
    multiplier=1.0,
    event=functools.partial(events.poisson, rate=1.0),
  )
  low = plain.tiers[0]._replace(link=made.link)
  private = algorithm.extended(plain, tiers=[low])
  drawn = plan.sampled(fp.sample.uniform(size), data, 0)
  assert made.event is not None
  charged = charging.charged(drawn, made.event, 1e-6)
  few = 3 if options.quick else 12
  runs = {
    name: fp.run(one, model, data, cohort=cohort, rounds=few + 2)
    for name, one, cohort in (
      ("plain", plain, drawn),
      ("private", private, charged),
    )
  }
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for turn in range(few + 2):  # the first two compile and settle
    for name, ran in runs.items():
      begun = time.perf_counter()
      jax.block_until_ready(next(ran)[0].nodes)
      if turn >= 2:
        seconds[name].append(time.perf_counter() - begun)
  median = {name: statistics.median(took) for name, took in seconds.items()}
  return {
    "clients": size,
    "plain_seconds": median["plain"],
    "plain_spread": _spread(seconds["plain"]),
    "seconds": median["private"],
    "spread": _spread(seconds["private"]),
    "to_plain": median["private"] / median["plain"],
    "peak_mib": round(workload.peak_mib(), 1),
  }


def _terms(n, size, identities):
  """The terms of a round, and when each client is lost in it, if it holds."""
  import numpy as np

  from fedjax_peft.privacy import dropout, terms

  wanted = dropout.risk(DROPOUT)
  if n < 100:  # so few are safe from less only
    wanted = dropout.risk(DROPOUT, correctness=1e-3)
  near, enough = dropout.ring(wanted, n)
  ids = np.arange(n)
  draw = next(
    (0, number, 0)
    for number in range(100)
    if dropout.attempt(wanted, ids, (0, number, 0)).why is None
  )
  known = terms.agree(
    dropout.session(dropout.number(draw)),
    tuple(identities),
    neighbours=near,
    threshold=enough,
    size=size,
  )
  return known, dropout.drawn(wanted, ids, draw)


def _spread(seconds):
  """Seconds between the quartiles."""
  import numpy as np

  return float(np.subtract(*np.percentile(seconds, [75, 25])))


PARTS = {"simulated": simulated, "protocol": protocol, "noise": noise}

if __name__ == "__main__":
  raise SystemExit(main())
