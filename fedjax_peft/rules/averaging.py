"""Averaging: rules that take the mean of factors.

Factors of client i are A_i and B_i, p_i its share of the examples, A and B what
it was sent. A client of a lower rank than the adapter's trains its first
columns of A and rows of B; the others are zero.
"""

import jax
import jax.numpy as jnp

from fedjax_peft.rules import heard as heard_lib
from fedjax_peft.rules import product
from fedjax_peft.rules.rule import Rule, recombine


def fedit() -> Rule:
  """Averages both factors (Zhang et al., 2023, arXiv 2305.05644).

  The mean of products is not the product of means: it leaves out the
  covariance of the factors, sum p_i (A_i - A)(B_i - B).
  """
  return Rule(
    name="fedit",
    formula="A <- sum p_i A_i, B <- sum p_i B_i",
    source="Zhang et al., 2023, arXiv 2305.05644",
    up="R (K + F)",
    down="R (K + F)",
    exact=False,
    gauge_invariant=False,
    heterogeneous_rank=True,
    linear=True,
  )


def ffa() -> Rule:
  """Trains and averages B alone (Sun et al., ICLR 2024, arXiv 2403.12313)."""
  return Rule(
    name="ffa",
    formula="A stays as it was drawn, B <- sum p_i B_i",
    source="Sun et al., 2024, arXiv 2403.12313",
    up="R F",
    down="R F",
    exact=True,
    gauge_invariant="fixed",
    heterogeneous_rank=False,
    linear=True,
    placement={".*/lora_a": "frozen"},
  )


def fedsa() -> Rule:
  """Averages A, each client keeps its B (Guo et al., arXiv 2410.01463)."""
  return Rule(
    name="fedsa",
    formula="A <- sum p_i A_i; B_i stays with client i",
    source="Guo et al., 2025, arXiv 2410.01463",
    up="R K",
    down="R K",
    exact=False,
    gauge_invariant=False,
    heterogeneous_rank=False,
    linear=True,
    placement={".*/lora_b": "device"},
  )


def rolora() -> Rule:
  """Trains B in one round, A in the next (Chen et al., arXiv 2409.02346)."""

  def active(name, now):
    is_a, is_b = name.endswith("/lora_a"), name.endswith("/lora_b")
    if not (is_a or is_b):
      return True
    return (now.round % 2 == 0) == is_b

  return Rule(
    name="rolora",
    formula="odd rounds: B <- sum p_i B_i, even rounds: A <- sum p_i A_i",
    source="Chen et al., 2025, arXiv 2409.02346",
    up="R F, then R K",
    down="R F, then R K",
    exact=True,
    gauge_invariant="fixed",
    heterogeneous_rank=False,
    linear=True,
    active=active,
    cycle=2,
  )


def hetlora(
  strength: float = 0.0, *, keep: float = 0.9, prune: bool = False
) -> Rule:
  """Zero-padded factors, weighed by their size (Cho et al., arXiv 2401.06432).

  A client counts as the Frobenius norm of its product, over all layers.

  Args:
    strength: of the penalty |A tail| |B tail| in a client's loss, summed over
      the layers, the tail being what is beyond `keep` of the client's rank.
    keep: see `strength`, in [0, 1). At least one rank is no tail.
    prune: a client whose |A tail| |B tail| is less than when it began gives the
      tail up for good; see `rules.pruned` for how its rank is kept and its
      bytes are counted.
  """
  if strength < 0 or not 0 <= keep < 1:
    raise ValueError(
      "strength must not be negative and keep must be in [0, 1): got "
      f"{strength=}, {keep=}"
    )

  def fewer(rank):
    less = jnp.floor(keep * rank.astype(jnp.float32))
    return jnp.maximum(less, 1).astype(jnp.int32)

  def tail(pairs, params, rank):
    total = jnp.zeros(())
    for pair in pairs:
      a, b = params[pair.a], params[pair.b]
      here = jnp.arange(a.shape[-1]) >= fewer(rank)
      here = here.astype(jnp.float32)
      a = a * here.reshape((1,) * (a.ndim - 1) + (-1,))
      b = b * here.reshape((1,) * (b.ndim - 2) + (-1, 1))
      total += jnp.sum(product.length(a) * product.length(b))
    return total

  def penalty(pairs):
    return lambda params, rank: strength * tail(pairs, params, rank)

  def pruning(pairs):
    def keeps(before, after, rank):
      shrunk = tail(pairs, after, rank) < tail(pairs, before, rank)
      return jnp.where(shrunk, jnp.minimum(fewer(rank), rank), rank)

    return keeps

  def server(pairs):
    def step(pair, params, heard, count):
      del count
      size = jnp.zeros(heard.weights.shape)
      for p in heard_lib.both_travel(pairs, params):
        a, b = heard_lib.factors(heard, p, params)
        norms = jax.vmap(lambda a, b: product.norm(product.stack(a, b)))(a, b)
        size += jnp.sum(jnp.square(norms).reshape(size.size, -1), -1)
      # Where nobody has moved from B = 0 there is nothing to tell them apart.
      size = jnp.where(heard.weights > 0, jnp.sqrt(size), 0)
      share = jnp.where(jnp.sum(size) > 0, size, heard.weights)
      share = share / jnp.maximum(jnp.sum(share), jnp.finfo(jnp.float32).tiny)
      held = heard_lib.factors(heard, pair, params)
      return {
        name: jnp.tensordot(share, x, 1)
        for name, x in zip((pair.a, pair.b), held, strict=True)
      }

    return recombine(pairs, step)

  return Rule(
    name="hetlora",
    formula="A <- sum q_i A_i, B <- sum q_i B_i, q_i ~ |A_i B_i|",
    source="Cho et al., 2024, arXiv 2401.06432",
    up="R_i (K + F)",
    down="R_i (K + F)",
    exact=False,
    gauge_invariant=False,
    heterogeneous_rank=True,
    linear=False,
    server=server,
    one_by_one=True,
    penalty=penalty if strength else None,
    prune=pruning if prune else None,
  )


def fedrot() -> Rule:
  """Turns each client's factors towards the sent ones, then averages.

  Q_i is the rotation that minimizes |A_i Q - A|^2 + |Q^T B_i - B|^2
  (orthogonal Procrustes); the product of a client is not changed by it.
  """

  def server(pairs):
    def step(pair, params, heard, count):
      del count
      a, b = params[pair.a], params[pair.b]

      def turned(mine_a, mine_b):
        q = product.turn(mine_a, mine_b, a, b)
        return product.matmul(mine_a, q), product.matmul(
          jnp.swapaxes(q, -1, -2), mine_b
        )

      rows = jax.vmap(turned)(*heard_lib.factors(heard, pair, params))
      new = [jnp.tensordot(heard.weights, x, 1) for x in rows]
      return dict(zip((pair.a, pair.b), new, strict=True))

    return recombine(pairs, step)

  return Rule(
    name="fedrot",
    formula="A <- sum p_i A_i Q_i, B <- sum p_i Q_i^T B_i, Q_i by Procrustes",
    source="FedRot-LoRA, 2026",
    up="R (K + F)",
    down="R (K + F)",
    exact=False,
    gauge_invariant="rotations",
    heterogeneous_rank=False,
    linear=False,
    server=server,
    one_by_one=True,
  )
