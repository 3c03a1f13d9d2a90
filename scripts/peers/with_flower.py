"""Flower's SecAgg+: the arithmetic with which one client masks its update.

What `flwr/client/mod/secure_aggregation/secaggplus_mod.py` does between the
quantized update and the upload: a private mask, and one for each neighbour.
Keys are given; agreeing on them, sharing secrets and encryption are left out.
"""

import argparse
import json
import time

import numpy as np
from flwr.common.secure_aggregation import ndarrays_arithmetic as arithmetic
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

MODULUS = 2**32


def main() -> None:
  """Prints the milliseconds of one client as one line."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--seconds", type=float, default=3.0)
  parser.add_argument("--quick", action="store_true")
  options = parser.parse_args()
  values, neighbours = (1000, 8) if options.quick else (100_000, 40)
  update = [np.zeros(values, np.int64)]
  times: list[float] = []
  while len(times) < 5 or sum(times) < options.seconds:
    begun = time.perf_counter()
    mask(update, neighbours)
    times.append(time.perf_counter() - begun)
  milliseconds = 1e3 * np.array(times)
  spread = {
    "milliseconds": float(np.median(milliseconds)),
    "min": float(milliseconds.min()),
    "max": float(milliseconds.max()),
    "n": len(times),
  }
  print(json.dumps(spread))


def mask(update, neighbours):
  """Adds a private mask, and adds or subtracts one for each neighbour."""
  shapes = arithmetic.get_parameters_shape(update)
  private = pseudo_rand_gen(bytes(32), MODULUS, shapes)
  update = arithmetic.parameters_addition(update, private)
  for i in range(neighbours):
    seed = i.to_bytes(32, "little")
    pairwise = pseudo_rand_gen(seed, MODULUS, shapes)
    if i % 2:
      update = arithmetic.parameters_addition(update, pairwise)
    else:
      update = arithmetic.parameters_subtraction(update, pairwise)
  return arithmetic.parameters_mod(update, MODULUS)


if __name__ == "__main__":
  main()
