"""The encoder: masks, compile size, sharing of the base, what it refuses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjax_peft import models, peft

TINY = {"vocab": 50, "width": 24, "depth": 2, "heads": 4, "ffn": 56}


def tokens(key=0, batch=2, length=7):
  return jax.random.randint(
    jax.random.key(key), (batch, length), 1, TINY["vocab"], jnp.int32
  )


@functools.cache
def encoder(**options):
  return models.load("encoder", **(TINY | options))


@nnx.jit
def run(model, x, length=None):
  return model(x, length)


def lines(depth, unroll=False):
  """Lines of the gradient's program as traced, of the forward as compiled."""
  model = encoder(depth=depth, unroll=unroll)
  graph, state = nnx.split(model)

  def total(state, x):
    return nnx.merge(graph, state)(x).sum()

  traced = jax.jit(jax.grad(total)).lower(state, tokens()).as_text()
  forward = jax.jit(total).lower(state, tokens()).compile().as_text()
  return len(traced.splitlines()), len(forward.splitlines())


def test_padding_has_no_influence():
  model = encoder(classes=3)
  x, length = tokens(), jnp.array([3, 5], jnp.int32)
  padding = jnp.arange(7)[None] >= length[:, None]
  other = jnp.where(padding, tokens(1), x)
  assert (other != x).any()
  np.testing.assert_array_equal(
    run(model, x, length), run(model, other, length)
  )


@pytest.mark.parametrize("pool", ["first", "mean"])
def test_more_padding_changes_nothing(pool, tol):
  model = encoder(pool=pool, pooler=True)
  x, length = tokens(), jnp.array([3, 7], jnp.int32)
  wide = jnp.pad(x, [(0, 0), (0, 4)])
  limit = tol(jnp.float32, 56 * 2)
  np.testing.assert_allclose(
    run(model, x, length), run(model, wide, length), rtol=limit, atol=limit
  )


def test_no_length_means_all_tokens_are_valid(tol):
  model = encoder()
  x, limit = tokens(), tol(jnp.float32, 56 * 2)
  full = jnp.full(2, 7, jnp.int32)
  np.testing.assert_allclose(
    run(model, x), run(model, x, full), rtol=limit, atol=limit
  )


def test_an_empty_text_is_finite():
  model = encoder(classes=3)
  logits = run(model, tokens(), jnp.array([0, 7], jnp.int32))
  assert jnp.isfinite(logits).all()


def test_the_program_does_not_grow_with_depth():
  for deep, shallow in zip(lines(12), lines(2), strict=True):
    assert deep <= 1.02 * shallow
  for deep, shallow in zip(lines(3, unroll=True), lines(2), strict=True):
    assert deep > 1.2 * shallow  # what the scan avoids


@pytest.mark.parametrize("unroll", [False, True])
def test_clients_share_one_matrix_product_with_the_base(unroll):
  clients, batch, time = 3, 2, 5
  model = encoder(classes=3, unroll=unroll)
  graph, head, base = nnx.split(model, nnx.filterlib.PathContains("head"), ...)

  def loss(head, base, x):
    return nnx.merge(graph, head, base)(x).sum()

  many = jax.tree.map(lambda leaf: jnp.stack([leaf] * clients), head)
  x = jnp.stack([tokens(i, batch, time) for i in range(clients)])
  step = jax.jit(jax.vmap(jax.grad(loss), (0, None, 0)))
  lowered = step.lower(many, base, x)
  # 24 x 56 is the shape of the base's `up` kernel and of nothing else.
  products = [
    line
    for line in lowered.as_text().splitlines()
    if "dot_general" in line and "tensor<24x56xf32>" in line
  ]
  assert products
  assert not any("batching_dims" in line for line in products)
  compiled = lowered.compile().as_text()
  rows = clients * batch * time
  assert re.search(rf"= f32\[{rows},56\]\S* dot\(", compiled)
  assert not re.search(rf"= f32\[{clients},\d[\d,]*,56\]\S* dot\(", compiled)


@functools.cache
def gradient(**options):
  graph, state = nnx.split(encoder(**options))
  x, length = tokens(), jnp.array([3, 7], jnp.int32)

  def loss(state):
    return jnp.square(nnx.merge(graph, state)(x, length)).sum()

  return jax.tree.leaves(jax.jit(jax.grad(loss))(state))


@pytest.mark.parametrize(
  ("keep", "unroll"),
  [("dots", False), ("none", False), ("dots", True)],
)
def test_what_is_stored_does_not_change_the_gradient(keep, unroll, tol):
  came = gradient(keep=keep, unroll=unroll)
  for a, b in zip(gradient(keep="all"), came, strict=True):
    limit = tol(jnp.float32, 56 * 14 * 2) * max(1.0, float(jnp.abs(a).max()))
    np.testing.assert_allclose(a, b, rtol=0, atol=limit)


def test_no_product_of_a_frozen_layer_is_computed_twice():
  def products(keep):
    """Products with the base's 24 x 56 or 56 x 24 kernels, as traced."""
    model = peft.lora(encoder(keep=keep), rank=2, where=".*/(query|value)")
    parts = peft.split(peft.freeze(model, precision="float32"))

    def loss(params, base):
      module = peft.merge(parts.graph, params, parts.rng, parts.mutable, base)
      return module(tokens()).sum()

    step = jax.jit(jax.grad(loss)).lower(parts.params, parts.base)
    found = re.findall(
      r"dot_general.*tensor<(?:24x56|56x24)xf32>", step.as_text()
    )
    return len(found)

  assert products("all") == products("dots") > 0
  assert products("none") > products("dots")


def test_each_layer_starts_from_its_own_random_weights():
  kernel = encoder().layers.attention.query.kernel[...]
  assert kernel.shape == (2, 24, 24)
  assert (kernel[0] != kernel[1]).mean() > 0.99


def test_a_seed_gives_the_same_model_and_another_seed_another():
  def first(seed):
    model = encoder(seed=seed)
    return jax.tree.leaves(nnx.state(model))

  for a, b in zip(first(1), first(1), strict=True):
    np.testing.assert_array_equal(a, b)
  differ = [(a != b).any() for a, b in zip(first(1), first(2), strict=True)]
  assert any(differ)


def test_too_long_a_text_is_refused():
  model = encoder(positions=4)
  with pytest.raises(ValueError, match=r"at most 4 tokens.*\(2, 7\)"):
    model(tokens())


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("heads", 5, "heads must divide width"),
    ("depth", 0, "depth must be at least 1"),
    ("classes", -1, "must not be negative"),
    ("pool", "last", "pool must be one of"),
    ("activation", "swish", "activation must be one of"),
    ("keep", "some", "keep must be one of"),
  ],
)
def test_a_config_that_cannot_work_is_refused(field, value, message):
  with pytest.raises(ValueError, match=message):
    models.EncoderConfig(**{field: value})
