"""Benchmark of the rules that aggregate adapters.

  python scripts/bench_rules.py --json

One adapter of rank 16 on a layer [4096, 4096], reported by 64 clients. Every
rule's server step is timed beside two things in the same run: the average of
the same factors (what FedIT does), and a bare QR and SVD of the same stacks.
A rule that moves the layer itself also writes [4096, 4096] numbers, which every
client of a real federation would do for itself: that is timed apart (`merge`).
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_peft as fp
from fedjax_peft.links import Counted
from fedjax_peft.rules import heard, product

FULL = {"clients": 64, "rank": 16, "size": 4096, "repeats": 7}
QUICK = {"clients": 8, "rank": 4, "size": 128, "repeats": 2}
SVD_RULES = ("flexlora", "fedex_truncated")
STACKING_RULES = ("flora", "fedex")


def reports(clients, rank, size):
  """Factors that clients moved to, and what they were sent."""
  rng = np.random.default_rng(0)
  pair = heard.Pair("layer", 2.0)
  params = {
    pair.a: rng.normal(size=(size, rank)) / size**0.5,
    pair.b: 0.1 * rng.normal(size=(rank, size)),
    pair.residual: np.zeros((size, size)),
  }
  params = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
  message = {
    k: jnp.asarray(
      0.1 * rng.normal(size=(clients, *params[k].shape)), jnp.float32
    )
    for k in (pair.a, pair.b)
  }
  weights = jnp.asarray(rng.integers(1, 50, clients), jnp.int32)
  return pair, params, Counted(message, weights)


def collected(pair, message, one_by_one):
  """What a server has heard when the last report is in."""
  reduce = heard.hear((pair,), one_by_one=one_by_one)
  clients = message.weight.size
  spec = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), message
  )
  acc = reduce.init(spec, clients)
  acc = reduce.update(acc, message, jnp.ones((clients,), bool))
  return jax.block_until_ready(reduce.finalize(acc))


def steps(pair, params, message, rank):
  """{name: (function, its argument)} of everything that is timed."""
  stacked = collected(pair, message, True)

  def fedit(message):
    share = message.weight / jnp.sum(message.weight)
    share = share.astype(jnp.float32)
    return [jnp.tensordot(share, x, 1) for x in message.message.values()]

  def bare(stacked):
    p = heard.mean_product(stacked, pair, params)
    q1, r1 = jnp.linalg.qr(jnp.swapaxes(p.left, -1, -2))
    q2, r2 = jnp.linalg.qr(jnp.swapaxes(p.weighted(p.right), -1, -2))
    u, s, v = jnp.linalg.svd(r1 @ r2.T, full_matrices=False)
    return q1 @ u[:, :rank], s[:rank], v[:rank] @ q2.T

  def stack(stacked):
    return heard.mean_product(stacked, pair, params)

  def left_out(stacked):
    return heard.covariance(stacked, pair)

  def best(p):
    return product.svd(p, rank)

  def rule(name):
    made = fp.rules.RULES[name]()
    server = made.server((pair,))
    state = server.init(params)
    small = {k: v for k, v in params.items() if k != pair.residual}
    given = params if made.residual else small
    return lambda h: server.update(h, state, given)[0]

  found = {
    "fedit": (fedit, message),
    "bare_qr_svd": (bare, stacked),
    "flora": (stack, stacked),
    "fedex": (left_out, stacked),
    "flexlora": (lambda h: best(stack(h)), stacked),
    "fedex_truncated": (lambda h: best(left_out(h)), stacked),
  }
  for name in ("hetlora", "fair", "fedrot"):
    found[name] = (rule(name), stacked)
  for name in ("flora", "fedex"):
    found[f"{name}_with_merge"] = (rule(name), stacked)
  return found


def measure(fun, argument, repeats):
  """(median, min, max seconds, bytes of results and temporaries)."""
  step = jax.jit(fun)
  compiled = step.lower(argument).compile()
  memory = compiled.memory_analysis()
  jax.block_until_ready(compiled(argument))
  times = []
  for _ in range(repeats):
    begun = time.perf_counter()
    jax.block_until_ready(compiled(argument))
    times.append(time.perf_counter() - begun)
  held = memory.temp_size_in_bytes + memory.output_size_in_bytes
  return statistics.median(times), min(times), max(times), held


def main():
  """Times every rule and prints a table."""
  parser = argparse.ArgumentParser(
    description=__doc__.split("\n")[0],
    epilog="Times are medians; run it on a machine that does nothing else.",
  )
  parser.add_argument(
    "--json", action="store_true", help="JSON on the last line"
  )
  parser.add_argument("--quick", action="store_true", help="small shapes")
  options = parser.parse_args()
  shape = QUICK if options.quick else FULL
  repeats = shape["repeats"]
  dims = {k: v for k, v in shape.items() if k != "repeats"}
  pair, params, message = reports(**dims)
  stack_bytes = 4 * dims["clients"] * dims["rank"] * 2 * dims["size"]
  result = {}
  print(f"{'':18}{'median ms':>10}{'min':>8}{'max':>8}{'memory / stack':>16}")
  for name, (fun, argument) in steps(
    pair, params, message, dims["rank"]
  ).items():
    median, low, high, held = measure(fun, argument, repeats)
    result[name] = {
      "seconds": median,
      "min": low,
      "max": high,
      "memory_of_stack": held / stack_bytes,
    }
    print(
      f"{name:18}{1e3 * median:10.1f}{1e3 * low:8.1f}{1e3 * high:8.1f}"
      f"{held / stack_bytes:16.2f}"
    )
  fedit, bare = result["fedit"]["seconds"], result["bare_qr_svd"]["seconds"]
  targets = {
    **{
      f"{n}.seconds_at_most": (result[n]["seconds"], 3 * fedit + 0.05)
      for n in STACKING_RULES
    },
    **{
      f"{n}.of_bare_qr_svd": (result[n]["seconds"] / bare, 1.3)
      for n in SVD_RULES
    },
    **{
      f"{n}.memory_of_stack": (result[n]["memory_of_stack"], 1.5)
      for n in (*STACKING_RULES, *SVD_RULES)
    },
  }
  print()
  for name, (value, limit) in targets.items():
    word = "met" if value <= limit else "MISSED"
    print(f"{name:36}{value:8.3f}  at most {limit:.3f}  {word}")
  if options.json:
    print(json.dumps({"rules": result, "shape": shape}))


if __name__ == "__main__":
  main()
