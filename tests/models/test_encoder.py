"""The encoder: masks, compile size, sharing of the base, what it refuses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjax_peft import models

TINY = {"vocab": 50, "width": 24, "depth": 3, "heads": 4, "ffn": 56}


def tokens(key=0, batch=2, length=7):
  return jax.random.randint(
    jax.random.key(key), (batch, length), 1, TINY["vocab"], jnp.int32
  )


def program(depth, unroll=False):
  """Number of lines of the compiled loss and gradient."""
  config = TINY | {"depth": depth, "unroll": unroll}
  model = models.load("encoder", classes=3, **config)
  graph, state = nnx.split(model)

  def loss(state, x):
    return nnx.merge(graph, state)(x).sum()

  lowered = jax.jit(jax.grad(loss)).lower(state, tokens())
  return len(lowered.compile().as_text().splitlines())


def test_padding_has_no_influence():
  model = models.load("encoder", classes=3, **TINY)
  x, length = tokens(), jnp.array([3, 5], jnp.int32)
  padding = jnp.arange(7)[None] >= length[:, None]
  other = jnp.where(padding, tokens(1), x)
  assert (other != x).any()
  np.testing.assert_array_equal(model(x, length), model(other, length))


@pytest.mark.parametrize("pool", ["first", "mean"])
def test_more_padding_changes_nothing(pool, tol):
  model = models.load("encoder", pool=pool, pooler=True, **TINY)
  x, length = tokens(), jnp.array([3, 7], jnp.int32)
  wide = jnp.pad(x, [(0, 0), (0, 4)])
  limit = tol(jnp.float32, 56 * 3)
  np.testing.assert_allclose(
    model(x, length), model(wide, length), rtol=limit, atol=limit
  )


def test_no_length_means_all_tokens_are_valid(tol):
  model = models.load("encoder", **TINY)
  x, limit = tokens(), tol(jnp.float32, 56 * 3)
  full = jnp.full(2, 7, jnp.int32)
  np.testing.assert_allclose(model(x), model(x, full), rtol=limit, atol=limit)


def test_an_empty_text_is_finite():
  model = models.load("encoder", classes=3, **TINY)
  logits = model(tokens(), jnp.array([0, 7], jnp.int32))
  assert jnp.isfinite(logits).all()


def test_the_compiled_program_does_not_grow_with_depth():
  shallow, deep = program(2), program(12)
  assert deep <= 1.02 * shallow
  assert program(12, unroll=True) > 2 * shallow  # what the scan avoids


@pytest.mark.parametrize("unroll", [False, True])
def test_clients_share_one_matrix_product_with_the_base(unroll):
  clients, batch, time = 3, 2, 5
  model = models.load("encoder", classes=3, unroll=unroll, **TINY)
  graph, head, base = nnx.split(
    model, nnx.filterlib.PathContains("head"), ...
  )

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


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("keep", ["all", "dots", "none"])
def test_what_is_stored_does_not_change_the_gradient(keep, unroll, tol):
  def grads(**options):
    model = models.load("encoder", **TINY, **options)
    graph, state = nnx.split(model)
    x, length = tokens(), jnp.array([3, 7], jnp.int32)

    def loss(state):
      return jnp.square(nnx.merge(graph, state)(x, length)).sum()

    return jax.jit(jax.grad(loss))(state)

  reference = jax.tree.leaves(grads(keep="all"))
  came = jax.tree.leaves(grads(keep=keep, unroll=unroll))
  for a, b in zip(reference, came, strict=True):
    scale = float(jnp.abs(a).max())
    limit = tol(jnp.float32, 56 * 14 * 3) * max(scale, 1.0)
    np.testing.assert_allclose(a, b, rtol=0, atol=limit)


def test_each_layer_starts_from_its_own_random_weights():
  kernel = models.load("encoder", **TINY).layers.attention.query.kernel[...]
  assert kernel.shape == (3, 24, 24)
  assert (kernel[0] != kernel[1]).mean() > 0.99


def test_a_seed_gives_the_same_model_and_another_seed_another():
  def first(seed):
    model = models.load("encoder", seed=seed, **TINY)
    return jax.tree.leaves(nnx.state(model))

  for a, b in zip(first(1), first(1), strict=True):
    np.testing.assert_array_equal(a, b)
  differ = [(a != b).any() for a, b in zip(first(1), first(2), strict=True)]
  assert any(differ)


def test_too_long_a_text_is_refused():
  model = models.load("encoder", positions=4, **TINY)
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
