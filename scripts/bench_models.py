"""Models: W1 and W2 as plain functions of dicts of arrays, for bare loops.

The peers take them as they are. The bare loops pass their own products and
barriers to `encode`, so both run the same mathematics.
"""

import math
from collections.abc import Callable

import bench_workload as workload
import jax
import jax.numpy as jnp
import numpy as np


def w1_params(shape: workload.W1) -> dict:
  """Weights of the perceptron, float32, uniform in +-1/sqrt(fan in)."""
  rng = np.random.default_rng(0)

  def dense(rows, columns):
    bound = 1 / math.sqrt(rows)
    draw = rng.uniform(-bound, bound, (rows + 1, columns)).astype(np.float32)
    return {"kernel": jnp.asarray(draw[1:]), "bias": jnp.asarray(draw[0])}

  return {
    "hidden": dense(shape.features, shape.hidden),
    "output": dense(shape.hidden, shape.classes),
  }


def w1_loss(params: dict, x: jax.Array, label: jax.Array) -> jax.Array:
  """Mean cross-entropy of x [B, features] and label [B]."""
  return cross_entropy(
    dense(jax.nn.relu(dense(x, params["hidden"])), params["output"]), label
  )


def w2_base(shape: workload.W2) -> dict:
  """Frozen weights, float32, normal with deviation 0.02."""
  rng, width = np.random.default_rng(0), shape.width

  def normal(*size):
    return jnp.asarray(rng.standard_normal(size, dtype=np.float32) * 0.02)

  def layer(rows, columns):
    return {"kernel": normal(rows, columns), "bias": jnp.zeros(columns)}

  def norm():
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

  def block():
    return {
      **{k: layer(width, width) for k in ("query", "key", "value", "output")},
      "attention_norm": norm(),
      "up": layer(width, shape.ffn),
      "down": layer(shape.ffn, width),
      "ffn_norm": norm(),
    }

  return {
    "token": normal(shape.vocab, width),
    "position": normal(512, width),
    "type": normal(2, width),
    "norm": norm(),
    "blocks": [block() for _ in range(shape.depth)],
    "pooler": layer(width, width),
  }


def w2_params(shape: workload.W2) -> dict:
  """What is trained: adapters of every block, and the head."""
  rng, width = np.random.default_rng(1), shape.width

  def normal(*size):
    return jnp.asarray(rng.standard_normal(size, dtype=np.float32) * 0.02)

  def adapter():
    return {"a": normal(width, shape.rank), "b": jnp.zeros((shape.rank, width))}

  return {
    "blocks": [
      {"query": adapter(), "value": adapter()} for _ in range(shape.depth)
    ],
    "head": {
      "kernel": normal(width, shape.classes),
      "bias": jnp.zeros(shape.classes),
    },
  }


def dense(x: jax.Array, layer: dict) -> jax.Array:
  """A layer: x @ kernel + bias."""
  return x @ layer["kernel"] + layer["bias"]


def side(x: jax.Array, adapters: dict, scale: float) -> tuple:
  """What the adapters of query and value add to these."""
  return tuple(
    x @ adapters[k]["a"] @ adapters[k]["b"] * scale for k in ("query", "value")
  )


def norm(x: jax.Array, layer: dict) -> jax.Array:
  """Layernorm over the last axis."""
  mean = x.mean(-1, keepdims=True)
  variance = jnp.square(x - mean).mean(-1, keepdims=True)
  return (x - mean) * jax.lax.rsqrt(variance + 1e-12) * layer["scale"] + layer[
    "bias"
  ]


def encode(
  params: dict,
  base: dict,
  tokens: jax.Array,
  shape: workload.W2,
  *,
  dense: Callable = dense,
  side: Callable = side,
  barrier: Callable = lambda x: x,
) -> jax.Array:
  """Logits [B, classes] of tokens [B, T].

  Args:
    params: what is trained.
    base: what is frozen.
    tokens: int32 [B, T].
    shape: the workload.
    dense: (x, layer) -> x @ kernel + bias, for frozen layers.
    side: (x, adapters, scale) -> what is added to query and value.
    barrier: what the stream crosses after each layernorm.
  """
  x = base["token"][tokens] + base["position"][: tokens.shape[1]]
  x = norm(x + base["type"][0], base["norm"])  # [B, T, D]

  def heads(t):
    return t.reshape(*t.shape[:-1], shape.heads, -1)

  for layer, adapters in zip(base["blocks"], params["blocks"], strict=True):
    add_query, add_value = side(x, adapters, shape.scale)
    query = heads(dense(x, layer["query"]) + add_query)
    key = heads(dense(x, layer["key"]))
    value = heads(dense(x, layer["value"]) + add_value)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
    scores = jax.nn.softmax(scores / math.sqrt(query.shape[-1]))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, value).reshape(x.shape)
    x = norm(x + dense(mixed, layer["output"]), layer["attention_norm"])
    x = barrier(x)
    hidden = jax.nn.gelu(dense(x, layer["up"]), approximate=False)
    x = barrier(norm(x + dense(hidden, layer["down"]), layer["ffn_norm"]))
  pooled = jnp.tanh(x[:, 0] @ base["pooler"]["kernel"] + base["pooler"]["bias"])
  return pooled @ params["head"]["kernel"] + params["head"]["bias"]


def w2_loss(params, base, tokens, label, shape, **products) -> jax.Array:
  """Mean cross-entropy of tokens [B, T] and label [B]; see `encode`."""
  return cross_entropy(encode(params, base, tokens, shape, **products), label)


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Mean over the batch, in nats."""
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1)
  return -picked.mean()


def descend(params: dict, gradients: dict, rate: float) -> dict:
  """One step of plain SGD."""
  return jax.tree.map(lambda p, g: p - rate * g, params, gradients)
