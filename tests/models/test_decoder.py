"""The decoder: causality, compile size, sharing of the base."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjax_peft import losses, models

TINY = {"vocab": 50, "width": 24, "depth": 2, "heads": 4, "groups": 2}
TINY |= {"ffn": 56, "head_norm": True, "bias": True}


def tokens(key=0, batch=2, length=7):
  return jax.random.randint(
    jax.random.key(key), (batch, length), 1, TINY["vocab"], jnp.int32
  )


@functools.cache
def decoder(**options):
  return models.load("decoder", **(TINY | options))


@nnx.jit
def run(model, x):
  return model(x)


def lines(depth):
  """Lines of the gradient's program as traced, of the forward as compiled."""
  graph, state = nnx.split(decoder(depth=depth))

  def total(state, x):
    return nnx.merge(graph, state)(x).sum()

  traced = jax.jit(jax.grad(total)).lower(state, tokens()).as_text()
  forward = jax.jit(total).lower(state, tokens()).compile().as_text()
  return len(traced.splitlines()), len(forward.splitlines())


@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_token_changes_only_the_logits_from_its_place_on(at):
  model = decoder()
  x = tokens()
  other = x.at[:, at].set(x[:, at] % 49 + 1)
  before, after = run(model, x), run(model, other)
  np.testing.assert_array_equal(before[:, :at], after[:, :at])
  assert (before[:, at:] != after[:, at:]).all(-1).all()


def test_positions_matter():
  """Without rotation, attention over equal keys could not tell order."""
  model = decoder()
  x = jnp.array([[5, 6, 7], [6, 5, 7]], jnp.int32)
  last = run(model, x)[:, -1]
  assert (jnp.abs(last[0] - last[1]) > 1e-4).mean() > 0.9


def test_the_program_does_not_grow_with_depth():
  for deep, shallow in zip(lines(12), lines(2), strict=True):
    assert deep <= 1.02 * shallow


def test_clients_share_one_matrix_product_with_the_base():
  clients, batch, time = 3, 2, 5
  model = decoder(tied=False)
  graph, head, base = nnx.split(model, nnx.filterlib.PathContains("head"), ...)

  def loss(head, base, x):
    module = nnx.merge(graph, head, base)
    batch = {"tokens": x, "length": jnp.full(2, time, jnp.int32)}
    return losses.next_token(module, batch, jax.random.key(0))[0].sum()

  many = jax.tree.map(lambda leaf: jnp.stack([leaf] * clients), head)
  x = jnp.stack([tokens(i, batch, time) for i in range(clients)])
  step = jax.jit(jax.vmap(jax.grad(loss), (0, None, 0)))
  lowered = step.lower(many, base, x)
  products = [
    line
    for line in lowered.as_text().splitlines()
    if "dot_general" in line and "tensor<24x56xf32>" in line
  ]
  assert products
  assert not any("batching_dims" in line for line in products)
  rows = clients * batch * time
  compiled = lowered.compile().as_text()
  assert re.search(rf"= f32\[{rows},56\]\S* dot\(", compiled)


def test_an_untied_head_is_its_own_matrix():
  tied = nnx.state(decoder())
  untied = nnx.state(decoder(tied=False))
  assert "head" not in tied
  assert untied["head"]["kernel"][...].shape == (24, 50)


def test_capped_logits_stay_below_the_cap_and_keep_their_order():
  x = tokens()
  plain, capped = run(decoder(), x), run(decoder(logit_cap=1.0), x)
  assert jnp.abs(plain).max() > 1 > jnp.abs(capped).max()
  np.testing.assert_array_equal(plain.argmax(-1), capped.argmax(-1))
  np.testing.assert_allclose(capped, jnp.tanh(plain), rtol=1e-5)


def test_scores_capped_near_zero_attend_to_all_alike():
  """Then the last place sees a set: order of the others is not seen."""
  model = decoder(attention_cap=1e-9, depth=1, post_norm=True)
  x = jnp.array([[5, 6, 7], [6, 5, 7]], jnp.int32)
  last = run(model, x)[:, -1]
  np.testing.assert_allclose(last[0], last[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"groups": 2}, "groups must divide heads"),
    ({"width": 100}, "heads must divide width"),
    ({"head_width": 7}, "even width"),
    ({"activation": "relu"}, "activation must be one of"),
    ({"groups": 0}, "groups must be at least 1"),
    ({"keep": "some"}, "keep must be one of"),
    ({"window": 0}, "window must be positive or None"),
    ({"logit_cap": -1.0}, "logit_cap must be positive or None"),
  ],
)
def test_a_config_that_cannot_work_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    models.DecoderConfig(**fields)
