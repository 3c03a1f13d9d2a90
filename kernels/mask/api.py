"""Masks of secure aggregation: keystreams that cancel in the sum.

Two clients that share a key add the same keystream, one with each sign. What
one client sends then tells nothing, and the sum over all is what it was.

Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine
Learning, 2017, https://eprint.iacr.org/2017/281
"""

import jax
import numpy as np

from fedjax_peft.kernels import argument, dispatch, native
from fedjax_peft.kernels.mask import layout, reference


def mask_add(
  q: jax.Array,
  keys: jax.Array,
  plus: jax.Array,
  minus: jax.Array,
  nonce: jax.Array,
  *,
  implementation: dispatch.Implementation | None = None,
) -> jax.Array:
  """Adds the keystream of each key to one row, and subtracts it from another.

  All simulated clients in one call: each pair's keystream is made once. One
  real client: C = 1, with its row 0 in `plus` or `minus` by the sign of the
  pair. The server takes the masks of dropped clients off the sum with the
  same call and the roles swapped.

  Guarantees:
    y[c] = q[c] + sum of the keystreams with plus = c - sum of those with
    minus = c, modulo 2^32, the same bits on every backend; the keystream is
    that of ChaCha20 in the order `layout.order(D)`, is never in memory as a
    whole, and is not made where it would go to nobody.

  A nonce must be new for every vector under the same keys, or the difference
  of two masked vectors is that of the plain ones. Let its words hold the round
  and the number of the tensor; the block counter starts at 0 in every call,
  and does not wrap.

  Args:
    q: uint32 [C, D], one row for each client; D at most 2^36.
    keys: uint32 [P, 8], each 32 bytes read little-endian.
    plus: int32 [P], the row that key p's keystream is added to; -1, like
      anything outside of 0..C-1, is nobody.
    minus: int32 [P], the row that it is subtracted from.
    nonce: uint32 [3].
    implementation: None chooses by the platform.

  Returns:
    uint32 [C, D], in the memory of `q` if that is donated.

  Raises:
    ValueError: if a shape or a dtype is another, or D is too large.

  Example:
    >>> import jax.numpy as jnp
    >>> q = jnp.array([[1, 2], [3, 4]], jnp.uint32)
    >>> keys, nonce = jnp.zeros((1, 8), jnp.uint32), jnp.zeros(3, jnp.uint32)
    >>> y = mask_add(q, keys, jnp.array([0]), jnp.array([1]), nonce)
    >>> y
    Array([[2917185655, 3202811809],
           [1377781645, 1092155493]], dtype=uint32)
    >>> y.sum(0)
    Array([4, 6], dtype=uint32)
  """
  argument.expect("q", q, np.uint32, ("C", "D"))
  argument.expect("keys", keys, np.uint32, ("P", 8))
  for name, rows in (("plus", plus), ("minus", minus)):
    argument.expect(name, rows, np.int32, keys.shape[:1])
  argument.expect("nonce", nonce, np.uint32, (3,))
  if q.shape[1] > layout.MAX_D:
    raise ValueError(
      f"a nonce is good for at most {layout.MAX_D} values: got "
      f"D={q.shape[1]}; give each part a nonce of its own"
    )
  return dispatch.call(
    KERNEL, q, keys, plus, minus, nonce, implementation=implementation
  )


def _native(*arrays):
  """C++: each thread takes some lanes of all rows."""
  return native.in_place("mask.MaskAdd", *arrays)


KERNEL = dispatch.register(
  dispatch.Kernel(
    "mask_add",
    reference=reference.mask_add,
    native=_native,
    pallas_tpu=dispatch.lazily(f"{__package__}.pallas_tpu", "mask_add"),
    pallas_gpu=dispatch.lazily(f"{__package__}.pallas_gpu", "mask_add"),
    library="mask",
    in_place=True,
  )
)
