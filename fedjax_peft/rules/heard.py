"""Heard: what a server knows of the adapters that clients report.

Clients report factor deltas dA_i, dB_i. Their weighted means and the mean
product sum_i p_i dA_i dB_i are enough to know every mean product exactly,
since the covariance of the factors does not depend on where they started:

  sum p (A_i - A)(B_i - B) = sum p dA_i dB_i - (sum p dA_i)(sum p dB_i).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import reduce as reduce_lib
from fedjax_peft.rules import product


class Pair(NamedTuple):
  """The two factors of an adapter: y = base(x) + scale (x A) B.

  Attributes:
    layer: its path.
    scale: alpha / rank.
  """

  layer: str
  scale: float

  @property
  def a(self) -> str:
    """Path of A [stack, K, R]."""
    return f"{self.layer}/lora_a"

  @property
  def b(self) -> str:
    """Path of B [stack, R, F]."""
    return f"{self.layer}/lora_b"

  @property
  def residual(self) -> str:
    """Path of the residual [stack, K, F]."""
    return f"{self.layer}/lora_residual"


class Heard(NamedTuple):
  """What all clients reported, as means with weights p_i that sum to one.

  Attributes:
    mean: {path: mean delta}.
    second: {layer: mean of the products dA_i dB_i}, where they were summed up.
    rows: {path: float32 [C, ...]}, factor deltas one by one, where they were
      kept; zero for who was absent.
    weights: float32 [C], p_i of the rows.
  """

  mean: dict[str, jax.Array]
  second: dict[str, jax.Array]
  rows: dict[str, jax.Array]
  weights: jax.Array


class _Acc(NamedTuple):
  """Weighted sums, and the factors that are kept one by one."""

  total: jax.Array
  sums: dict[str, jax.Array]
  second: dict[str, jax.Array]
  kept: Any


def hear(
  pairs: tuple[Pair, ...], *, one_by_one: bool = False
) -> reduce_lib.Reduce:
  """Collects what the rules need, in the smaller form for each adapter.

  Args:
    pairs: the adapters among the leaves.
    one_by_one: keep the factors of every client, however many there are.

  Returns:
    A Reduce of `Counted` messages whose result is a `Heard`. It keeps factors
    where C R (K + F) <= K F, C being the places of a cohort, else it adds up
    products: memory is min(C R (K + F), K F) for each adapter.
  """

  def kept_pairs(spec, places):
    def small(pair):
      a, b = spec[pair.a], spec[pair.b]
      return product.pays(places * a.shape[-1], a.shape[-2], b.shape[-1])

    return [p for p in pairs if one_by_one or small(p)]

  def factors(message, chosen):
    return {name: message[name] for p in chosen for name in (p.a, p.b)}

  def init(spec, places):
    message = spec.message
    keep = kept_pairs(message, places)
    kept = _collected().init((factors(message, keep), spec.weight), places)
    second = {
      p.layer: jnp.zeros((*message[p.a].shape[:-1], message[p.b].shape[-1]))
      for p in pairs
      if p not in keep
    }
    sums = {k: jnp.zeros(x.shape, jnp.float32) for k, x in message.items()}
    return _Acc(jnp.zeros(()), sums, second, kept)

  def update(acc, messages, present):
    weight = jnp.where(present, messages.weight, 0).astype(jnp.float32)
    message = {
      k: jnp.where(_wide(present, x), x, 0).astype(jnp.float32)
      for k, x in messages.message.items()
    }
    sums = {
      k: acc.sums[k] + jnp.tensordot(weight, x, 1, precision="highest")
      for k, x in message.items()
    }
    second = {}
    for pair in pairs:
      if pair.layer in acc.second:
        a = message[pair.a] * _wide(weight, message[pair.a])
        more = jnp.einsum(
          "c...kr,c...rf->...kf", a, message[pair.b], precision="highest"
        )
        second[pair.layer] = acc.second[pair.layer] + more
    keep = [p for p in pairs if p.layer not in acc.second]
    kept = _collected().update(
      acc.kept, (factors(message, keep), messages.weight), present
    )
    return _Acc(acc.total + jnp.sum(weight), sums, second, kept)

  def merge(a, b):
    total, sums, second = jax.tree.map(jnp.add, a[:3], b[:3])
    return _Acc(total, sums, second, _collected().merge(a.kept, b.kept))

  def finalize(acc):
    total = jnp.maximum(acc.total, 1)
    (rows, weight), present = acc.kept
    weights = jnp.where(present, weight, 0).astype(jnp.float32) / total
    return Heard(
      {k: x / total for k, x in acc.sums.items()},
      {k: x / total for k, x in acc.second.items()},
      rows,
      weights,
    )

  return reduce_lib.Reduce(
    name="hear",
    init=init,
    update=update,
    merge=merge,
    finalize=finalize,
    linear=False,
    memory="cohort",
    weighs="count",
  )


def _collected():
  """The reduction that keeps messages one by one."""
  return reduce_lib.collect("rows", lambda rows, present: (rows, present))


def covariance(heard: Heard, pair: Pair) -> product.Product:
  """Sum of p_i (A_i - mean A)(B_i - mean B): what averaging factors leaves out.

  Its rank is at most (C - 1) R for C clients.
  """
  a, b = heard.mean[pair.a], heard.mean[pair.b]
  if pair.layer in heard.second:
    return product.Dense(heard.second[pair.layer] - _matmul(a, b))
  return _stacked(
    heard, heard.rows[pair.a] - a[None], heard.rows[pair.b] - b[None]
  )


def mean_product(heard: Heard, pair: Pair, params: dict) -> product.Product:
  """Sum of p_i A_i B_i, A_i = A - dA_i being what client i holds."""
  a, b = params[pair.a], params[pair.b]
  if pair.layer in heard.second:
    new_a, new_b = a - heard.mean[pair.a], b - heard.mean[pair.b]
    return product.add(covariance(heard, pair), product.Stack(new_a, new_b))
  return _stacked(
    heard, a[None] - heard.rows[pair.a], b[None] - heard.rows[pair.b]
  )


def _stacked(heard, a, b):
  """Rows [C, ..., K, R] and [C, ..., R, F] side by side, weighted on A."""
  a = a * _wide(heard.weights, a)
  left = jnp.moveaxis(a, 0, -2)  # [..., K, C, R]
  right = jnp.moveaxis(b, 0, -3)  # [..., C, R, F]
  return product.Stack(
    left.reshape(*left.shape[:-2], -1),
    right.reshape(*right.shape[:-3], -1, right.shape[-1]),
  )


def _matmul(a, b):
  """A product in full float32."""
  return jnp.matmul(a, b, precision="highest")


def _wide(x, like):
  """[C] -> [C, 1, ...], to multiply rows by."""
  return x.reshape(-1, *(1,) * (like.ndim - 1))
