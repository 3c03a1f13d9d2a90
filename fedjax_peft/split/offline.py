"""Offline: what a device does when its link is gone in the midst of a round.

It goes on with the last gradient that came: its part of the model takes steps
along it, for as many steps as the round has left. The server's copy of the
other parts waits. When the link is back the next gradient takes its place, so
nothing is replayed and nothing jumps.

The gradient is a leaf that lives on the client. Its own "gradient" is what
comes back over the wire, and its "step" is to become that.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fedjax_peft import algorithm, tailoring, work
from fedjax_peft.peft import adapter
from fedjax_peft.split import cutting, moving

ONLINE = "online"  # trait: steps of a round in which the link is there
GRADIENT = "offline/gradient"
_ONLINE = "offline/online"


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
    A clone with an `offline` part.

  Raises:
    ValueError: if no gradient comes back.
  """
  if pipe.wires[0].down is None:
    raise ValueError(
      "a device that goes on with the last gradient must get one: the first "
      "wire lets none back; give it a link for `down`"
    )
  first = {
    k: jax.ShapeDtypeStruct((batch, *v.shape[1:]), v.dtype)
    for k, v in features.items()
    if k != "label"
  }
  graph, state = nnx.split(pipe.parts()[0])
  message = jax.eval_shape(
    lambda state, first: nnx.merge(graph, state)(**first), state, first
  )
  clone: Any = nnx.clone(pipe)
  adapted = adapter.find(pipe, adapter.Adapter)
  kind = adapter.Adapter if adapted else nnx.Param
  clone.offline = Offline(message["x"].shape, kind)
  return clone


def going_on(local: work.Local) -> work.Local:
  """The same local training, in which gradients are remembered."""

  def becomes(updates, state, params=None):
    return jax.tree.map(jnp.subtract, updates, params), state

  remember = optax.GradientTransformation(lambda _: optax.EmptyState(), becomes)

  def label(params):
    return {k: "remember" if k == GRADIENT else "train" for k in params}

  def optimizer(round):
    return optax.partition(
      {"train": local.optimizer(round), "remember": remember}, label
    )

  return local._replace(optimizer=optimizer)


def gated(loss: Callable) -> Callable:
  """The same loss, from which no server learns while the link is gone."""

  def run(module, examples, key):
    each, metrics = loss(module, examples, key)
    if not hasattr(module, "offline"):  # what a server sees
      return each, metrics
    online = module.offline.online[...]
    return jnp.where(online, each, jax.lax.stop_gradient(each)), metrics

  return run


PLACEMENT = {GRADIENT: "device", _ONLINE: "frozen"}


def tolerant(made: algorithm.Algorithm) -> algorithm.Algorithm:
  """An algorithm whose clients go on when their link is gone.

  Args:
    made: of a model `with_memory` and a `gated` loss, trained as `going_on`
      says, with the placement `PLACEMENT`.

  Returns:
    The algorithm; clients have a link for so many steps of a round as their
    trait `online` says.

  Raises:
    ValueError: if a part of this is missing.
  """
  whole = made.work
  for name, label in PLACEMENT.items():
    if whole.placement.get(name) != label:
      raise ValueError(
        f"a device that goes on without its link keeps '{name}' as {label!r}: "
        f"got {whole.placement.get(name)!r}; use with_memory, and placement="
        "{**placement, **split.offline.PLACEMENT}"
      )

  def own(sent, facts, taken):
    here = {_ONLINE: taken < facts[ONLINE]}
    return sent._replace(params=sent.params | here)

  job = tailoring.tailored(whole, (ONLINE,), own)
  return algorithm.extended(made, job=job)
