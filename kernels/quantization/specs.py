"""Shapes of real adapters, and the odd ones."""

import jax.numpy as jnp
import numpy as np

from fedjax_peft.kernels.quantization import reference
from fedjax_peft.kernels.specs import Spec

# name: number of blocks, their size, worth measuring.
SHAPES = {
  "LoRA leaf of MiniLM, 6 x 384 x 8": (72, 256, True),
  "message of 76,038 values": (298, 256, True),
  "head, 6 x 384": (9, 256, False),
  "large blocks": (5, 4096, False),
  "small blocks": (33, 128, False),
  "one short block": (1, 104, False),
  "one value": (1, 8, False),
}


def _vectors(nb, block):
  """Blocks of many sizes, one of zeros where there are several."""

  def draw(rng):
    x = rng.standard_normal((nb, block)) * np.exp(rng.standard_normal((nb, 1)))
    x[1:2] = 0
    key = rng.integers(0, 2**32, 2, np.uint32)
    return jnp.asarray(x, jnp.float32), jnp.asarray(key)

  return draw


def _wires(nb, block, bits):
  """Packed blocks with every code, and their scales."""

  def draw(rng):
    row, dtype = block // reference.packing(bits), reference.wire_dtype(bits)
    ends = np.iinfo(dtype)
    packed = rng.integers(ends.min, ends.max, (nb, row), dtype, endpoint=True)
    return jnp.asarray(packed), jnp.asarray(rng.random(nb), jnp.float32)

  return draw


SPECS: tuple[Spec, ...] = tuple(
  Spec(
    f"{name}, {bits} bits{'' if stochastic else ', nearest'}",
    _vectors(nb, block),
    {"bits": bits, "stochastic": stochastic},
    bench and stochastic,
  )
  for name, (nb, block, bench) in SHAPES.items()
  for bits in (1, 2, 4, 8, 16)
  for stochastic in (True, False)
  if stochastic or name == "head, 6 x 384"
)

DEQUANTIZE_SPECS: tuple[Spec, ...] = tuple(
  Spec(f"{name}, {bits} bits", _wires(nb, block, bits), {"bits": bits}, bench)
  for name, (nb, block, bench) in SHAPES.items()
  for bits in (1, 2, 4, 8, 16)
)
