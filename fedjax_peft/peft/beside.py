"""Adapters beside one matrix product: LoRA and its relatives.

Each wraps one layer, of which a Contraction makes a product with a matrix W,
and adds x @ delta(W) to its output. That is all `wrap` and `merged` need to
know.
"""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft.peft import adapter, contraction, frozen, quantized

_REFUSED = (nnx.Embed, nnx.Conv, nnx.ConvTranspose)


@jax.custom_jvp
def silent(y: jax.Array) -> jax.Array:
  """The same numbers, with an exact zero written as -0.0.

  x + -0.0 is x bit for bit for every x, while -0.0 + 0.0 is 0.0: so adding a
  silent zero changes nothing. Its derivative is that of the identity.

  Example:
    >>> silent(jnp.array([0.0, 1.0]))
    Array([-0.,  1.], dtype=float32)
  """
  return jnp.where(y == 0, -0.0, y)


@silent.defjvp
def _silent_jvp(primals, tangents):
  """The tangent passes: a `where` would stop it at zero."""
  return silent(*primals), tangents[0]


def row(vector: jax.Array, rows: jax.Array) -> jax.Array:
  """A vector [F] that broadcasts against rows [..., F]."""
  return vector.reshape((1,) * (rows.ndim - 1) + vector.shape)


class Beside(nnx.Module):
  """A layer and something beside it; the base class of such adapters.

  A subclass gives `side` and `delta`. It is a class hierarchy, which this
  library avoids elsewhere, because NNX finds arrays through module attributes.

  Attributes:
    lora_base: the layer it wraps.
    contraction: how the layer's kernel meets its input.
  A stack axis (layers of a deep model under a scan) is gone by the time the
  layer is called.
  """

  def __init__(self, base: nnx.Module, shape: contraction.Contraction):
    self.lora_base = base
    self.contraction = shape

  def side(self, x: jax.Array) -> jax.Array:
    """What is added for rows x [..., K]: float32 [..., F], silent."""
    raise NotImplementedError

  def delta(self) -> jax.Array:
    """What is added to the kernel: float32 [stack, K, F]."""
    raise NotImplementedError

  def __call__(self, x: jax.Array, *args, **options) -> jax.Array:
    """The layer's output plus the adapter's, in the dtype of the layer's."""
    y = self.lora_base(x, *args, **options)
    side = self.side(self.contraction.flatten(x))
    return y + self.contraction.unflatten(side).astype(y.dtype)


class Site(NamedTuple):
  """A layer that is about to get an adapter.

  Attributes:
    name: "/"-joined path.
    shape: how its kernel meets its input.
    stack: leading axes that a deep model stacks layers on.
    key: a function of (seed, name).
  """

  name: str
  shape: contraction.Contraction
  stack: tuple[int, ...]
  key: jax.Array


def wrap(
  module: nnx.Module,
  where: str,
  method: str,
  make: Callable[[nnx.Module, Site], nnx.Module],
  seed: int = 0,
) -> nnx.Module:
  """Replaces every matched layer.

  Args:
    module: any NNX module; untouched.
    where: regex, matched in full against the names of layers.
    method: name of the caller, for errors.
    make: (layer, site) -> its replacement.
    seed: of the sites' keys.

  Returns:
    The changed clone.

  Raises:
    ValueError: if `where` matches no layer (near names are listed), an Embed or
      convolution, or a layer with such an adapter; if the module is frozen.
  """
  frozen.refuse(module, method)
  layers = _layers(module, where, method)
  key = jax.random.key(seed)

  def one(path, node):
    if path not in layers:
      return node
    name = adapter.join(path)
    shape = contraction.of(node, name)
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return make(node, Site(name, shape, stack(node, shape), own))

  return adapter.replace(module, one)


def stack(layer: nnx.Module, shape: contraction.Contraction) -> tuple[int, ...]:
  """Leading axes of a layer's kernel that a deep model stacks layers on."""
  if isinstance(layer, quantized.QuantizedLinear):
    return layer.kernel.shape[:-2]
  return shape.stack(layer.kernel)


def stack_within(module: nnx.Module) -> tuple[int, ...]:
  """Leading axes that the layers in a module are stacked on, or ().

  Raises:
    ValueError: if they differ.
  """
  found = adapter.find(module, (*contraction.LAYERS, quantized.QuantizedLinear))
  stacks = {
    stack(layer, contraction.of(layer))
    for layer, _ in found.values()
    if not (isinstance(layer, nnx.LinearGeneral) and layer.batch_axis)
  }
  if len(stacks) > 1:
    raise ValueError(
      "the layers of a module that gets one adapter must be stacked alike: got "
      f"leading axes {sorted(stacks)}; match its parts instead"
    )
  return stacks.pop() if stacks else ()


def matrix(layer: nnx.Module, shape: contraction.Contraction) -> jax.Array:
  """A layer's kernel as a matrix, float32 [stack, K, F]."""
  if isinstance(layer, quantized.QuantizedLinear):
    return layer.matrix().astype(jnp.float32)
  return shape.matrix(layer.kernel[...]).astype(jnp.float32)


def _layers(module, where, method):
  """Paths of the layers to wrap; refuses what cannot be wrapped."""
  types = (*contraction.LAYERS, quantized.QuantizedLinear, *_REFUSED, Beside)
  found = adapter.find(module, types)
  names = {
    path: names
    for path, (_, names) in found.items()
    if path[-1:] != ("lora_base",)
  }
  chosen = adapter.select(where, names, f"layer that {method} can wrap")
  for path in chosen:
    node, name = found[path][0], adapter.join(path)
    if isinstance(node, Beside):
      raise ValueError(
        f"a layer takes one adapter: {name!r} has {type(node).__name__} and "
        f"{where=} of {method} matches it; leave it out of where"
      )
    if isinstance(node, _REFUSED):
      raise ValueError(
        f"{method} is for Linear, LinearGeneral and Einsum: {where=} matches "
        f"{name!r} of type {type(node).__name__}; leave it out, or train "
        "it as it is with tune"
      )
  return chosen


def leading(
  matrix: jax.Array, rank: int, name: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The first `rank` singular triples of stacked matrices.

  Args:
    matrix: float32 [stack, K, F].
    rank: R.
    name: whose matrix it is, for the error.

  Returns:
    (U [stack, K, R], S [stack, R], Vt [stack, R, F]).

  Raises:
    ValueError: if a matrix has fewer than `rank` of them.
  """
  most = min(matrix.shape[-2:])
  if rank > most:
    raise ValueError(
      f"rank must be at most {most} for the {matrix.shape[-2]} x "
      f"{matrix.shape[-1]} matrix of {name!r}: {rank=}; write a smaller rank "
      "or leave the layer out of where"
    )
  u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
  return u[..., :rank], s[..., :rank], vt[..., :rank, :]
