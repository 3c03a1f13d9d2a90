"""Examples: local steps that hide any one example of a client.

Each example's gradient of what is trained is clipped by itself, noise is added
to their sum, and the sum is divided by the batch size that was planned, so
that an example that is not there moves nothing but its own part. What a client
then sends, and all that is made of it, tells no more.

The guarantee is about one example of one client: two data sets are neighbours
if in one of them an example is taken away and its place in every batch stays
empty. How many examples a client has is no secret. A client's passes are
shuffled, not sampled, so nothing is gained by chance: each time an example is
visited is one Gaussian release. Losses in the record are not protected.

Abadi et al., Deep Learning with Differential Privacy, 2016,
https://arxiv.org/abs/1607.00133; Ponomareva et al., How to DP-fy ML, 2023,
https://arxiv.org/abs/2303.00654 (units of privacy, zero-out neighbours)
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from fedjax_peft import link, objective, tree, validate, work
from fedjax_peft.links import clipping
from fedjax_peft.privacy import events


def train(
  model: objective.Model,
  how: work.Local,
  *,
  clip_norm: float,
  multiplier: float,
  **options,
) -> work.Work:
  """As `work.train`, with steps that hide any one example.

  Args:
    model: what is trained; none of its leaves may change in the forward pass.
    how: optimizer and batches.
    clip_norm: see `descent`.
    multiplier: see `descent`.
    **options: of `work.train`, but for `descent`.

  Returns:
    The Work, for `algorithm.extended(made, job=...)` or `federated`.

  Raises:
    ValueError: as `descent` does.

  Example:
    >>> import optax
    >>> how = work.local(optax.sgd(0.1), batch=8, epochs=2)
    >>> event(1.1), participations(how, rounds=30)
    (Poisson(multiplier=1.1, rate=1.0), 60)
  """
  down = descent(
    model, batch=how.batch, clip_norm=clip_norm, multiplier=multiplier
  )
  return work.train(model, how, descent=down, **options)


def descent(
  model: objective.Model, *, batch: int, clip_norm: float, multiplier: float
) -> Callable[..., work.Slope]:
  """The direction of a private step, for `work.train`.

  Guarantees:
    the sum of clipped gradients moves by at most
    clip_norm * (1 + 4 eps of the lowest leaf dtype) if one example becomes
    padding, whatever it holds: gradients that are not finite count as zero.
    Every value of the sum has independent normal noise of standard deviation
    multiplier * clip_norm. The base has no axis of examples.

  Args:
    model: what is trained. Each example has a random key of its own.
    batch: planned examples of a batch, by which the sum is divided; that fewer
      are there makes a step shorter.
    clip_norm: L2 bound on the gradient of one example, over all that a client
      trains, > 0.
    multiplier: std of the noise / clip_norm, >= 0.

  Returns:
    (weights, rest, base, batch, Moment) -> Slope. The fraction of examples
    whose gradient was clipped is the stat `clipped`.

  Raises:
    ValueError: if an argument is out of range, or the forward pass changes
      leaves: they would mix the examples of a batch without any noise.
  """
  validate.positive(clip_norm=clip_norm)
  validate.at_least(1, batch=batch)
  event(multiplier)
  if model.mutable:
    raise ValueError(
      "leaves that change in the forward pass tell of examples without noise: "
      f"got {sorted(model.mutable)}; use a norm without batch statistics, such "
      "as nnx.LayerNorm or nnx.GroupNorm"
    )
  clip = clipping.clip(clip_norm)

  def down(weights, rest, base, rows, now):
    noise_key, example_key = jax.random.split(rows.key)
    total, stats = clipped_sum(
      model, clip, weights, rest, base, rows._replace(key=example_key)
    )
    leaves, treedef = jax.tree.flatten(total)
    keys = jax.random.split(noise_key, len(leaves))
    std = multiplier * clip_norm

    def mean(key, x, w):
      noisy = x + jnp.float32(std) * jax.random.normal(key, x.shape)
      return (noisy / batch).astype(w.dtype)

    flat = map(mean, keys, leaves, jax.tree.leaves(dict(weights)))
    return work.Slope(jax.tree.unflatten(treedef, list(flat)), stats, {})

  return down


def clipped_sum(
  model: objective.Model,
  clip: link.Link,
  weights: Mapping[str, jax.Array],
  rest: Mapping[str, jax.Array],
  base,
  batch: work.Batch,
) -> tuple[dict[str, jax.Array], dict[str, tuple[jax.Array, jax.Array]]]:
  """The sum of the clipped gradients of a batch, without noise.

  Args:
    model: the loss.
    clip: what is done to the gradient of one example.
    weights: what the gradient is taken by.
    rest: other leaves; where a name is in both, the weight counts.
    base: frozen weights.
    batch: of one client; padding counts zero.

  Returns:
    (float32 sums, stats): as in `work.Slope`.
  """

  def loss(weights, row, key):
    one = {k: v[None] for k, v in row.items()}  # a batch of one
    each, metrics, _ = model.loss({**rest, **weights}, base, one, key)
    return each[0], (each, metrics)

  def gradient(row, key):
    grads, (each, metrics) = jax.grad(loss, has_aux=True)(
      dict(weights), row, key
    )
    sent, _, stats = clip.send(grads, (), (), link.alone())
    return sent, each[0], jax.tree.map(lambda x: x[0], metrics), stats

  keys = jax.random.split(batch.key, batch.mask.shape[0])
  sent, each, metrics, clips = jax.vmap(gradient)(batch.examples, keys)
  here = batch.mask > 0

  def total(x):
    held = tree.where(here, x, jnp.zeros_like(x))
    return jnp.sum(held.astype(jnp.float32), axis=0)

  count = jnp.sum(batch.mask)
  over = jnp.maximum(clips["clip/fraction"], clips["clip/nonfinite"])
  stats = {
    "loss": (work.masked_sum(batch.mask, each), count),
    "clipped": (work.masked_sum(batch.mask, over), count),
    **work.masked_metrics(batch.mask, metrics),
  }
  return jax.tree.map(total, sent), stats


def event(multiplier: float) -> events.Poisson:
  """What one visit of an example releases.

  That an example's place stays empty moves a sum as far as one example more or
  less, so it is accounted as such a round of everyone.

  Args:
    multiplier: std of the noise / clip_norm, >= 0.
  """
  return events.poisson(multiplier, 1.0)


def participations(how: work.Local, rounds: int, *, smallest: int = 1) -> int:
  """How often one example is visited at most: the events to account.

  A pass visits each example once at most.

  Args:
    how: how clients train.
    rounds: in which its client takes part, at most; all, if who does is left
      to chance.
    smallest: examples of the smallest client, whose passes are the shortest;
      it matters where `how.steps` is set.

  Raises:
    ValueError: if a count is below 1.
  """
  validate.at_least(1, rounds=rounds, smallest=smallest)
  if how.steps is None:
    return how.epochs * rounds
  if how.drop_remainder:
    a_pass = max(smallest // how.batch, 1)
  else:
    a_pass = math.ceil(smallest / how.batch)
  return math.ceil(how.steps / a_pass) * rounds
