"""Schemes: who trains which part of a cut model, and when.

`splitfed` makes split training of any algorithm whose model is a pipeline:
every client has a copy of the server's parts, and both sides are averaged. In
turn (`in_turn`) clients work one after another on the same server parts, or on
all of the model. In lockstep all work side by side, and the server's parts
take one step on the mean of their gradients.

Thapa et al., SplitFed, 2020, https://arxiv.org/abs/2004.12088
Lin et al., SplitLoRA, 2024, https://arxiv.org/abs/2407.00952
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from fedjax_peft import (
  algorithm,
  hierarchy,
  link,
  links,
  objective,
  work,
)
from fedjax_peft.split import cost, cutting, memory, turns


def splitfed(
  made: algorithm.Algorithm,
  model: objective.Model,
  examples: Mapping[str, Any],
) -> algorithm.Algorithm:
  """Any algorithm, whose clients compute some parts of the model only.

  Every client has its own copy of the server's parts while it works, so that
  with wires that change nothing the algorithm does what it did (SplitFed
  version 1). Of a report, only leaves of the device's parts cross the links.

  Args:
    made: such as `fedavg(model, local)`; low-rank local SGD is not used.
    model: of a `pipeline`.
    examples: {feature: [M, ...]}, for shapes.

  Raises:
    ValueError: if the model is not cut, a part would never learn, or clients
      that are not in lockstep would get one gradient.
  """
  pipe = of(model)
  whole, is_own = memory.kept(made.work, pipe), cutting.owner_of(pipe)
  _refuse_idle(pipe, model, whole)
  _refuse_common(pipe, whole)

  def compact(spec, traits, round):
    spec = whole.compact(spec, traits, round)
    return {k: v for k, v in spec.items() if is_own(k)}

  split = cost.measure(whole, model, examples, lambda module, traits: module)
  job = whole._replace(split=split, compact=compact)
  lowest, *higher = made.tiers
  # Leaves of the servers' parts never cross to a device.
  lowest = lowest._replace(
    link=links.only(lowest.link, is_own), down=links.only(lowest.down, is_own)
  )
  return algorithm.extended(made, job=job, tiers=[lowest, *higher])


def of(model: objective.Model) -> cutting.Pipeline:
  """The pipeline that a model was made of.

  Raises:
    ValueError: if it was not made of one.
  """
  if not isinstance(model.origin, cutting.Pipeline):
    raise ValueError(
      "split training needs a model that is cut: got a "
      f"{type(model.origin).__name__}; write split.pipeline(module, "
      '{"device": 1, "server": None})'
    )
  return model.origin


def _refuse_idle(pipe, model, job):
  """Raises ValueError if a part trains but hears no gradient."""
  mute = [i for i, wire in enumerate(pipe.wires) if wire.down is None]
  deaf = pipe.names[: mute[-1] + 1] if mute else ()
  deaf = deaf[1:] if hasattr(pipe, cutting.HEAD) else deaf
  for name in model.params:
    part = name.split("/")[0]
    still = job.placement[name] in ("frozen", "served") or name in model.mutable
    if part in deaf and not still:
      raise ValueError(
        f"no gradient comes back to '{part}', so '{name}' would never learn; "
        f'freeze it, placement={{"{part}/.*": "frozen"}}, put adapters into '
        "later parts only, or give the device a loss of its own "
        "(split.local_loss)"
      )


def _refuse_common(pipe, job):
  """Raises ValueError if one gradient is for clients that do not step at once.

  Or if there are parts behind it that would add it up again.
  """
  if not any(wire.common for wire in pipe.wires):
    return
  if job.lanes != "all":
    raise ValueError(
      "one gradient for all is for clients that take every step together: got "
      "a wire with common=True; use split.lockstep, or common=False"
    )
  if len(pipe.names) > 2:
    raise ValueError(
      "one gradient for all comes from the server's only part: got the parts "
      f"{', '.join(pipe.names)}; cut the model in one place, or use "
      "common=False"
    )


def in_turn(
  model: objective.Model,
  local: work.Local,
  examples: Mapping[str, Any],
  *,
  shared: Literal["all", "server"] = "all",
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """Clients work one after another, in the order of the cohort.

  Args:
    model: of a `pipeline`.
    local: how each trains.
    examples: {feature: [M, ...]}, for shapes.
    shared: what a client takes over from the one before it. "all": the whole
      model, which goes from device to device (split learning); "server": the
      server's parts, while the devices' are averaged (SplitFed version 2, and
      with adapters SplitLoRA).
    server: optimizer of what the round has changed; None applies it.
    uplink: what reports of the device's parts cross; begins with `count()`.
    downlink: what the device's parts cross on their way to the clients.
    placement: {regex: "cloud", "device" or "frozen"}; what is placed on the
      device stays there.
  """
  is_own = cutting.owner_of(of(model))
  if shared == "server":
    local = local._replace(optimizer=_apart(local.optimizer, is_own))
  job = work.train(model, local, rules=placement)
  stays = {k for k, label in job.placement.items() if label == "device"}

  def kept(name):
    return shared == "all" or not is_own(name)

  def takes(path):
    keys = {k.key for k in path if isinstance(k, jax.tree_util.DictKey)}
    leaves = keys & model.params.keys()
    if leaves:
      return not leaves & stays and all(map(kept, leaves))
    return shared == "all" or _SERVER in keys

  def handover(fresh, before):
    some = before.steps > 0

    def pick(path, new, old):
      return jnp.where(some, old, new) if takes(path) else new

    params, opt = jax.tree_util.tree_map_with_path(
      pick, (fresh.params, fresh.opt), (before.params, before.opt)
    )
    return fresh._replace(params=params, opt=opt)

  job = job._replace(lanes="one", handover=handover)
  cloud = hierarchy.tier(
    "cloud",
    link=links.count() if uplink is None else uplink,
    reduce=turns.relay(kept),
    server=server,
    down=downlink,
  )
  return splitfed(algorithm.federated(job, [cloud]), model, examples)


_SERVER = "at the server"


def _apart(optimizer, is_own):
  """The same optimizer twice: its state for the server is apart."""

  def label(params):
    return {k: "at home" if is_own(k) else _SERVER for k in params}

  def made(round):
    return optax.partition(
      {"at home": optimizer(round), _SERVER: optimizer(round)}, label
    )

  return made


def lockstep(
  model: objective.Model,
  local: work.Local,
  examples: Mapping[str, Any],
  *,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """All clients step side by side; the server's parts take one step for all.

  That step is along the mean of the clients' gradients, weighted by the
  examples of their batches. Each device's part goes along its own gradient;
  or, where the wire is `common`, all along one: the server sums the gradients
  by the messages, so weighted, row by row, and broadcasts the sum.

  Args:
    model: of a `pipeline`.
    local: how each trains; with `steps`, the same number for all.
    examples: {feature: [M, ...]}, for shapes.
    server: optimizer of what the round has changed; None applies it.
    uplink: see `fedavg`.
    downlink: see `fedavg`.
    placement: {regex: "cloud", "device" or "frozen"}.

  Raises:
    ValueError: if clients take different numbers of steps.
  """
  pipe = of(model)
  is_own = cutting.owner_of(pipe)
  if local.steps is None:
    raise ValueError(
      "clients in lockstep take the same number of steps: got epochs, of which "
      "clients with more examples make more steps; write local(..., steps=4)"
    )
  common = any(wire.common for wire in pipe.wires)

  def descent(weights, rest, base, batch, now):
    count = jnp.sum(batch.mask)
    everyone = jax.lax.psum(count, work.LANES)
    share = count / jnp.maximum(everyone, 1)
    examples = batch.examples
    if common:
      examples = {**examples, cutting.REAL: batch.mask}

    def loss(weights):
      params = {**rest, **weights}
      each, metrics, changed = model.loss(params, base, examples, batch.key)
      total = work.masked_sum(batch.mask, each)
      mean = total / jnp.maximum(count, 1)
      return share * mean, (total, metrics, changed)

    grads, (total, metrics, changed) = jax.grad(loss, has_aux=True)(
      dict(weights)
    )
    own = 1.0 if common else 1 / jnp.maximum(share, 1 / 2**24)

    def of_all(name, grad):
      if not is_own(name):
        return jax.lax.psum(grad, work.LANES)
      # A memory is what has crossed, not a slope of this loss.
      return grad if name.startswith(memory.PREFIX) else grad * own

    grads = {k: of_all(k, g) for k, g in grads.items()}
    stats = {
      "loss": (total, count),
      **work.masked_metrics(batch.mask, metrics),
    }
    return work.Slope(grads, stats, changed)

  job = work.train(model, local, rules=placement, descent=descent)
  job = job._replace(lanes="all")
  cloud = hierarchy.tier("cloud", link=uplink, server=server, down=downlink)
  return splitfed(algorithm.federated(job, [cloud]), model, examples)
