"""Top-k: keep the entries of largest magnitude, and add them up on receipt.

Alistarh et al., The Convergence of Sparsified Gradient Methods, 2018,
https://arxiv.org/abs/1809.10505
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft.kernels import argument, dispatch, native
from fedjax_peft.kernels.selection import reference


def _native(x, *, k):
  """C++: one pass over x, and work on few candidates."""
  result = (
    jax.ShapeDtypeStruct((k,), jnp.float32),
    jax.ShapeDtypeStruct((k,), jnp.int32),
  )
  return tuple(native.call("top_k.TopK", result, x))


def _native_scatter_add(*arrays):
  """C++: plain loops over ranges of the accumulator."""
  return native.in_place("top_k.ScatterAdd", *arrays)


KERNEL = dispatch.register(
  dispatch.Kernel(
    "top_k",
    reference=reference.top_k,
    native=_native,
    pallas_tpu=dispatch.lazily(f"{__package__}.pallas_tpu", "top_k"),
    pallas_gpu=dispatch.lazily(f"{__package__}.pallas_gpu", "top_k"),
    library="top_k",
  )
)

SCATTER_ADD = dispatch.register(
  dispatch.Kernel(
    "scatter_add",
    reference=reference.scatter_add,
    native=_native_scatter_add,
    why={
      "tpu": "a client is one scatter of XLA; no kernel is written for it",
      "gpu": "a client is one scatter of XLA; no kernel is written for it",
    },
    library="top_k",
  )
)


def top_k(
  x: jax.Array,
  k: int,
  *,
  implementation: dispatch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Keeps the k entries of largest magnitude.

  Guarantees:
    magnitudes are ordered as the bits of |x|, so +0.0 and -0.0 are equal and
    subnormals are told apart; among equals the lower index is kept;
    a nan is below every number: it is kept only where fewer than k are left;
    indices ascend; values are those of x, bit for bit;
    every implementation returns the same.

  On TPUs and GPUs a search for the threshold is used that was compiled for
  them and never timed on one.

  Args:
    x: float32 [D]. For more axes, use `jax.vmap`.
    k: entries to keep, 1 <= k <= D.
    implementation: None chooses by platform; see `kernels.explain`.

  Returns:
    values float32 [k] and indices int32 [k].

  Raises:
    ValueError: if x is not a float32 vector, or k is out of range.
    RuntimeError: if a named implementation cannot run here.

  Example:
    >>> values, indices = top_k(jnp.array([1.0, -3.0, 0.5, 2.0]), 2)
    >>> values, indices
    (Array([-3.,  2.], dtype=float32), Array([1, 3], dtype=int32))
  """
  argument.expect(
    "x", x, jnp.float32, ("D",), "cast it, and use jax.vmap for more axes"
  )
  if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
    raise ValueError(f"k must be an integer, known when compiling: got {k=}")
  if not 1 <= k <= x.size:
    raise ValueError(f"k must be in 1..{x.size}, the size of x: got {k=}")
  return dispatch.call(KERNEL, x, implementation=implementation, k=int(k))


def scatter_add(
  acc: jax.Array,
  values: jax.Array,
  indices: jax.Array,
  weight: jax.Array | None = None,
  *,
  implementation: dispatch.Implementation | None = None,
) -> jax.Array:
  """Adds to an accumulator what clients kept.

  Guarantees:
    clients are added in their order, each product weight * value rounded
    before it is added: the result does not depend on the number of threads;
    a client of weight 0 changes nothing, whatever its values;
    indices outside of 0..D-1, negative ones too, are dropped;
    acc may be donated, and its memory is then the result's.

  An index may occur twice in a client; on GPUs the order of the two is open.

  Args:
    acc: float32 [D].
    values: float32 [C, K].
    indices: int32 [C, K].
    weight: float32 [C], 0 = absent; None is 1 for everyone.
    implementation: None chooses by platform; see `kernels.explain`.

  Returns:
    float32 [D].

  Raises:
    ValueError: if shapes or dtypes are others.
    RuntimeError: if a named implementation cannot run here.

  Example:
    >>> values, indices = jnp.array([[1.0, 2.0]]), jnp.array([[0, 2]])
    >>> scatter_add(jnp.zeros(3), values, indices, jnp.array([2.0]))
    Array([2., 0., 4.], dtype=float32)
  """
  if weight is None:
    weight = jnp.ones(values.shape[:1], jnp.float32)
  argument.expect("acc", acc, jnp.float32, ("D",))
  argument.expect("values", values, jnp.float32, ("C", "K"))
  argument.expect("indices", indices, jnp.int32, values.shape)
  argument.expect("weight", weight, jnp.float32, values.shape[:1])
  return dispatch.call(
    SCATTER_ADD, acc, values, indices, weight, implementation=implementation
  )
