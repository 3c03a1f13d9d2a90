"""Aliases: known algorithms, each a few lines of the same mechanism."""

from collections.abc import Callable, Mapping

import optax

from fedjax_peft import (
  adaptive,
  algorithm,
  factored,
  hierarchy,
  link,
  objective,
  work,
)


def fedavg(
  model: objective.Model,
  local: work.Local,
  *,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
  proximal: float = 0.0,
  lowrank: bool | None = None,
) -> algorithm.Algorithm:
  """Federated averaging (McMahan et al., 2017, arXiv 1602.05629).

  Args:
    model: what is trained.
    local: how clients train.
    server: optax optimizer of the mean delta; None applies it as it is.
    uplink: what a client's message crosses; None weighs by examples.
    downlink: what the model crosses on its way to the clients.
    placement: {regex: "cloud", "device" or "frozen"}.
    proximal: mu of FedProx.
    lowrank: compute on shared weights where the local steps are plain SGD on
      Linear layers (see `factored`). None does so when it applies and pays,
      True insists, False never does.
  """
  job = work.train(model, local, rules=placement, proximal=proximal)
  cloud = hierarchy.tier("cloud", link=uplink, server=server, down=downlink)
  general = algorithm.federated(job, [cloud])
  if lowrank is False:
    return general

  def specialize(data):
    steps = factored.steps_of(local, data.train.sizes)
    reason = "it adds a proximal term" if proximal else ""
    reason = reason or factored.why_not(
      job, model, (cloud,), data.examples, int(steps.max(initial=1))
    )
    if not reason:
      lean = factored.train(model, local, job, steps)
      return algorithm.federated(lean, [cloud]), "low-rank local SGD"
    if lowrank:
      raise ValueError(
        f"low-rank local SGD does not apply: {reason}; use lowrank=None"
      )
    return general, f"every client its own weights: {reason}"

  return general._replace(specialize=specialize)


def fedprox(
  model: objective.Model, local: work.Local, *, mu: float, **options
) -> algorithm.Algorithm:
  """Clients are held near where they start (Li et al., arXiv 1812.06127)."""
  return fedavg(model, local, proximal=mu, **options)


def fedavgm(
  model: objective.Model,
  local: work.Local,
  *,
  learning_rate: float = 1.0,
  momentum: float = 0.9,
  **options,
) -> algorithm.Algorithm:
  """Momentum at the server (Hsu et al., 2019, arXiv 1909.06335)."""
  server = optax.sgd(learning_rate, momentum=momentum)
  return fedavg(model, local, server=server, **options)


def _adaptive(make: Callable, name: str) -> Callable:
  """An alias for an adaptive server optimizer."""

  def alias(
    model: objective.Model,
    local: work.Local,
    *,
    learning_rate: float = 1e-2,
    eps: float = 1e-3,
    **options,
  ) -> algorithm.Algorithm:
    server = make(learning_rate, eps=eps)
    return fedavg(model, local, server=server, **options)

  alias.__name__ = name
  alias.__doc__ = f"""`adaptive.{make.__name__}` at the server.

  Reddi et al., Adaptive Federated Optimization, arXiv 2003.00295.
  """
  return alias


fedadam = _adaptive(adaptive.adam, "fedadam")
fedyogi = _adaptive(adaptive.yogi, "fedyogi")
fedadagrad = _adaptive(adaptive.adagrad, "fedadagrad")


def fedsgd(
  model: objective.Model,
  *,
  batch: int,
  server: optax.GradientTransformation,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """Distributed gradient descent: every client sends its mean gradient.

  Args:
    model: what is trained.
    batch: examples whose gradient a client computes at once.
    server: optax optimizer that takes the step.
    uplink: see `fedavg`.
    downlink: see `fedavg`.
    placement: {regex: "cloud" or "frozen"}.
  """
  job = work.gradient(model, batch=batch, rules=placement)
  cloud = hierarchy.tier("cloud", link=uplink, server=server, down=downlink)
  return algorithm.federated(job, [cloud])
