"""Personal models: each client has one of its own beside the global one.

A personal model is leaves on the device. It is trained on the same batches as
the global one, in the same step, and evaluated by `Work.view`.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from fedjax_peft import algorithm, link, objective, validate, work
from fedjax_peft import placement as placement_lib
from fedjax_peft.algorithms import memory


def ditto(
  model: objective.Model,
  local: work.Local,
  *,
  strength: float,
  personal: optax.GradientTransformation | None = None,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """Ditto: personal models v_i are held near the global one.

  The global model is that of federated averaging; v_i, on the device under
  `ditto/`, takes steps along the gradient of f_i(v) + strength/2 |v - x|^2, x
  being the model as it was sent. Strength 0 trains alone.

  Li et al., 2021, https://arxiv.org/abs/2012.04221

  Args:
    model: what is trained.
    local: how clients train; its batches serve both models.
    strength: lambda, >= 0. Plain SGD needs rate * strength < 2.
    personal: optimizer of the personal model; None is that of `local`.
    server: see `fedavg`.
    uplink: see `fedavg`.
    downlink: see `fedavg`.
    placement: see `fedavg`.
  """
  if not strength >= 0:
    raise ValueError(f"strength must be at least 0: got {strength=}")
  both = _twin(model, "ditto")

  def pull(grads, weights, sent):
    return {
      f"ditto/{k}": grads[f"ditto/{k}"]
      + strength * (weights[f"ditto/{k}"] - sent[k])
      for k in memory.under("ditto", weights)
      if k in sent
    }

  def descent(weights, rest, base, batch, now):
    mine = memory.under("ditto", weights)
    theirs = {k: v for k, v in weights.items() if k in model.params}
    moved = memory.under("ditto", rest)
    first = work.slope(model, theirs, rest, base, batch)
    second = work.slope(model, mine, rest | moved, base, batch)
    return _together(first, second, "ditto")

  how = memory.before(_divided(local, personal, "ditto"), memory.tie(pull))
  job = work.train(
    both, how, rules=_at_home("ditto", placement), descent=descent
  )

  def view(params):
    return params | memory.under("ditto", params)

  return memory.assemble(
    job._replace(view=view), server=server, uplink=uplink, downlink=downlink
  )


def apfl(
  model: objective.Model,
  local: work.Local,
  *,
  alpha: float = 0.5,
  adaptive: bool = False,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """APFL: a client uses alpha v_i + (1 - alpha) x, v_i being its own.

  v_i, on the device under `apfl/`, takes steps along the gradient of the loss
  of that mixture, in which x is the client's copy of the global model as it
  trains; x is that of federated averaging. alpha = 0 uses the global model,
  alpha = 1 trains alone.

  Deng et al., 2020, https://arxiv.org/abs/2003.13461

  Args:
    model: what is trained.
    local: how clients train; its batches serve both models.
    alpha: weight of the personal model, in [0, 1].
    adaptive: whether each client also steps its alpha (leaf `apfl/alpha`, on
      the device) along its gradient, with the optimizer of `local`, within
      [0, 1].
    server: see `fedavg`.
    uplink: see `fedavg`.
    downlink: see `fedavg`.
    placement: see `fedavg`.
  """
  if not 0 <= alpha <= 1:
    raise ValueError(f"alpha must be in [0, 1]: got {alpha=}")
  both = _twin(model, "apfl")
  if adaptive:
    both = both._replace(
      params={**both.params, "apfl/alpha": jnp.float32(alpha)}
    )

  def view(params):
    mine = memory.under("apfl", params)
    a = mine.pop("alpha") if adaptive else alpha
    mixed = {
      k: v if k in model.mutable else a * v + (1 - a) * params[k]
      for k, v in mine.items()
    }
    return params | mixed

  mixture = model._replace(
    loss=lambda params, *rest: model.loss(view(params), *rest)
  )

  def descent(weights, rest, base, batch, now):
    theirs = {k: v for k, v in weights.items() if k in model.params}
    mine = {k: v for k, v in weights.items() if k not in theirs}
    first = work.slope(model, theirs, rest, base, batch)
    second = work.slope(mixture, mine, rest | theirs, base, batch)
    second = second._replace(grads=memory.under("apfl", second.grads))
    return _together(first, second, "apfl")

  job = work.train(
    both, local, rules=_at_home("apfl", placement), descent=descent
  )
  if adaptive:
    job = _cut(job, "apfl/alpha")
  return memory.assemble(
    job._replace(view=view), server=server, uplink=uplink, downlink=downlink
  )


def pfedme(
  model: objective.Model,
  local: work.Local,
  *,
  strength: float,
  inner: optax.GradientTransformation,
  steps: int = 5,
  beta: float = 1.0,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """pFedMe: federated averaging of Moreau envelopes.

  In every local step `inner` looks for the personal model p that minimizes
  f(p) + strength/2 |p - y|^2 on the batch, from y on; the step is along
  strength (y - p). The last p stays on the device under `pfedme/`.

  Dinh et al., 2020, https://arxiv.org/abs/2006.08848

  Args:
    model: what is trained.
    local: how clients train; its rate is the paper's eta.
    strength: lambda, > 0.
    inner: optimizer of the personal model, anew for each batch.
    steps: inner steps a batch, K.
    beta: how far the server goes towards the mean; 1 is all the way.
    server: optax optimizer of beta times the mean delta.
    uplink: see `fedavg`.
    downlink: see `fedavg`.
    placement: see `fedavg`.
  """
  validate.positive(strength=strength, beta=beta)
  validate.at_least(1, steps=steps)
  plain = work.train(model, local, rules=placement)
  names = memory.sent_weights(plain, model)

  def descent(weights, rest, base, batch, now):
    def one(carry, _):
      p, opt, moved = carry
      found = work.slope(model, p, rest | moved, base, batch)
      grads = {
        k: g + strength * (p[k] - weights[k]) for k, g in found.grads.items()
      }
      updates, opt = inner.update(grads, opt, p)
      return (optax.apply_updates(p, updates), opt, found.changed), found.stats

    moved = {k: rest[k] for k in model.mutable}
    (p, _, changed), stats = jax.lax.scan(
      one, (weights, inner.init(weights), moved), length=steps
    )
    grads = {k: strength * (weights[k] - p[k]) for k in weights}
    return work.Slope(grads, jax.tree.map(lambda x: x[-1], stats), changed)

  def last(grads, old, weights=None):
    return grads, {k: weights[k] - grads[k] / strength for k in names}

  start = {k: jnp.asarray(model.params[k]) for k in names}
  note = optax.GradientTransformation(lambda w: {k: w[k] for k in names}, last)
  job = work.train(
    model, memory.before(local, note), rules=placement, descent=descent
  )

  def close(held, leaves, message):
    return message, memory.within("pfedme", held.job.opt[0])

  def view(params):
    return params | memory.under("pfedme", params)

  apply = optax.sgd(beta)
  if server is not None:
    apply = optax.chain(optax.scale(beta), server)
  job = memory.remember(job, own=memory.within("pfedme", start), close=close)
  return memory.assemble(
    job._replace(view=view), server=apply, uplink=uplink, downlink=downlink
  )


def _twin(model: objective.Model, prefix: str) -> objective.Model:
  """The model with every leaf that clients change twice."""
  names = model.params.keys() - model.served
  copies = {k: jnp.asarray(model.params[k]) for k in sorted(names)}
  return model._replace(
    params={**model.params, **memory.within(prefix, copies)},
    mutable=model.mutable | {f"{prefix}/{k}" for k in model.mutable},
  )


def _at_home(
  prefix: str, placement: Mapping[str, str] | None
) -> dict[str, str]:
  """Placement rules, those under a prefix on the device."""
  here = {f"{re.escape(prefix)}/.*": placement_lib.DEVICE}
  return here | dict(placement or {})


def _together(first: work.Slope, second: work.Slope, prefix: str) -> work.Slope:
  """Slopes of a global and a personal model as one."""
  personal = {f"personal_{k}": v for k, v in second.stats.items()}
  return work.Slope(
    first.grads | memory.within(prefix, second.grads),
    first.stats | personal,
    first.changed | memory.within(prefix, second.changed),
  )


def _divided(
  how: work.Local, personal: optax.GradientTransformation | None, prefix: str
) -> work.Local:
  """Local training with an optimizer of its own for the leaves of a prefix."""
  if personal is None:
    return how

  def labels(leaves):
    start = f"{prefix}/"
    return {k: "mine" if k.startswith(start) else "theirs" for k in leaves}

  def optimizer(round):
    parts = {"mine": personal, "theirs": how.optimizer(round)}
    return optax.partition(parts, labels)

  return how._replace(optimizer=optimizer)


def _cut(job: work.Work, name: str) -> work.Work:
  """A job after each of whose steps a leaf is cut to [0, 1]."""

  def step(carry, sent, base, batch):
    carry, stats = job.step(carry, sent, base, batch)
    cut = {name: jnp.clip(carry.params[name], 0, 1)}
    return carry._replace(params=carry.params | cut), stats

  return job._replace(step=step)
