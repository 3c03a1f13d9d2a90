"""Meta-learning: a model from which a client gets far in a few steps."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from fedjax_peft import algorithm, alias, link, objective, validate, work
from fedjax_peft.algorithms import memory


def per_fedavg(
  model: objective.Model,
  local: work.Local,
  *,
  rate: float,
  first_order: bool = True,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """Per-FedAvg: minimizes the loss after one step of SGD on a client.

  Each local step takes the gradient of f(y - rate grad g(y)), g being the loss
  of every other example of the batch and f that of the rest (of the only one,
  if there is one). Evaluate with `evaluation(..., personalize=...)`.

  Fallah et al., 2020, https://arxiv.org/abs/2002.07948

  Args:
    model: what is trained.
    local: how clients train; its optimizer takes the outer steps.
    rate: of the inner step, > 0.
    first_order: leave out the second derivatives (FO-MAML).
    server: see `fedavg`.
    uplink: see `fedavg`.
    downlink: see `fedavg`.
    placement: see `fedavg`.
  """
  validate.positive(rate=rate)

  def descent(weights, rest, base, batch, now):
    odd = jnp.arange(batch.mask.size) % 2 == 1
    rows = jnp.where(odd, batch.mask, 0)
    rows = jnp.where(jnp.sum(rows) > 0, rows, batch.mask)
    support = batch._replace(mask=jnp.where(odd, 0, batch.mask))

    def adapted(weights):
      inner = work.slope(model, weights, rest, base, support).grads
      if first_order:
        inner = jax.lax.stop_gradient(inner)
      return {k: w - rate * inner[k] for k, w in weights.items()}

    ahead = model._replace(
      loss=lambda params, *more: model.loss(
        params | adapted({k: params[k] for k in weights}), *more
      )
    )
    query = batch._replace(mask=rows)
    return work.slope(ahead, weights, rest, base, query)

  job = work.train(model, local, rules=placement, descent=descent)
  return memory.assemble(job, server=server, uplink=uplink, downlink=downlink)


def reptile(
  model: objective.Model, local: work.Local, *, rate: float, **options
) -> algorithm.Algorithm:
  """Reptile: the server goes part of the way to the mean of the clients.

  Nichol et al., 2018, https://arxiv.org/abs/1803.02999

  Args:
    model: what is trained.
    local: how clients train.
    rate: of the server, > 0; 1 is federated averaging.
    **options: see `fedavg`.
  """
  validate.positive(rate=rate)
  return alias.fedavg(model, local, server=optax.sgd(rate), **options)
