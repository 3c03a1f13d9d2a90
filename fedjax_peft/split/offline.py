"""Offline: what a device does when its link is gone in the midst of a round.

It goes on with the last gradient that came: its part of the model takes steps
along it, for as many steps as the round has left. The server's copy of the
other parts waits. When the link is back the next gradient takes its place, so
nothing is replayed and nothing jumps.

The gradient is a `memory`, which becomes what comes back over the wire.

  pipe = offline.with_memory(pipe, batch, examples)
  model = fp.model(pipe, offline.gated(loss))
  local = memory.remembering(local)
  made = fp.fedavg(model, local, placement=offline.PLACEMENT)
  made = offline.tolerant(split.splitfed(made, model, examples))
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft import algorithm, tailoring
from fedjax_peft.split import cutting, memory, moving

GRADIENT = f"{memory.PREFIX}offline/gradient"
_ONLINE = f"{memory.PREFIX}offline/online"
PLACEMENT = {_ONLINE: "frozen", **memory.PLACEMENT}


class Offline(nnx.Module):
  """What a device remembers of the server.

  Attributes:
    gradient: float32 [B, ...], the last that came for a batch.
    online: bool scalar, whether the link is there.
  """

  def __init__(self, shape: tuple[int, ...], kind: type[nnx.Variable]):
    self.gradient = kind(jnp.zeros(shape, jnp.float32))
    self.online = moving.Position(jnp.array(True))

  def __call__(self, message: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The message, whose gradient is the one that came last."""
    x = message["x"]
    if x.shape != self.gradient.shape:  # a batch that is only looked at
      return message
    held = _held(x, self.gradient[...], self.online[...])
    return {**message, "x": held}


@jax.custom_vjp
def _held(x, gradient, online):
  """The value x; its gradient is replaced while the link is gone."""
  del gradient, online
  return x


def _held_backward(kept, came):
  gradient, online = kept
  now = jnp.where(online, came, gradient)
  return now, now, None


_held.defvjp(lambda x, g, on: (x, (g, on)), _held_backward)


def with_memory(
  pipe: cutting.Pipeline, batch: int, features: Mapping[str, Any]
) -> cutting.Pipeline:
  """The same pipeline, whose device remembers the last gradient.

  Adapters come before, since they say what is trained.

  Args:
    pipe: over whose first wire a gradient comes back.
    batch: examples of a client's batch.
    features: {name: [M, ...]}, for shapes.

  Returns:
    A clone with leaves `memory/offline/...`.

  Raises:
    ValueError: if no gradient comes back.
  """
  if pipe.wires[0].down is None:
    raise ValueError(
      "a device that goes on with the last gradient must get one: the first "
      "wire lets none back; give it a link for `down`"
    )
  x = memory.messages(pipe, batch, features)[0]["x"]
  return memory.with_part(pipe, "offline", Offline(x.shape, memory.kind(pipe)))


def gated(loss: Callable) -> Callable:
  """The same loss, from which no server learns while the link is gone."""

  def run(module, examples, key):
    each, metrics = loss(module, examples, key)
    if not hasattr(module, "memory"):  # what a server sees
      return each, metrics
    online = module.memory.offline.online[...]
    return jnp.where(online, each, jax.lax.stop_gradient(each)), metrics

  return run


def tolerant(made: algorithm.Algorithm) -> algorithm.Algorithm:
  """An algorithm whose clients go on when their link is gone.

  Args:
    made: of a model `with_memory` and a `gated` loss, `remembering`, with the
      placement `PLACEMENT`.

  Returns:
    The algorithm; clients have a link for so many steps of a round as their
    trait `online` says.

  Raises:
    ValueError: if a part of this is missing.
  """
  whole = made.work
  for name, label in ((GRADIENT, "device"), (_ONLINE, "frozen")):
    if whole.placement.get(name) != label:
      raise ValueError(
        f"a device that goes on without its link keeps '{name}' as {label!r}: "
        f"got {whole.placement.get(name)!r}; use with_memory, and placement="
        "{**split.offline.PLACEMENT, ...}"
      )

  def own(sent, facts, taken):
    here = {_ONLINE: taken < facts[tailoring.ONLINE]}
    return sent._replace(params=sent.params | here)

  job = tailoring.tailored(whole, (tailoring.ONLINE,), own)
  return algorithm.extended(made, job=job)
