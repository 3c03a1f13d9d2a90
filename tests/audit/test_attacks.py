"""Attacks: they find what is there, and nothing where nothing is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model
import sklearn.metrics
from flax import nnx

import audit_world as world
import fedjax_peft as fp
from fedjax_peft import audit
from fedjax_peft.audit import (
  deal,
  inversion,
  membership,
  properties,
  score,
  table,
  voice,
)
from tolerance import tol

KEY = jax.random.key(2)
SEARCH = inversion.Search(steps=300, restarts=3)
SIZES = table.Sizes(
  targets=4, search=SEARCH, trials=32, fitted=96, probed=48, runs=64
)


# Inversion.


class Dense(nnx.Module):
  """One dense layer with a bias."""

  def __init__(self):
    self.head = nnx.Linear(6, 3, rngs=nnx.Rngs(0))

  def __call__(self, image):
    return self.head(image)


def test_the_input_of_a_dense_layer_is_in_its_gradient_exactly():
  model = fp.model(Dense(), fp.losses.classification, precision="float32")
  one = voice.trained(model)
  x = np.random.default_rng(0).normal(size=(1, 6)).astype(np.float32)
  said = one.say(one.weights, {"image": x, "label": np.array([1], np.int32)})
  found = inversion.linear_input(said["head/kernel"], said["head/bias"])
  # A message is a difference of weights of about one.
  near = tol("float32", 18) * np.abs(x).max() / np.abs(said["head/bias"]).max()
  np.testing.assert_allclose(found, x[0], atol=near)
  # Of two examples it is no longer either of them.
  two = {"image": np.stack([x[0], -x[0]]), "label": np.array([1, 2], np.int32)}
  said = one.say(one.weights, two)
  found = inversion.linear_input(said["head/kernel"], said["head/bias"])
  assert np.abs(found - x[0]).max() > 0.1
  with pytest.raises(ValueError, match="where a bias has a gradient"):
    inversion.linear_input(said["head/kernel"], np.zeros(3))


@functools.cache
def inverted(name):
  return table.inverted(world.seen(name), world.pool(), SIZES, 0)


def test_images_come_back_from_the_full_gradient():
  found = inverted("full_gradient")
  assert found["better_than_guess"] >= 0.75  # few starts, and few steps
  assert found["psnr"] > found["psnr_guess"] + 5


@pytest.mark.parametrize("name", ["secure_wire", "secure_sum", "client_dp"])
def test_images_do_not_come_back_from_a_sum_a_mask_or_noise(name):
  found = inverted(name)
  if name != "secure_sum":  # of four, in which one may stand out
    assert found["better_than_guess"] == 0
  assert found["psnr"] < found["psnr_guess"]
  assert found["psnr"] < inverted("full_gradient")["psnr"] - 5


def test_a_search_finds_the_image_that_was_seen_and_no_other():
  seen = world.seen("full_gradient")
  examples = deal.examples(world.pool(), np.arange(4)[:, None])
  said = audit.observe(seen, examples, KEY)
  turned = jax.tree.map(lambda x: np.roll(x, 1, 0), said)
  run = functools.partial(inversion.invert, seen.voice)
  shape = (world.SIDE, world.SIDE, 1)
  label, image = examples["label"], examples["image"]
  right = score.psnr(run(said, label, shape, KEY, SEARCH), image)
  wrong = run(turned, np.roll(label, 1, 0), shape, KEY, SEARCH)
  assert (right > score.psnr(wrong, image) + 3).all()


def test_cosine_and_variation_are_those_of_a_loop():
  rng = np.random.default_rng(0)
  a, b = ({"x": rng.normal(size=9), "y": rng.normal(size=2)} for _ in range(2))
  left, right = (np.concatenate(list(x.values())) for x in (a, b))
  want = left @ right / np.linalg.norm(left) / np.linalg.norm(right)
  near = tol("float32", 11)
  assert float(inversion.cosine(a, b)) == pytest.approx(want, abs=near)
  assert float(inversion.cosine(a, a)) == pytest.approx(1, abs=near)
  assert float(inversion.cosine(a, jax.tree.map(jnp.zeros_like, b))) == 0
  step = np.zeros((1, 4, 4, 1), np.float32)
  step[:, 2:] = 1  # one of three differences down, none across
  assert float(inversion.variation(step)) == pytest.approx(1 / 3)
  assert float(inversion.variation(np.ones_like(step))) == 0


# Membership.


@pytest.mark.parametrize("seed", range(5))
def test_the_auc_is_that_of_scikit_learn_with_ties(seed):
  rng = np.random.default_rng(seed)
  up, down = rng.integers(0, 6, 40) + seed % 3, rng.integers(0, 6, 70)
  truth = np.repeat([1, 0], [40, 70])
  want = sklearn.metrics.roc_auc_score(truth, np.concatenate([up, down]))
  assert score.auc(up, down) == pytest.approx(want, abs=1e-12)
  assert score.auc(up, down) + score.auc(down, up) == pytest.approx(1)


def test_a_bootstrap_interval_holds_the_truth_about_as_often_as_it_says():
  # Of 100 intervals of 90 % at least 80 must hold the AUC of two normal laws
  # one apart, 0.7602: fewer would have p < 0.002. Of one that is 0.1 off fewer
  # than 60 do.
  true = 0.76025
  held = {0.0: 0, 0.1: 0}
  for seed in range(100):
    rng = np.random.default_rng(seed)
    up, down = rng.normal(1, 1, (60, 1)), rng.normal(0, 1, (60, 1))
    found = score.auc_interval(
      up, down, seed=seed, resamples=60, confidence=0.9
    )
    for off in held:
      held[off] += found.low <= true + off <= found.high
  assert held[0.0] >= 80
  assert held[0.1] < 60


def test_scores_that_cannot_be_ranked_are_refused():
  with pytest.raises(ValueError, match="got 0 positive and 1 negative"):
    score.auc([], [1.0])
  with pytest.raises(ValueError, match="got nan"):
    score.auc([np.nan], [1.0])
  with pytest.raises(ValueError, match="got 2 and 3 rows"):
    score.auc_interval(np.ones(2), np.ones(3), seed=0)


def test_the_only_example_of_a_client_is_known_from_its_gradient():
  seen, mine = world.seen("full_gradient"), world.clients(8, n=1)
  other = world.clients(8, n=1, seed=1)
  both = jax.tree.map(lambda a, b: np.concatenate([a, b], 1), mine, other)
  observed = audit.observe(seen, mine, KEY)
  found = membership.alignment(seen, observed, both)
  assert score.auc(found[:, 0], found[:, 1]) == 1


def test_members_show_in_a_message_and_not_in_a_masked_or_noisy_one():
  # Intervals of 95 %, each from a fixed seed.
  found = {
    name: table.members(world.seen(name), world.pool(), SIZES, 0)
    for name in ("full_gradient", "secure_wire", "client_dp")
  }
  assert found["full_gradient"]["alignment"]["low"] > 0.6
  for name in ("secure_wire", "client_dp"):
    for kind in ("alignment", "loss"):
      assert found[name][kind]["low"] < 0.5 < found[name][kind]["high"]


def test_a_model_that_learned_by_heart_likes_what_it_learned():
  full = world.subject().full
  both = world.clients(1, n=32)
  # Of labels drawn at random nothing can be learned but these themselves.
  rng = np.random.default_rng(0)
  both["label"] = rng.integers(0, 4, (1, 32)).astype(np.int32)
  mine, other = ({k: x[:, i::2] for k, x in both.items()} for i in range(2))
  one = {k: x[0] for k, x in mine.items()}
  step = jax.jit(full.say)
  params, base = full.weights
  for _ in range(150):
    said = step((params, base), one)
    params = {k: params[k] - 0.1 * said[k] for k in params}

  def auc(params):
    params = {k: np.asarray(x)[None] for k, x in params.items()}
    likes = [
      membership.lower_loss(full.model, params, base, rows)
      for rows in (mine, other)
    ]
    return score.auc(*likes)

  # Of 16 of either kind a rank test has p > 0.009 before, and p < 1e-4 after.
  assert 0.25 < auc(full.weights[0]) < 0.75
  assert auc(params) > 0.87


# Properties.


def test_the_probe_is_ridge_regression():
  rng = np.random.default_rng(0)
  x, label = rng.normal(size=(30, 50)), rng.integers(0, 3, 30)
  probe = properties.fit(x, label, 3, 2.0)
  target = np.where(np.arange(3) == label[:, None], 1.0, -1.0)
  want = sklearn.linear_model.Ridge(alpha=2.0, solver="svd").fit(x, target)
  new = rng.normal(size=(5, 50))
  near = tol("float64", 50) * 100  # scikit-learn inverts another matrix
  np.testing.assert_allclose(probe.scores(new), want.predict(new), atol=near)


@functools.cache
def guessed(name):
  return table.property_of(world.seen(name), world.pool(), SIZES, 0)


def test_the_majority_class_shows_in_a_gradient_and_in_its_signs():
  for name in ("full_gradient", "adapters_sign"):
    assert guessed(name)["low"] > 2 * guessed(name)["chance"]


@pytest.mark.parametrize("name", ["client_dp", "local_dp", "secure_wire"])
def test_it_does_not_show_under_noise_or_masks(name):
  assert guessed(name)["low"] < guessed(name)["chance"]
  assert guessed(name)["value"] < guessed("full_gradient")["low"]


def test_a_probe_of_nothing_guesses_at_chance():
  # Exact interval of 95 %, fixed seed.
  rng = np.random.default_rng(3)
  x, label = rng.normal(size=(300, 40)), rng.integers(0, 4, 300)
  found = score.accuracy(*properties.hits(x, label, 4, 200))
  assert found.low < 0.25 < found.high
  x[:, 0] = 9 * (label == 2)  # something
  assert score.accuracy(*properties.hits(x, label, 4, 200)).low > 0.25
