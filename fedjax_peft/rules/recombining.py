"""Recombining: rules that make new factors out of the mean product.

Factors of client i are A_i and B_i, p_i its share of the examples, s the common
scale alpha / rank; "cov" is what averaging factors leaves out,
sum p_i (A_i - mean A)(B_i - mean B).
"""

import zlib

import jax
import jax.numpy as jnp

from fedjax_peft import linalg, validate
from fedjax_peft.rules import heard as heard_lib
from fedjax_peft.rules import product
from fedjax_peft.rules.rule import Rule, means, recombine, terms


def flora(*, seed: int = 0) -> Rule:
  """Adds the mean product to the layer, and starts anew (arXiv 2409.05976).

  Args:
    seed: of the factors A that clients start from in every round.
  """

  def server(pairs):
    def step(pair, params, heard, count):
      a, b = params[pair.a], params[pair.b]
      total = heard_lib.mean_product(heard, pair, params)
      key = jax.random.fold_in(jax.random.key(seed), count)
      key = jax.random.fold_in(key, zlib.crc32(pair.layer.encode()))
      fresh = jax.random.normal(key, a.shape) / jnp.sqrt(a.shape[-2])
      residual = params[pair.residual] + pair.scale * product.expand(total)
      return {pair.a: fresh, pair.b: 0 * b, pair.residual: residual}

    return recombine(pairs, step)

  return Rule(
    name="flora",
    formula="W <- W + s sum p_i A_i B_i; A drawn anew, B <- 0",
    source="Wang et al., 2024, arXiv 2409.05976",
    up="R (K + F)",
    down="min(C R (K + F), K F)",
    exact=True,
    gauge_invariant=True,
    heterogeneous_rank=True,
    linear=False,
    rebases=True,
    residual=True,
    server=server,
    # A follows from the seed and B is zero.
    told=lambda pair, specs, senders, round: {
      pair.a: None,
      pair.b: None,
      pair.residual: terms(pair, specs, senders * specs[pair.a].shape[-1]),
    },
  )


def flexlora() -> Rule:
  """The best adapter of rank R for the mean product (arXiv 2402.11505)."""

  def server(pairs):
    def step(pair, params, heard, count):
      total = heard_lib.mean_product(heard, pair, params)
      return _factors(pair, product.svd(total, params[pair.a].shape[-1]))

    return recombine(pairs, step)

  return Rule(
    name="flexlora",
    formula="U S V^T = svd(sum p_i A_i B_i): A <- U_R, B <- S_R V_R^T",
    source="Bai et al., 2024, arXiv 2402.11505",
    up="R (K + F)",
    down="R (K + F)",
    exact=False,
    gauge_invariant=True,
    heterogeneous_rank=True,
    linear=False,
    rebases=True,
    server=server,
  )


def fedex(rank: int | None = None) -> Rule:
  """FedIT, and what it leaves out goes into the layer (arXiv 2410.09432).

  Args:
    rank: keep the best approximation of this rank of what is left out; None
      keeps all of it, which is exact.
  """
  if rank is not None:
    validate.at_least(1, rank=rank)

  def server(pairs):
    def step(pair, params, heard, count):
      del count
      left_out = heard_lib.covariance(heard, pair)
      if rank is not None:
        u, s, v = product.svd(left_out, rank)
        left_out = product.stack(u * s[..., None, :], v)
      more = pair.scale * product.expand(left_out)
      return {pair.residual: params[pair.residual] + more}

    return recombine(pairs, step)

  def told(pair, specs, senders, round):
    # A covariance of C factors of rank R has a rank of (C - 1) R.
    all_of_it = (senders - 1) * specs[pair.a].shape[-1]
    return {
      pair.residual: terms(
        pair, specs, all_of_it if rank is None else min(rank, all_of_it)
      )
    }

  cut = "" if rank is None else f", cut to rank {rank}"
  return Rule(
    name="fedex" if rank is None else f"fedex({rank})",
    formula="as fedit, and W <- W + s sum p_i (A_i - A)(B_i - B)" + cut,
    source="Singhal et al., 2025, arXiv 2410.09432",
    up="R (K + F)",
    down="R (K + F) + min((C - 1) R (K + F), K F)"
    if rank is None
    else f"(R + {rank}) (K + F)",
    exact=rank is None,
    # A, B themselves are FedIT's; the model that they and W make is not.
    gauge_invariant=rank is None,
    heterogeneous_rank=True,
    linear=False,
    residual=True,
    server=server,
    told=told,
  )


def fair(strength: float = 0.01, *, steps: int = 0, rate: float = 0.1) -> Rule:
  """FedIT, with B corrected for what it leaves out (arXiv 2411.14961).

  Args:
    strength: lambda >= 0, weight of the size of the correction.
    steps: 0 solves the least squares problem in closed form; else so many
      steps of gradient descent on the paper's cosine dissimilarity.
    rate: learning rate of these steps, relative to the size of B.
  """
  if strength < 0:
    raise ValueError(f"strength must not be negative: got {strength=}")

  def solve(a, residual):
    gram = product.matmul(jnp.swapaxes(a, -1, -2), a)
    gram = gram + strength * product.eye_like(gram)
    seen = _project(a, residual)
    # A mean of factors may have lost rank: least squares of least norm.
    return product.matmul(linalg.inverse(gram), seen)

  def descend(a, b, residual):
    target = product.expand(residual) + product.matmul(a, b)
    size = jnp.sqrt(jnp.sum(jnp.square(b), (-2, -1), keepdims=True))

    def cost(change):
      made = product.matmul(a, b + change)
      dot = jnp.sum(made * target, (-2, -1))
      lengths = product.length(made) * product.length(target)
      cosine = dot / jnp.where(lengths > 0, lengths, 1)
      return jnp.sum(1 - cosine + strength * product.length(change))

    def one(_, change):
      return change - rate * size * size * jax.grad(cost)(change)

    return jax.lax.fori_loop(0, steps, one, jnp.zeros_like(b))

  def server(pairs):
    def step(pair, params, heard, count):
      del count
      a = params[pair.a] - heard.mean[pair.a]
      b = params[pair.b] - heard.mean[pair.b]
      left_out = heard_lib.covariance(heard, pair)
      change = descend(a, b, left_out) if steps else solve(a, left_out)
      return {pair.b: b + change}

    return recombine(pairs, step)

  return Rule(
    name="fair" if not steps else "fair_iterative",
    formula="A <- mean A, B <- mean B + argmin_D |cov - A D|^2 + lambda |D|^2"
    if not steps
    else "A <- mean A, B <- mean B + D, D by descent on 1 - cos + lambda |D|",
    source="Bian et al., 2025, arXiv 2411.14961",
    up="R (K + F)",
    down="R (K + F)",
    exact=False,
    gauge_invariant=False,
    heterogeneous_rank=True,
    linear=False,
    server=server,
  )


def fedsvd(every: int = 1) -> Rule:
  """FFA whose A is drawn anew from the adapter itself (arXiv 2505.12805).

  Args:
    every: rounds between two refactorings A B = U S V^T, A <- U, B <- S V^T,
      which change nothing but the factors.
  """
  validate.at_least(1, every=every)

  def server(pairs):
    def step(pair, params, message, count):
      a, b = params[pair.a], params[pair.b] - means(message)[pair.b]
      found = product.svd(product.stack(a, b), a.shape[-1])
      due = (count + 1) % every == 0
      # Columns of a zero adapter would be arbitrary: keep the old ones.
      due &= jnp.any(b != 0)
      return {
        k: jnp.where(due, v, old)
        for (k, v), old in zip(
          _factors(pair, found).items(), (a, b), strict=True
        )
      }

    return recombine(pairs, step)

  return Rule(
    name="fedsvd",
    formula="B <- sum p_i B_i; then U S V^T = A B: A <- U, B <- S V^T",
    source="Lee et al., 2025, arXiv 2505.12805",
    up="R F",
    down="R F, with the new A R (K + F)",
    exact=True,
    gauge_invariant="fixed",
    heterogeneous_rank=False,
    linear=True,
    rebases=True,
    placement={".*/lora_a": "served"},
    server=server,
    cycle=every,
    told=lambda pair, specs, senders, round: (
      {} if (round + 1) % every == 0 else {pair.a: None}
    ),
  )


def _factors(pair, found):
  """Factors of a product from its singular triples, all of S on B."""
  left, values, right = found
  return {pair.a: left, pair.b: values[..., None] * right}


def _project(a, residual):
  """A^T times a product."""
  at = jnp.swapaxes(a, -1, -2)
  if isinstance(residual, product.Dense):
    return product.matmul(at, residual.matrix)
  inner = residual.weighted(product.matmul(residual.left, a))
  return product.matmul(jnp.swapaxes(inner, -1, -2), residual.right)
