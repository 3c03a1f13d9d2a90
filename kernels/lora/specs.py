"""Products of adapted layers: clients, tokens, widths and ranks."""

import jax.numpy as jnp
import numpy as np

from fedjax_peft.kernels.specs import Spec


def _layer(shape, dtype=jnp.float32, flip=False, x_dtype=jnp.float32):
  """Arguments for shape = (C, M, K, N, R), of sums that are about 1."""
  clients, rows, width, columns, rank = shape

  def draw(rng):
    def normal(shape, fan_in, dtype=np.float32):
      return (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(dtype)

    kernel = (columns, width) if flip else (width, columns)
    return (
      normal((clients, rows, width), 1, x_dtype),
      normal(kernel, width, dtype),
      normal((clients, width, rank), width),
      normal((clients, rank, columns), rank),
    )

  return draw


_PLAIN = {"scale": 2.0, "flip": False}
_FLIP = {"scale": 2.0, "flip": True}
_LOW = jnp.bfloat16

SPECS: tuple[Spec, ...] = (
  Spec("MiniLM query", _layer((8, 512, 384, 384, 8)), _PLAIN, True),
  Spec("the same, bfloat16", _layer((8, 512, 384, 384, 8), _LOW), _PLAIN, True),
  Spec(
    "the same, backward",
    _layer((8, 512, 384, 384, 8), _LOW, flip=True),
    _FLIP,
    True,
  ),
  Spec("MiniLM, up", _layer((8, 128, 384, 1536, 8), _LOW), _PLAIN, True),
  Spec("MiniLM, down", _layer((4, 128, 1536, 384, 16), _LOW), _PLAIN, True),
  Spec(
    "odd widths, x bfloat16",
    _layer((2, 37, 100, 70, 5), _LOW, x_dtype=_LOW),
    _PLAIN,
  ),
  Spec("odd tails", _layer((1, 300, 200, 300, 3)), _PLAIN),
  Spec("odd tails, backward", _layer((1, 300, 200, 300, 3), flip=True), _FLIP),
  Spec("deep, odd", _layer((1, 9, 1100, 130, 4)), _PLAIN),
  Spec("one client, one row", _layer((1, 1, 3, 2, 1)), _PLAIN),
  Spec("no client", _layer((0, 9, 16, 8, 2)), _PLAIN),
)
