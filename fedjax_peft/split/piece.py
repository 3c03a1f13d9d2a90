"""Pieces: parts of a model as pure functions, of which only shapes are known.

Parts are taken inside a trace, where slicing a stack of layers is an operation
like any other: a model from `nnx.eval_shape`, without weights, will do.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from fedjax_peft import peft, tree
from fedjax_peft.peft import adapter
from fedjax_peft.split import cutting

Message = Mapping[str, Any]


class Piece(NamedTuple):
  """A part of a model.

  Attributes:
    train: {path: spec}, what trains.
    still: {path: spec}, what else it holds.
    graph: what is static.
    first: whether it gets the inputs of the model, and no message.
    behind: whether anything before it trains, so that it owes a gradient by
      the floats that it gets.
  """

  train: dict[str, Any]
  still: dict[str, Any]
  graph: peft.Graph
  first: bool
  behind: bool

  @property
  def learns(self) -> bool:
    """Whether it has a backward pass."""
    return self.behind or tree.size(self.train) > 0


def cutter(module: Any) -> Callable[..., Piece]:
  """A function (start, stop, behind=False) -> Piece of a model.

  What trains is said by the whole model: of one with adapters nothing else
  trains, in the parts that have none neither.

  Args:
    module: any model with `stages()` and `part(start, stop)`.

  Raises:
    ValueError: if the model offers no stages.
  """
  if not (hasattr(module, "stages") and hasattr(module, "part")):
    raise ValueError(
      "a model must offer stages() and part(start, stop): got a "
      f"{type(module).__name__}; make its layers stages with split.Modules"
    )
  graph, state = nnx.split(module, graph=True)
  state, is_tuned = specs(state), bool(adapter.find(module, peft.Adapter))

  def piece(start, stop, behind=False):
    def take(state):
      part = nnx.merge(graph, state).part(start, stop)
      found = peft.split(part)
      train, still = found.params, found.base | found.mutable | found.rng
      if is_tuned and not adapter.find(part, peft.Adapter):
        train, still = {}, still | train
      served = {k: train.pop(k) for k in list(train) if peft.is_residual(k)}
      return train, still | served, found.graph

    train, still, static = jax.eval_shape(take, state)
    return Piece(train, still, static, start == 0, behind)

  return piece


def given(inputs: Message) -> tuple[int, dict[str, Any]]:
  """(B, specs) of the inputs of a model.

  Args:
    inputs: {argument of the model: spec or array [B, ...]}.

  Raises:
    ValueError: if they do not have one batch axis.
  """
  shapes = {k: tuple(v.shape) for k, v in inputs.items()}
  sizes = {shape[:1] for shape in shapes.values()}
  if len(sizes) != 1 or sizes & {(), (0,)}:
    raise ValueError(
      f"inputs must be {{name: [B, ...]}} with the same B >= 1: got {shapes}; "
      "give every example a row"
    )
  return sizes.pop()[0], specs(dict(inputs))


def forward(piece: Piece) -> Callable:
  """(train, still, message) -> the next message, or what the model returns.

  Under `jit`, so that the model is traced once whatever is made of it.
  """

  @jax.jit
  def run(train, still, message):
    part = peft.merge(piece.graph, train, {}, {}, still)
    return part(**message) if piece.first else part(message)

  return run


def backward(piece: Piece, run: Callable) -> Callable:
  """(train, still, message) -> (floats that come out, function back).

  The function takes the gradient by these floats to those by what trains and,
  if the piece owes it, by the floats of its message.

  Args:
    piece: whose.
    run: `forward(piece)`.
  """

  def there(train, still, message):
    floats, rest = divide(message) if piece.behind else ({}, message)

    def out(train, floats):
      return divide(run(train, still, {**floats, **rest}))[0]

    return jax.vjp(out, train, floats)

  return there


def divide(message: Any) -> tuple[dict, dict]:
  """(floats, rest) of a message, or of what a model returns."""
  whole = message if isinstance(message, dict) else {"output": message}
  return cutting.divide(whole)


def specs(arrays: Any) -> Any:
  """Shapes and dtypes of a tree, of random keys too."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
