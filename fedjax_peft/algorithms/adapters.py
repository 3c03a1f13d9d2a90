"""Personal adapters: some adapters of a layer travel, some stay.

For modules built by `stack`: each adapter is leaves of its own, and where it
lives is its placement.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import optax

from fedjax_peft import (
  algorithm,
  hierarchy,
  link,
  objective,
  validate,
  work,
)
from fedjax_peft import placement as placement_lib
from fedjax_peft.algorithms import memory, nearness, stacked


def feddpa(
  model: objective.Model,
  local: work.Local,
  *,
  weight: float = 0.5,
  after: int | None = None,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """FedDPA: a global adapter, and on each device a personal one beside it.

  The global adapter `shared` is trained without the other and averaged. The
  adapter `personal` is trained and used in the mixture y = W x + weight *
  personal(x) + (1 - weight) * shared(x), in which `shared` is as the client
  has it and stands still. Whatever else the model trains belongs to the global
  part. With a model from `by_example` the weight is fixed in training only: a
  client's model weighs each example by how near it is to those it trained on.

  Yang et al., 2024, https://arxiv.org/abs/2403.19211

  Args:
    model: of a module from `stack(module, {"shared": R, "personal": R})`, as
      it is or from `by_example`.
    local: how clients train; each batch serves both adapters.
    weight: of the personal adapter, in [0, 1]. 0.5 in the paper.
    after: rounds of which `shared` is trained and `personal` is not, and then
      the other way round (FedDPA-F). None trains both in every step
      (FedDPA-T).
    server: see `fedavg`.
    uplink: see `fedavg`.
    downlink: see `fedavg`.
    placement: see `fedavg`, for what else there is.
  """
  if not 0 <= weight <= 1:
    raise ValueError(f"weight must be in [0, 1]: got {weight=}")
  stacked.check(model.params, ("shared", "personal"))
  by_example, whole = nearness.CENTER in model.params, model
  if by_example:
    rest = {k: v for k, v in model.params.items() if k != nearness.CENTER}
    model = model._replace(params=rest)
  both = {"personal": weight, "shared": 1 - weight}

  def mixed(weights):
    def loss(params, *rest):
      here = {k: v for k, v in params.items() if k != nearness.CENTER}
      return model.loss(stacked.mix(here, weights), *rest)

    return model._replace(loss=loss)

  alone, mixture = mixed({"personal": 0.0}), mixed(both)

  def descent(weights, rest, base, batch, now):
    mine = {k: v for k, v in weights.items() if _is(k, "personal")}
    theirs = {k: v for k, v in weights.items() if k not in mine}
    first = work.slope(alone, theirs, rest | mine, base, batch)
    second = work.slope(mixture, mine, rest | theirs, base, batch)
    personal = {f"personal_{k}": v for k, v in second.stats.items()}
    return first._replace(
      grads=first.grads | second.grads, stats=first.stats | personal
    )

  def active(path, now):
    late = now.round >= jnp.int32(after)
    return late if _is(path, "personal") else jnp.logical_not(late)

  rules = {r"(.*/)?personal/lora_[ab]": placement_lib.DEVICE}
  job = work.train(
    model,
    local,
    rules=rules | dict(placement or {}),
    active=None if after is None else active,
    descent=descent,
  )
  if by_example:  # the model's loss mixes
    job = nearness.centered(job, whole)
  else:
    job = job._replace(view=lambda params: stacked.mix(params, both))
  return memory.assemble(job, server=server, uplink=uplink, downlink=downlink)


def hilora(
  model: objective.Model,
  local: work.Local,
  *,
  edges: int,
  stages: tuple[int, int] | None = None,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """Three adapters: everyone's, an edge's and a client's own, added up.

  `shared` is averaged over all, `cluster` over the clients of an edge and
  `personal` stays on the device. Client i talks to edge i modulo `edges`, or to
  the one that the cohort's `nodes` say, such as those of `find_nodes`.

  After HiLoRA, 2026, https://arxiv.org/abs/2603.02785

  Args:
    model: of a module from `stack(module, {"shared": R, "cluster": R,
      "personal": R})`.
    local: how clients train.
    edges: clusters, E.
    stages: rounds at which `shared` hands over to `cluster`, and `cluster` to
      `personal`, the others standing still; None trains all in every step.
    server: optax optimizer at the cloud.
    uplink: from the clients to the edges; None weighs by examples.
    downlink: from the edges to the clients.
    placement: see `fedavg`, for what else there is.
  """
  validate.at_least(1, edges=edges)
  names = ("shared", "cluster", "personal")
  stacked.check(model.params, names)

  def active(path, now):
    stage = sum((now.round >= s).astype(jnp.int32) for s in stages or ())
    own = [i for i, name in enumerate(names) if _is(path, name)]
    return stage == (own[0] if own else 0)

  rules = {
    r"(.*/)?cluster/lora_[ab]": "edge",
    r"(.*/)?personal/lora_[ab]": placement_lib.DEVICE,
  }
  job = work.train(
    model,
    local,
    rules=rules | dict(placement or {}),
    tiers=("edge", "cloud"),
    active=None if stages is None else active,
  )
  edge = hierarchy.tier("edge", edges, link=uplink, down=downlink)
  return algorithm.federated(
    job, [edge, hierarchy.tier("cloud", server=server)]
  )


def _is(path: str, name: str) -> bool:
  """Whether a leaf is part of an adapter of this name."""
  return path.endswith(("/lora_a", "/lora_b")) and stacked.name_of(path) == name
