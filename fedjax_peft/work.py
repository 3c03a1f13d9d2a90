"""Work: what one client does in one round.

Three pure functions: what it starts from, what it does with one batch, what it
reports. The executor vmaps them over lanes and scans them over batches; the
base has no client axis in any of them.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_peft import objective, placement, tree, validate

PyTree = Any
LANES = "lanes"  # axis of the clients that are at work side by side


class Sent(NamedTuple):
  """What a client gets at the start of a round.

  Attributes:
    params: {path: array}, all leaves that do not live on the device.
    extras: what else the algorithm sends along (the round, anchors, ...).
  """

  params: dict[str, jax.Array]
  extras: dict[str, Any]


class Client(NamedTuple):
  """Who does the work.

  Attributes:
    key: random key of (seed, round, client).
    id: int32 scalar.
    weight: int32 scalar, number of examples it trains on.
    traits: read-only facts about it (rank, device, ...), {name: scalar}.
  """

  key: jax.Array
  id: jax.Array
  weight: jax.Array
  traits: Mapping[str, jax.Array] = {}


class Moment(NamedTuple):
  """When and by whom a step is taken, for leaves that are not always trained.

  Attributes:
    round: int32 scalar.
    step: int32 scalar, the client's steps so far in this round.
    traits: as in `Client`.
  """

  round: jax.Array
  step: jax.Array
  traits: Mapping[str, jax.Array]


class Batch(NamedTuple):
  """One batch of one client.

  Attributes:
    examples: {feature: [B, ...]}.
    mask: float32 [B], 0 where the row is padding.
    key: random key of (seed, round, client, step); [stride] keys for a work
      that takes several steps at a time, whose rows are then [stride B].
  """

  examples: dict[str, jax.Array]
  mask: jax.Array
  key: jax.Array


class Work(NamedTuple):
  """What one client does in one round.

  Attributes:
    init: (sent, base, local, client) -> carry; see `Client`.
    step: (carry, sent, base, batch) -> (carry, stats), stats being
      {name: (numerator, denominator)}, which are summed over the steps.
    finish: (carry, sent) -> (message, local); the message is params - new, a
      descent direction.
    params: {path: array}, initial values of all leaves.
    placement: {path: label}.
    local: how examples become batches.
    stride: steps that a call of `step` takes. Where it is not 1 a client's
      last call may hold batches without any example, which must change
      nothing.
    prepare: (sent, base) -> (sent, base), done once a round for all clients
      where they are sent the same.
    view: (params) -> params of the client's own model, from what it is sent
      and what lives on it: what is evaluated.
    compact: (spec of the message, traits, round) -> spec of what has to cross
      the uplink: the entries that such a client trains in such a round.
    traits: names of the traits that it reads.
    cycle: rounds after which `compact` repeats itself.
    split: what a step costs a device whose model is computed elsewhere in part
      (`split.Split`); None: it computes everything.
    lanes: "any", or "one": clients work one after another, each as `handover`
      says; or "all": all at once, in one block whose axis is called `LANES`.
    handover: (carry of a client that starts, carry of the one before it in
      its lane) -> carry that it starts with; steps are 0 where there is none.
    watch: what looks at all that is reported (`trust.Watch`), or None.
  """

  init: Callable
  step: Callable
  finish: Callable
  params: dict[str, jax.Array]
  placement: dict[str, str]
  local: "Local"
  stride: int = 1
  prepare: Callable = lambda sent, base: (sent, base)
  view: Callable = lambda params: params
  compact: Callable = lambda spec, traits, round: spec
  traits: tuple[str, ...] = ()
  cycle: int = 1
  split: Any = None
  lanes: Literal["any", "one", "all"] = "any"
  handover: Callable | None = None
  watch: Any = None

  @property
  def rows(self) -> int:
    """Rows of the examples that a call of `step` gets."""
    return self.stride * self.local.batch


class Local(NamedTuple):
  """How a client trains: its optimizer and its batches; see `local`."""

  optimizer: Callable[[jax.Array], optax.GradientTransformation]
  batch: int
  epochs: int
  steps: int | None
  shuffle: bool
  drop_remainder: bool


def local(
  optimizer: optax.GradientTransformation
  | Callable[[jax.Array], optax.GradientTransformation],
  *,
  batch: int,
  epochs: int = 1,
  steps: int | None = None,
  shuffle: bool = True,
  drop_remainder: bool = False,
) -> Local:
  """How a client trains.

  Args:
    optimizer: an optax optimizer, started anew for each client and round; or
      a function of the round (int32 scalar, traced) that returns one, for
      learning rates that follow a schedule of the round:
      `lambda round: optax.sgd(0.1 * 0.99**round)`.
    batch: examples in a batch, B. The last batch of a pass may be smaller; its
      mean is over the examples that are there.
    epochs: passes over the client's examples.
    steps: batches of every client, instead of epochs.
    shuffle: a new random order for each pass.
    drop_remainder: leave out a last batch that is not full.

  Raises:
    ValueError: if a count is below 1.
  """
  validate.at_least(1, batch=batch, epochs=epochs)
  if steps is not None:
    validate.at_least(1, steps=steps)
  if isinstance(optimizer, optax.GradientTransformation):
    fixed = optimizer
    return Local(lambda _: fixed, batch, epochs, steps, shuffle, drop_remainder)
  return Local(optimizer, batch, epochs, steps, shuffle, drop_remainder)


class Carry(NamedTuple):
  """What a training client holds between two batches.

  Attributes:
    params: {path: array}, all leaves that it changes.
    opt: state of its optimizer.
    steps: int32 scalar, how many it has taken.
    traits: what it is.
  """

  params: dict[str, jax.Array]
  opt: PyTree
  steps: jax.Array
  traits: Mapping[str, jax.Array]


def train(
  model: objective.Model,
  how: Local,
  *,
  rules: Mapping[str, str] | None = None,
  tiers: tuple[str, ...] = ("cloud",),
  proximal: float = 0.0,
  active: Callable[[str, Moment], jax.Array] | None = None,
  descent: Callable[..., "Slope"] | None = None,
) -> Work:
  """Minimizes the model's loss with a local optimizer.

  An optimizer that takes extra arguments gets `sent`, the leaves as they were
  sent: so a term that ties a client to them is an optax transformation.

  Args:
    model: what is trained.
    how: optimizer and batches.
    rules: placement, {regex: tier name, "device" or "frozen"}.
    tiers: names of the tiers, lowest first.
    proximal: mu of FedProx: adds mu/2 |params - sent|^2 to the loss, over
      the leaves that travel (Li et al., 2020,
      https://arxiv.org/abs/1812.06127).
    active: (path, Moment) -> bool scalar, whether a leaf is trained in a step;
      None trains all in every step.
    descent: (weights, rest, base, batch, Moment) -> Slope, the direction that a
      step takes; None is `slope` of the model's loss.

  Returns:
    The Work. Its message holds the leaves that leave the device.
  """
  labels = placement.resolve(
    list(model.params), rules, list(tiers), model.mutable, model.served
  )
  unmoved, owned, moving = placement.split(labels)
  changed_names = sorted(model.mutable.difference(unmoved))

  def init(sent, base, local_rows, client):
    params = {k: sent.params[k] for k in moving} | local_rows
    weights = {k: v for k, v in params.items() if k not in model.mutable}
    opt = how.optimizer(sent.extras["round"]).init(weights)
    return Carry(params, opt, jnp.int32(0), client.traits)

  def step(carry, sent, base, batch):
    moved = {k: v for k, v in carry.params.items() if k in model.mutable}
    weights = {k: v for k, v in carry.params.items() if k not in model.mutable}
    now = Moment(sent.extras["round"], carry.steps, carry.traits)
    rest = sent.params | moved
    if descent is None:
      grads, stats, changed = slope(model, weights, rest, base, batch)
    else:
      grads, stats, changed = descent(weights, rest, base, batch, now)
    if proximal:
      grads = {
        k: g + proximal * (weights[k] - sent.params[k]) if k in moving else g
        for k, g in grads.items()
      }
    trained = {k: active(k, now) for k in weights} if active else {}
    grads = {
      k: _if(trained.get(k), g, jnp.zeros_like(g)) for k, g in grads.items()
    }
    optimizer = optax.with_extra_args_support(
      how.optimizer(sent.extras["round"])
    )
    updates, opt = optimizer.update(grads, carry.opt, weights, sent=sent.params)
    new = optax.apply_updates(weights, updates)
    new = {k: _if(trained.get(k), v, weights[k]) for k, v in new.items()}
    new |= {k: changed[k] for k in changed_names}
    return Carry(new, opt, carry.steps + 1, carry.traits), stats

  def finish(carry, sent):
    message = {k: sent.params[k] - carry.params[k] for k in moving}
    return message, {k: carry.params[k] for k in owned}

  def prepare(sent, base):
    params, base = model.fold(sent.params, base)
    return sent._replace(params=params), base

  return Work(init, step, finish, model.params, labels, how, prepare=prepare)


class Slope(NamedTuple):
  """Which way a step goes; see `slope`.

  Attributes:
    grads: {path: array}, of the weights.
    stats: as in `Work.step`.
    changed: new values of the leaves that the forward pass changes.
  """

  grads: dict[str, jax.Array]
  stats: dict[str, tuple[jax.Array, jax.Array]]
  changed: dict[str, jax.Array]


def slope(
  model: objective.Model,
  weights: Mapping[str, jax.Array],
  rest: Mapping[str, jax.Array],
  base: PyTree,
  batch: Batch,
  *,
  penalty: Callable[[dict], jax.Array] | None = None,
) -> Slope:
  """Gradient of the mean loss over the examples of a batch that are there.

  Args:
    model: the loss, and names that it knows; others are ignored.
    weights: what the gradient is taken by.
    rest: other leaves; where a name is in both, the weight counts.
    base: frozen weights.
    batch: of one client.
    penalty: (params) -> [B], added to the loss, but not to the stats.
  """
  count = jnp.sum(batch.mask)

  def mean_loss(weights):
    params = {**rest, **weights}
    each, metrics, changed = model.loss(params, base, batch.examples, batch.key)
    total = masked_sum(batch.mask, each)
    mean = total / jnp.maximum(count, 1)
    if penalty is not None:
      more = masked_sum(batch.mask, penalty(params))
      mean = mean + more / jnp.maximum(count, 1)
    return mean, (total, metrics, changed)

  grads, (total, metrics, changed) = jax.grad(mean_loss, has_aux=True)(
    dict(weights)
  )
  stats = {"loss": (total, count), **masked_metrics(batch.mask, metrics)}
  return Slope(grads, stats, changed)


def _if(condition, yes: jax.Array, no: jax.Array) -> jax.Array:
  """A select, or `yes` where there is no condition."""
  return yes if condition is None else jnp.where(condition, yes, no)


def gradient(
  model: objective.Model,
  *,
  batch: int,
  rules: Mapping[str, str] | None = None,
  tiers: tuple[str, ...] = ("cloud",),
) -> Work:
  """Reports the gradient over all of a client's examples, training nothing.

  With a weighted mean at the server this is distributed gradient descent
  (FedSGD): the cohort's pooled gradient whatever the number of clients.

  Args:
    model: what is trained.
    batch: examples whose gradient is computed at once; no effect on the sum.
    rules: placement; "device" makes no sense here and is refused.
    tiers: names of the tiers, lowest first.
  """
  labels = placement.resolve(
    list(model.params), rules, list(tiers), model.mutable, model.served
  )
  if placement.DEVICE in labels.values() or model.mutable:
    raise ValueError(
      "fedsgd sends gradients and keeps nothing on the device: got leaves that "
      "live there or change in the forward pass; use fedavg for them"
    )
  moving = placement.split(labels).moving

  def init(sent, base, local_rows, client):
    zeros = tree.zeros_like({k: sent.params[k] for k in moving})
    return zeros, jnp.zeros(())

  def step(carry, sent, base, batch):
    def sum_loss(weights):
      params = sent.params | weights
      each, metrics, _ = model.loss(params, base, batch.examples, batch.key)
      total = masked_sum(batch.mask, each)
      return total, (total, metrics)

    weights = {k: sent.params[k] for k in moving}
    grads, (total, metrics) = jax.grad(sum_loss, has_aux=True)(weights)
    count = jnp.sum(batch.mask)
    stats = {"loss": (total, count), **masked_metrics(batch.mask, metrics)}
    summed = jax.tree.map(jnp.add, carry[0], grads)
    return (summed, carry[1] + count), stats

  def finish(carry, sent):
    summed, count = carry
    return tree.scale(summed, 1 / jnp.maximum(count, 1)), {}

  how = local(optax.sgd(1.0), batch=batch, shuffle=False)
  return Work(init, step, finish, model.params, labels, how)


def masked_metrics(mask: jax.Array, metrics: Mapping) -> dict:
  """Sums numerators and denominators over the examples that are there."""
  return {
    name: (masked_sum(mask, top), masked_sum(mask, bottom))
    for name, (top, bottom) in metrics.items()
  }


def masked_sum(mask: jax.Array, values: jax.Array) -> jax.Array:
  """Sum over examples, in which padding counts zero even where it is nan."""
  values = values.astype(jnp.float32)
  return jnp.sum(jnp.where(mask > 0, values * mask, 0))
