"""Losses against hand-computed values and the plain way to compute them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn import metrics

from fedjax_peft import losses, models

KEY = jax.random.key(0)
TINY = {"vocab": 50, "width": 24, "depth": 1, "heads": 4, "groups": 2}


@functools.cache
def decoder():
  return models.load("decoder", **TINY)


@functools.partial(nnx.jit, static_argnums=2)
def next_token(model, batch, wrap):
  return losses.next_token(wrap(model), batch, KEY)


def texts(batch=3, length=39):
  x = jax.random.randint(jax.random.key(1), (batch, length), 0, 50, jnp.int32)
  return {"tokens": x, "length": jnp.array([length, 5, 18], jnp.int32)}


def plain(module):
  """The same function of tokens, without `hidden` and `unembed`."""
  return lambda tokens, length: module(tokens, length)


def test_cross_entropy_is_that_of_scikit_learn():
  logits = jax.random.normal(jax.random.key(1), (6, 4))
  label = jnp.array([0, 3, 1, 1, 2, 0], jnp.int32)
  batch = {"x": logits, "label": label}
  loss, stats = losses.classification(lambda x: x, batch, KEY)
  assert loss.shape == (6,)
  expected = metrics.log_loss(label, jax.nn.softmax(logits))
  np.testing.assert_allclose(loss.mean(), expected, rtol=1e-6)
  hits, count = stats["accuracy"]
  expected = metrics.accuracy_score(label, logits.argmax(1))
  np.testing.assert_allclose(hits.sum() / count.sum(), expected, rtol=1e-6)


def test_large_logits_do_not_overflow():
  batch = {"x": jnp.array([[1e4, 0.0]]), "label": jnp.array([1], jnp.int32)}
  loss, _ = losses.classification(lambda x: x, batch, KEY)
  np.testing.assert_array_equal(loss, [1e4])


def test_each_token_is_predicted_from_those_before_it():
  """A module that always says 'the next id is mine plus one'."""

  def successor(tokens, length):
    return 100.0 * jax.nn.one_hot(tokens + 1, 9)

  batch = {
    "tokens": jnp.array([[1, 2, 3, 4, 0], [1, 2, 2, 7, 7]], jnp.int32),
    "length": jnp.array([4, 3], jnp.int32),
  }
  loss, stats = losses.next_token(successor, batch, KEY)
  np.testing.assert_allclose(loss, [0.0, 50.0])
  np.testing.assert_array_equal(stats["accuracy"][0], [3, 1])
  np.testing.assert_array_equal(stats["accuracy"][1], [3, 2])
  np.testing.assert_allclose(stats["token_loss"][0], [0.0, 100.0])


def test_padding_does_not_enter_the_loss():
  model, batch = decoder(), texts()
  padding = jnp.arange(39)[None] >= batch["length"][:, None]
  other = batch | {"tokens": jnp.where(padding, 7, batch["tokens"])}
  for wrap in (plain, nnx.clone):
    a, b = (next_token(model, x, wrap) for x in (batch, other))
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1]["accuracy"][0], b[1]["accuracy"][0])


@pytest.mark.parametrize("length", [0, 1])
def test_a_text_with_nothing_to_predict_has_loss_zero(length):
  batch = texts() | {"length": jnp.full(3, length, jnp.int32)}
  loss, stats = next_token(decoder(), batch, nnx.clone)
  np.testing.assert_array_equal(loss, 0.0)
  np.testing.assert_array_equal(stats["token_loss"][1], 0.0)


@pytest.mark.parametrize("length", [2, 17, 39])
def test_chunks_give_the_loss_and_gradient_of_all_logits_at_once(length, tol):
  graph, state = nnx.split(decoder())
  batch = texts()
  batch["tokens"] = batch["tokens"][:, :length]

  def total(state, wrap):
    module = wrap(nnx.merge(graph, state))
    loss, stats = losses.next_token(module, batch, KEY)
    return loss.sum(), stats

  run = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
  whole, parts = run(state, plain), run(state, nnx.clone)
  limit = tol(jnp.float32, 50 * 39)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    scale = max(1.0, float(jnp.abs(a).max()))
    np.testing.assert_allclose(a, b, rtol=0, atol=limit * scale)


def test_chunks_never_hold_all_logits():
  graph, state = nnx.split(decoder())
  batch = texts()

  def total(state, wrap):
    module = wrap(nnx.merge(graph, state))
    return losses.next_token(module, batch, KEY)[0].sum()

  def holds_all(wrap):
    step = jax.jit(jax.grad(total), static_argnums=1)
    text = step.lower(state, wrap).compile().as_text()
    return any(f"f32[{x},50]" in text for x in ("3,39", "3,38", "117", "114"))

  assert holds_all(plain)
  assert not holds_all(nnx.clone)


def test_squared_error_is_averaged_over_outputs():
  batch = {"x": jnp.zeros((2, 2)), "label": jnp.array([[1.0, 3.0], [0, 2]])}
  loss, stats = losses.regression(lambda x: x, batch, KEY)
  np.testing.assert_array_equal(loss, [5.0, 2.0])
  np.testing.assert_array_equal(stats["squared_error"][1], [1.0, 1.0])


def test_features_reach_the_module_by_name():
  def module(*, image, weight):
    return image * weight

  batch = {
    "weight": jnp.full((1, 2), 3.0),
    "label": jnp.array([0], jnp.int32),
    "image": jnp.ones((1, 2)),
  }
  loss, _ = losses.classification(module, batch, KEY)
  np.testing.assert_allclose(loss, [np.log(2)], rtol=1e-6)


def test_what_does_not_fit_is_refused():
  label = jnp.zeros(2, jnp.int32)
  with pytest.raises(ValueError, match="needs 'label'"):
    losses.classification(lambda x: x, {"x": label}, KEY)
  with pytest.raises(ValueError, match=r"\[batch, classes\]"):
    losses.classification(lambda x: x, {"x": label, "label": label}, KEY)
  with pytest.raises(ValueError, match="next_token needs 'length'"):
    losses.next_token(lambda tokens: tokens, {"tokens": label}, KEY)
  batch = {"x": jnp.zeros((2, 1)), "label": jnp.zeros(2)}
  with pytest.raises(ValueError, match=r"predictions \(2, 1\), labels \(2,\)"):
    losses.regression(lambda x: x, batch, KEY)
