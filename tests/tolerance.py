"""The one tolerance of the suite."""

import math

import jax.numpy as jnp


def tol(dtype, n: int = 1) -> float:
  """Returns 4 eps sqrt(n): the error of a reduction of length `n`."""
  return 4 * float(jnp.finfo(dtype).eps) * math.sqrt(n)
