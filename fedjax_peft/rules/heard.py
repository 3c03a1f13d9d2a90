"""Heard: what a server knows of the adapters that clients report.

Clients report factor deltas dA_i, dB_i. Their weighted means and the mean
product sum_i p_i dA_i dB_i are enough to know every mean product exactly,
since the covariance of the factors does not depend on where they started:

  sum p (A_i - A)(B_i - B) = sum p dA_i dB_i - (sum p dA_i)(sum p dB_i).
"""

from collections.abc import Container
from typing import NamedTuple

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


def both_travel(
  pairs: tuple[Pair, ...], leaves: Container[str]
) -> tuple[Pair, ...]:
  """The adapters of which both factors are among the leaves."""
  return tuple(p for p in pairs if p.a in leaves and p.b in leaves)


class Heard(NamedTuple):
  """What all clients reported, as means with weights p_i that sum to one.

  Attributes:
    mean: {path: mean delta}.
    second: {layer: mean of the products dA_i dB_i}, where they were summed up.
    rows: {path: float32 [stack, C, R, K or F]}, factor deltas one by one (of
      A transposed), where they were kept; zero for who was absent.
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
  rows: dict[str, jax.Array]
  weights: jax.Array


def hear(
  pairs: tuple[Pair, ...], *, one_by_one: bool = False
) -> reduce_lib.Reduce:
  """Collects what the rules need, in the smaller form for each adapter.

  Args:
    pairs: the adapters; of those that do not travel nothing is heard.
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

    here = both_travel(pairs, spec)
    return [p for p in here if one_by_one or small(p)]

  def init(spec, places):
    message = spec.message
    keep = kept_pairs(message, places)
    rows = {
      name: jnp.zeros((*shape[:-2], places, *shape[-2:]))
      for p in keep
      for name, shape in _row_shapes(p, message)
    }
    second = {
      p.layer: jnp.zeros((*message[p.a].shape[:-1], message[p.b].shape[-1]))
      for p in both_travel(pairs, message)
      if p not in keep
    }
    sums = {k: jnp.zeros(x.shape, jnp.float32) for k, x in message.items()}
    weights = jnp.zeros((places,), jnp.int32)
    return _Acc(jnp.zeros(()), sums, second, rows, weights)

  def update(acc, messages, present):
    weight = jnp.where(present, messages.weight, 0)
    message = {
      k: jnp.where(_wide(present, x), x, 0).astype(jnp.float32)
      for k, x in messages.message.items()
    }
    share = weight.astype(jnp.float32)
    sums = {
      k: acc.sums[k] + jnp.tensordot(share, x, 1, precision="highest")
      for k, x in message.items()
    }
    second = {}
    for pair in pairs:
      if pair.layer in acc.second:
        a = message[pair.a] * _wide(share, message[pair.a])
        more = jnp.einsum(
          "c...kr,c...rf->...kf", a, message[pair.b], precision="highest"
        )
        second[pair.layer] = acc.second[pair.layer] + more
    # Free places are filled in the order of arrival.
    taken = jnp.sum(acc.weights > 0, dtype=jnp.int32)
    place = taken + jnp.cumsum(weight > 0, dtype=jnp.int32) - 1
    place = jnp.where(weight > 0, place, acc.weights.size)
    rows = {
      k: v.at[..., place, :, :].set(
        jnp.moveaxis(_upright(k, message[k]), 0, -3), mode="drop"
      )
      for k, v in acc.rows.items()
    }
    weights = acc.weights.at[place].set(weight, mode="drop")
    return _Acc(acc.total + jnp.sum(share), sums, second, rows, weights)

  def merge(a, b):
    total, sums, second = jax.tree.map(jnp.add, a[:3], b[:3])
    rows = {k: jnp.concatenate([x, b.rows[k]], -3) for k, x in a.rows.items()}
    weights = jnp.concatenate([a.weights, b.weights])
    return _Acc(total, sums, second, rows, weights)

  def finalize(acc):
    total = jnp.maximum(acc.total, 1)
    return Heard(
      {k: x / total for k, x in acc.sums.items()},
      {k: x / total for k, x in acc.second.items()},
      acc.rows,
      acc.weights.astype(jnp.float32) / total,
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


def _upright(name, x):
  """Factors with the rank as the last but one axis: A is turned over."""
  return jnp.swapaxes(x, -1, -2) if name.endswith("/lora_a") else x


def _row_shapes(pair, message):
  """(path, shape [stack, R, K or F]) of the factors of a client."""
  *stack, K, R = message[pair.a].shape
  return (pair.a, (*stack, R, K)), (pair.b, message[pair.b].shape)


def factors(
  heard: Heard, pair: Pair, params: dict
) -> tuple[jax.Array, jax.Array]:
  """What each client holds: A [C, stack, K, R] and B [C, stack, R, F]."""
  a = jnp.moveaxis(heard.rows[pair.a], -3, 0)
  b = jnp.moveaxis(heard.rows[pair.b], -3, 0)
  return params[pair.a][None] - jnp.swapaxes(a, -1, -2), params[pair.b][
    None
  ] - b


def covariance(heard: Heard, pair: Pair) -> product.Product:
  """Sum of p_i (A_i - mean A)(B_i - mean B): what averaging factors leaves out.

  Its rank is at most (C - 1) R for C clients.
  """
  a, b = heard.mean[pair.a], heard.mean[pair.b]
  if pair.layer in heard.second:
    return product.Dense(heard.second[pair.layer] - product.matmul(a, b))
  return _stacked(heard, pair, a, b)


def mean_product(heard: Heard, pair: Pair, params: dict) -> product.Product:
  """Sum of p_i A_i B_i, A_i = A - dA_i being what client i holds."""
  a, b = params[pair.a], params[pair.b]
  if pair.layer in heard.second:
    new_a, new_b = a - heard.mean[pair.a], b - heard.mean[pair.b]
    return product.add(covariance(heard, pair), product.stack(new_a, new_b))
  return _stacked(heard, pair, a, b)


def _stacked(heard, pair, a, b):
  """Sum of p_i (a - dA_i)(b - dB_i), side by side."""
  left = _upright(pair.a, a)[..., None, :, :] - heard.rows[pair.a]
  right = b[..., None, :, :] - heard.rows[pair.b]  # [stack, C, R, F]
  weights = jnp.repeat(heard.weights, a.shape[-1])
  return product.Stack(_side_by_side(left), _side_by_side(right), weights)


def _side_by_side(x):
  """[stack, C, R, N] -> [stack, C R, N]."""
  return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _wide(x, like):
  """[C] -> [C, 1, ...], to multiply rows by."""
  return x.reshape(-1, *(1,) * (like.ndim - 1))
