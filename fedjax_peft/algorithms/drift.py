"""Drift: local steps that do not run away from the common optimum.

Where clients differ, several local steps lead each towards its own optimum and
the mean of where they end is not that of the mean loss. These algorithms
correct the direction of the steps, or what is made of them.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import optax

from fedjax_peft import algorithm, link, objective, validate, work
from fedjax_peft.algorithms import memory


def scaffold(
  model: objective.Model,
  local: work.Local,
  *,
  clients: int,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """SCAFFOLD: steps along g + c - c_i, with control variates c and c_i.

  Karimireddy et al., 2020, https://arxiv.org/abs/1910.06378, option II: c_i is
  the mean of the gradients that client i met in its last round, which for plain
  SGD is (x - y_i) / (steps * rate) - c + c_i. The server's c moves by |S| / N
  times the mean of what the c_i moved.

  c lives at the cloud under `scaffold/c/`, the c_i on the devices under
  `scaffold/mine/`: a message is twice as long, up and down. Where all take
  part, or the uplink weighs clients alike, c is the mean of all c_i, with the
  weights of the uplink.

  Args:
    model: what is trained.
    local: how clients train.
    clients: N, how many may take part.
    server: optax optimizer of the mean delta of the model.
    uplink: None weighs by examples. A clip bounds model and c together.
    downlink: see `fedavg`.
    placement: {regex: "cloud", "device" or "frozen"}; what stays on the device
      is not corrected.
  """
  names = memory.sent_weights(work.train(model, local, rules=placement), model)
  nothing = memory.zeros(model, names)

  def correct(grads, total, params=None, *, sent, **extra):
    c = memory.under("scaffold/c", sent)
    mine = memory.under("scaffold/mine", sent)
    total = {k: total[k] + grads[k] for k in names}
    return grads | {k: grads[k] + (c[k] - mine[k]) for k in names}, total

  tap = optax.GradientTransformationExtraArgs(lambda _: dict(nothing), correct)
  job = work.train(model, memory.before(local, tap), rules=placement)

  def close(held, leaves, message):
    mine = memory.under("scaffold/mine", leaves)
    total, steps = held.job.opt[0], jnp.maximum(held.job.steps, 1)
    new = {k: total[k] / steps.astype(total[k].dtype) for k in names}
    delta = {k: mine[k] - new[k] for k in names}
    return (
      message | memory.within("scaffold/c", delta),
      memory.within("scaffold/mine", new),
    )

  def understand(message, params):
    share = message[memory.SHARE]
    return {
      k: x * share.astype(x.dtype) if k.startswith("scaffold/c/") else x
      for k, x in message.items()
      if k != memory.SHARE
    }

  return memory.assemble(
    memory.remember(
      job,
      shared=memory.within("scaffold/c", nothing),
      own=memory.within("scaffold/mine", nothing),
      close=close,
    ),
    server=memory.server(server, understand, memory="scaffold"),
    uplink=uplink,
    downlink=downlink,
    clients=clients,
  )


def fednova(
  model: objective.Model,
  local: work.Local,
  *,
  momentum: float = 0.0,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """FedNova: averages directions, not distances.

  Client i reports its delta divided by |a_i|_1, the weight that its steps have
  in it, and |a_i|_1 itself (leaf `fednova/steps`); the server multiplies the
  mean of the one by the mean of the other. So who makes more steps does not
  pull the model towards its own optimum.

  Wang et al., 2020, https://arxiv.org/abs/2007.07481, with tau_eff as in its
  equation (7).

  Args:
    model: what is trained.
    local: how clients train.
    momentum: of the local optimizer, in [0, 1); 0 makes |a_i|_1 the number of
      steps.
    server: optax optimizer of what that gives.
    uplink: see `fedavg`. A clip bounds model and report together.
    downlink: see `fedavg`.
    placement: see `fedavg`.
  """
  if not 0 <= momentum < 1:
    raise ValueError(f"momentum must be in [0, 1): got {momentum=}")
  job = work.train(model, local, rules=placement)
  names, report = memory.sent_weights(job, model), "fednova/steps"

  def close(held, leaves, message):
    steps = held.job.steps.astype(jnp.float32)
    if momentum:
      lost = momentum * (1 - momentum**steps) / (1 - momentum)
      size = (steps - lost) / (1 - momentum)
    else:
      size = steps
    size = jnp.maximum(size, 1)
    scaled = {k: message[k] / size.astype(message[k].dtype) for k in names}
    return message | scaled | {report: leaves[report] - size}, {}

  def understand(message, params):
    size = memory.reported(report, message, params)
    return message | {
      k: message[k] * size.astype(message[k].dtype) for k in names
    }

  return memory.assemble(
    memory.remember(job, shared={report: jnp.zeros(())}, close=close),
    server=memory.server(server, understand, memory="fednova"),
    uplink=uplink,
    downlink=downlink,
  )


def feddyn(
  model: objective.Model,
  local: work.Local,
  *,
  alpha: float,
  clients: int,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """FedDyn: clients minimize f_i(y) - <l_i, y> + alpha/2 |y - x|^2.

  l_i, on the device under `feddyn/mine/`, moves by -alpha (y - x) after a
  round. The server keeps h, the mean of all l_i, in the state of its
  optimizer, and its model becomes mean(y) - h / alpha.

  Acar et al., 2021, https://arxiv.org/abs/2111.04263

  Args:
    model: what is trained.
    local: how clients train.
    alpha: strength of the dynamic regularizer, > 0.
    clients: N, how many may take part.
    server: optax optimizer of the step from x to mean(y) - h / alpha.
    uplink: None weighs by examples; the paper weighs clients alike.
    downlink: see `fedavg`.
    placement: see `fedavg`.
  """
  validate.positive(alpha=alpha)
  names = memory.sent_weights(work.train(model, local, rules=placement), model)
  nothing = memory.zeros(model, names)

  def pull(grads, weights, sent):
    mine = memory.under("feddyn/mine", sent)
    return {
      k: grads[k] - mine[k] + alpha * (weights[k] - sent[k]) for k in names
    }

  how = memory.before(local, memory.tie(pull))
  job = work.train(model, how, rules=placement)

  def close(held, leaves, message):
    mine = memory.under("feddyn/mine", leaves)
    new = {k: mine[k] + alpha * message[k] for k in names}
    return message, memory.within("feddyn/mine", new)

  def correct(message, h, params=None):
    share = message[memory.SHARE]
    h = {k: h[k] + alpha * share * message[k] for k in names}
    rest = {k: v for k, v in message.items() if k != memory.SHARE}
    return rest | {k: message[k] + h[k] / alpha for k in names}, h

  drag = optax.GradientTransformation(lambda _: dict(nothing), correct)
  own = memory.within("feddyn/mine", nothing)
  return memory.assemble(
    memory.remember(job, own=own, close=close),
    server=optax.chain(drag, memory.server(server, memory="feddyn")),
    uplink=uplink,
    downlink=downlink,
    clients=clients,
  )


def mime_lite(
  model: objective.Model,
  local: work.Local,
  *,
  momentum: float = 0.9,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """MimeLite with momentum: the server's momentum steers every local step.

  Local steps go along (1 - b) g + b m; m, at the cloud under
  `mime/momentum/`, stands still meanwhile and then becomes (1 - b) G + b m, G
  being the mean of the clients' gradients at the model they were sent. Each
  batch's gradient is taken twice, and a message is twice as long.

  Karimireddy et al., 2020, https://arxiv.org/abs/2008.03606

  Args:
    model: what is trained.
    local: how clients train; its optimizer is without momentum of its own.
    momentum: b, in [0, 1).
    server: optax optimizer of the mean delta of the model.
    uplink: see `fedavg`. A clip bounds model and momentum together.
    downlink: see `fedavg`.
    placement: see `fedavg`.
  """
  if not 0 <= momentum < 1:
    raise ValueError(f"momentum must be in [0, 1): got {momentum=}")
  names = memory.sent_weights(work.train(model, local, rules=placement), model)
  nothing, b = memory.zeros(model, names), momentum

  def pull(grads, weights, sent):
    m = memory.under("mime/momentum", sent)
    return {k: (1 - b) * grads[k] + b * m[k] for k in names}

  job = work.train(
    model, memory.before(local, memory.tie(pull)), rules=placement
  )

  def see(leaves, base, batch):
    weights = {k: leaves[k] for k in names}
    grads = work.slope(model, weights, leaves, base, batch).grads
    count = jnp.sum(batch.mask)  # the mean over a batch, as its sum
    return {k: g * count for k, g in grads.items()}, count

  def close(held, leaves, message):
    total, count = held.seen
    m = memory.under("mime/momentum", leaves)
    mean = {k: total[k] / jnp.maximum(count, 1) for k in names}
    delta = {k: (1 - b) * (m[k] - mean[k]) for k in names}
    return message | memory.within("mime/momentum", delta), {}

  return memory.assemble(
    memory.remember(
      job,
      shared=memory.within("mime/momentum", nothing),
      close=close,
      watch=memory.Watch((nothing, jnp.zeros(())), see),
    ),
    server=memory.server(server, memory="mime"),
    uplink=uplink,
    downlink=downlink,
  )
