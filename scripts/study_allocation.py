r"""Studies who gets what in split training: cut, bits, power, band and server.

  python scripts/study_allocation.py --json
  python scripts/study_allocation.py --only scale --clients 10 100 1000

Three seeds of a drawn fleet in a drawn cell train a ViT-B/32 on 450 images of
224 pixels each (5 epochs, batches of 128) and a CNN whose activations shrink.
FLOPs, parameters and values that leave each stage are read from the models. For
each: the joint optimum beside equal shares, plain ones and the worst choices,
the trade between seconds and joules, what moves the cuts, and how long it takes
to solve for more clients, with a bound on what is left to gain.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedjax_peft.models import cnn, vision
from fedjax_peft.network import channel, positions, profile, radio
from fedjax_peft.split import allocate, bound, outcome
from fedjax_peft.split import problem as problem_lib
from fedjax_peft.split import table as table_lib

BITS = (32, 16, 8, 4, 2, 1)
IMAGES, EPOCHS, BATCH = 450, 5, 128
MIX = {"phone": 0.5, "phone_low": 0.2, "gateway": 0.1, "old_pc": 0.2}
CELL = radio.radio(bandwidth=20e6, fading="rayleigh")
SERVER = 1e14  # FLOP/s, shared
PARTS = ("baselines", "trade", "cuts", "scale")


@functools.cache
def stages(model: str) -> tuple[table_lib.Row, ...]:
  """The stages of a model, without making its weights."""
  if model == "vit":
    options = {"patch": 32, "width": 768, "heads": 12, "ffn": 3072}
    config = vision.ViTConfig(**options, layer_scale=0.0, classes=10)
    build, size = (lambda: vision.ViT(config, nnx.Rngs(0))), 224
  else:
    config = cnn.CNNConfig(
      image_size=60, channels=3, filters=(32, 64), hidden=(256,), classes=10
    )
    build, size = (lambda: cnn.CNN(config, nnx.Rngs(0))), 60
  image = jax.ShapeDtypeStruct((BATCH, size, size, 3), jnp.uint8)
  return table_lib.table(nnx.eval_shape(build), {"image": image})


def posed(
  model: str, clients: int, seed: int, *, faster: float = 1.0, **options
) -> problem_lib.Problem:
  """A round of split training of a model by a drawn fleet in a drawn cell.

  Args:
    model: "vit" or "cnn".
    clients: C.
    seed: of machines, places and fading.
    faster: by which all gains are multiplied.
    **options: of the problem.
  """
  rows, ids = stages(model), np.arange(clients)
  machines = profile.fleet(MIX, clients, seed, spread=0.3)
  metres = np.hypot(*positions.disc(ids, seed, radius=CELL.radius).T)
  gains = faster * radio.gains(CELL, metres, ids, 0, seed)[1]
  share = CELL.bandwidth / clients
  down = channel.rate(share, channel.watts(CELL.station_power) / clients, gains)
  steps = EPOCHS * IMAGES  # examples that are trained on in a round
  flops = steps * np.cumsum([row.train_flops for row in rows])
  held = np.cumsum([row.parameters for row in rows])
  values = steps * np.array([row.values for row in rows])
  values[-1] = 0  # the whole model is on the device: nothing crosses
  bits = values[:, None] * np.array(BITS) + 32.0 * held[:, None]
  seconds = flops / machines.flops[:, None]
  stored = np.cumsum([row.values for row in rows]) * BATCH
  problem = problem_lib.Problem(
    device_seconds=seconds,
    compute_joules=seconds * (machines.compute - machines.idle)[:, None],
    up_bits=np.broadcast_to(bits, (clients, *bits.shape)),
    down_seconds=bits / down[:, None, None],
    server_flops=flops[-1] - flops,
    gains=gains,
    power_max=channel.watts(CELL.power),
    bandwidth=CELL.bandwidth,
    server_speed=SERVER,
    # Weights, gradients and momentum, and what the backward pass reads.
    memory=4.0 * (3 * held + stored),
    memory_max=machines.memory,
    # n Delta^2 / 4 of a range of one, for every value.
    error=0.25 / (2.0 ** np.array(BITS) - 1) ** 2,
    cuts=[row.name for row in rows],
    bits=BITS,
  )
  even = outcome.equal(problem)
  scales = {
    "seconds_scale": float(even.finish),
    "joules_scale": float(even.joules.sum()),
    "error_weight": 10.0 / clients,
  }
  return dataclasses.replace(problem, **{**scales, **options})


def summary(allocation: outcome.Allocation) -> dict[str, float]:
  """Figures of an allocation."""
  return {
    "seconds": float(allocation.finish),
    "joules": float(allocation.joules.mean()),
    "objective": float(allocation.objective),
    "cut": float(allocation.cut.mean()) + 1,
    "bits": float(np.array(BITS)[allocation.bits].mean()),
  }


def plain(problem: problem_lib.Problem) -> outcome.Allocation:
  """The first cut and 32 bits for all, with equal shares and full power."""
  one = np.zeros(len(problem), int)
  even = outcome.equal(problem)
  return outcome.judge(
    problem, one, one, None, even.width, problem.power_max, even.speed
  )


def spread(values: list[float]) -> str:
  """Mean and deviation, as text."""
  text = f"{statistics.mean(values):.4g}"
  if len(values) > 1:
    text += f" +-{statistics.stdev(values):.2g}"
  return text


def baselines(models, clients: int, seeds: int) -> dict:
  """The optimum beside equal shares, plain ones and the worst choices."""
  ways = {
    "optimized": lambda p: allocate.optimize(p).allocation,
    "equal": outcome.equal,
    "plain": plain,
    "worst": outcome.worst,
  }
  found: dict = {}
  for model in models:
    print(f"\n{model}: {clients} clients, mean and deviation of {seeds} seeds")
    print(f"{'':10}{'seconds':>18}{'joules each':>20}{'objective':>18}")
    for name, way in ways.items():
      each = [summary(way(posed(model, clients, s))) for s in range(seeds)]
      columns = {key: [x[key] for x in each] for key in each[0]}
      found.setdefault(model, {})[name] = columns
      shown = ("seconds", "joules", "objective")
      texts = [spread(columns[c]) for c in shown]
      print("{:10}{:>18}{:>20}{:>18}".format(name, *texts))
  return found


def trade(models, clients: int, seeds: int) -> dict:
  """Seconds against joules, for weights between them."""
  weights = (0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 1.0)
  found = {}
  for model in models:
    problem = posed(model, clients, 0, error_weight=0.0)
    points = allocate.pareto(problem, weights)
    found[model] = [
      {"weight": p.weight, **summary(p.allocation)} for p in points
    ]
    print(f"\n{model}: {clients} clients, seed 0")
    print(f"{'weight':>8}{'seconds':>12}{'joules each':>14}{'cut':>6}")
    for p in found[model]:
      print(
        f"{p['weight']:8}{p['seconds']:12.4g}{p['joules']:14.4g}{p['cut']:6.1f}"
      )
  return found


def cuts(models, clients: int, seeds: int) -> dict:
  """What moves the cut: links, a busy server, memory, privacy."""
  scenes = {
    f"gains x {faster:g}": {"faster": faster}
    for faster in (1e-4, 1e-2, 1.0, 1e2, 1e4)
  }
  scenes["server / 1000"] = {"server_speed": SERVER / 1000}
  scenes["memory, server"] = {"server_speed": SERVER / 1000, "memory_max": 1e8}
  scenes["depth of 2"] = {"least_cut": 1}
  found: dict = {}
  for model in models:
    rows = stages(model)
    print(f"\n{model}: stages on the device, of {len(rows)}; {seeds} seeds")
    print(f"{'':16}{'mean cut':>9}{'mean bits':>10}  clients")
    for name, options in scenes.items():
      problems = [
        posed(model, clients, s, weight=0.95, **options) for s in range(seeds)
      ]
      several = [allocate.optimize(p).allocation for p in problems]
      each = [summary(a) for a in several]
      cut = np.concatenate([a.cut for a in several])
      count = {rows[k].name: int(np.sum(cut == k)) for k in np.unique(cut)}
      found.setdefault(model, {})[name] = {
        "cut": statistics.mean(x["cut"] for x in each),
        "bits": statistics.mean(x["bits"] for x in each),
        "clients": count,
      }
      means = found[model][name]
      text = ", ".join(f"{n} to {k}" for k, n in count.items())
      print(f"{name:16}{means['cut']:9.2f}{means['bits']:10.1f}  {text}")
  return found


def scale(models, sizes, seeds: int) -> dict:
  """Seconds to solve, and what is left to gain at most."""
  found: dict = {}
  for model in models:
    print(f"\n{model}: solving for more clients; {seeds} seeds")
    print(f"{'clients':>8}{'solve s':>18}{'adapt s':>18}{'to gain':>10}")
    for clients in sizes:
      seconds, again, gaps = [], [], []
      for seed in range(seeds):
        problem = posed(model, clients, seed)
        began = time.perf_counter()
        best = allocate.optimize(problem).allocation
        seconds.append(time.perf_counter() - began)
        faded = problem.gains * channel.rayleigh(seed, 1, np.arange(clients))
        began = time.perf_counter()
        allocate.adapt(problem, faded, best)
        again.append(time.perf_counter() - began)
        least = bound.lower(problem, best, tolerance=2e-3)
        gaps.append(float(best.objective) / least - 1)
      found.setdefault(model, {})[clients] = {
        "solve_seconds": seconds,
        "adapt_seconds": again,
        "gap": gaps,
      }
      print(
        f"{clients:8}{spread(seconds):>18}{spread(again):>18}{max(gaps):10.2%}"
      )
  return found


def main():
  """Runs the parts that are asked for."""
  parser = argparse.ArgumentParser(
    description=__doc__.split("\n")[0],
    epilog=__doc__.split("\n", 2)[2],
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--only", nargs="+", choices=PARTS, default=PARTS, help="some parts")
  add("--models", nargs="+", choices=("vit", "cnn"), default=("vit", "cnn"))
  add("--seeds", type=int, default=3, help="fleets and cells (%(default)s)")
  add(
    "--clients",
    type=int,
    nargs="+",
    default=(10, 50, 100, 1000),
    help="sizes; the first is that of all parts but scale (%(default)s)",
  )
  add("--json", action="store_true", help="JSON on the last line")
  options = parser.parse_args()
  few = options.clients[0]
  parts = {
    "baselines": lambda: baselines(options.models, few, options.seeds),
    "trade": lambda: trade(options.models, few, options.seeds),
    "cuts": lambda: cuts(options.models, few, options.seeds),
    "scale": lambda: scale(options.models, options.clients, options.seeds),
  }
  found = {name: run() for name, run in parts.items() if name in options.only}
  if options.json:
    print(json.dumps(found))


if __name__ == "__main__":
  try:
    main()
  except ValueError as error:
    sys.exit(f"study_allocation: error: {error}")
