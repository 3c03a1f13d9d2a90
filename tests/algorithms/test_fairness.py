"""Fair objectives, against plain loops on quadratics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bowls
from fedjax_peft import algorithms
from fedjax_peft.algorithms import fairness

ALL = bowls.EVERYONE
RATE, STEPS = bowls.RATE, bowls.STEPS


def near(found, wanted, eps):
  np.testing.assert_allclose(found, wanted, rtol=0, atol=eps)


@functools.cache
def qffl(q):
  algorithm = algorithms.qffl(bowls.model(), bowls.how(), q=q, rate=RATE)
  return bowls.play(algorithm, *[ALL] * 3)


@pytest.mark.parametrize("q", [0.0, 0.5, 2.0])
def test_qffl_is_its_paper_in_a_plain_loop(q, tol):
  x = bowls.start()
  for _ in range(3):
    d = (x - bowls.alone(x)) / RATE
    f, w = bowls.losses(x), bowls.weights()
    h = q * f ** (q - 1) * np.sum(d**2, 1) + f**q / RATE
    x = x - (w @ (f[:, None] ** q * d)) / (w @ h)
  # Powers and the ratio of the two means: a few more roundings each.
  near(bowls.flat(qffl(q).params), x, 2 * tol(jnp.float32, STEPS * 3))


def test_qffl_without_q_is_fedavg(tol):
  eps = 2 * tol(jnp.float32, STEPS * 3)
  near(bowls.flat(qffl(0.0).params), bowls.fedavg(3), eps)


def test_the_larger_q_is_the_better_off_are_the_worst():
  # One local step each, so that rounds converge to the fair optimum.
  def worst(q):
    how = bowls.how(rate=0.25, steps=1)
    algorithm = algorithms.qffl(bowls.model(), how, q=q, rate=0.25)
    state = bowls.play(algorithm, *[ALL] * 60)
    return bowls.losses(bowls.flat(state.params)).max()

  assert worst(3.0) < 0.95 * worst(0.0)


@pytest.fixture(scope="module")
def agnostic():
  how = bowls.how(rate=0.25, steps=1)
  return bowls.player(algorithms.afl(bowls.model(), how, clients=4, rate=0.05))


def test_afl_is_its_paper_in_a_plain_loop(agnostic, tol):
  cohorts = [(0, 2), (1, 3), (0, 1)]
  state = agnostic.play(*cohorts)[0]
  x, w = bowls.start(), np.full(4, 0.25)
  for cohort in cohorts:
    here = np.isin(np.arange(4), cohort) * 4 / len(cohort)
    moved = w + 0.05 * here * bowls.losses(x)
    x = x - 0.25 * ((here * w) @ bowls.slopes(x))
    w = nearest(moved)
  eps = tol(jnp.float32, 4 * 3)
  near(bowls.flat(state.params), x, eps)
  near(state.params["afl/weights"], w, eps)
  assert np.ptp(w) > 0.01


def test_afl_makes_the_worst_better_off(agnostic):
  state = agnostic.play(*[ALL] * 200)[0]
  worst = bowls.losses(bowls.flat(state.params)).max()
  a, b = bowls.curves()
  alike = (a * b).sum(0) / a.sum(0)
  assert worst < 0.95 * bowls.losses(alike).max()
  assert state.params["afl/weights"].min() >= 0
  assert state.params["afl/weights"].sum() == pytest.approx(1, rel=1e-6)


def nearest(x):
  """Nearest point of the simplex by bisection, not by sorting."""
  low, high = x.min() - 1, x.max()
  for _ in range(100):
    middle = (low + high) / 2
    if np.maximum(x - middle, 0).sum() > 1:
      low = middle
    else:
      high = middle
  return np.maximum(x - high, 0)


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_the_projection_is_the_nearest_point_of_the_simplex(n, tol):
  x = np.random.default_rng(n).normal(size=n).astype(np.float32)
  found = np.asarray(fairness.simplex(jnp.asarray(x)))
  near(found, nearest(x.astype(np.float64)), tol(jnp.float32, n))
  near(jax.device_get(fairness.simplex(jnp.asarray(found))), found, 1e-6)


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda m, h: algorithms.qffl(m, h, q=-1.0, rate=0.1), "got q=-1.0"),
    (lambda m, h: algorithms.qffl(m, h, q=1.0, rate=0.0), "rate=0.0"),
    (lambda m, h: algorithms.afl(m, h, clients=0, rate=0.1), "clients=0"),
  ],
)
def test_numbers_that_make_no_sense_are_refused(make, words):
  with pytest.raises(ValueError, match=words):
    make(bowls.model(), bowls.how())
