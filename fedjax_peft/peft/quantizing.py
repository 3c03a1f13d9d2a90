"""Quantizing the base: frozen kernels of 8 or 4 bits (QLoRA).

Dettmers et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314
"""

from flax import nnx

from fedjax_peft import validate
from fedjax_peft.peft import adapter, contraction, frozen, quantized

QTYPES = ("int8", "int4", "nf4")


def quantize_base(
  module: nnx.Module,
  qtype: str = "nf4",
  where: str = r"layers/.*",
  *,
  tile: int | None = None,
) -> nnx.Module:
  """Stores the kernels of matched layers as integer codes.

  Comes before or after the adapters, with the same result, and before `freeze`.
  The error of a layer's output is |x| times the error of its kernel: at most
  half a scale an entry for "int8" and "int4". A quantized kernel never trains
  and `merged` cannot fold into it; residuals stay beside it.

  Guarantees:
    adapters and biases are as they were; under vmap over adapters the product
    with a quantized kernel stays one product for all clients;
    the same module and qtype give the same codes.

  Args:
    module: any NNX module; untouched.
    qtype: "int8", "int4" or "nf4" (16 quantiles of a normal variable).
    where: regex, matched in full against the "/"-joined name of each layer:
      nnx.Linear, nnx.LinearGeneral (without batch_axis), nnx.Einsum (one
      contraction).
    tile: consecutive inputs that share a scale; must divide a layer's inputs.
      None is the largest divisor of them up to 64, for "int8" all inputs.

  Returns:
    A clone with `QuantizedLinear` in place of the matched layers, K * F codes
    and K / tile * F scales each.

  Raises:
    ValueError: if `where` matches no layer, or one whose kernel trains or is
      quantized; if `tile` does not divide its inputs; if the module is frozen.
    ImportError: if the qwix library is not installed.

  Example:
    >>> model = nnx.Sequential(nnx.Linear(8, 3, rngs=nnx.Rngs(0)))
    >>> small = quantize_base(model, "int8", where="layers/0")
    >>> small.layers[0].kernel.dtype, small.layers[0].kernel_scale.shape
    (dtype('int8'), (1, 3))
  """
  validate.one_of(QTYPES, qtype=qtype)
  if tile is not None:
    validate.at_least(1, tile=tile)
  frozen.refuse(module, "quantize_base")
  types = (*contraction.LAYERS, quantized.QuantizedLinear)
  found = adapter.find(module, types)
  names = {path: names for path, (_, names) in found.items()}
  chosen = adapter.select(where, names, "layer that can be quantized")

  def swap(path, node):
    if path not in chosen:
      return node
    name = adapter.join(path)
    _check(node, name, where)
    shape = contraction.of(node, name)
    size = tile or _tile(shape.rows, qtype)
    if shape.rows % size:
      raise ValueError(
        f"tile must divide the inputs of a layer: {tile=} but {name!r} has "
        f"{shape.rows}; write e.g. tile={_tile(shape.rows, qtype)}"
      )
    return quantized.QuantizedLinear(node, shape, qtype, size)

  return adapter.replace(module, swap)


def _tile(rows, qtype):
  """How many inputs share a scale when nothing is said."""
  if qtype == "int8":
    return rows
  return max(size for size in range(1, 65) if rows % size == 0)


def _check(node, name, where):
  """Refuses what is quantized, or must not be."""
  if isinstance(node, quantized.QuantizedLinear):
    raise ValueError(
      f"a layer is quantized once: {name!r} is and {where=} matches it; leave "
      "it out of where"
    )
  if isinstance(node.kernel, adapter.Adapter):
    raise ValueError(
      f"a kernel that trains cannot be quantized: {where=} matches {name!r}; "
      "leave it out of where"
    )
