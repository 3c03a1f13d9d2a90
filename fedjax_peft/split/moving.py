"""Cuts that move: every client its own, in one compiled program.

The model stays whole. After each of its stages the stream may cross a wire,
and does where a client's cut is. Where the cut is after the last stage nothing
crosses: such a client computes everything, as in federated learning, so that
split and federated clients train side by side (hybrid split learning).

Every client holds a copy of each layer, on the device or at the server, and
all copies are averaged: the mean of a layer is exact whatever the cuts.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft import algorithm, link, links, objective, tailoring
from fedjax_peft.links.affine import rounded
from fedjax_peft.split import cost, cutting

CUT, BITS = "cut", "bits"  # traits: stages on the device, bits of a value
_AT = "crossing/"  # where a model keeps them


class Position(nnx.Variable):
  """A number that says how a client takes part; nobody trains it."""


class Crossing(nnx.Module):
  """A wire at a place that is known when the program runs.

  Attributes:
    wire: what is crossed.
    cut: int32 scalar, after how many stages; that of all stages: nowhere.
    bits: int32 scalar, of a value on the wire both ways, in place of the
      wire's own links; None where those say it.
  """

  def __init__(self, wire: cutting.Wire, stages: int, bits: bool, seed: int):
    self.wire = wire
    self.cut = Position(jnp.int32(stages))
    self.bits = Position(jnp.int32(32)) if bits else None
    self.rngs = nnx.Rngs(cut=seed)

  def arm(self):
    """(stage, stream) -> stream as it goes on, for one forward pass."""
    key, cut = self.rngs.cut(), self.cut[...]
    bits = None if self.bits is None else self.bits[...]

    def visit(stage, x):
      here = jnp.asarray(stage, jnp.int32) + 1 == cut
      own = jax.random.fold_in(key, stage)
      if bits is None:
        there = cutting.cross(self.wire, {"x": x}, own)["x"]
      else:
        there = _rounded(x, bits, own)
      return jnp.where(here, there, x)

    return visit


def _sent(x, bits, key, way):
  """What the wire `affine(bits, per="token")` would make of a value."""
  key = jax.random.fold_in(jax.random.fold_in(key, way), 0)
  return rounded(x, bits, key, per="token")


@jax.custom_vjp
def _rounded(x, bits, key):
  """Values of so many bits, each token with a range; straight through."""
  return _sent(x, bits, key, 0)


def _rounded_forward(x, bits, key):
  return _rounded(x, bits, key), (bits, key)


def _rounded_backward(kept, gradient):
  bits, key = kept
  return _sent(gradient, bits, key, 1), None, None


_rounded.defvjp(_rounded_forward, _rounded_backward)


def movable(
  module: Any,
  wire: cutting.Wire = cutting.PLAIN,
  *,
  bits: bool = False,
  seed: int = 0,
) -> nnx.Module:
  """A model whose cut is where each client's trait `cut` says.

  Args:
    module: a model that offers stages, with or without adapters.
    wire: what is crossed there. A gradient must come back.
    bits: values have as many bits as the client's trait `bits` says, both
      ways and with a range for each token, in place of the wire's links.
    seed: of the wire's randomness, where no round says another.

  Returns:
    A clone. Called by itself it is not cut.

  Raises:
    ValueError: if the model offers no stages, or no gradient would come back.

  Example:
    >>> from fedjax_peft.models import cnn
    >>> model = movable(cnn.CNN(cnn.CNNConfig(classes=10), nnx.Rngs(0)))
    >>> model(jnp.ones((2, 28, 28))).shape
    (2, 10)
  """
  if not hasattr(module, "crossing"):
    raise ValueError(
      f"a model must offer stages to be cut, got a {type(module).__name__} "
      "without `crossing`; put its layers into split.Modules"
    )
  if wire.down is None or wire.common:
    raise ValueError(
      "over a wire that moves the client's own gradient comes back: got "
      f"down={wire.down} common={wire.common}; use a pipeline for the others"
    )
  link.cut(wire.up, wire.down)  # refuses what cannot be
  clone = nnx.clone(module)
  clone.crossing = Crossing(wire, len(module.stages()), bits, seed)
  return clone


def hybrid(
  made: algorithm.Algorithm,
  model: objective.Model,
  examples: Mapping[str, Any],
) -> algorithm.Algorithm:
  """Any algorithm, whose clients are cut where their trait `cut` says.

  A client whose cut is the number of stages trains by itself, as without any
  cut; of a report only those rows of a leaf are counted that its device holds.

  Args:
    made: such as `fedavg(model, local, placement={"crossing/.*": "frozen"})`.
    model: of a `movable` module.
    examples: {feature: [M, ...]}, for shapes.

  Raises:
    ValueError: if the module is not movable, or its numbers are not frozen.
  """
  crossing = getattr(model.origin, "crossing", None)
  if not isinstance(crossing, Crossing):
    raise ValueError(
      "cuts of clients need a model whose cut moves: got a "
      f"{type(model.origin).__name__}; write split.movable(module)"
    )
  whole, stages = made.work, model.origin.stages()
  reads = (CUT,) if crossing.bits is None else (CUT, BITS)
  loose = [k for k in reads if whole.placement.get(_AT + k) != "frozen"]
  if loose:
    raise ValueError(
      f"'{_AT}{loose[0]}' is a client's own and must stay as it is: got "
      f"placement {whole.placement.get(_AT + loose[0])!r}; write "
      'placement={"crossing/.*": "frozen"}'
    )

  def own(sent, facts, taken):
    at = {_AT + k: jnp.asarray(facts[k], jnp.int32) for k in reads}
    return sent._replace(params=sent.params | at)

  def compact(spec, traits, round):
    spec = whole.compact(spec, traits, round)
    cut = int(traits.get(CUT, len(stages)))
    held = {k: _held(k, v, stages, cut) for k, v in spec.items()}
    return {k: v for k, v in held.items() if v is not None}

  def cut_of(module, facts):
    cut = int(facts.get(CUT, len(stages)))
    if cut >= len(stages):
      return None
    module.crossing = None
    ends = {"device": cut, "server": None}
    return cutting.pipeline(module, ends, crossing.wire)

  job = tailoring.tailored(whole, reads, own)._replace(
    compact=compact,
    split=cost.measure(
      whole,
      model,
      examples,
      cut_of,
      wires_of=lambda facts: [_wire(crossing, facts)],
      of_wires=(BITS,),
    ),
  )
  return algorithm.extended(made, job=job)


def _wire(crossing: Crossing, facts) -> cutting.Wire:
  """What such a client's values cross."""
  if crossing.bits is None:
    return crossing.wire
  return _each_way(int(facts.get(BITS, 32)))


@functools.cache
def _each_way(bits: int) -> cutting.Wire:
  """A wire that counts what `_rounded` stands for."""
  each = links.affine(bits, per="token")
  return cutting.Wire(each, each)


def _held(path, leaf, stages, cut):
  """The shape of what a device holds of a leaf; None for nothing."""
  count = 0
  for i, stage in enumerate(stages):
    if not any(path == p or path.startswith(f"{p}/") for p in stage.owns):
      continue
    if stage.row is None:
      return leaf if i < cut else None
    count += i < cut
  if not count:
    return None
  return jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype)
