"""Pipelines: a model cut into parts that compute in different places.

What one part hands to the next is a message, and crosses a wire: its floats go
up through one link, and the gradient by them comes back through another. With
wires that change nothing a pipeline is the model that was cut, bit for bit.

Gupta and Raskar, Distributed learning of deep neural network over multiple
agents, 2018, https://arxiv.org/abs/1810.06060
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft import link, tree, validate, work

DEVICE, HOME = "device", "home"  # parts that compute where the data are
HEAD = "device_head"  # of a device that has a loss of its own
REAL = "cut/real"  # a feature: 0 where a row of a batch is padding


class Wire(NamedTuple):
  """What connects two parts.

  Attributes:
    up: crossed by the floats of the message, into the later part.
    down: crossed by the gradient on its way back; None: none comes back, so
      that what is before the cut does not learn from what is behind it.
    common: all clients that are at work get one gradient, the sum of theirs
      row by row; for clients in lockstep (`lockstep`).
  """

  up: link.Link = link.chain()
  down: link.Link | None = link.chain()
  common: bool = False


PLAIN = Wire()


class Pipeline(nnx.Module):
  """Parts one after another, with wires between them; see `pipeline`.

  Attributes:
    names: of the parts, in order; each is an attribute of this name.
    wires: between each part and the next.
    memory: what a client keeps from step to step, or None; see `memory`.
  """

  def __init__(
    self, parts: Mapping[str, nnx.Module], wires: Sequence[Wire], seed: int
  ):
    self.names = tuple(parts)
    for name, part in parts.items():
      setattr(self, name, part)
    self.wires = tuple(wires)
    self.memory = nnx.data(None)
    self.rngs = nnx.Rngs(cut=seed)

  def parts(self) -> list[nnx.Module]:
    """The parts, in order."""
    return [getattr(self, name) for name in self.names]

  def __call__(self, *inputs, **features) -> jax.Array:
    """What the model returns that was cut; arguments as for that."""
    return self.parts()[-1](self.message(*inputs, **features))

  def message(self, *inputs, **features) -> dict[str, jax.Array]:
    """What the last part gets; arguments as for a call."""
    real = features.pop(REAL, None)
    return self.onward(self.parts()[0](*inputs, **features), real)

  def onward(
    self, message: dict[str, jax.Array], real: jax.Array | None = None
  ) -> dict[str, jax.Array]:
    """What the last part gets of what the first one hands on; see `cross`."""
    key, parts = self.rngs.cut(), self.parts()
    held: Mapping[str, Any] = {}
    if self.memory is not None:
      held = self.memory.feedback
      message, real = self.memory.arrive(message, real)
    for i, wire in enumerate(self.wires):
      if i:
        message = parts[i](message)
      own = jax.random.fold_in(key, i)
      message = cross(wire, message, own, real, held.get(str(i)))
    return message


class TokenPipeline(Pipeline):
  """A pipeline whose last part makes logits of a stream a few at a time."""

  def hidden(self, *inputs, **features) -> jax.Array:
    """The normalized stream [B, T, D]; arguments as for a call."""
    last: Any = self.parts()[-1]
    return last.hidden(self.message(*inputs, **features))

  def unembed(self, hidden: jax.Array) -> jax.Array:
    """Logits [..., V] of the stream [..., D]."""
    last: Any = self.parts()[-1]
    return last.unembed(hidden)


def pipeline(
  module: Any,
  ends: Mapping[str, str | int | None],
  wires: Wire | Sequence[Wire] = PLAIN,
  *,
  seed: int = 0,
) -> Pipeline:
  """Cuts a model into parts that compute in different places.

  Args:
    module: a model that offers stages: `stages()` and `part(start, stop)`, as
      all models of the zoo do, and `Modules` of any modules. Adapters are
      put in place after cutting, so that their paths name the part.
    ends: {part: the last stage that it computes}, in order; a stage by its
      name or as how many stages are done by then. None, for the last part, is
      the last stage. Parts called "device..." and "home..." compute on the
      device, others on a server.
    wires: between each part and the next; one is used for all.
    seed: of the wires' randomness, where no round says another.

  Returns:
    A module with the parts' names as attributes, which is called like the
    model.

  Raises:
    ValueError: if a stage is unknown, the ends do not rise, or the last part
      does not reach the end.

  Example:
    >>> from fedjax_peft.models import cnn
    >>> model = cnn.CNN(cnn.CNNConfig(classes=10), nnx.Rngs(0))
    >>> cut = pipeline(model, {"device": "convolutions/1", "server": None})
    >>> image = jnp.ones((2, 28, 28))
    >>> bool((cut(image) == model(image)).all())
    True
  """
  if not hasattr(module, "part"):
    raise ValueError(
      f"a model must offer stages to be cut, got a {type(module).__name__} "
      "without part(start, stop); put its layers into split.Modules"
    )
  names = [stage.name for stage in module.stages()]
  stops = [_stop(end, names) for end in ends.values()]
  starts = [0, *stops[:-1]]
  rising = all(a < b for a, b in zip(starts, stops, strict=True))
  if len(ends) < 2 or not rising or stops[-1] != len(names):
    raise ValueError(
      f"a model of stages {', '.join(names)} must be cut into two parts or "
      f"more, each later than the one before, the last up to the end: got "
      f'{dict(ends)}; write {{"device": {names[0]!r}, "server": None}}'
    )
  if isinstance(wires, Wire):
    wires = [wires] * (len(ends) - 1)
  if len(wires) != len(ends) - 1:
    raise ValueError(
      f"there must be a wire between each part and the next, "
      f"{len(ends) - 1}, got {len(wires)}; give one to use it for all"
    )
  for wire in wires:
    link.cut(wire.up, wire.down or link.chain())  # refuses what cannot be
  parts = {
    name: module.part(start, stop)
    for name, start, stop in zip(ends, starts, stops, strict=True)
  }
  kind = TokenPipeline if hasattr(module, "unembed") else Pipeline
  return kind(parts, wires, seed)


def _stop(end: str | int | None, names: list[str]) -> int:
  """How many stages are done at an end."""
  if end is None:
    return len(names)
  if isinstance(end, int):
    if not 1 <= end <= len(names):
      raise ValueError(
        f"a cut must be after 1 to {len(names)} stages, got {end}; the stages "
        f"are {', '.join(names)}"
      )
    return end
  if end not in names:
    raise ValueError(
      f"a part must end with a stage of the model, {', '.join(names)}, got "
      f"{end!r}{validate.near(end, names)}"
    )
  return names.index(end) + 1


def cross(
  wire: Wire,
  message: Mapping[str, jax.Array],
  key: jax.Array,
  real: jax.Array | None = None,
  held: Callable | None = None,
) -> dict[str, jax.Array]:
  """A message as it is received: floats cross the wire, integers as they are.

  Args:
    wire: its links.
    message: {name: [B, ...]}.
    key: of the links' randomness.
    real: [B], 0 for rows that are padding; None: there are none. Of a common
      gradient they get nothing, though other clients have examples there.
    held: what the wire has not said yet (`feedback.Held`), which is for rows
      that are known to be real or not.
  """
  floats, rest = divide(message)
  if held is not None and real is not None:
    return {**held(wire, floats, key, real), **rest}
  received = link.cut(wire.up, wire.down or link.chain())(floats, key)
  if wire.down is None:
    received = jax.lax.stop_gradient(received)
  elif wire.common:
    received = _told_together(received, real)
  return {**received, **rest}


@jax.custom_vjp
def _told_together(message, real):
  """The message; its gradient is the sum over all clients at work."""
  return message


def _sum(real, gradient):
  gradient = jax.lax.psum(gradient, work.LANES)
  if real is not None:
    gradient = jax.tree.map(
      lambda x: jnp.where(real.reshape(-1, *[1] * (x.ndim - 1)) > 0, x, 0),
      gradient,
    )
  return gradient, None


_told_together.defvjp(lambda message, real: (message, real), _sum)


def divide(message: Mapping[str, Any]) -> tuple[dict, dict]:
  """The floats of a message, and the rest."""
  floats = {k: v for k, v in message.items() if tree.is_float(v)}
  return floats, {k: v for k, v in message.items() if k not in floats}


class Behind:
  """What a loss sees of a pipeline that has come as far as its last part."""

  def __init__(self, last: Any, message: dict[str, jax.Array]):
    self.last, self.message = last, message

  def __call__(self, *inputs, **features) -> jax.Array:
    """What the model returns, whatever it is called with."""
    return self.last(self.message)


class TokensBehind(Behind):
  """The same, of a last part that makes logits a few at a time."""

  def hidden(self, *inputs, **features) -> jax.Array:
    """The normalized stream [B, T, D]."""
    return self.last.hidden(self.message)

  def unembed(self, hidden: jax.Array) -> jax.Array:
    """Logits [..., V] of the stream [..., D]."""
    return self.last.unembed(hidden)


def behind(pipe: Pipeline, message: dict[str, jax.Array]) -> Behind:
  """What a loss sees of a pipeline whose last part gets this message."""
  kind = TokensBehind if hasattr(pipe, "unembed") else Behind
  return kind(pipe.parts()[-1], message)


def is_at_home(part: str) -> bool:
  """Whether a part of that name computes on the device."""
  return part.startswith((DEVICE, HOME))


def owner_of(pipe: Pipeline) -> Callable[[str], bool]:
  """(path of a leaf) -> whether it belongs to the device.

  What an algorithm keeps beside the model has a name of its own in front of
  that of the part, as in "scaffold/c/device/kernel"; what is of no part is
  said by the client.
  """
  parts = {*pipe.names, HEAD}

  def is_own(path):
    return is_at_home(next((s for s in path.split("/") if s in parts), DEVICE))

  return is_own
