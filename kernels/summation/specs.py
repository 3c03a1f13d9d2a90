"""Cohorts of real adapters, and what is at the edges of the wire's format."""

import numpy as np

from fedjax_peft.kernels import specs
from fedjax_peft.kernels.quantization import api as quantize


def wires(clients: int, size: int, bits: int, block: int = 256):
  """Draws what `clients` clients send; about one in eight is absent."""
  lay = quantize.layout(size, bits=bits, block=block)
  dtype = np.dtype({16: np.int16, 8: np.int8}.get(bits, np.uint8))
  row = lay.length * dtype.itemsize

  def draw(rng):
    here = rng.random(clients) > 1 / 8
    weight = here * rng.integers(1, 64, clients)
    return (
      rng.normal(size=size).astype(np.float32),
      rng.integers(0, 256, (clients, row), np.uint8).view(dtype),
      rng.random((clients, lay.blocks), np.float32),
      weight.astype(np.float32),
    )

  return draw, {"bits": bits, "block": block}


def rows(clients: int, size: int, dtype):
  """Draws rows of `clients` clients; about one in eight is absent."""

  def draw(rng):
    if np.dtype(dtype).kind == "f":
      values = rng.normal(size=(clients + 1, size)).astype(dtype)
    else:
      top = np.iinfo(dtype).max
      values = rng.integers(0, top, (clients + 1, size), dtype, endpoint=True)
    return values[0], values[1:], rng.random(clients) > 1 / 8

  return draw, {}


def _spec(name, drawn, **more):
  draw, static = drawn
  return specs.Spec(name, draw, static, **more)


SPECS: tuple[specs.Spec, ...] = (
  _spec("MiniLM LoRA leaf 6x384x8, 8 bits", wires(12, 18_432, 8)),
  _spec("MiniLM LoRA leaf 6x384x8, 4 bits", wires(9, 18_432, 4)),
  _spec("a leaf 768x8, 2 bits", wires(8, 6_144, 2)),
  _spec("a head 6x384, 1 bit", wires(9, 2_304, 1)),
  _spec("a head 6x384, 16 bits", wires(3, 2_304, 16, 128)),
  _spec("blocks of 1024, 4 bits", wires(5, 10_000, 4, 1024)),
  _spec("blocks of 128, 1 bit", wires(5, 1500, 1, 128)),
  _spec("blocks of 4096, 16 bits", wires(3, 9000, 16, 4096)),
  _spec("odd tail within the first plane, 4 bits", wires(5, 1000, 4)),
  _spec("odd tail of one value, 2 bits", wires(6, 513, 2)),
  _spec("odd tail within the last plane, 1 bit", wires(3, 509, 1)),
  _spec("shorter than a block, 2 bits", wires(4, 37, 2)),
  _spec("one value, 1 bit", wires(3, 1, 1)),
  _spec("odd tail, 8 bits", wires(8, 777, 8)),
  _spec("one client", wires(1, 600, 8)),
  _spec("no client", wires(0, 600, 4)),
  _spec("no value", wires(3, 0, 4)),
  _spec(
    "64 clients of 76,038 values, 8 bits", wires(64, 76_038, 8), bench=True
  ),
  _spec(
    "64 clients of 76,038 values, 4 bits", wires(64, 76_038, 4), bench=True
  ),
  _spec("256 clients of 2^20 values, 8 bits", wires(256, 2**20, 8), bench=True),
  _spec("256 clients of 2^20 values, 4 bits", wires(256, 2**20, 4), bench=True),
)

ROWS_SPECS: tuple[specs.Spec, ...] = (
  _spec("MiniLM LoRA leaf 6x384x8, uint32", rows(12, 18_432, np.uint32)),
  _spec("a head 6x384, float32", rows(21, 2_304, np.float32)),
  _spec("odd size, uint8", rows(9, 777, np.uint8)),
  _spec("odd size, uint16", rows(40, 1_001, np.uint16)),
  _spec("odd size, float32", rows(9, 129, np.float32)),
  _spec("one client, uint32", rows(1, 37, np.uint32)),
  _spec("one value, float32", rows(8, 1, np.float32)),
  _spec("no client, uint32", rows(0, 100, np.uint32)),
  _spec("no value, uint32", rows(3, 0, np.uint32)),
  _spec(
    "64 clients of 76,038 values, float32",
    rows(64, 76_038, np.float32),
    bench=True,
  ),
  _spec(
    "64 clients of 2^20 values, uint32",
    rows(64, 2**20, np.uint32),
    bench=True,
  ),
)
