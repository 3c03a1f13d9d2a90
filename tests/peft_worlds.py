"""Small modules and the methods put on them, for the tests of all methods."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft import models, peft
from fedjax_peft.models import stack

# No two sizes agree, so that a shape says whose it is.
WIDTH, FFN, DEPTH, VOCAB, CLASSES, T, B, P = 12, 20, 2, 23, 3, 5, 4, 6


class Block(nnx.Module):
  """A residual layer with a norm."""

  def __init__(self, rngs):
    self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.up = nnx.Linear(WIDTH, FFN, rngs=rngs)
    self.down = nnx.Linear(FFN, WIDTH, rngs=rngs)

  def __call__(self, x):
    return x + self.down(jnp.tanh(self.up(self.norm(x))))


class MLP(nnx.Module):
  """A user's module: stacked layers that it scans over by itself."""

  def __init__(self):
    self.layers = stack.build(Block, DEPTH, nnx.Rngs(0))
    self.head = nnx.Linear(WIDTH, CLASSES, rngs=nnx.Rngs(1))

  def __call__(self, x):
    graph, state = nnx.split(self.layers)
    step = lambda x, s: (nnx.merge(graph, s)(x), None)  # noqa: E731
    return self.head(jax.lax.scan(step, x, state)[0])


class World(NamedTuple):
  module: nnx.Module
  inputs: tuple
  where: str  # layers that take adapters
  kernels: tuple  # their shapes


@functools.cache
def world(name):
  """A module, what it is called with, and where it takes adapters."""
  rows = jax.random.randint(jax.random.key(3), (B, T), 0, VOCAB)
  length = jnp.array([5, 2, 4, 1], jnp.int32)
  shared = {
    "vocab": VOCAB,
    "width": WIDTH,
    "depth": DEPTH,
    "heads": 2,
    "ffn": FFN,
  }
  square, up, down = (WIDTH, WIDTH), (WIDTH, FFN), (FFN, WIDTH)
  if name == "mlp":
    x = jax.random.normal(jax.random.key(2), (B, WIDTH))
    return World(MLP(), (x,), r".*/(up|down)", (up, down))
  if name == "encoder":
    module = models.load(
      "encoder", positions=T + P, types=0, classes=CLASSES, **shared
    )
    where, kernels = r".*/(query|value|down)", (square, square, down)
    return World(module, (rows, length), where, kernels)
  module = models.load("decoder", groups=2, **shared)
  where, kernels = r".*/(query|value|up)", (square, square, up)
  return World(module, (rows, length), where, kernels)


def _per_kernel(formula):
  """Entries of a method, from those of one kernel of K x F."""
  return lambda w: DEPTH * sum(formula(*shape) for shape in w.kernels)


class Method(NamedTuple):
  make: object  # (module, where) -> module
  count: object  # World -> trained entries


# Every method that changes nothing at first, on every matched kernel.
SILENT = {
  "lora": Method(
    lambda m, w: peft.lora(m, 3, w), _per_kernel(lambda k, f: 3 * (k + f))
  ),
  "rslora": Method(
    lambda m, w: peft.lora(m, 3, w, scaling="sqrt", init="svd"),
    _per_kernel(lambda k, f: 3 * (k + f)),
  ),
  "dora": Method(
    lambda m, w: peft.dora(m, 3, w, detached=False),
    _per_kernel(lambda k, f: 3 * (k + f) + f),
  ),
  "vera": Method(
    lambda m, w: peft.vera(m, 7, w), _per_kernel(lambda k, f: 7 + f)
  ),
  "core": Method(
    lambda m, w: peft.core(m, 3, w), _per_kernel(lambda k, f: 3 * 3)
  ),
  "ravan": Method(
    lambda m, w: peft.ravan(m, 3, w, heads=2),
    _per_kernel(lambda k, f: 2 * (3 * 3 + 1)),
  ),
  "sparse": Method(
    lambda m, w: peft.sparse(m, 0.1, w),
    _per_kernel(lambda k, f: round(0.1 * k * f)),
  ),
  "ia3": Method(lambda m, w: peft.ia3(m, w), _per_kernel(lambda k, f: f)),
  "ia3 on inputs": Method(
    lambda m, w: peft.ia3(m, w, side="input"), _per_kernel(lambda k, f: k)
  ),
  "bottleneck": Method(
    lambda m, w: peft.bottleneck(m, 5, w),
    _per_kernel(lambda k, f: 2 * f * 5 + 5 + f),
  ),
  "parallel bottleneck": Method(
    lambda m, w: peft.bottleneck(m, 5, w, parallel=True, scale=4.0),
    _per_kernel(lambda k, f: 5 * (k + f) + 5 + f),
  ),
}
# Those that `merged` leaves nothing of.
FOLDED = [name for name in SILENT if "bottleneck" not in name]


@functools.cache
def tuned(method, name):
  """A method on a world's module."""
  w = world(name)
  return SILENT[method].make(w.module, w.where)


def noisy(module, seed=2, size=0.3):
  """The module with what trains moved at random."""
  parts = peft.split(module)
  key = jax.random.key(seed)
  params = {
    name: value
    + size
    * jax.random.normal(jax.random.fold_in(key, i), value.shape)
    / math.sqrt(value.shape[-1])
    for i, (name, value) in enumerate(parts.params.items())
  }
  return peft.merge(*parts._replace(params=params))


def call(module, inputs):
  """The output, each operation by itself: no compiler's fusion rounds it."""
  with jax.disable_jit():
    return module(*inputs)


@functools.cache
def plain(name):
  """What a world's module computes."""
  w = world(name)
  return call(w.module, w.inputs)


@functools.cache
def descent(method):
  """(parts, (params, base floats) -> gradients by both), on the frozen MLP."""
  w = world("mlp")
  parts = peft.split(peft.freeze(tuned(method, "mlp"), "float32"))
  is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
  rest = {n: x for n, x in parts.base.items() if not is_float(x)}

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def step(params, floats):
    module = peft.merge(parts.graph, params, {}, {}, floats | rest)
    return (module(*w.inputs) ** 2).sum()

  return parts, step
