"""Feedback: what a wire could not say in a step is said in the next one.

A link that keeps a few values, or a few bits of each, loses something of every
batch. With a memory of what was lost, e, it sends Q(x + e) of the message x and
keeps e = x + e - received; so do the gradients on their way back. Straight
through: the gradient by what was received is the gradient by x.

What was received telescopes: its sum over the steps is that of what was sent
less what is held, row by row of a batch. So it helps

  where rows are the same examples from step to step: a client's whole data as
  one batch, `local(batch=M, shuffle=False)`. Otherwise an example is told what
  was lost of another one, and no feedback may be better.
  gradients of which little gets through (`top_k`, `sign`), whose sum over the
  steps is what counts. With more bits there is little to say later; activations
  are not summed up, and coarse ones may become worse: ways=("down",).
  links that leave less than they were given, as these do. What is held grows
  without bound behind `rand_k`, which scales up, and behind a single bit,
  rounded at random, for the range of a whole tensor, `affine(1)`.

Seide et al., 1-Bit Stochastic Gradient Descent, 2014; Karimireddy et al., 2019,
https://arxiv.org/abs/1901.09847
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft import link, tree, validate
from fedjax_peft.split import cutting, memory

WAYS = ("up", "down")

Floats = dict[str, jax.Array]


class Held(nnx.Module):
  """What a wire has not said yet of a batch.

  Attributes:
    up: {name: [B, ...]}, of the message; empty if nothing of it is held.
    down: {name: [B, ...]}, of its gradient, likewise.
  """

  def __init__(
    self,
    wire: cutting.Wire,
    floats: Mapping[str, jax.ShapeDtypeStruct],
    kind: type[nnx.Variable],
    ways: Sequence[str] = WAYS,
  ):
    def zeros(way):
      is_held = way in ways and loses(getattr(wire, way))
      lossy = floats if is_held else {}
      return {k: kind(jnp.zeros(v.shape, v.dtype)) for k, v in lossy.items()}

    self.up = nnx.Dict(zeros("up"))
    self.down = nnx.Dict(zeros("down"))

  def __call__(
    self, wire: cutting.Wire, floats: Floats, key: jax.Array, real: jax.Array
  ) -> Floats:
    """The floats of a message as they are received; see `cutting.cross`.

    Rows that are padding hold back nothing: what is remembered of these rows
    waits for the next batch that has them.

    Raises:
      ValueError: if the batch is none of those that are remembered.
    """
    up = {k: v[...] for k, v in self.up.items()}
    down = {k: v[...] for k, v in self.down.items()}
    for k, v in {**up, **down}.items():
      if v.shape != floats[k].shape:
        raise ValueError(
          f"what is held of '{k}' is of batches {v.shape[0]} long: got "
          f"{floats[k].shape} for {v.shape}; use with_memory(pipe, "
          f"{floats[k].shape[0]}, ...)"
        )
    return _crossing(wire)(floats, up, down, key, real)


def _crossing(wire):
  """(floats, what is held up and down, key, real) -> floats as received.

  The cotangent of what is held is what is held afterwards.
  """

  @jax.custom_vjp
  def received(floats, up, down, key, real):
    return forward(floats, up, down, key, real)[0]

  def forward(floats, up, down, key, real):
    there = jax.random.fold_in(key, 0)
    came, left = _said(wire.up, floats, up, there, real)
    return came, (left, down, key, real)

  def backward(kept, gradient):
    left, down, key, real = kept
    if wire.down is None:
      return tree.zeros_like(gradient), left, down, None, None
    back = jax.random.fold_in(key, 1)
    came, after = _said(wire.down, gradient, down, back, real)
    # The device knows which rows are padding, whatever a link makes of them.
    came = {k: jnp.where(_rows(real, v), v, 0) for k, v in came.items()}
    return came, left, after, None, None

  received.defvjp(forward, backward)
  return received


def _said(links, floats, held, key, real):
  """(what is received of floats and of what was held, what is held then)."""
  whole = {
    k: jnp.where(_rows(real, x), x + held[k], x) if k in held else x
    for k, x in floats.items()
  }
  ctx = link.alone()._replace(key=key)
  mine, shared = links.init(link.Spec(tree.spec(whole)))
  came, *_ = link.broadcast(links)(whole, mine, shared, ctx)
  left = {
    k: jnp.where(_rows(real, e), whole[k] - came[k], e) for k, e in held.items()
  }
  return came, left


def _rows(real, x):
  """Which rows of x [B, ...] are real, to be broadcast against it."""
  return real.reshape(-1, *[1] * (x.ndim - 1)) > 0


def loses(links: link.Link | None) -> bool:
  """Whether anything but the identity is crossed."""
  return links is not None and bool(link.parts_of(links))


def with_memory(
  pipe: cutting.Pipeline,
  batch: int,
  features: Mapping[str, Any],
  *,
  ways: Sequence[str] = WAYS,
) -> cutting.Pipeline:
  """The same pipeline, whose wires say later what they could not say at once.

  All wires do whose links lose something, in training alone: what is evaluated
  crosses as it is. Adapters come before, since they say what is trained;
  `memory` says how such a model is trained.

  Args:
    pipe: made by `split.pipeline`.
    batch: examples of a client's batch, B.
    features: {name: [M, ...]}, for shapes.
    ways: "up", messages, and "down", gradients, or one of them.

  Returns:
    A clone with leaves `memory/feedback/...`.

  Raises:
    ValueError: if the model is not a pipeline, no link loses anything, or all
      clients get one gradient.

  Example:
    >>> from fedjax_peft import links, models, split
    >>> model = models.load("cnn", classes=3)
    >>> ends = {"device": "convolutions/0", "server": None}
    >>> pipe = split.pipeline(model, ends, split.Wire(down=links.top_k(0.1)))
    >>> image = {"image": jax.ShapeDtypeStruct((9, 28, 28), "uint8")}
    >>> pipe = with_memory(pipe, 4, image)
    >>> pipe.memory.feedback["0"].down["x"].shape[0]
    4
  """
  if not isinstance(pipe, cutting.Pipeline):
    raise ValueError(
      "feedback is for the wires of a model that is cut in one place for all: "
      f"got a {type(pipe).__name__}; use split.pipeline, or no feedback"
    )
  if any(wire.common for wire in pipe.wires):
    raise ValueError(
      "a gradient that is common to all clients holds back nothing of one of "
      "them: got a wire with common=True; use common=False, or no feedback"
    )
  for way in ways:
    validate.one_of(WAYS, ways=way)
  if not any(loses(getattr(w, way)) for w in pipe.wires for way in ways):
    raise ValueError(
      "feedback says later what a link could not say at once, but no link "
      f"loses anything on its way {' or '.join(ways)}: got wires without; give "
      "them one, such as Wire(down=links.top_k(0.1)), or leave feedback out"
    )
  kind = memory.kind(pipe)
  specs = memory.messages(pipe, batch, features)
  held = {
    str(i): Held(wire, cutting.divide(spec)[0], kind, ways)
    for i, (wire, spec) in enumerate(zip(pipe.wires, specs, strict=True))
  }
  held = {i: one for i, one in held.items() if one.up or one.down}
  return memory.with_part(pipe, "feedback", nnx.Dict(held))
