"""Contrast: clients whose features stay near those of the global model."""

from collections.abc import Mapping

import jax.numpy as jnp
import optax

from fedjax_peft import algorithm, link, objective, validate, work
from fedjax_peft.algorithms import memory, seeing


def moon(
  model: objective.Model,
  local: work.Local,
  *,
  features: seeing.Features | None = None,
  mu: float = 1.0,
  temperature: float = 0.5,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """MOON: features are drawn to the global model's, away from the last ones.

  Adds mu times -log(e^(s/t) / (e^(s/t) + e^(p/t))) to an example's loss, s and
  p being the cosines of its features with those of the model that was sent and
  of the client's model at the end of its last round, which stays on the device
  under `moon/previous/` (at first, the initial model).

  Li et al., 2021, https://arxiv.org/abs/2103.16257

  Args:
    model: what is trained.
    local: how clients train.
    features: (module, examples) -> [B, D], what is compared; None is what the
      head reads, for a module with a method `features`.
    mu: weight of the term.
    temperature: t, > 0.
    server: see `fedavg`.
    uplink: see `fedavg`.
    downlink: see `fedavg`.
    placement: see `fedavg`.

  Raises:
    ValueError: if no features are given and the module has none.
  """
  validate.positive(temperature=temperature)
  if features is None:
    instead = ", or write moon(..., features=lambda module, examples: ...)"
    features = seeing.features_of(model, "moon", instead)
  names = memory.sent_weights(work.train(model, local, rules=placement), model)

  def descent(weights, rest, base, batch, now):
    def seen(params):
      return features(model.module(params, base, batch.key), batch.examples)

    ours = {**weights, **rest}  # what was sent, where it was
    old = memory.under("moon/previous", rest)
    z_sent, z_old = seen(ours), seen(ours | old)

    def contrast(params):
      z = seen(params)
      near = _cosine(z, z_sent) / temperature
      far = _cosine(z, z_old) / temperature
      return mu * (jnp.logaddexp(near, far) - near)

    return work.slope(model, weights, rest, base, batch, penalty=contrast)

  job = work.train(model, local, rules=placement, descent=descent)

  def close(held, leaves, message):
    new = {k: held.job.params[k] for k in names}
    return message, memory.within("moon/previous", new)

  start = {k: jnp.asarray(model.params[k]) for k in names}
  return memory.assemble(
    memory.remember(
      job, own=memory.within("moon/previous", start), close=close
    ),
    server=server,
    uplink=uplink,
    downlink=downlink,
  )


def _cosine(x, y):
  """Cosines of the rows of two matrices [B, D], 0 where a row is zero."""
  square = jnp.sum(x * x, -1) * jnp.sum(y * y, -1)
  length = jnp.sqrt(jnp.where(square > 0, square, 1))  # no nan in its gradient
  return jnp.sum(x * y, -1) / length
