"""Costs of stages: what each piece of a model holds, computes and hands on.

Everything is read from the model: parameters from its variables, products from
the programs of its parts, values and bytes from the messages between them.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import rich.table
from flax import nnx

from fedjax_peft import flops, tree
from fedjax_peft.peft import adapter
from fedjax_peft.split import piece as piece_lib


class Row(NamedTuple):
  """Costs of one stage.

  FLOPs are those of matrix products and convolutions, two for a multiplication
  and an addition. They are a batch's, divided by its examples and rounded up:
  products of weights alone are shared by the batch.

  Attributes:
    name: of the stage.
    parameters: values of the Params that it owns, as they are held (codes of a
      quantized kernel count one each); a tied table counts where it is owned.
    flops: forward, an example.
    values: floats that leave it, an example; of the last stage the output.
    side_bytes: of what else leaves it (lengths), an example.
    train_flops: forward and backward, an example. The backward pass makes the
      gradient by what trains in the stage and, if anything before it trains,
      by its input.
  """

  name: str
  parameters: int
  flops: int
  values: int
  side_bytes: int
  train_flops: int


def table(module: Any, inputs: piece_lib.Message) -> tuple[Row, ...]:
  """Costs of every stage of a model.

  Args:
    module: any model with `stages()` and `part(start, stop)`, with adapters or
      without; it may be abstract, from `nnx.eval_shape`.
    inputs: {argument of the model: spec or array [B, ...]}.

  Returns:
    A row for each stage. Forward FLOPs add up to those of the whole model.

  Raises:
    ValueError: if the model offers no stages, a parameter belongs to none of
      them, or the inputs do not have one batch axis.

  Example:
    >>> from fedjax_peft.models import cnn
    >>> config = cnn.CNNConfig(classes=10)
    >>> model = nnx.eval_shape(lambda: cnn.CNN(config, nnx.Rngs(0)))
    >>> image = jax.ShapeDtypeStruct((8, 28, 28), jnp.uint8)
    >>> row = table(model, {"image": image})[-1]
    >>> row.parameters, row.flops, row.values, row.train_flops
    (850, 1680, 10, 5040)
  """
  cut, (batch, message) = piece_lib.cutter(module), piece_lib.given(inputs)
  parameters, last = _parameters(module), module.stages()[-1]
  rows, seen, behind = [], {}, False
  for i, stage in enumerate(module.stages()):
    piece = cut(i, i + 1, behind)
    # Rows of one stack are one program, unless what they hold differs.
    shapes, kind = jax.tree.flatten((piece.train, piece.still, message))
    alike = (stage.owns, piece.first, stage is last, behind, kind, *shapes)
    if alike not in seen:
      seen[alike] = _costs(piece, message)
    forward, training, message = seen[alike]
    floats, rest = piece_lib.divide(message)
    counts = (forward, tree.size(floats), tree.nbytes(rest), training)
    each = (-(-count // batch) for count in counts)
    rows.append(Row(stage.name, parameters[stage.name], *each))
    behind = piece.learns
  return tuple(rows)


def format(rows: Sequence[Row]) -> rich.table.Table:
  """The rows as a table for the command line; below them their sums.

  Args:
    rows: as `table` returns them. "to here" is the share of the forward FLOPs
      of the first stages up to this one: a device's, if the cut is after it.
  """
  shown = rich.table.Table(box=None, pad_edge=False)
  shown.add_column("stage")
  titles = ("parameters", "FLOPs", "to here", "training FLOPs", "values out")
  for title in (*titles, "bytes beside"):
    shown.add_column(title, justify="right")
  *_, total = done = list(itertools.accumulate(row.flops for row in rows))
  for row, reached in zip(rows, done, strict=True):
    share = f"{reached / max(total, 1):.2%}"
    shown.add_row(
      row.name,
      f"{row.parameters:,}",
      f"{row.flops:,}",
      share,
      f"{row.train_flops:,}",
      f"{row.values:,}",
      f"{row.side_bytes:,}",
    )
  parameters = sum(row.parameters for row in rows)
  training = sum(row.train_flops for row in rows)
  shown.add_row("", f"{parameters:,}", f"{total:,}", "", f"{training:,}")
  return shown


def _parameters(module):
  """{stage: parameters that it owns}."""
  found = dict.fromkeys((stage.name for stage in module.stages()), 0)
  _, state = nnx.split(module, graph=True)
  for path, leaf in nnx.to_flat_state(state):
    if isinstance(leaf, nnx.Variable) and not isinstance(leaf, nnx.Param):
      continue  # counts and keys of random streams, statistics
    value = leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
    name = adapter.join(path)
    owners = [s for s in module.stages() if _owns(s, name)]
    if not owners:
      raise ValueError(
        f"every parameter must belong to a stage: got {name!r}, but stages own "
        f"{sorted({p for s in module.stages() for p in s.owns})}; add it to one"
      )
    for stage in owners:
      shape = value.shape if stage.row is None else value.shape[1:]
      found[stage.name] += math.prod(shape)
  return found


def _owns(stage, name):
  """Whether a variable is a stage's."""
  return any(f"{name}/".startswith(f"{prefix}/") for prefix in stage.owns)


def _costs(piece, message):
  """(forward FLOPs, those with backward, specs of what comes out)."""
  forward = piece_lib.forward(piece)
  backward = piece_lib.backward(piece, forward)

  def step(train, still, message):
    out, back = backward(train, still, message)
    return back(jax.tree.map(jnp.ones_like, out))

  given = (piece.train, piece.still, message)
  once = flops.count(forward, *given)
  training = flops.count(step, *given) if piece.learns else once
  return once, training, jax.eval_shape(forward, *given)
