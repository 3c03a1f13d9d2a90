"""Weighted sums: what a receiver does with the wires of a cohort.

Both functions add into an accumulator, so that a cohort of any size can be
taken in as it arrives. Donate it (`donate_argnums`) and nothing is copied.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft.kernels import argument, dispatch, native
from fedjax_peft.kernels.quantization import api as quantize
from fedjax_peft.kernels.summation import reference


def weighted_sum(
  acc: jax.Array,
  packed: jax.Array,
  scale: jax.Array,
  weight: jax.Array,
  *,
  bits: int,
  block: int = 256,
  implementation: dispatch.Implementation | None = None,
) -> jax.Array:
  """Adds the weighted sum of quantized vectors: acc + sum_c w_c decoded_c.

  Guarantees:
    Contributions (w_c scale_c) q_c are added in the order of the clients, so
    several calls, each with the next few clients, return the same bits as
    one. A product and its sum are rounded together or apart, as the machine
    likes: implementations differ by at most 4 eps sqrt(C) of the sum of the
    absolute contributions.
    A client of weight 0 changes nothing, whatever its scales are.

  Args:
    acc: float32 [D].
    packed: [C, n], wires as `quantize` returns them: n is
      `quantize.layout(D).length`, the dtype int16 for 16 bits, int8 for 8,
      uint8 for fewer.
    scale: float32 [C, blocks], blocks = `quantize.layout(D).blocks`.
    weight: float32 [C], 0 = absent.
    bits: 1, 2, 4, 8 or 16.
    block: values that share a scale, as given to `quantize`.
    implementation: None chooses by platform.

  Returns:
    float32 [D].

  Raises:
    ValueError: if an argument has another shape, dtype or value.

  Example:
    >>> weighted_sum(
    ...   jnp.zeros(3),
    ...   jnp.array([[1, -2, 3], [10, 10, 10]], jnp.int8),
    ...   jnp.array([[0.5], [0.1]]),
    ...   jnp.array([2.0, 1.0]),
    ...   bits=8,
    ... )
    Array([ 2., -1.,  4.], dtype=float32)
  """
  acc, packed = jnp.asarray(acc), jnp.asarray(packed)
  scale, weight = jnp.asarray(scale), jnp.asarray(weight)
  lay = quantize.layout(acc.size, bits=bits, block=block)
  wire = {16: jnp.int16, 8: jnp.int8}.get(bits, jnp.uint8)
  clients = weight.size
  argument.expect("acc", acc, jnp.float32, ("D",))
  argument.expect("weight", weight, jnp.float32, ("C",))
  argument.expect("packed", packed, wire, (clients, lay.length))
  argument.expect("scale", scale, jnp.float32, (clients, lay.blocks))
  return dispatch.call(
    KERNEL,
    acc,
    packed,
    scale,
    weight,
    implementation=implementation,
    bits=bits,
    block=block,
  )


def add_rows(
  acc: jax.Array,
  rows: jax.Array,
  present: jax.Array,
  *,
  implementation: dispatch.Implementation | None = None,
) -> jax.Array:
  """Adds the rows of the clients that are present: acc + sum_c rows_c.

  For unsigned integers this is the secure sum: wires of `fixed_point`, masked
  or not, added modulo 2^8, 2^16 or 2^32.

  Guarantees:
    Integers are exact modulo 2^bits, in any order of the clients. Floats are
    added in the order of the clients, one rounding each: all implementations
    return the same bits, in one call or in several.
    An absent client changes nothing, whatever its row holds.

  Args:
    acc: uint8, uint16, uint32 or float32 [D].
    rows: [C, D], of the same dtype.
    present: bool [C], or numbers of which those above 0 are present.
    implementation: None chooses by platform.

  Returns:
    [D], of the same dtype.

  Raises:
    ValueError: if an argument has another shape or dtype.

  Example:
    >>> add_rows(
    ...   jnp.array([250, 1], jnp.uint8),
    ...   jnp.array([[10, 20], [99, 99]], jnp.uint8),
    ...   jnp.array([True, False]),
    ... )
    Array([ 4, 21], dtype=uint8)
  """
  acc, rows, present = map(jnp.asarray, (acc, rows, present))
  argument.expect("acc", acc, DTYPES, ("D",))
  argument.expect("rows", rows, acc.dtype, (present.size, acc.size))
  argument.expect("present", present, present.dtype, ("C",))
  if present.dtype != jnp.bool:
    present = present > 0
  if implementation is None:
    return _rows(acc, rows, present)
  return dispatch.call(ROWS, acc, rows, present, implementation=implementation)


@jax.custom_jvp
def _rows(acc, rows, present):
  """`add_rows`, differentiable: a round may be, as a whole."""
  return dispatch.call(ROWS, acc, rows, present)


@_rows.defjvp
def _rows_jvp(primals, tangents):
  """The sum is linear, and so is its derivative."""
  (_, _, present), (d_acc, d_rows, _) = primals, tangents
  return _rows(*primals), reference.add_rows(d_acc, d_rows, present)


DTYPES = (jnp.uint8, jnp.uint16, jnp.uint32, jnp.float32)


def _sum_native(*arrays, bits, block):
  """C++; each thread takes some values of all clients."""
  sizes = {"bits": np.int64(bits), "block": np.int64(block)}
  return native.in_place("weighted_sum.WeightedSum", *arrays, **sizes)


def _rows_native(*arrays):
  """C++; each thread takes some values of all clients."""
  return native.in_place("weighted_sum.AddRows", *arrays)


KERNEL, ROWS = (
  dispatch.register(
    dispatch.Kernel(
      name,
      reference=getattr(reference, name),
      native=fun,
      pallas_tpu=dispatch.lazily(f"{__package__}.pallas_tpu", name),
      pallas_gpu=dispatch.lazily(f"{__package__}.pallas_gpu", name),
      library="weighted_sum",
      in_place=True,
    )
  )
  for name, fun in (("weighted_sum", _sum_native), ("add_rows", _rows_native))
)
