"""FLOPs: what a function computes, counted from its jaxpr.

A compiler's own count takes the body of a loop once; here a scan counts as
often as it runs. Matrix products and convolutions are counted, two operations
for a multiplication and an addition; the rest of a network is a few percent.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count(fun: Callable, *args: Any) -> int:
  """Floating point operations of the products in `fun(*args)`.

  Args:
    fun: any function that JAX can trace.
    *args: its arguments, arrays or specs.

  Returns:
    The number. Of the branches of a conditional the dearest counts.

  Raises:
    ValueError: if a product is inside a loop whose length is only known when
      it runs.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.ones((4, 3))
    >>> layers = jnp.ones((10, 3, 3))
    >>> count(lambda x: jax.lax.scan(lambda x, w: (x @ w, None), x, layers), x)
    720
  """
  closed = jax.make_jaxpr(fun)(*args)
  return _of(closed.jaxpr)


def _of(jaxpr) -> int:
  """Operations of all equations."""
  return sum(_equation(eqn) for eqn in jaxpr.eqns)


def _equation(eqn) -> int:
  """Operations of one equation."""
  name, params = eqn.primitive.name, eqn.params
  if name == "dot_general":
    return _product(eqn)
  if name == "conv_general_dilated":
    return _convolution(eqn)
  inner = [_of(j) for j in _inside(params)]
  if name == "scan":
    return params["length"] * sum(inner)
  if name == "cond":
    return max(inner, default=0)
  if name == "while" and any(inner):
    raise ValueError(
      "a loop must have a length that is known when it is traced: got products "
      "inside a while loop; use lax.scan, or fori_loop with fixed bounds"
    )
  return sum(inner)


def _inside(params):
  """The jaxprs of an equation, each once."""
  for key, value in params.items():
    if key in ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd"):
      continue
    for one in value if isinstance(value, tuple | list) else (value,):
      if isinstance(one, core.ClosedJaxpr):
        yield one.jaxpr
      elif isinstance(one, core.Jaxpr):
        yield one


def _product(eqn) -> int:
  """2 B M N K of a dot_general."""
  left = eqn.invars[0].aval.shape
  (contracted, _), _ = eqn.params["dimension_numbers"]
  out = math.prod(eqn.outvars[0].aval.shape)
  return 2 * out * math.prod(left[i] for i in contracted)


def _convolution(eqn) -> int:
  """Two for every output value and entry of its kernel."""
  kernel = eqn.invars[1].aval.shape
  features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
  out = math.prod(eqn.outvars[0].aval.shape)
  return 2 * out * (math.prod(kernel) // features)
