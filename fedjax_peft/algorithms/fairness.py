"""Fairness: objectives in which those who fare worse count more."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from fedjax_peft import algorithm, link, links, objective, validate, work
from fedjax_peft.algorithms import memory


def qffl(
  model: objective.Model,
  local: work.Local,
  *,
  q: float,
  rate: float,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """q-FedAvg: minimizes the mean of F_i^(q + 1) / (q + 1).

  Client i reports F^q (x - y) / rate and h = q F^(q - 1) |x - y|^2 / rate^2 +
  F^q / rate (leaf `qffl/h`), F being its loss at the model x that it was sent;
  the server steps by the ratio of the means. q = 0 is federated averaging. One
  more forward pass a batch.

  Li et al., 2020, https://arxiv.org/abs/1905.10497, Algorithm 2.

  Args:
    model: what is trained.
    local: how clients train.
    q: how much more the worse off count, >= 0.
    rate: learning rate of the local steps, > 0; 1 / L in the paper.
    server: optax optimizer of the ratio.
    uplink: see `fedavg`. A clip bounds model and report together.
    downlink: see `fedavg`.
    placement: see `fedavg`.
  """
  validate.positive(rate=rate)
  if not q >= 0:
    raise ValueError(f"q must be at least 0: got {q=}")
  job = work.train(model, local, rules=placement)
  names, report = memory.sent_weights(job, model), "qffl/h"

  def close(held, leaves, message):
    total, count = held.seen
    loss = total / jnp.maximum(count, 1) + 1e-10  # 0^(q - 1), as the authors
    squares = [jnp.sum(jnp.square(message[k] / rate)) for k in names]
    norm = jnp.sum(jnp.stack(squares))
    h = q * loss ** (q - 1) * norm + loss**q / rate
    scaled = {k: loss**q * (message[k] / rate) for k in names}
    return message | scaled | {report: leaves[report] - h}, {}

  def understand(message, params):
    h = memory.reported(report, message, params)
    return message | {k: message[k] / h for k in names}

  return memory.assemble(
    memory.remember(
      job,
      shared={report: jnp.zeros(())},
      close=close,
      watch=_loss_as_sent(model),
    ),
    server=memory.server(server, understand, memory="qffl"),
    uplink=uplink,
    downlink=downlink,
  )


def afl(
  model: objective.Model,
  local: work.Local,
  *,
  clients: int,
  rate: float,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """Agnostic federated learning: the worst mixture of clients is minimized.

  The server holds a weight for each of N clients (leaf `afl/weights`, at first
  all 1 / N). A client reports its delta times N times its weight, and N times
  its loss at its own place; the weights go up along the losses and back onto
  the simplex. N numbers cross with every message, up and down.

  Mohri et al., 2019, https://arxiv.org/abs/1902.00146, with several local
  steps for one.

  Args:
    model: what is trained.
    local: how clients train.
    clients: N, the size of the population.
    rate: of the weights, > 0.
    server: optax optimizer of the weighted delta.
    uplink: None weighs clients alike, as the weights want it.
    downlink: see `fedavg`.
    placement: see `fedavg`.
  """
  validate.positive(rate=rate)
  validate.at_least(1, clients=clients)
  job = work.train(model, local, rules=placement)
  names, leaf = memory.sent_weights(job, model), "afl/weights"

  def close(held, leaves, message):
    total, count = held.seen
    loss = total / jnp.maximum(count, 1)
    here = jnp.arange(clients) == held.client.id
    weight = clients * jnp.sum(jnp.where(here, leaves[leaf], 0))
    scaled = {k: weight * message[k] for k in names}
    # A descent direction: the weights go up.
    up = jnp.where(here, -rate * clients * loss, 0.0)
    return message | scaled | {leaf: up}, {}

  def understand(message, params):
    moved = simplex(params[leaf] - message[leaf])
    return message | {leaf: params[leaf] - moved}

  return memory.assemble(
    memory.remember(
      job,
      shared={leaf: jnp.full((clients,), 1 / clients)},
      close=close,
      watch=_loss_as_sent(model),
    ),
    server=memory.server(server, understand, memory="afl"),
    uplink=links.weigh("clients") if uplink is None else uplink,
    downlink=downlink,
  )


def simplex(x: jax.Array) -> jax.Array:
  """Nearest point of the simplex: not negative, sum one.

  Duchi et al., 2008, https://doi.org/10.1145/1390156.1390191

  Args:
    x: float [N].

  Example:
    >>> simplex(jnp.array([0.5, 0.9, -1.0]))
    Array([0.3, 0.7, 0. ], dtype=float32)
  """
  falling = -jnp.sort(-x)
  count = jnp.arange(1, x.size + 1, dtype=x.dtype)
  excess = (jnp.cumsum(falling) - 1) / count
  kept = jnp.sum(falling > excess)
  return jnp.maximum(x - excess[kept - 1], 0)


def _loss_as_sent(model: objective.Model) -> memory.Watch:
  """A client's summed loss, and its count, at the leaves it was sent."""

  def see(leaves, base, batch):
    each, _, _ = model.loss(leaves, base, batch.examples, batch.key)
    return work.masked_sum(batch.mask, each), jnp.sum(batch.mask)

  return memory.Watch((jnp.zeros(()), jnp.zeros(())), see)
