"""The decoder: causality, compile size, sharing of the base."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjax_peft import losses, models

TINY = {
  **{"vocab": 50, "width": 24, "depth": 3, "heads": 4, "groups": 2},
  **{"ffn": 56, "head_norm": True, "bias": True},
}


def tokens(key=0, batch=2, length=7):
  return jax.random.randint(
    jax.random.key(key), (batch, length), 1, TINY["vocab"], jnp.int32
  )


def program(depth):
  """Number of lines of the compiled loss and gradient."""
  graph, state = nnx.split(models.load("decoder", **(TINY | {"depth": depth})))

  def loss(state, x):
    return nnx.merge(graph, state)(x).sum()

  lowered = jax.jit(jax.grad(loss)).lower(state, tokens())
  return len(lowered.compile().as_text().splitlines())


@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_token_changes_only_the_logits_from_its_place_on(at):
  model = models.load("decoder", **TINY)
  x = tokens()
  other = x.at[:, at].set(x[:, at] % 49 + 1)
  before, after = model(x), model(other)
  np.testing.assert_array_equal(before[:, :at], after[:, :at])
  assert (before[:, at:] != after[:, at:]).all(-1).all()


def test_positions_matter():
  """Without rotation, attention over equal keys could not tell order."""
  model = models.load("decoder", **TINY)
  x = jnp.array([[5, 6, 7], [6, 5, 7]], jnp.int32)
  last = model(x)[:, -1]
  assert (jnp.abs(last[0] - last[1]) > 1e-4).mean() > 0.9


def test_the_compiled_program_does_not_grow_with_depth():
  assert program(12) <= 1.02 * program(2)


def test_clients_share_one_matrix_product_with_the_base():
  clients, batch, time = 3, 2, 5
  model = models.load("decoder", tied=False, **TINY)
  graph, head, base = nnx.split(
    model, nnx.filterlib.PathContains("head"), ...
  )

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
  tied = nnx.state(models.load("decoder", **TINY))
  untied = nnx.state(models.load("decoder", tied=False, **TINY))
  assert "head" not in tied
  assert untied["head"]["kernel"][...].shape == (24, 50)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"groups": 2}, "groups must divide heads"),
    ({"width": 100}, "heads must divide width"),
    ({"head_width": 7}, "even width"),
    ({"activation": "relu"}, "activation must be one of"),
    ({"groups": 0}, "groups must be at least 1"),
    ({"keep": "some"}, "keep must be one of"),
  ],
)
def test_a_config_that_cannot_work_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    models.DecoderConfig(**fields)
