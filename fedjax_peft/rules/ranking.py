"""Ranking: clients that train and send less than the adapter's rank.

A client of rank r holds the first r columns of A and rows of B; the others are
zero, have a gradient of zero and stay zero, so that one compiled program does
for all ranks. It reports against what it was sent, so that the server knows the
factors that it holds, padded with zeros.

A rank is a trait, which the host knows, or it is a row of the client's own that
only ever falls (`pruned`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import placement, tailoring, work
from fedjax_peft.rules import rule as rule_lib

RANK = "hetlora/rank"  # the leaf in which a client keeps its rank


def first(
  params: Mapping[str, jax.Array], pairs: rule_lib.Pairs, rank: jax.Array
) -> dict[str, jax.Array]:
  """Leaves whose adapters are zero beyond the first columns.

  Args:
    params: {path: array}.
    pairs: the adapters.
    rank: int32 scalar, columns of A and rows of B that stay.
  """
  kept = dict(params)
  for pair in pairs:
    for name, axis in ((pair.a, -1), (pair.b, -2)):
      if name in kept:
        x = kept[name]
        shape = [1] * x.ndim
        shape[axis] = x.shape[axis]
        here = jnp.arange(x.shape[axis]) < rank
        kept[name] = jnp.where(here.reshape(shape), x, jnp.zeros_like(x))
  return kept


def ranked(job: work.Work, bound: rule_lib.Bound) -> work.Work:
  """A job whose clients have ranks of their own, their trait `rank`."""

  def mine(sent, facts, taken):
    params = first(sent.params, bound.pairs, facts["rank"])
    return sent._replace(params=params)

  return tailoring.tailored(job, ("rank",), mine)


class Pruning(NamedTuple):
  """What a client that may give up ranks holds between two batches.

  Attributes:
    rank: int32 scalar, with which it began.
    kept: int32 scalar, with which it would end now.
    job: carry of the job that trains.
  """

  rank: jax.Array
  kept: jax.Array
  job: Any


def pruned(
  job: work.Work,
  pairs: rule_lib.Pairs,
  keeps: Callable[[Mapping, Mapping, jax.Array], jax.Array],
) -> work.Work:
  """A job whose clients give up ranks for good.

  The rank of a client is a row of its own, the leaf `hetlora/rank` on the
  device, int32: at first that of the adapters, and never more than the trait
  `rank` where it has one. What it gives up it neither sends nor is sent again.

  The host does not know these ranks while it plans, so bytes are counted by
  the trait. What is left is in the record, `train/rank` (mean over clients),
  and `algorithm.bytes(C, traits={"rank": r})` says what a rank costs.

  Args:
    job: a `work.train`.
    pairs: the adapters.
    keeps: (params as they were sent, params, rank) -> rank that it keeps.
  """
  most = max(job.params[p.a].shape[-1] for p in pairs)

  def mine(sent, rank):
    return sent._replace(params=first(sent.params, pairs, rank))

  def init(sent, base, local, client):
    local = dict(local)
    own = local.pop(RANK)
    rank = jnp.minimum(own, client.traits.get("rank", own).astype(own.dtype))
    here = client._replace(traits={**client.traits, "rank": rank})
    inner = job.init(mine(sent, rank), base, local, here)
    # Nothing is kept yet: what a step adds to it is its part of the stats.
    return Pruning(rank, jnp.zeros_like(rank), inner)

  def step(carry, sent, base, batch):
    sent = mine(sent, carry.rank)
    inner, stats = job.step(carry.job, sent, base, batch)
    kept = keeps(sent.params, inner.params, carry.rank)
    more = (kept - carry.kept).astype(jnp.float32)
    one = (carry.kept == 0).astype(jnp.float32)
    stats = {**stats, "rank": (more, one)}
    return Pruning(carry.rank, kept, inner), stats

  def finish(carry, sent):
    message, rows = job.finish(carry.job, sent)
    kept = jnp.where(carry.kept > 0, carry.kept, carry.rank)  # no step made
    left = first(sent.params, pairs, kept)
    message = first(message, pairs, kept)
    # What is given up is zero now: its delta is all that was sent.
    message = {k: v + (sent.params[k] - left[k]) for k, v in message.items()}
    return message, {**rows, RANK: kept}

  return job._replace(
    init=init,
    step=step,
    finish=finish,
    params={**job.params, RANK: jnp.int32(most)},
    placement={**job.placement, RANK: placement.DEVICE},
  )


def compacted(job: work.Work, bound: rule_lib.Bound) -> work.Work:
  """A job that sends what the rule leaves, and says how much that is."""
  rule, pairs = bound.rule, bound.pairs

  def compact(spec, traits, round):
    spec = dict(spec)
    rank = traits.get("rank")
    for pair in pairs:
      for name, axis in ((pair.a, -1), (pair.b, -2)):
        if name not in spec:
          continue
        if rule.active is not None and not rule.active(name, _When(round)):
          del spec[name]
        elif rank is not None:
          spec[name] = _cut(spec[name], axis, int(rank))
    return spec

  if rule.prune is not None:
    job = pruned(job, pairs, rule.prune(pairs))
  return job._replace(compact=compact, cycle=rule.cycle)


class _When(NamedTuple):
  """The part of a `work.Moment` that a host knows."""

  round: int


def _cut(spec, axis, size):
  """A shape with an axis cut to a size."""
  shape = list(spec.shape)
  shape[axis] = min(shape[axis], size)
  return jax.ShapeDtypeStruct(tuple(shape), spec.dtype)
