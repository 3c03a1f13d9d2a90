"""MOON: features near the global model's, away from the last ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_peft as fp
import toy
from fedjax_peft import algorithms

DATA = toy.people((2, 3, 4, 4))
COHORT = (0, 1, 2, 3)
HOW = fp.local(optax.sgd(0.2), batch=4, epochs=2)


def features(module, examples):
  return jax.nn.relu(module.up(examples["x"]))


@functools.cache
def player(mu):
  algorithm = algorithms.moon(toy.net(), HOW, features=features, mu=mu)
  return toy.Player(algorithm, DATA, toy.net().base)


def near(found, wanted, eps):
  for k, x in wanted.items():
    np.testing.assert_allclose(found[k], x, rtol=eps, atol=eps)


def test_without_its_term_it_is_fedavg(tol):
  plain = fp.fedavg(toy.net(), HOW, lowrank=False)
  wanted = toy.Player(plain, DATA, toy.net().base).play(COHORT, COHORT)[0]
  found = player(0.0).play(COHORT, COHORT)[0]
  near(found.params, wanted.params, tol(jnp.float32, 7 * 4))


def test_two_rounds_are_those_of_a_plain_loop(tol):
  # In the first round the model of the last one is the initial model; in the
  # second it is where the client ended in the first.
  state = player(2.0).play(COHORT, COHORT)[0]
  model = toy.net()

  def mean_loss(params, sent, old, rows):
    each, _, _ = model.loss(params, model.base, rows, jax.random.key(0))
    z, there, then = (
      jax.nn.relu(rows["x"] @ p["up/kernel"]) for p in (params, sent, old)
    )

    def cosine(u):
      return optax.losses.cosine_similarity(z, u, epsilon=1e-12) / 0.5

    scores = jnp.stack([cosine(there), cosine(then)], axis=1)
    return jnp.mean(each - 2.0 * jax.nn.log_softmax(scores, axis=1)[:, 0])

  slope = jax.jit(jax.grad(mean_loss))
  sent = {k: np.asarray(v) for k, v in model.params.items()}
  old = dict.fromkeys(COHORT, sent)
  for _ in range(2):
    new = {}
    for c in COHORT:  # every client's examples fit one batch
      rows = {k: v[DATA.train[c]] for k, v in DATA.examples.items()}
      y = sent
      for _ in range(2):
        grads = slope(y, sent, old[c], rows)
        y = {k: y[k] - 0.2 * grads[k] for k in y}
      new[c] = y
    old, sent = new, toy.mean(new, DATA)
    sent = {k: v.astype(np.float32) for k, v in sent.items()}
  # The term's gradient divides by norms of features of about 1.
  eps = 4 * tol(jnp.float32, 7 * 4)
  near(state.params, sent, eps)
  rows = {k: v[3] for k, v in state.clients.local.items()}
  near(rows, {f"moon/previous/{k}": v for k, v in old[3].items()}, eps)


def test_what_is_remembered_is_in_no_message():
  algorithm = player(2.0).algorithm
  size = sum(x.nbytes for x in toy.net().params.values())
  assert algorithm.bytes(4)["cloud/up_bytes"] == size + 4
  assert algorithm.bytes(4)["cloud/down_bytes"] == size


class Seeing(toy.Net):
  """A net that offers what its head reads."""

  def features(self, x):
    return jax.nn.relu(self.up(x))

  def __call__(self, x):
    return self.head(self.features(x))


def test_a_module_that_offers_its_features_needs_no_function():
  model = fp.model(
    Seeing(nnx.Rngs(0)), fp.losses.classification, precision="float32"
  )
  algorithm = algorithms.moon(model, HOW, mu=2.0)
  found = toy.Player(algorithm, DATA, model.base).play(COHORT, COHORT)[0]
  wanted = player(2.0).play(COHORT, COHORT)[0]
  assert toy.same_bits(found.params, wanted.params)


def test_a_module_without_features_is_refused_with_what_to_write():
  with pytest.raises(ValueError, match=r"a Net has no.*features=lambda"):
    algorithms.moon(toy.net(), HOW)
