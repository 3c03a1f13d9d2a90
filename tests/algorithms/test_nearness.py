"""FedDPA by example: the nearer to a client's data, the more personal."""

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
from fedjax_peft.algorithms import nearness

COHORT = (0, 1, 3)
HOW = fp.local(optax.sgd(0.25), batch=4, epochs=2)
MOST = 0.75


class Seeing(toy.Net):
  """A net that offers what its head reads."""

  def features(self, x):
    return jax.nn.relu(self.up(x))

  def __call__(self, x):
    return self.head(self.features(x))


@functools.cache
def data():
  return toy.people((5, 6, 9, 7), heldout=0.3)


@functools.cache
def plain():
  ranks = {"shared": 2, "personal": 1}
  module = algorithms.stack(Seeing(nnx.Rngs(0)), ranks, where="up|head")
  return fp.model(module, fp.losses.classification, precision="float32")


@functools.cache
def model():
  return algorithms.by_example(plain(), data().examples, most=MOST)


@functools.cache
def player(by_example=True):
  here = model() if by_example else plain()
  return toy.Player(algorithms.feddpa(here, HOW), data(), here.base)


@functools.cache
def drawn():
  """The model's leaves with B and a center that are not zero."""
  rng = np.random.default_rng(0)
  return {
    k: np.asarray(v) if "lora_a" in k else rng.normal(size=v.shape)
    for k, v in model().params.items()
  }


def base(layer):
  """A kernel, float64 [K, F]."""
  module = getattr(plain().origin, layer)
  return np.asarray(module.lora_base.kernel[...], np.float64)


def directions(x):
  """Features of length one of the plain net, float64 [B, 7]."""
  seen = np.maximum(np.asarray(x, np.float64) @ base("up"), 0)
  length = np.linalg.norm(seen, axis=1, keepdims=True)
  return seen / np.where(length > 0, length, 1)


def losses(params, x, label):
  """Cross-entropies one example after another, in float64."""
  params = {k: np.asarray(v, np.float64) for k, v in params.items()}

  def layer(name, x, weight):
    y = x @ base(name)
    for which, share in (("personal", weight), ("shared", 1 - weight)):
      a, b = (params[f"{name}/{which}/lora_{k}"] for k in "ab")
      y = y + 2.0 * share * (x @ a @ b)
    return y

  found = []
  for one, seen, true in zip(
    np.asarray(x, np.float64), directions(x), label, strict=True
  ):
    weight = MOST * max(seen @ params[nearness.CENTER], 0)
    logits = layer("head", np.maximum(layer("up", one, weight), 0), weight)
    found.append(np.log(np.sum(np.exp(logits))) - logits[true])
  return np.array(found)


def test_every_example_has_its_own_mixture(tol):
  params = {k: jnp.asarray(v, jnp.float32) for k, v in drawn().items()}
  rows = {k: v[:12] for k, v in data().examples.items()}
  weights = directions(rows["x"]) @ drawn()[nearness.CENTER]
  assert (weights > 0.05).any()
  assert (weights < 0).any()  # no more than nothing is taken away
  each, metrics, changed = model().loss(
    params, model().base, rows, jax.random.key(0)
  )
  wanted = losses(drawn(), rows["x"], rows["label"])
  np.testing.assert_allclose(each, wanted, rtol=1e-5, atol=tol(jnp.float32, 64))
  assert metrics["accuracy"][0].shape == (12,)
  assert not changed


def test_the_center_is_the_mean_direction_of_what_a_client_trained_on(tol):
  state = player().play(COHORT, COHORT)[0]
  centers = state.clients.local[nearness.CENTER]
  for c in range(4):
    rows = data().train[c]
    wanted = directions(data().examples["x"][rows]).mean(axis=0)
    wanted = wanted if c in COHORT else 0 * wanted
    np.testing.assert_allclose(
      centers[c], wanted, atol=4 * tol(jnp.float32, 7 * 9)
    )


def test_clients_train_as_they_do_with_a_fixed_weight(tol):
  found, wanted = (
    player(by_example).play(COHORT, COHORT)[0] for by_example in (True, False)
  )
  for one, other in (
    (found.params, wanted.params),
    (found.clients.local, wanted.clients.local),
  ):
    assert set(one) - {nearness.CENTER} == set(other)
    for k, x in other.items():
      np.testing.assert_allclose(one[k], x, atol=4 * tol(jnp.float32, 7 * 9))


def test_the_center_is_in_no_message():
  sizes = (player(b).algorithm.bytes(3) for b in (True, False))
  assert len({tuple(sorted(s.items())) for s in sizes}) == 1


def test_clients_are_tested_with_the_weight_of_each_example():
  state = player().play(*(COHORT,) * 6)[0]
  algorithm = player().algorithm
  run = fp.evaluation(
    algorithm, model(), data(), batch=4, settings=toy.lanes(width=1)
  )
  columns = run(state).clients
  moved = 0.0
  for i, c in enumerate(columns["client"]):
    params = dict(state.params)
    params |= {k: v[c] for k, v in state.clients.local.items()}
    rows = data().heldout[int(c)]
    x, label = (data().examples[k][rows] for k in ("x", "label"))
    wanted = losses(params, x, label)
    np.testing.assert_allclose(
      columns["loss/numerator"][i], wanted.sum(), rtol=1e-5
    )
    everyone = losses(params | {nearness.CENTER: np.zeros(7)}, x, label)
    away = np.abs(wanted - everyone).max()
    assert (away > 0) == (c in COHORT)  # who never trained uses `shared`
    moved = max(moved, away)
  assert moved > 1e-3


def test_what_cannot_be_weighed_is_refused():
  with pytest.raises(ValueError, match="most must be"):
    algorithms.by_example(plain(), data().examples, most=1.5)
  ranks = {"shared": 1, "personal": 1}
  blind = algorithms.stack(toy.Net(nnx.Rngs(0)), ranks, where="up")
  blind = fp.model(blind, fp.losses.classification)
  with pytest.raises(ValueError, match="a Net has no method features"):
    algorithms.by_example(blind, data().examples)
  with pytest.raises(ValueError, match="called"):
    algorithms.by_example(toy.net(), data().examples)
