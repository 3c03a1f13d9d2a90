"""Partial sharing: some layers are everyone's, some are a client's own."""

import re
from collections.abc import Mapping

import jax.numpy as jnp
import optax

from fedjax_peft import algorithm, alias, link, objective, validate, work
from fedjax_peft import placement as placement_lib
from fedjax_peft.algorithms import memory


def fedper(
  model: objective.Model,
  local: work.Local,
  *,
  head: str = r"head/.*",
  placement: Mapping[str, str] | None = None,
  **options,
) -> algorithm.Algorithm:
  """FedPer: the head stays on the device, both are trained in every step.

  Arivazhagan et al., 2019, https://arxiv.org/abs/1912.00818

  Args:
    model: what is trained.
    local: how clients train.
    head: regex of the leaves that stay, matched in full.
    placement: see `fedavg`, for the other leaves.
    **options: see `fedavg`.
  """
  rules = {head: placement_lib.DEVICE} | dict(placement or {})
  return alias.fedavg(model, local, placement=rules, **options)


def fedrep(
  model: objective.Model,
  local: work.Local,
  *,
  head_steps: int,
  head: str = r"head/.*",
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """FedRep: first the head, on what was sent, then the body under that head.

  The head stays on the device. A client that makes no more than `head_steps`
  steps in a round does not train the body.

  Collins et al., 2021, https://arxiv.org/abs/2102.07078

  Args:
    model: what is trained.
    local: how clients train.
    head_steps: steps of a round in which the head is trained, >= 1; in the
      others the body is.
    head: regex of the leaves that stay, matched in full.
    server: see `fedavg`.
    uplink: see `fedavg`.
    downlink: see `fedavg`.
    placement: see `fedavg`, for the body.
  """
  validate.at_least(1, head_steps=head_steps)
  rules = {head: placement_lib.DEVICE} | dict(placement or {})

  def active(path, now):
    first = now.step < head_steps
    return first if re.fullmatch(head, path) else jnp.logical_not(first)

  job = work.train(model, local, rules=rules, active=active)
  return memory.assemble(job, server=server, uplink=uplink, downlink=downlink)
