"""Aliases: known algorithms, each a few lines of the same mechanism."""

from collections.abc import Callable, Mapping

import optax

from fedjax_peft import (
  adaptive,
  algorithm,
  factored,
  hierarchy,
  link,
  links,
  objective,
  rules,
  work,
)
from fedjax_peft import reduce as reduce_lib


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
  rule: rules.Rule | None = None,
  ranks: bool = False,
  watch: bool = False,
  reduce: reduce_lib.Reduce | None = None,
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
    rule: how low-rank adapters are aggregated; None averages every leaf.
    ranks: clients have ranks of their own, their trait `rank`: each trains the
      first columns of A and rows of B.
    watch: write diagnostics of the aggregation into the record. Where the rule
      is linear, the server then hears more than a sum: no masks.
    reduce: how messages become one where no rule says so, such as
      `robust.median()`; None adds them up.

  Raises:
    ValueError: if the rule and what it is put together with do not fit.
  """
  if rule is not None or ranks or watch:
    if reduce is not None:
      raise ValueError(
        "what adapters become is said by a rule or by a reduction: got "
        f"reduce='{reduce.name}' beside a rule, ranks or watch; leave one out"
      )
    rule = rules.fedit() if rule is None else rule
    return _ruled(
      model,
      local,
      rule,
      ranks=ranks,
      watch=watch,
      server=server,
      uplink=uplink,
      downlink=downlink,
      placement=placement,
      proximal=proximal,
    )
  job = work.train(model, local, rules=placement, proximal=proximal)
  cloud = hierarchy.tier(
    "cloud", link=uplink, reduce=reduce, server=server, down=downlink
  )
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


def _ruled(
  model,
  local,
  rule,
  *,
  ranks,
  watch,
  server,
  uplink,
  downlink,
  placement,
  proximal,
):
  """Federated averaging with a rule for low-rank adapters."""
  bound = rules.bind(rule, model, watch=watch)
  rules.check(rule, server, uplink, ranks)
  job = work.train(
    model,
    local,
    rules={**(placement or {}), **rule.placement},
    proximal=proximal,
    active=rule.active,
    descent=rules.descent(bound, model),
  )
  job = rules.compacted(job, bound)
  if ranks:
    job = rules.ranked(job, bound)
  apply = optax.sgd(1.0) if server is None else server
  if bound.server is not None:
    apply = optax.chain(bound.server, apply)
  cloud = hierarchy.tier(
    "cloud",
    link=uplink,
    reduce=bound.reduce,
    server=apply,
    down=downlink,
    news=rules.news(rule, bound.pairs),
    watch=rules.watch(bound.pairs) if watch else None,
  )
  return algorithm.federated(job, [cloud])


def flasc(
  model: objective.Model,
  local: work.Local,
  *,
  down: float = 0.25,
  up: float = 0.25,
  **options,
) -> algorithm.Algorithm:
  """Sparse adapters on the way down and up (Kuo et al., arXiv 2406.05233).

  A client gets the largest entries of all adapters together, trains them
  densely, and reports the largest entries of what has changed since.

  Args:
    model: what is trained.
    local: how clients train.
    down: fraction of the entries that goes down.
    up: fraction of the entries that comes up.
    **options: of `fedavg`; the paper's server is Adam.
  """
  uplink = link.chain(links.weigh(), links.top_k(up))
  return fedavg(
    model, local, uplink=uplink, downlink=links.top_k(down), **options
  )


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
