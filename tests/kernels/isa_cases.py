"""Compares native kernels with their references; a process of its own.

The instruction set of a process is chosen once: FEDJAX_PEFT_ISA caps it.
"""

import sys

import jax
import numpy as np

import kernel_cases
from fedjax_peft.kernels import native


def main() -> int:
  """Prints the instruction set, and the name of every shape that differs."""
  print(native.isa())
  wrong = 0
  for case in kernel_cases.cases():
    arrays = case.draw()
    if case.kernel.native is None or case.spec.bench:
      continue
    if sum(x.size for x in arrays) > 30_000:
      continue
    found = jax.tree.leaves(case.run(*arrays, implementation="native"))
    wanted = jax.tree.leaves(jax.jit(case.reference)(*arrays))
    for x, y in zip(found, wanted, strict=True):
      same = np.array_equal(x, y, equal_nan=True)
      if np.issubdtype(x.dtype, np.floating) and np.all(np.isfinite(y)):
        # A sum may be rounded at each step or not.
        slack = 1e-5 * np.max(np.abs(y), initial=0)
        same = np.allclose(x, y, rtol=0, atol=slack)
      if not same:
        wrong += 1
        print(f"differs: {case.name}")
  return wrong


if __name__ == "__main__":
  sys.exit(main())
