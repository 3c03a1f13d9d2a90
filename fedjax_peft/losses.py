"""Losses: module and batch to one loss an example, and metrics that add.

A loss is `loss(module, batch, key) -> (per_example, metrics)`. The module is
called with the features by name: all entries of the batch but `label`. Metrics
are pairs (numerator, denominator), one entry an example, so that sums over any
set of examples, clients or devices divide to the right mean.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Batch = dict[str, Any]
Metrics = dict[str, tuple[Float[Array, " B"], Float[Array, " B"]]]

_CHUNK = 16  # positions whose logits are alive at once in `next_token`


def classification(
  module, batch: Batch, key: jax.Array
) -> tuple[Float[Array, " B"], Metrics]:
  """Cross-entropy of integer labels.

  Args:
    module: features by name -> logits `[B, classes]`.
    batch: features and `label` int32 `[B]`.
    key: unused; a module with dropout carries its own random streams.

  Returns:
    The loss in nats, float32 `[B]`, and the metric `accuracy`.

  Raises:
    ValueError: if the batch has no label or the logits are not `[B, classes]`.
  """
  del key
  logits, label = module(**_features(batch)), _label(batch)
  if logits.ndim != 2:
    raise ValueError(
      "classification needs logits of shape [batch, classes]:"
      f" logits.shape={logits.shape}; build the model with classes=..."
    )
  loss, correct = _cross_entropy(logits, label)
  return loss, {"accuracy": (correct, jnp.ones_like(correct))}


def next_token(
  module, batch: Batch, key: jax.Array
) -> tuple[Float[Array, " B"], Metrics]:
  """Cross-entropy of each token given those before it.

  A module with `hidden(tokens, length) -> [B, T, D]` and
  `unembed([B, t, D]) -> [B, t, V]` never has all its logits in memory: they
  are made, and made again in the backward pass, a few positions at a time.

  Args:
    module: `tokens`, `length` -> logits `[B, T, V]`.
    batch: `tokens` int32 `[B, T]` and `length` int32 `[B]`: position t is
      predicted if 1 <= t < length. A `label` is ignored.
    key: unused; a module with dropout carries its own random streams.

  Returns:
    The mean loss over an example's predicted tokens in nats, float32 `[B]`
    (0 if there are none), and the metrics `accuracy` and `token_loss`, both
    per predicted token over all examples.

  Raises:
    ValueError: if the batch has no `tokens` or no `length`.
  """
  del key
  features = _features(batch)
  for name in ("tokens", "length"):
    if name not in features:
      raise ValueError(f"next_token needs {name!r}: got {sorted(batch)}")
  target = features["tokens"][:, 1:]  # [B, T - 1]
  position = jnp.arange(target.shape[1])[None] + 1
  mask = (position < features["length"][:, None]).astype(jnp.float32)
  if hasattr(module, "hidden") and hasattr(module, "unembed"):
    hidden = module.hidden(**features)[:, :-1]
    loss, correct = _chunked(module.unembed, hidden, target, mask)
  else:
    each, hit = _cross_entropy(module(**features)[:, :-1], target)
    loss, correct = (each * mask).sum(1), (hit * mask).sum(1)
  count = mask.sum(1)
  metrics = {"accuracy": (correct, count), "token_loss": (loss, count)}
  return loss / jnp.maximum(count, 1), metrics


def regression(
  module, batch: Batch, key: jax.Array
) -> tuple[Float[Array, " B"], Metrics]:
  """Squared error, averaged over an example's outputs.

  Args:
    module: features by name -> predictions `[B, ...]`.
    batch: features and `label` of the predictions' shape.
    key: unused.

  Returns:
    The squared error, float32 `[B]`, and the same as metric `squared_error`.

  Raises:
    ValueError: if predictions and labels have different shapes.
  """
  del key
  prediction, label = module(**_features(batch)), _label(batch)
  if prediction.shape != label.shape:
    raise ValueError(
      "regression needs predictions of the labels' shape:"
      f" predictions {prediction.shape}, labels {label.shape}"
    )
  error = prediction.astype(jnp.float32) - label.astype(jnp.float32)
  loss = jnp.square(error).reshape(error.shape[0], -1).mean(1)
  return loss, {"squared_error": (loss, jnp.ones_like(loss))}


def _features(batch):
  """All entries but the label."""
  return {name: value for name, value in batch.items() if name != "label"}


def _label(batch):
  """The label, or a sentence."""
  if "label" not in batch:
    raise ValueError(f"the batch needs 'label': got {sorted(batch)}")
  return batch["label"]


def _cross_entropy(logits, label):
  """Logits [..., V] and labels [...] to loss and hits, float32 [...]."""
  logits = logits.astype(jnp.float32)
  picked = jnp.take_along_axis(logits, label[..., None], axis=-1)[..., 0]
  loss = jax.nn.logsumexp(logits, axis=-1) - picked
  return loss, (logits.argmax(-1) == label).astype(jnp.float32)


def _chunked(unembed, hidden, target, mask):
  """Masked sums over time of loss and hits [B], `_CHUNK` positions at once."""
  pad = -target.shape[1] % _CHUNK

  def chunks(x):  # [B, T, ...] -> [T / chunk, B, chunk, ...]
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, _CHUNK, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  @jax.checkpoint
  def step(total, chunk):
    hidden, target, mask = chunk
    each, hit = _cross_entropy(unembed(hidden), target)
    return (
      total[0] + (each * mask).sum(1),
      total[1] + (hit * mask).sum(1),
    ), None

  zero = jnp.zeros(target.shape[0], jnp.float32)
  each = tuple(chunks(x) for x in (hidden, target, mask))
  return jax.lax.scan(step, (zero, zero), each)[0]
