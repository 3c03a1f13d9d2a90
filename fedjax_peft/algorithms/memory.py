"""Memory: leaves that the loss does not know.

Control variates, anchors, personal models, reports: what an algorithm keeps or
says beside the model is leaves like any other, under names of its own. Those at
the cloud cross the links as deltas and are counted in bytes, those on the
device are the client's rows. There is no other way from one round to the next.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_peft import (
  algorithm,
  hierarchy,
  link,
  links,
  objective,
  placement,
  validate,
  work,
)

PyTree = Any
Leaves = dict[str, jax.Array]

SHARE = "share"  # what `tally` adds to a message when it is received


def within(prefix: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Puts leaves under a prefix.

  Example:
    >>> within("mine", {"up/kernel": 1})
    {'mine/up/kernel': 1}
  """
  return {f"{prefix}/{k}": v for k, v in leaves.items()}


def under(prefix: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
  """The leaves under a prefix, by their names without it.

  Example:
    >>> under("mine", {"mine/up/kernel": 1, "up/kernel": 2})
    {'up/kernel': 1}
  """
  start = f"{prefix}/"
  return {
    k.removeprefix(start): v for k, v in leaves.items() if k.startswith(start)
  }


def sent_weights(job: work.Work, model: objective.Model) -> tuple[str, ...]:
  """Names of what clients train and report, sorted; running statistics not."""
  moving = placement.split(job.placement).moving
  return tuple(k for k in moving if k in model.params.keys() - model.mutable)


def zeros(model: objective.Model, names: Iterable[str]) -> Leaves:
  """Zeros of the shapes of the model's leaves."""
  return {k: jnp.zeros_like(model.params[k]) for k in names}


class Held(NamedTuple):
  """What a client with a memory holds between two batches.

  Attributes:
    job: carry of the job that remembers.
    rows: leaves that live on the device, as they were when the round began.
    seen: what its watch has added up.
    client: who it is; the key is left out.
  """

  job: PyTree
  rows: Leaves
  seen: PyTree
  client: work.Client


class Watch(NamedTuple):
  """What a client adds up over its batches, at the leaves it was sent.

  Attributes:
    start: pytree of zeros.
    see: (leaves, base, batch) -> what one batch adds.
  """

  start: PyTree
  see: Callable


def remember(
  job: work.Work,
  *,
  shared: Leaves | None = None,
  own: Leaves | None = None,
  close: Callable[..., tuple[dict, dict]],
  watch: Watch | None = None,
) -> work.Work:
  """Gives a job leaves that its loss does not know.

  Args:
    job: a `work.train`; its steps find these leaves in `sent.params`.
    shared: initial values of leaves at the cloud, which all are sent.
    own: initial values of leaves that live on the device.
    close: (held, leaves, message) -> (message, rows), when a client is done:
      `leaves` are those it was sent and its own as they were, `message` is the
      job's. The message that it returns is what is sent; rows that it leaves
      out stay.
    watch: what it adds up on the way.
  """
  shared, own = shared or {}, own or {}

  def with_rows(sent, held):
    return sent._replace(params=sent.params | held.rows)

  def init(sent, base, rows, client):
    start = () if watch is None else watch.start
    inner = {k: v for k, v in rows.items() if k not in own}
    carry = job.init(sent, base, inner, client)
    return Held(carry, rows, start, client._replace(key=()))

  def step(held, sent, base, batch):
    sent = with_rows(sent, held)
    carry, stats = job.step(held.job, sent, base, batch)
    if watch is not None:
      more = watch.see(sent.params, base, batch)
      held = held._replace(seen=jax.tree.map(jnp.add, held.seen, more))
    return held._replace(job=carry), stats

  def finish(held, sent):
    sent = with_rows(sent, held)
    message, rows = job.finish(held.job, sent)
    message, more = close(held, sent.params, message)
    return message, {**{k: held.rows[k] for k in own}, **rows, **more}

  where = dict.fromkeys(shared, "cloud") | dict.fromkeys(own, placement.DEVICE)
  return job._replace(
    init=init,
    step=step,
    finish=finish,
    params={**job.params, **shared, **own},
    placement={**job.placement, **where},
  )


def before(how: work.Local, *first: optax.GradientTransformation) -> work.Local:
  """Local training whose gradients are changed before the optimizer's step."""
  return how._replace(
    optimizer=lambda round: optax.chain(*first, how.optimizer(round))
  )


def tie(
  pull: Callable[[dict, dict, dict], dict],
) -> optax.GradientTransformation:
  """Changes gradients by what a client was sent: (grads, weights, sent)."""

  def update(grads, state, params=None, *, sent, **extra):
    del extra
    return grads | pull(grads, params, sent), state

  return optax.GradientTransformationExtraArgs(lambda _: (), update)


def tally(clients: int) -> link.Link:
  """Tells the server which share of all clients it has heard.

  It sends nothing. To the message that is received it adds the leaf `share`,
  the number of clients whose message arrived divided by `clients`.

  Args:
    clients: N, how many may take part.
  """
  validate.at_least(1, clients=clients)

  def send(message, ctx):
    return message, {}

  def receive(message, roster):
    heard = roster.weights > 0
    if roster.arrived is not None:
      heard &= roster.arrived
    share = jnp.sum(heard).astype(jnp.float32) / clients
    return {**message, SHARE: share}

  return link.stateless("tally", send, receive, receive_on="sum")


def server(
  optimizer: optax.GradientTransformation | None,
  understand: Callable[[Leaves, Leaves], Leaves] | None = None,
  *,
  memory: str,
) -> optax.GradientTransformation:
  """A server whose optimizer moves the model; memory moves as it is told.

  Args:
    optimizer: of the model's leaves; None applies their message as it is.
    understand: (message, params) -> message, before it is applied.
    memory: first part of the names of the leaves of the memory.
  """
  plain = optax.sgd(1.0)

  def labels(leaves):
    start = f"{memory}/"
    return {k: "memory" if k.startswith(start) else "model" for k in leaves}

  apply = plain
  if optimizer is not None:
    apply = optax.partition({"model": optimizer, "memory": plain}, labels)
  if understand is None:
    return apply
  return optax.chain(optax.stateless(understand), apply)


def reported(name: str, message: Leaves, params: Leaves) -> jax.Array:
  """Mean of what clients reported as the new value of a leaf."""
  return params[name] - message[name]


def assemble(
  job: work.Work,
  *,
  server: optax.GradientTransformation | None,
  uplink: link.Link | None,
  downlink: link.Link | None,
  clients: int | None = None,
) -> algorithm.Algorithm:
  """An algorithm with one tier.

  Args:
    job: what clients do.
    server: see `hierarchy.tier`.
    uplink: None weighs by examples.
    downlink: see `hierarchy.tier`.
    clients: N, where the server has to know which share of all it has heard.

  Raises:
    ValueError: when it is started for fewer clients than that.
  """
  if clients is None:
    up = uplink
  else:
    up = link.chain(tally(clients), links.weigh() if uplink is None else uplink)
  cloud = hierarchy.tier("cloud", link=up, server=server, down=downlink)
  made = algorithm.federated(job, [cloud])
  if clients is None:
    return made
  most = clients

  def init(params=None, *, clients, cohort):
    if most > clients or cohort > most:
      raise ValueError(
        f"clients must be the number of those that may take part: got "
        f"clients={most}, a population of {clients} and cohorts of up to "
        f"{cohort}; write clients=int(data.seen.sum())"
      )
    return made.init(params, clients=clients, cohort=cohort)

  return made._replace(init=init)
