"""Meta-learning and baselines, against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bowls
import fedjax_peft as fp
import toy
from fedjax_peft import algorithms

ALL = bowls.EVERYONE
RATE, STEPS = bowls.RATE, bowls.STEPS


def near(found, wanted, eps):
  np.testing.assert_allclose(found, wanted, rtol=0, atol=eps)


@pytest.mark.parametrize("first_order", [True, False])
def test_per_fedavg_steps_along_the_gradient_after_a_step(first_order, tol):
  algorithm = algorithms.per_fedavg(
    bowls.model(), bowls.how(), rate=0.25, first_order=first_order
  )
  state = bowls.play(algorithm, ALL, ALL)
  a, x = bowls.curves()[0].astype(np.float64), bowls.start()
  for _ in range(2):
    y = np.tile(x, (4, 1))
    for _ in range(STEPS):
      slope = bowls.slopes(y - 0.25 * bowls.slopes(y))
      y = y - RATE * (slope if first_order else (1 - 0.25 * a) * slope)
    x = bowls.weights() @ y
  near(bowls.flat(state.params), x, tol(jnp.float32, STEPS * 2))


def test_a_batch_is_split_into_two_halves_for_the_two_gradients(tol):
  # Client 0 has five examples: 0, 2, 4 for the inner step, 1, 3 for the outer.
  data = toy.people((5, 1))
  how = fp.local(optax.sgd(1.0), batch=8, shuffle=False)
  algorithm = algorithms.per_fedavg(toy.net(), how, rate=0.5)
  player = toy.Player(algorithm, data, toy.net().base)
  state = player.play((0,))[0]
  params = {k: np.asarray(v) for k, v in toy.net().params.items()}
  rows = data.train[0]
  inner = toy.gradient(params, data, rows[0::2])
  ahead = {k: v - np.float32(0.5) * inner[k] for k, v in params.items()}
  outer = toy.gradient(ahead, data, rows[1::2])
  for k, v in params.items():
    near(state.params[k], v - outer[k], tol(jnp.float32, 7))
  # Client 1 has one, for both.
  state = player.play((1,))[0]
  inner = toy.gradient(params, data, data.train[1])
  ahead = {k: v - np.float32(0.5) * inner[k] for k, v in params.items()}
  outer = toy.gradient(ahead, data, data.train[1])
  for k, v in params.items():
    near(state.params[k], v - outer[k], tol(jnp.float32, 7))


def test_reptile_goes_part_of_the_way_to_the_mean(tol):
  algorithm = algorithms.reptile(
    bowls.model(), bowls.how(), rate=0.25, lowrank=False
  )
  state = bowls.play(algorithm, ALL, ALL)
  x = bowls.start()
  for _ in range(2):
    x = x + 0.25 * (bowls.weights() @ bowls.alone(x) - x)
  near(bowls.flat(state.params), x, tol(jnp.float32, STEPS * 2))


# Baselines.


@functools.cache
def people():
  return toy.people((6, 9, 14, 5, 8, 11), heldout=0.4, unseen=0.34, seed=3)


def test_who_trains_alone_sends_nothing_and_ends_where_sgd_does(tol):
  how = fp.local(optax.sgd(0.2), batch=4)
  algorithm = algorithms.local_only(toy.net(), how)
  assert algorithm.bytes(4)["cloud/down_bytes"] == 0
  data = people()
  state = toy.Player(algorithm, data, toy.net().base).play((0, 1), (0, 1))[0]
  params = {k: np.asarray(v) for k, v in toy.net().params.items()}
  for number in range(2):
    params = toy.train(params, data, 1, how, 0.2, round=number)
  for k, v in params.items():
    near(state.clients.local[k][1], v, tol(jnp.float32, 7 * 4))


def test_the_pool_has_what_seen_clients_train_on_and_the_same_test():
  data, pool = people(), algorithms.pooled(people())
  seen = np.flatnonzero(data.seen)
  wanted = np.sort(np.concatenate([data.train[int(c)] for c in seen]))
  assert len(pool) == 1
  assert pool.train[0].tolist() == wanted.tolist()
  assert pool.heldout[0].tolist() == np.unique(data.heldout.rows).tolist()
  assert pool.test.tolist() == data.test.tolist()


def test_the_centralized_baseline_makes_as_many_steps_as_a_cohort(tol):
  data, how = people(), fp.local(optax.sgd(0.2), batch=4, epochs=2)
  algorithm = algorithms.centralized(toy.net(), how, data=data, cohort=3)
  steps = algorithm.work.local.steps
  sizes = data.train.sizes[data.seen]
  assert steps == round(3 * np.mean(2 * np.ceil(sizes / 4)))
  pool = algorithms.pooled(data)
  state = toy.Player(algorithm, pool, toy.net().base).play((0,))[0]
  params = {k: np.asarray(v) for k, v in toy.net().params.items()}
  params = toy.train(params, pool, 0, algorithm.work.local, 0.2)
  for k, v in params.items():
    near(state.params[k], v, tol(jnp.float32, 7 * steps))


# What a client is evaluated with.


def by_hand(params, client):
  """Summed loss over a client's held-out rows."""
  model, data = toy.net(), people()
  rows = {k: v[data.heldout[client]] for k, v in data.examples.items()}
  each, _, _ = model.loss(params, model.base, rows, jax.random.key(0))
  return float(each.sum())


def test_clients_are_scored_with_their_own_models_seen_or_not(tol):
  how = fp.local(optax.sgd(0.3), batch=4)
  algorithm = algorithms.ditto(toy.net(), how, strength=0.1)
  data = people()
  seen = np.flatnonzero(data.seen)[:3]
  state = toy.Player(algorithm, data, toy.net().base).play(seen)[0]
  report = fp.evaluation(algorithm, toy.net(), data, batch=4, personalize=how)(
    state
  )
  found = report.clients["loss/numerator"]
  for client in range(6):
    own = {
      k.removeprefix("ditto/"): v[client]
      for k, v in state.clients.local.items()
    }
    assert found[client] == pytest.approx(by_hand(own, client), rel=1e-5)
    trained = toy.train(own, data, client, how, 0.3)
    assert report.clients["personal/loss/numerator"][client] == pytest.approx(
      by_hand(trained, client), rel=1e-4
    )
  strangers = np.flatnonzero(~data.seen)
  for client in strangers:  # all that lives on them is where everyone began
    start = {k: jnp.asarray(v) for k, v in toy.net().params.items()}
    assert found[client] == pytest.approx(by_hand(start, client), rel=1e-5)
  wanted = ("eval", "unseen", "personal", "personal_unseen")
  assert {f"{name}/loss" for name in wanted} <= report.record.keys()
  assert "test/loss" not in report.record


def test_what_no_model_reads_leaves_evaluation_as_it_is():
  # Control variates live on the devices and change nothing there.
  how = fp.local(optax.sgd(0.3), batch=4)
  algorithm = algorithms.scaffold(toy.net(), how, clients=4)
  state = algorithm.init(clients=6, cohort=2)
  report = fp.evaluation(algorithm, toy.net(), people(), batch=4)(state)
  plain = fp.fedavg(toy.net(), how, lowrank=False)
  other = fp.evaluation(plain, toy.net(), people(), batch=4)(
    plain.init(clients=6, cohort=2)
  )
  assert report.record == other.record
  assert "test/loss" in report.record
