"""Algorithms against client drift, against plain loops on quadratics."""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bowls
import fedjax_peft as fp
from fedjax_peft import algorithms

ALL = bowls.EVERYONE
RATE, STEPS = bowls.RATE, bowls.STEPS
COHORTS = ((0, 2), (1, 3), (0, 3), (2, 3))


def near(found, wanted, eps):
  np.testing.assert_allclose(found, wanted, rtol=0, atol=eps)


# SCAFFOLD.


@functools.cache
def scaffold(**options):
  algorithm = algorithms.scaffold(
    bowls.model(), bowls.how(), clients=4, **options
  )
  return bowls.player(algorithm)


def test_scaffold_is_its_paper_in_a_plain_loop(tol):
  # Option II, with any cohorts; c moves by |S| / N of the mean, and c_i of
  # those who are not there stay.
  state = scaffold().play(*COHORTS)[0]
  x, c, mine = bowls.start(), np.zeros(5), np.zeros((4, 5))
  for cohort in COHORTS:
    y = np.tile(x, (4, 1))
    for _ in range(STEPS):
      y = y - RATE * (bowls.slopes(y) - mine + c)
    new = mine - c + (x - y) / (STEPS * RATE)
    w = bowls.weights(cohort)
    c = c + len(cohort) / 4 * (w @ (new - mine))
    mine = np.where((w > 0)[:, None], new, mine)
    x = w @ y
  eps = tol(jnp.float32, STEPS * len(COHORTS))
  near(bowls.flat(state.params), x, eps)
  near(bowls.flat(state.params, "scaffold/c/"), c, eps)
  near(bowls.flat(state.clients.local, "scaffold/mine/"), mine, eps)


def test_the_control_variate_is_the_mean_of_the_clients_every_round(tol):
  state = None
  for _ in range(3):
    state = scaffold().play(ALL, state=state)[0]
    c = bowls.flat(state.params, "scaffold/c/")
    mine = bowls.flat(state.clients.local, "scaffold/mine/")
    near(c, bowls.weights() @ mine, tol(jnp.float32, STEPS * 3))
    assert np.abs(c).max() > 1e-3


def test_with_equal_weights_it_is_the_mean_whoever_takes_part(tol):
  play = scaffold(uplink=fp.weigh("clients")).play
  state = play(*COHORTS)[0]
  c = bowls.flat(state.params, "scaffold/c/")
  mine = bowls.flat(state.clients.local, "scaffold/mine/")
  near(c, mine.mean(0), tol(jnp.float32, STEPS * 4))
  assert np.abs(c).max() > 1e-3


def test_scaffold_reaches_the_joint_optimum_where_fedavg_stalls(tol):
  state = scaffold().play(*[ALL] * 60)[0]
  near(bowls.flat(state.params), bowls.optimum(), 2 * tol(jnp.float32, STEPS))
  stalled = bowls.fedavg(60) - bowls.optimum()
  assert np.abs(stalled).max() > 1e-2


def test_the_number_of_clients_must_fit_the_population():
  algorithm = algorithms.scaffold(bowls.model(), bowls.how(), clients=5)
  with pytest.raises(ValueError, match=r"clients=5, a population of 4 .*write"):
    algorithm.init(clients=4, cohort=2)
  algorithm = algorithms.scaffold(bowls.model(), bowls.how(), clients=2)
  with pytest.raises(ValueError, match="cohorts of up to 3"):
    algorithm.init(clients=4, cohort=3)


# FedNova.


def epochs(rate=RATE, optimizer=None):
  """Batches of two: 1, 1, 2 and 3 steps a pass."""
  optimizer = optax.sgd(rate) if optimizer is None else optimizer
  return fp.local(optimizer, batch=2, epochs=2)


def test_fednova_is_fedavg_where_all_make_as_many_steps(tol):
  state = bowls.play(algorithms.fednova(bowls.model(), bowls.how()), *[ALL] * 3)
  eps = tol(jnp.float32, STEPS * 3)
  near(bowls.flat(state.params), bowls.fedavg(3), eps)
  assert state.params["fednova/steps"] == STEPS


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_fednova_averages_directions_and_steps_apart(momentum, tol):
  optimizer = optax.sgd(RATE, momentum=momentum or None)
  algorithm = algorithms.fednova(
    bowls.model(), epochs(optimizer=optimizer), momentum=momentum
  )
  state = bowls.play(algorithm, ALL, ALL)
  steps, x = np.array([2, 2, 4, 6]), bowls.start()
  # |a|_1 by its definition: how much each gradient counts in the end.
  size = np.array(
    [
      sum(sum(momentum**j for j in range(t - k)) for k in range(t))
      for t in steps
    ]
  )
  for _ in range(2):
    y, v = np.tile(x, (4, 1)), np.zeros((4, 5))
    for step in range(max(steps)):
      live = (step < steps)[:, None]
      v = np.where(live, momentum * v + bowls.slopes(y), v)
      y = np.where(live, y - RATE * v, y)
    w = bowls.weights()
    x = x - (w @ size) * (w @ ((x - y) / size[:, None]))
  near(bowls.flat(state.params), x, tol(jnp.float32, 6 * 2))


def test_fednova_ends_nearer_to_the_joint_optimum():
  how = epochs(rate=0.02)
  nova = bowls.play(algorithms.fednova(bowls.model(), how), *[ALL] * 60)
  plain = bowls.play(fp.fedavg(bowls.model(), how, lowrank=False), *[ALL] * 60)
  errors = [
    np.abs(bowls.flat(s.params) - bowls.optimum()).max() for s in (nova, plain)
  ]
  assert errors[0] < 0.2 * errors[1]


# FedDyn.


@functools.cache
def feddyn():
  return bowls.player(
    algorithms.feddyn(bowls.model(), bowls.how(), alpha=0.5, clients=4)
  )


def test_feddyn_is_its_paper_in_a_plain_loop(tol):
  state = feddyn().play(*COHORTS)[0]
  x, h, mine = bowls.start(), np.zeros(5), np.zeros((4, 5))
  for cohort in COHORTS:
    y = np.tile(x, (4, 1))
    for _ in range(STEPS):
      y = y - RATE * (bowls.slopes(y) - mine + 0.5 * (y - x))
    w = bowls.weights(cohort)
    mine = np.where((w > 0)[:, None], mine - 0.5 * (y - x), mine)
    h = h - 0.5 * len(cohort) / 4 * (w @ (y - x))
    x = w @ y - h / 0.5
  eps = tol(jnp.float32, STEPS * len(COHORTS))
  near(bowls.flat(state.params), x, 2 * eps)  # h / alpha doubles an error
  near(bowls.flat(state.clients.local, "feddyn/mine/"), mine, eps)


def test_feddyn_reaches_the_joint_optimum(tol):
  state = feddyn().play(*[ALL] * 150)[0]
  near(bowls.flat(state.params), bowls.optimum(), 2 * tol(jnp.float32, STEPS))


# MimeLite.


def test_mime_lite_without_momentum_is_fedavg(tol):
  algorithm = algorithms.mime_lite(bowls.model(), bowls.how(), momentum=0.0)
  state = bowls.play(algorithm, *[ALL] * 3)
  eps = tol(jnp.float32, STEPS * 3)
  near(bowls.flat(state.params), bowls.fedavg(3), eps)


def test_mime_lite_is_its_paper_in_a_plain_loop(tol):
  algorithm = algorithms.mime_lite(bowls.model(), epochs(), momentum=0.75)
  state = bowls.play(algorithm, *[ALL] * 3)
  steps, x, m = np.array([2, 2, 4, 6]), bowls.start(), np.zeros(5)
  for _ in range(3):
    y = np.tile(x, (4, 1))
    for step in range(max(steps)):
      moved = y - RATE * (0.25 * bowls.slopes(y) + 0.75 * m)
      y = np.where((step < steps)[:, None], moved, y)
    w = bowls.weights()
    m = 0.25 * (w @ bowls.slopes(x)) + 0.75 * m
    x = w @ y
  eps = tol(jnp.float32, 6 * 3)
  near(bowls.flat(state.params), x, eps)
  near(bowls.flat(state.params, "mime/momentum/"), m, eps)


@pytest.mark.parametrize("make", [algorithms.fednova, algorithms.mime_lite])
def test_a_momentum_of_one_is_refused(make):
  with pytest.raises(ValueError, match=r"\[0, 1\): got momentum=1.0"):
    make(bowls.model(), bowls.how(), momentum=1.0)
