"""What a part holds while it trains, in bytes.

The activations are those of the backward pass as it is written: what it reads
that is no variable. So `keep` of the models, frozen layers and adapters are
accounted for, and nothing is compiled.
"""

import math
from typing import Any, NamedTuple

import jax
import optax
from jax.extend import core

from fedjax_peft.split import piece as piece_lib


class Memory(NamedTuple):
  """Bytes that a part holds while it trains; workspace is not included.

  Attributes:
    parameters: all of its variables.
    gradients: of those that train.
    optimizer: its state.
    activations: what the forward pass of a batch leaves for the backward pass.
      A compiler that computes some of it again keeps less.
  """

  parameters: int
  gradients: int
  optimizer: int
  activations: int

  @property
  def state(self) -> int:
    """Bytes without activations."""
    return self.parameters + self.gradients + self.optimizer


def memory(
  module: Any,
  inputs: piece_lib.Message,
  start: int,
  stop: int,
  optimizer: optax.GradientTransformation,
) -> Memory:
  """Bytes that a part of a model holds while it trains on one batch.

  Args:
    module: any model with `stages()` and `part(start, stop)`, with adapters or
      without; it may be abstract, from `nnx.eval_shape`.
    inputs: of the whole model, {argument: spec or array [B, ...]}.
    start: stages before the part.
    stop: stages up to its end: the device of a cut c holds (0, c).
    optimizer: of what trains in it.

  Raises:
    ValueError: if the model offers no stages, there is no such part, or the
      inputs do not have one batch axis.

  Example:
    >>> from flax import nnx
    >>> from fedjax_peft.models import cnn
    >>> config = cnn.CNNConfig(classes=10)
    >>> model = nnx.eval_shape(lambda: cnn.CNN(config, nnx.Rngs(0)))
    >>> image = {"image": jax.ShapeDtypeStruct((8, 28, 28), "uint8")}
    >>> memory(model, image, 0, 1, optax.sgd(0.1, momentum=0.9)).state
    1872
  """
  cut, (_, message) = piece_lib.cutter(module), piece_lib.given(inputs)
  count = len(module.stages())
  if not 0 <= start < stop <= count:
    raise ValueError(
      f"a part must hold some of stages 0 to {count}: got {start=} {stop=}; "
      f"use start=0 stop={count} for the whole model"
    )
  behind = False
  if start:
    before = cut(0, start)
    given = (before.train, before.still, message)
    message = jax.eval_shape(piece_lib.forward(before), *given)
    behind = before.learns
  piece = cut(start, stop, behind)
  return Memory(
    parameters=_nbytes((piece.train, piece.still)),
    gradients=_nbytes(piece.train),
    optimizer=_nbytes(jax.eval_shape(optimizer.init, piece.train)),
    activations=_kept(piece, _twice(message)) - _kept(piece, message),
  )


def _twice(message):
  """Specs of a batch of twice as many examples; axis B leads."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype),
    message,
  )


def _kept(piece, message) -> int:
  """Bytes that wait for the backward pass and are none of the variables.

  Copies of variables are among them, such as rows of a stack; what grows with
  the batch are activations.
  """
  if not piece.learns:
    return 0
  there = piece_lib.backward(piece, piece_lib.forward(piece))

  def waiting(train, still, message):
    return jax.tree.leaves(there(train, still, message)[1])

  jaxpr = jax.make_jaxpr(waiting)(piece.train, piece.still, message).jaxpr
  own = jaxpr.invars[: len(jax.tree.leaves((piece.train, piece.still)))]
  kept = {v for v in jaxpr.outvars if isinstance(v, core.Var)} - set(own)
  return _nbytes([v.aval for v in kept])


def _nbytes(specs):
  """Bytes of all leaves, of random keys too."""
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(specs)
  )
