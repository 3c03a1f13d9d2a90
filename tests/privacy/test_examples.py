"""Example-level privacy: jax-privacy's clipped sums, and laws of a step."""

import functools
import math
import re

import dp_accounting as dp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from flax import nnx
from jax_privacy import clipping as oracle

import fedjax_peft as fp
import tolerance
import toy
from fedjax_peft import algorithm, links, work
from fedjax_peft.data import schedule
from fedjax_peft.privacy import accounting, examples

CLIP, BATCH = 0.5, 6


@functools.cache
def weights():
  return dict(toy.net().params)


def batch_of(rows=BATCH, mask=None, seed=0):
  rng = np.random.default_rng(seed)
  features = {
    "x": jnp.asarray(rng.normal(size=(rows, 5)).astype(np.float32)),
    "label": jnp.asarray(rng.integers(0, 3, rows).astype(np.int32)),
  }
  mask = jnp.ones(rows) if mask is None else jnp.asarray(mask, jnp.float32)
  return work.Batch(features, mask, jax.random.key(seed))


@functools.cache
def summed():
  model, clip = toy.net(), links.clip(CLIP)

  def run(params, batch):
    return examples.clipped_sum(model, clip, params, {}, model.base, batch)

  return jax.jit(run)


@functools.cache
def private(multiplier):
  model = toy.net()
  down = examples.descent(
    model, batch=BATCH, clip_norm=CLIP, multiplier=multiplier
  )
  now = work.Moment(jnp.int32(0), jnp.int32(0), {})
  return jax.jit(lambda params, batch: down(params, {}, model.base, batch, now))


def norm_of(a, b):
  return math.sqrt(sum(float(jnp.sum((a[k] - b[k]) ** 2)) for k in a))


# The oracle calls a function of optax by its old name.
@pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated")
def test_the_clipped_sum_is_that_of_jax_privacy():
  model, mask = toy.net(), np.array([1, 1, 0, 1, 1, 1])
  batch = batch_of(mask=mask)

  def mean_loss(params, rows):
    each, _, _ = model.loss(params, model.base, rows, jax.random.key(0))
    return jnp.mean(each)

  reference = oracle.clipped_grad(
    mean_loss, l2_clip_norm=CLIP, batch_argnums=1, return_values=True
  )
  want, aux = jax.jit(reference)(
    weights(), batch.examples, is_padding_example=jnp.asarray(mask == 0)
  )
  got, stats = summed()(weights(), batch)
  for name, x in want.items():
    # Sums of BATCH gradients that are made in another order, through products
    # of 7 terms: a handful of roundings each.
    limit = tolerance.tol(jnp.float32, BATCH * 7)
    np.testing.assert_allclose(got[name], x, atol=limit, rtol=limit)
  here = mask > 0
  assert stats["loss"][0] == pytest.approx(
    float(np.sum(np.asarray(aux.values)[here])), rel=1e-5
  )
  assert float(stats["loss"][1]) == float(stats["clipped"][1]) == 5
  assert stats["clipped"][0] >= 1  # some were, and some were not
  unclipped = jax.grad(mean_loss)(weights(), batch.examples)
  assert norm_of({k: BATCH * v for k, v in unclipped.items()}, got) > CLIP


@pytest.mark.parametrize("value", [0.0, 3.0, 1e20, 3e38, np.inf, np.nan])
def test_one_example_moves_the_sum_by_the_clip_norm_at_most(value):
  batch = batch_of()
  x = batch.examples["x"]
  for row in 0, 4:
    mask = batch.mask.at[row].set(0)
    without = summed()(weights(), batch._replace(mask=mask))[0]
    bad = batch.examples | {"x": x.at[row].set(value)}
    got, _ = summed()(weights(), batch._replace(examples=bad))
    assert all(bool(jnp.all(jnp.isfinite(v))) for v in got.values())
    # Float32 sums of up to BATCH clipped gradients are compared.
    limit = BATCH * CLIP * tolerance.tol(jnp.float32, BATCH)
    assert norm_of(got, without) <= CLIP + limit
    # Padding counts exactly zero, whatever it holds, nan too.
    padded = summed()(weights(), batch._replace(examples=bad, mask=mask))[0]
    assert toy.same_bits(padded, without)
  # The bound is reached: by a gradient that is clipped.
  if value == 3.0:
    assert norm_of(got, without) > 0.99 * CLIP


def test_a_step_divides_by_the_planned_size_not_by_those_who_are_there():
  full, half = batch_of(), batch_of(mask=[1, 1, 1, 0, 0, 0])
  for batch in full, half:
    total, _ = summed()(weights(), batch)
    slope = private(0.0)(weights(), batch)
    for name, x in total.items():
      np.testing.assert_allclose(slope.grads[name], x / BATCH, rtol=1e-6)
  nobody = private(0.0)(weights(), batch_of(mask=np.zeros(BATCH)))
  assert all(not np.any(x) for x in nobody.grads.values())


def test_noise_has_the_stated_variance_and_not_two_thirds_of_it():
  # Two-sided chi-square test of some 45,000 normal numbers, fixed seeds:
  # p > 0.01 as stated, < 1e-9 at 2/3 and 3/2 of the variance.
  multiplier, draws = 1.3, 800
  batch = batch_of()
  quiet = private(0.0)(weights(), batch).grads
  keys = jax.random.split(jax.random.key(5), draws)
  noisy = jax.vmap(
    lambda key: private(multiplier)(weights(), batch._replace(key=key)).grads
  )(keys)
  std = multiplier * CLIP / BATCH
  z = np.concatenate(
    [
      (np.asarray(noisy[k]) - np.asarray(x)).reshape(draws, -1)
      for k, x in quiet.items()
    ],
    1,
  )

  def p_of(stated):
    tail = scipy.stats.chi2(z.size).cdf(np.sum(np.float64(z) ** 2) / stated**2)
    return 2 * min(tail, 1 - tail)

  assert p_of(std) > 0.01
  assert p_of(std * math.sqrt(2 / 3)) < 1e-9
  assert p_of(std * math.sqrt(3 / 2)) < 1e-9
  # Independent from value to value and from draw to draw: correlations of so
  # many normal numbers are normal of std 1 / sqrt(n), and the largest of all
  # pairs stays below five of them (p = 1e-3 by Bonferroni's bound).
  pairs = np.corrcoef(z.T) - np.eye(z.shape[1])
  assert np.abs(pairs).max() < 5 / math.sqrt(draws)
  assert scipy.stats.kstest(z.ravel() / std, "norm").pvalue > 0.01
  again = private(multiplier)(weights(), batch._replace(key=keys[3])).grads
  other = private(multiplier)(weights(), batch._replace(key=keys[4])).grads
  assert norm_of(again, other) > 0


def rounds_of(job):
  made = fp.fedavg(toy.net(), job.local, lowrank=False)
  return toy.Player(algorithm.extended(made, job=job), toy.people(), most=4)


@functools.cache
def player(clip_norm, multiplier, proximal=0.0):
  how = fp.local(optax.sgd(0.1), batch=4, epochs=2)
  job = examples.train(
    toy.net(),
    how,
    clip_norm=clip_norm,
    multiplier=multiplier,
    proximal=proximal,
  )
  return rounds_of(job)


def test_without_noise_and_clipping_a_round_is_that_of_summed_gradients():
  # Plain SGD where each batch's sum is divided by the planned size.
  data, ids = toy.people(), [3, 5]
  state, outcome = player(1e6, 0.0).play(ids)
  start = {k: v[0] for k, v in player(1e6, 0.0).start().nodes[0].params.items()}
  messages = {}
  for client in ids:
    plan = schedule.batches(
      data.train, np.array([client]), batch=4, epochs=2, seed=(0, 0)
    )
    new = start
    for rows in plan.rows:
      here = rows[rows >= 0]
      grads = toy.gradient(new, data, here)
      new = {k: new[k] - 0.1 * grads[k] * here.size / 4 for k in new}
    messages[client] = {k: start[k] - new[k] for k in new}
  want = toy.mean(messages, data)
  got = {k: start[k] - v[0] for k, v in state.nodes[0].params.items()}
  for name, x in want.items():
    # Six steps, each of sums of 4 rows and 7 terms.
    np.testing.assert_allclose(
      got[name], x, atol=tolerance.tol(jnp.float32, 6 * 4 * 7)
    )
  assert outcome.record["train/clipped"] == 0


def test_a_round_with_noise_differs_by_its_seed_and_is_repeated_by_it():
  playing = player(0.5, 1.0, 0.1)
  one, outcome = playing.play([3, 5], seed=1)
  again, _ = playing.play([3, 5], seed=1)
  other, _ = playing.play([3, 5], seed=2)
  assert toy.same_bits(one.nodes[0].params, again.nodes[0].params)
  assert norm_of(one.nodes[0].params, other.nodes[0].params) > 0.01
  assert 0 < outcome.record["train/clipped"] <= 1


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("steps", [None, 1, 4, 7])
def test_no_example_is_visited_more_often_than_is_accounted(
  steps, epochs, drop
):
  how = fp.local(
    optax.sgd(1.0), batch=4, epochs=epochs, steps=steps, drop_remainder=drop
  )
  data, most = toy.people(), 0
  for smallest in 1, 3, 9:
    ids = np.flatnonzero(data.train.sizes >= smallest)
    for seed in range(20):
      visits = schedule.batches(
        data.train,
        ids,
        batch=4,
        epochs=how.epochs,
        steps=how.steps,
        drop_remainder=drop,
        seed=(seed, 0),
      ).rows
      counts = np.bincount(visits[visits >= 0])
      most = max(most, counts.max())
      bound = examples.participations(how, 1, smallest=smallest)
      assert counts.max() <= bound
    assert examples.participations(how, 7, smallest=smallest) == 7 * bound
  assert most == examples.participations(how, 1)  # it is reached


def test_epsilon_is_that_of_as_many_gaussians():
  how = fp.local(optax.sgd(1.0), batch=4, epochs=2)
  visits = examples.participations(how, 10)
  got = accounting.epsilon(examples.event(5.0), 1e-5, rounds=visits)
  want = dp.get_epsilon_gaussian(5.0 / math.sqrt(20), 1e-5)
  assert got == pytest.approx(want, abs=1e-3)


def test_what_cannot_be_private_is_refused():
  model = toy.net()
  mixing = model._replace(mutable=frozenset({"mean"}))
  options = {"batch": 4, "clip_norm": 1.0, "multiplier": 1.0}
  with pytest.raises(ValueError, match="without batch statistics"):
    examples.descent(mixing, **options)
  for name, value in {
    "clip_norm": 0.0,
    "multiplier": -1.0,
    "batch": 0,
  }.items():
    with pytest.raises(ValueError, match=name):
      examples.descent(model, **(options | {name: value}))
  with pytest.raises(ValueError, match="rounds"):
    examples.participations(fp.local(optax.sgd(1.0), batch=4), 0)


def test_the_base_has_no_axis_of_examples():
  module = fp.peft.lora(toy.Net(nnx.Rngs(0)), 2, "up|head")
  model = fp.model(module, fp.losses.classification, precision="float32")
  clip, batch = links.clip(CLIP), batch_of()

  def dots(base):
    def run(params, base):
      return examples.clipped_sum(model, clip, params, {}, base, batch)

    text = jax.jit(run).lower(dict(model.params), base).as_text()
    return re.findall(r"dot_general[^\n]*: \((.*?)\) ->", text)

  shapes = {"x".join(map(str, x.shape)) + "xf32" for x in model.base.values()}
  assert {"5x7xf32", "7x3xf32"} <= shapes
  found = " ".join(dots(model.base))
  assert all(f"<{s}>" in found for s in ("5x7xf32", "7x3xf32"))
  assert not any(f"<{BATCH}x{s}>" in found for s in shapes)
