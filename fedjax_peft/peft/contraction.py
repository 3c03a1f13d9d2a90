"""Linear, LinearGeneral and Einsum as one matrix product.

Each of the three contracts some axes of its input with some axes of its kernel.
A Contraction says which, so that low-rank adapters and frozen products need to
be written for matrices only: y = unflatten(flatten(x) @ matrix(kernel)).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)


@dataclasses.dataclass(frozen=True)
class Contraction:
  """How the kernel of a layer meets its input.

  Attributes:
    fan_in: sizes of the contracted axes, in the kernel's order.
    fan_out: sizes of the kernel's other axes, in the kernel's order.
    axis: contracted axes of the input, when there is no equation.
    equation: (input, kernel, output) terms of an einsum, or ().
  """

  fan_in: tuple[int, ...]
  fan_out: tuple[int, ...]
  axis: tuple[int, ...] = (-1,)
  equation: tuple[str, ...] = ()

  @property
  def rows(self) -> int:
    """Rows of the kernel as a matrix."""
    return math.prod(self.fan_in)

  @property
  def columns(self) -> int:
    """Columns of the kernel as a matrix."""
    return math.prod(self.fan_out)

  def flatten(self, x: jax.Array) -> jax.Array:
    """[...] -> [free axes, rows]: the contracted axes go last, as one."""
    if self.equation:
      left, right, _ = self._letters(x.ndim)
      axes = tuple(left.index(c) for c in right if c in left)
    else:
      axes = tuple(sorted(axis % x.ndim for axis in self.axis))
    last = tuple(range(x.ndim - len(axes), x.ndim))
    if axes != last:
      x = jnp.moveaxis(x, axes, last)
    return x if len(axes) == 1 else x.reshape(*x.shape[: last[0]], -1)

  def unflatten(self, y: jax.Array) -> jax.Array:
    """[free axes, columns] -> the layer's output."""
    free = y.shape[:-1]
    if len(self.fan_out) != 1:
      y = y.reshape(*free, *self.fan_out)
    if not self.equation:
      return y
    left, right, out = self._letters(len(free) + len(self.fan_in))
    order = [c for c in left if c not in right]
    order += [c for c in right if c not in left]
    permutation = tuple(order.index(c) for c in out)
    return (
      y if permutation == tuple(range(y.ndim)) else y.transpose(permutation)
    )

  def spread(self, bias: jax.Array, ndim: int) -> jax.Array:
    """Reshapes a bias so that it broadcasts against an output of `ndim`."""
    if not self.equation:
      return bias.reshape((1,) * (ndim - len(self.fan_out)) + self.fan_out)
    free = ndim - len(self.fan_out)
    left, right, out = self._letters(free + len(self.fan_in))
    kept = [c for c in right if c not in left]
    size = dict(zip(kept, self.fan_out, strict=True))
    return bias.reshape([size.get(c, 1) for c in out])

  def spread_rows(self, gain: jax.Array, ndim: int) -> jax.Array:
    """Reshapes [rows] so that it broadcasts against an input of `ndim`."""
    if self.equation:
      left, right, _ = self._letters(ndim)
      kept = [c for c in right if c in left]
      size = dict(zip(kept, self.fan_in, strict=True))
      return gain.reshape([size.get(c, 1) for c in left])
    axes = sorted(axis % ndim for axis in self.axis)
    sizes = dict(zip(axes, self.fan_in, strict=True))
    return gain.reshape([sizes.get(axis, 1) for axis in range(ndim)])

  def stack(self, kernel: jax.Array) -> tuple[int, ...]:
    """Leading axes of a kernel that the layer does not know of."""
    return kernel.shape[: kernel.ndim - len(self.fan_in + self.fan_out)]

  def matrix(self, kernel: jax.Array) -> jax.Array:
    """[stack, kernel's own axes] -> [stack, rows, columns]."""
    order = self._kernel_order()
    stack = kernel.ndim - len(order)
    if order != tuple(range(len(order))):
      own = tuple(stack + axis for axis in order)
      kernel = kernel.transpose(*range(stack), *own)
    return kernel.reshape(*kernel.shape[:stack], self.rows, self.columns)

  def kernel(self, matrix: jax.Array) -> jax.Array:
    """[stack, rows, columns] -> [stack, kernel's own axes]."""
    order = self._kernel_order()
    stack = matrix.ndim - 2
    kernel = matrix.reshape(*matrix.shape[:stack], *self.fan_in, *self.fan_out)
    inverse = tuple(stack + order.index(axis) for axis in range(len(order)))
    return kernel.transpose(*range(stack), *inverse)

  def _kernel_order(self):
    """Axes of the kernel: contracted ones first."""
    if not self.equation:
      return tuple(range(len(self.fan_in) + len(self.fan_out)))
    left, right, _ = self.equation
    inputs = [i for i, c in enumerate(right) if c in left]
    return (*inputs, *(i for i, c in enumerate(right) if c not in left))

  def _letters(self, ndim):
    """The terms for an input of `ndim` axes, with "..." as numbers."""
    left, right, out = self.equation
    extra = range(ndim - len(left.replace("...", "")))

    def expand(term):
      head, dots, tail = term.partition("...")
      return [*head, *(extra if dots else ()), *tail]

    return expand(left), list(right), expand(out)


def of(layer: nnx.Module, name: str = "") -> Contraction:
  """The Contraction of a layer.

  Args:
    layer: nnx.Linear, nnx.LinearGeneral (without batch_axis) or nnx.Einsum
      (each kernel letter in exactly one of input and output), or a layer that
      carries its Contraction as `contraction`.
    name: the layer's name, for the error message.

  Raises:
    ValueError: if the layer is not one matrix product over its input.

  Example:
    >>> of(nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), rngs=nnx.Rngs(0)))
    Contraction(fan_in=(2, 3), fan_out=(4,), axis=(-2, -1), equation=())
  """
  own = getattr(layer, "contraction", None)
  if isinstance(own, Contraction):
    return own
  if isinstance(layer, nnx.Linear):
    return Contraction((layer.in_features,), (layer.out_features,))
  if isinstance(layer, nnx.LinearGeneral):
    if layer.batch_axis:
      raise ValueError(
        f"LinearGeneral must have no batch_axis: {name!r} has "
        f"batch_axis={dict(layer.batch_axis)}; leave it out of where"
      )
    return Contraction(layer.in_features, layer.out_features, layer.axis)
  if isinstance(layer, nnx.Einsum):
    return _of_einsum(layer, name)
  raise ValueError(
    "expected a Linear, LinearGeneral or Einsum: "
    f"{name!r} is of type {type(layer).__name__}; leave it out of where"
  )


def _of_einsum(layer, name):
  """Reads an einsum equation, refusing those that are no matrix product."""
  equation = (layer.einsum_str or "").replace(" ", "")
  left, _, rest = equation.partition(",")
  right, _, out = rest.partition("->")
  shared = set(left) & set(right)
  is_product = (
    bool(shared)
    and "." not in right
    and all(len(set(t)) == len(t) for t in (right, *_plain(left, out)))
    and not shared & set(out)
    and set(out) == set(left) ^ set(right)
  )
  if not is_product:
    raise ValueError(
      "an Einsum must be one contraction of its input with its kernel, each "
      "letter in two of the three terms and the equation given when it is "
      f"built: {name!r} has {layer.einsum_str!r}; leave it out of where, or "
      'write it like "btd,dhk->bthk"'
    )
  size = dict(zip(right, layer.kernel_shape, strict=True))
  return Contraction(
    tuple(size[c] for c in right if c in left),
    tuple(size[c] for c in right if c not in left),
    equation=(left, right, out),
  )


def _plain(*terms):
  """Terms without their ellipsis."""
  return [term.replace("...", "") for term in terms]
