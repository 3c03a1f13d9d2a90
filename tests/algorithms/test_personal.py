"""Personal models, against plain loops on quadratics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bowls
import fedjax_peft as fp
from fedjax_peft import algorithms

ALL = bowls.EVERYONE
RATE, STEPS = bowls.RATE, bowls.STEPS
COHORTS = ((0, 2), (1, 3), (0, 3))
ROUNDS = 3


def near(found, wanted, eps):
  np.testing.assert_allclose(found, wanted, rtol=0, atol=eps)


def play(make, *cohorts, **options):
  algorithm = make(bowls.model(), bowls.how(), **options)
  return bowls.play(algorithm, *cohorts)


def eps_of(tol):
  return tol(jnp.float32, STEPS * ROUNDS)


def rows(state, prefix):
  return bowls.flat(state.clients.local, prefix)


def alone():
  """[4, 5], where clients end that always train alone."""
  return bowls.alone(bowls.start(), STEPS * ROUNDS)


# Ditto.


def test_ditto_is_its_paper_in_a_plain_loop(tol):
  state = play(algorithms.ditto, *COHORTS, strength=0.5)
  x, v = bowls.start(), np.tile(bowls.start(), (4, 1))
  for cohort in COHORTS:
    y, new = np.tile(x, (4, 1)), v
    for _ in range(STEPS):
      y = y - RATE * bowls.slopes(y)
      new = new - RATE * (bowls.slopes(new) + 0.5 * (new - x))
    w = bowls.weights(cohort)
    v = np.where((w > 0)[:, None], new, v)
    x = w @ y
  near(bowls.flat(state.params), x, eps_of(tol))
  near(rows(state, "ditto/"), v, eps_of(tol))


def test_ditto_of_no_strength_trains_alone_beside_fedavg(tol):
  state = play(algorithms.ditto, *[ALL] * ROUNDS, strength=0.0)
  near(bowls.flat(state.params), bowls.fedavg(ROUNDS), eps_of(tol))
  near(rows(state, "ditto/"), alone(), eps_of(tol))


def test_ditto_of_great_strength_has_the_global_model_everywhere():
  # The stationary point of f(v) + s/2 |v - x|^2 is a distance slope / s off.
  strength = 1e4
  cohorts, personal = [ALL] * ROUNDS, optax.sgd(1 / strength)
  state = play(algorithms.ditto, *cohorts, strength=strength, personal=personal)
  x = bowls.fedavg(ROUNDS - 1)  # the one that was sent last
  near(rows(state, "ditto/"), np.tile(x, (4, 1)), 2 * 10 / strength)
  near(bowls.flat(state.params), bowls.fedavg(ROUNDS), 1e-5)


# APFL.


@pytest.mark.parametrize("adaptive", [False, True])
def test_apfl_is_its_paper_in_a_plain_loop(adaptive, tol):
  state = play(algorithms.apfl, *COHORTS, alpha=0.75, adaptive=adaptive)
  x, v = bowls.start(), np.tile(bowls.start(), (4, 1))
  alpha = np.full((4, 1), 0.75)
  for cohort in COHORTS:
    y, new, a = np.tile(x, (4, 1)), v, alpha
    for _ in range(STEPS):
      slope = bowls.slopes(a * new + (1 - a) * y)
      apart = np.sum(slope * (new - y), 1, keepdims=True)
      y, new = y - RATE * bowls.slopes(y), new - RATE * a * slope
      if adaptive:
        a = np.clip(a - RATE * apart, 0, 1)
    w = bowls.weights(cohort)
    here = (w > 0)[:, None]
    v, alpha = np.where(here, new, v), np.where(here, a, alpha)
    x = w @ y
  near(bowls.flat(state.params), x, eps_of(tol))
  near(rows(state, "apfl/"), v, eps_of(tol))
  if adaptive:
    near(state.clients.local["apfl/alpha"], alpha[:, 0], eps_of(tol))
    assert np.ptp(alpha) > 1e-3


def test_apfl_is_the_global_model_at_zero_and_alone_at_one(tol):
  def used(alpha):
    algorithm = algorithms.apfl(bowls.model(), bowls.how(), alpha=alpha)
    state = bowls.play(algorithm, *[ALL] * ROUNDS)
    shared = {k: jnp.asarray(v) for k, v in state.params.items()}
    view = algorithm.work.view
    return bowls.flat(
      jax.vmap(lambda own: view(shared | own))(state.clients.local)
    )

  near(used(0.0), np.tile(bowls.fedavg(ROUNDS), (4, 1)), eps_of(tol))
  near(used(1.0), alone(), eps_of(tol))


# pFedMe.


def test_pfedme_is_its_paper_in_a_plain_loop(tol):
  state = play(
    algorithms.pfedme,
    *COHORTS,
    strength=2.0,
    inner=optax.sgd(0.25),
    steps=3,
    beta=1.5,
  )
  x, last = bowls.start(), np.tile(bowls.start(), (4, 1))
  for cohort in COHORTS:
    y = np.tile(x, (4, 1))
    for _ in range(STEPS):
      p = y
      for _ in range(3):
        p = p - 0.25 * (bowls.slopes(p) + 2.0 * (p - y))
      y = y - RATE * 2.0 * (y - p)
    w = bowls.weights(cohort)
    last = np.where((w > 0)[:, None], p, last)
    x = x - 1.5 * (x - w @ y)
  near(bowls.flat(state.params), x, 2 * eps_of(tol))
  near(rows(state, "pfedme/"), last, 2 * eps_of(tol))


def test_pfedme_reaches_the_optimum_of_the_moreau_envelopes(tol):
  # The envelope of a bowl is a bowl of curvature a s / (a + s).
  s, how = 2.0, bowls.how(rate=0.25, steps=1)
  algorithm = algorithms.pfedme(
    bowls.model(), how, strength=s, inner=optax.sgd(0.25), steps=40
  )
  state = bowls.play(algorithm, *[ALL] * 150)
  a, b = (v.astype(np.float64) for v in bowls.curves())
  flatter = bowls.weights()[:, None] * (a * s / (a + s))
  wanted = (flatter * b).sum(0) / flatter.sum(0)
  near(bowls.flat(state.params), wanted, 4 * tol(jnp.float32, 40))


# Layers of one's own.


def body(x):
  return x[..., :3]


def head(x):
  return x[..., 3:]


def test_fedper_trains_both_and_shares_the_body(tol):
  state = play(algorithms.fedper, *COHORTS, head="head")
  x, own = body(bowls.start()), np.tile(head(bowls.start()), (4, 1))
  for cohort in COHORTS:
    y = np.concatenate([np.tile(x, (4, 1)), own], 1)
    for _ in range(STEPS):
      y = y - RATE * bowls.slopes(y)
    w = bowls.weights(cohort)
    own = np.where((w > 0)[:, None], head(y), own)
    x = w @ body(y)
  assert set(state.params) == {"body"}
  near(state.params["body"], x, eps_of(tol))
  near(state.clients.local["head"], own, eps_of(tol))


class Coupled:
  """A loss in which the body's gradient depends on the head."""

  a, b = (v[:, :2].astype(np.float64) for v in bowls.curves())

  @staticmethod
  @functools.cache
  def model():
    def loss(module, examples, key):
      p = module.body[...][:2] * module.head[...]
      a, b = examples["a"][:, :2], examples["b"][:, :2]
      return 0.5 * jnp.sum(a * (p[None] - b) ** 2, axis=1), {}

    return fp.model(bowls.Point(), loss, precision="float32")


def test_fedrep_trains_the_head_first_and_then_the_body_under_it(tol):
  algorithm = algorithms.fedrep(
    Coupled.model(), bowls.how(), head="head", head_steps=3
  )
  state = bowls.play(algorithm, *COHORTS)
  x, own = bowls.start()[:3], np.tile(bowls.start()[3:], (4, 1))
  for cohort in COHORTS:
    y, h = np.tile(x, (4, 1)), own
    for step in range(STEPS):
      slope = Coupled.a * (y[:, :2] * h - Coupled.b)
      if step < 3:
        h = h - RATE * slope * y[:, :2]
      else:
        y = y - RATE * np.pad(slope * h, ((0, 0), (0, 1)))
    w = bowls.weights(cohort)
    own = np.where((w > 0)[:, None], h, own)
    x = w @ y
  near(state.params["body"], x, eps_of(tol))
  near(state.clients.local["head"], own, eps_of(tol))
  sizes = algorithm.bytes(2)
  assert sizes == {"cloud/up_bytes": 3 * 4 + 4, "cloud/down_bytes": 3 * 4}


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda m, h: algorithms.ditto(m, h, strength=-1.0), "strength=-1.0"),
    (lambda m, h: algorithms.apfl(m, h, alpha=1.5), r"\[0, 1\]: got alpha=1.5"),
    (lambda m, h: algorithms.fedrep(m, h, head_steps=0), "head_steps=0"),
    (lambda m, h: algorithms.fedper(m, h, head="heat"), "did you mean 'head'"),
  ],
)
def test_numbers_that_make_no_sense_are_refused(make, words):
  with pytest.raises(ValueError, match=words):
    make(bowls.model(), bowls.how())
