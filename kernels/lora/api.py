"""LoRA's product: a frozen kernel shared by all clients, and theirs beside it.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021,
https://arxiv.org/abs/2106.09685
"""

import functools
import math

import jax
import jax.numpy as jnp

from fedjax_peft.kernels import argument, dispatch
from fedjax_peft.kernels.lora import reference

KERNEL = dispatch.register(
  dispatch.Kernel(
    "lora_matmul",
    reference=reference.lora_matmul,
    pallas_tpu=dispatch.lazily(f"{__package__}.pallas_tpu", "lora_matmul"),
    pallas_gpu=dispatch.lazily(f"{__package__}.pallas_gpu", "lora_matmul"),
    why={
      "cpu": (
        "x W alone takes 82 to 94 % of its time (rank 8 and 16, widths 384 to "
        "1536): fusing saves less than the rest, and needs a product of "
        "matrices as fast as XLA's"
      ),
      "tpu": "the Pallas kernel is compiled for it, not yet measured there",
      "gpu": "the Pallas kernel is compiled for it, not yet measured there",
    },
  )
)


def lora_matmul(
  x: jax.Array,
  w: jax.Array,
  a: jax.Array,
  b: jax.Array,
  scale: float,
  *,
  w_t: jax.Array | None = None,
  implementation: dispatch.Implementation | None = None,
) -> jax.Array:
  """Computes y_c = x_c W + scale (x_c A_c) B_c for every client c.

  Guarantees:
    sums are float32, in the precision that is the platform's default;
    with B = 0 and finite x the result is x W, bit for bit;
    w is frozen: no gradient is computed for it, and it gets zeros;
    the gradient of x is the same kernel with transposed operands:
      dx = g W^T + scale (g B^T) A^T, with g cast to the dtype of w;
    dA = scale x^T (g B^T) and dB = scale (x A)^T g are left to XLA.

  Implementations agree up to the order of their sums. The Pallas kernels are
  compiled for TPUs and GPUs and checked by an interpreter; whether they are
  faster than XLA has not been measured, so they run only where they are named.

  Args:
    x: float32 or bfloat16 [C, M, K]; cast to the dtype of w for x W only.
    w: float32 or bfloat16 [K, N], shared by all clients.
    a: float32 [C, K, R], R >= 1.
    b: float32 [C, R, N].
    scale: alpha / rank, a Python number.
    w_t: [N, K], a stored transpose of w that the gradient of x reads; None
      has w itself transposed.
    implementation: None chooses by platform; see `kernels.explain`.

  Returns:
    float32 [C, M, N].

  Raises:
    ValueError: if shapes or dtypes are others, or scale is not finite.
    RuntimeError: if a named implementation cannot run here.

  Example:
    >>> x, w = jnp.ones((1, 2, 3)), jnp.ones((3, 2))
    >>> lora_matmul(x, w, jnp.ones((1, 3, 1)), jnp.ones((1, 1, 2)), 2.0)
    Array([[[9., 9.], [9., 9.]]], dtype=float32)
  """
  _check(x, w, a, b, w_t)
  if not (isinstance(scale, (int, float)) and math.isfinite(scale)):
    raise ValueError(f"scale must be a finite Python number: got {scale=}")
  return _product(float(scale), implementation, x, w, w_t, a, b)


def _check(x, w, a, b, w_t):
  """Raises ValueError unless axes and dtypes fit together."""
  low, more = (jnp.float32, jnp.bfloat16), "use jax.vmap for more axes"
  argument.expect("x", x, low, ("C", "M", "K"), more)
  clients, _, width = x.shape
  argument.expect("w", w, low, (width, "N"))
  columns = w.shape[1]
  argument.expect("a", a, jnp.float32, (clients, width, "R"))
  rank = a.shape[2]
  argument.expect("b", b, jnp.float32, (clients, rank, columns))
  if w_t is not None:
    argument.expect("w_t", w_t, w.dtype, (columns, width))
  if not (width and rank):
    raise ValueError(f"K and R must be at least 1: got K={width}, R={rank}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(scale, implementation, x, w, w_t, a, b):
  """The product; `w_t` is for its gradient."""
  del w_t
  return dispatch.call(
    KERNEL, x, w, a, b, implementation=implementation, scale=scale, flip=False
  )


def _forward(scale, implementation, x, w, w_t, a, b):
  """Forward rule: keeps the arguments."""
  return _product(scale, implementation, x, w, w_t, a, b), (x, w, w_t, a, b)


def _backward(scale, implementation, residuals, g):
  """Backward rule: narrow products are made again, they are cheap."""
  x, w, w_t, a, b = residuals
  a_t, b_t = jnp.swapaxes(a, 1, 2), jnp.swapaxes(b, 1, 2)
  dx = dispatch.call(
    KERNEL,
    g,
    w if w_t is None else w_t,
    b_t,
    a_t,
    implementation=implementation,
    scale=scale,
    flip=w_t is None,
  ).astype(x.dtype)
  wide = x.astype(jnp.float32)
  dnarrow = (g @ b_t) * scale  # [C, M, R]
  da_t = jnp.swapaxes(dnarrow, 1, 2) @ wide  # [C, R, K], fast on CPUs
  narrow = (wide @ a) * scale
  db = jnp.swapaxes(narrow, 1, 2) @ g
  return dx, None, None, jnp.swapaxes(da_t, 1, 2), db


_product.defvjp(_forward, _backward)
