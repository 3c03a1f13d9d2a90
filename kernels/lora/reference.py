"""The frozen and the low-rank product in plain jnp: the specification."""

import jax
import jax.numpy as jnp
from jax import lax


def lora_matmul(
  x: jax.Array,
  w: jax.Array,
  a: jax.Array,
  b: jax.Array,
  *,
  scale: float,
  flip: bool = False,
) -> jax.Array:
  """The sum x W + scale (x A) B; all sums are float32.

  An exact zero beside x W is written as -0.0, which leaves it bit for bit.

  Args:
    x: float32 or bfloat16 [C, M, K]; cast to the dtype of w for x W only.
    w: float32 or bfloat16 [K, N], shared by all clients.
    a: float32 [C, K, R].
    b: float32 [C, R, N].
    scale: alpha / rank.
    flip: w is [N, K] and is used transposed.

  Returns:
    float32 [C, M, N].
  """
  wide = lax.dot_general(
    x.astype(w.dtype),
    w,
    (((2,), (int(flip),)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  side = ((x.astype(jnp.float32) @ a) * scale) @ b
  return wide + jnp.where(side == 0, -0.0, side)
