"""A loss at the device: learning without waiting for the server.

The device's part learns from a head of its own, and the server's part from
what the device sends; no gradient comes back, and nobody waits for one.

Han et al., Accelerating Federated Learning with Split Learning on Locally
Generated Losses, 2021
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from fedjax_peft.split import cutting


def with_head(
  pipe: cutting.Pipeline, width: int, classes: int, *, seed: int = 0
) -> cutting.Pipeline:
  """The same pipeline, with a linear head at the device.

  It reads the mean over all axes of a message but the first and the last.

  Args:
    pipe: whose first wire lets no gradient back.
    width: D, of the message.
    classes: outputs of the head.
    seed: of its initial weights.

  Returns:
    A clone with the Linear `device_head`.

  Raises:
    ValueError: if a gradient comes back over the first wire.
  """
  if pipe.wires[0].down is not None:
    raise ValueError(
      "a device with a loss of its own does not wait for a gradient, but one "
      "comes back over the first wire; write Wire(up, down=None)"
    )
  clone: Any = nnx.clone(pipe)
  head = nnx.Linear(width, classes, rngs=nnx.Rngs(seed))
  setattr(clone, cutting.HEAD, head)
  return clone


def guess(pipe: cutting.Pipeline, message: dict[str, jax.Array]) -> jax.Array:
  """Logits [B, classes] of the device's own head."""
  x = message["x"]
  axes = tuple(range(1, x.ndim - 1))
  return getattr(pipe, cutting.HEAD)(x.mean(axes) if axes else x)


def local_loss(loss: Callable) -> Callable:
  """A loss of both ends: the server's, and the device's own.

  Args:
    loss: of logits [B, classes], such as `losses.classification`.

  Returns:
    A loss for a pipeline `with_head`; the sum of the two, whose gradients do
    not meet. Metrics are the server's; those of the device's head are called
    `device_...`.
  """

  def both(module, examples, key):
    if not hasattr(module, cutting.HEAD):  # what a server sees
      return loss(module, examples, key)
    features = {k: v for k, v in examples.items() if k != "label"}
    real = features.pop(cutting.REAL, None)
    message = module.parts()[0](**features)
    seen = cutting.behind(module, module.onward(message, real))
    each, metrics = loss(seen, examples, key)
    own, more = loss(lambda **_: guess(module, message), examples, key)
    more = {f"device_{k}": v for k, v in more.items()}
    return each + own, {**metrics, **more}

  return both
