"""Banded noise: its covariance, its sensitivity, and who may be sampled."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
import scipy.stats
from jax_privacy import batch_selection
from jax_privacy.matrix_factorization import toeplitz

import fedjax_peft as fp
import tolerance
import toy
from fedjax_peft import links, sampling
from fedjax_peft.privacy import accounting, banded, cyclic, events

ROUNDS, BANDS = 6, 3
STD = 0.7


@functools.cache
def how(rounds=ROUNDS, bands=BANDS):
  return banded.strategy(rounds, bands)


def matrix(strategy, rounds):
  """C [T, T], from its coefficients."""
  column = np.zeros(rounds)
  column[: strategy.bands] = strategy.coefficients[:rounds]
  return scipy.linalg.toeplitz(column, np.zeros(rounds))


@functools.cache
def drawn(values=20_000):
  """The noise of ROUNDS rounds in each value, [T, values]."""
  link = banded.noise(how(), STD)
  zeros = {"a": jnp.zeros(values - 8), "b": jnp.zeros((4, 2), jnp.float32)}
  _, shared = link.init(fp.Spec(zeros))
  receive = jax.jit(link.receive)
  roster, rows = fp.link.alone().roster, []
  for t in range(ROUNDS):
    key = jax.random.fold_in(jax.random.key(4), t)
    got, shared = receive(zeros, shared, roster, key)
    rows.append(np.concatenate([np.ravel(x) for x in got.values()]))
  return np.float64(np.stack(rows))


def p_value(z, covariance):
  """Of a two-sided chi-square test of normal columns with this covariance.

  Every entry of it is tested: the columns are made white first, and the sample
  covariance of white numbers is compared with the identity.
  """
  white = np.linalg.solve(np.linalg.cholesky(covariance), z)
  n = z.shape[1]
  sample = white @ white.T / n
  off = sample[np.tril_indices(len(z), -1)] * math.sqrt(n)
  on = (np.diag(sample) - 1) * math.sqrt(n / 2)
  stat = np.sum(off**2) + np.sum(on**2)
  return scipy.stats.chi2(off.size + on.size).sf(stat)


def test_the_noise_of_all_rounds_has_its_covariance():
  # Fixed key, p > 0.01; wrong constants, independent noise, the other product
  # and a strategy of one band less are at p < 1e-9.
  inverse = np.linalg.inv(matrix(how(), ROUNDS))
  fewer = banded.Strategy(how().coefficients[:2])
  other = np.linalg.inv(matrix(fewer, ROUNDS))
  right = STD**2 * inverse @ inverse.T
  assert p_value(drawn(), right) > 0.01
  for wrong in (
    right * 2 / 3,
    right * 3 / 2,
    STD**2 * np.eye(ROUNDS),
    STD**2 * inverse.T @ inverse,
    STD**2 * other @ other.T,
  ):
    assert p_value(drawn(), wrong) < 1e-9
  # Of the first round it is a plain Gaussian.
  std = STD / how().coefficients[0]
  assert scipy.stats.kstest(drawn()[0] / std, "norm").pvalue > 0.01


def test_values_have_noise_of_their_own():
  rows = drawn()[:, : 20_000 // 40 * 40].reshape(ROUNDS, 40, -1)
  for t in 0, ROUNDS - 1:
    pairs = np.corrcoef(rows[t]) - np.eye(40)
    # The largest of 780 correlations of 500 normal numbers: p = 4e-4.
    assert np.abs(pairs).max() < 5 / math.sqrt(rows.shape[-1])


@pytest.mark.parametrize("rounds", [1, 2, 5, 7, 8])
@pytest.mark.parametrize("period", [3, 4])
@pytest.mark.parametrize("most", [None, 1, 2])
def test_the_sensitivity_is_the_largest_of_all_patterns(rounds, period, most):
  C, found = matrix(how(), rounds), 0.0
  for pattern in itertools.product((0, 1), repeat=rounds):
    turns = np.flatnonzero(pattern)
    apart = np.all(np.diff(turns) >= period)
    if apart and (most is None or turns.size <= most):
      found = max(found, np.linalg.norm(C[:, turns].sum(axis=1)))
  got = banded.sensitivity(how(), rounds, period=period, most=most)
  assert got == pytest.approx(found, rel=1e-12)
  if rounds >= BANDS:
    with jax.numpy_dtype_promotion("standard"):
      oracle = toeplitz.minsep_sensitivity_squared(
        jnp.asarray(how().coefficients), period, most, rounds
      )
    rel = tolerance.tol(jnp.float32, rounds)
    assert got**2 == pytest.approx(float(oracle), rel=rel)


def test_clients_that_come_more_often_are_not_covered():
  C = matrix(how(), ROUNDS)
  often = np.linalg.norm(C[:, ::2].sum(axis=1))
  assert often > 1.1 * math.sqrt(3) * how().norm  # overlap: not orthogonal
  with pytest.raises(ValueError, match="bands=2"):
    banded.sensitivity(how(), ROUNDS, period=2)


def test_a_turn_a_period_is_what_the_whole_run_releases():
  # One Gaussian of all rounds together, and as many as there are turns.
  rounds, period = 12, 4
  whole = banded.sensitivity(how(), rounds, period=period)
  one = events.poisson(STD / whole, 1.0)
  each = banded.event(how(), STD, 1.0)
  turns = banded.turns(rounds, period)
  assert turns == 3
  for accountant in "rdp", "pld":
    want = accounting.epsilon(one, 1e-5, accountant=accountant)
    got = accounting.epsilon(each, 1e-5, rounds=turns, accountant=accountant)
    assert got == pytest.approx(want, abs=2e-3)
  less = banded.event(how(), STD, 1.0, rate=0.1)
  assert accounting.epsilon(less, 1e-5, rounds=turns) < 0.5 * got


def test_the_model_is_less_noisy_at_the_same_epsilon():
  # Prefix sums are the models of all rounds. With one turn a period, and
  # columns of norm 1, the std is that of independent noise at this epsilon.
  rounds = 24
  strategy = how(rounds, 6)
  assert strategy.norm == pytest.approx(1, rel=1e-12)
  prefix = np.tril(np.ones((rounds, rounds)))
  sums = prefix @ np.linalg.inv(matrix(strategy, rounds))
  error = np.mean(np.sum(sums**2, axis=1))
  plain = np.mean(np.sum(prefix**2, axis=1))
  assert error < 0.6 * plain
  narrow = prefix @ np.linalg.inv(matrix(how(rounds, 2), rounds))
  assert error < np.mean(np.sum(narrow**2, axis=1)) < plain


def test_one_band_is_independent_noise():
  only = banded.strategy(5, 1)
  assert only.coefficients == (1.0,)
  assert banded.event(only, 2.0, 0.5) == events.poisson(4.0, 1.0)
  link = banded.noise(only, STD)
  shared = link.init(fp.Spec({"a": jnp.zeros(3)}))[1]
  assert all(x.size == 0 for x in jax.tree.leaves(shared))


@functools.cache
def player():
  chain = fp.link.chain(
    links.clip(1.0), links.average(3.0), banded.noise(how(), 0.05)
  )
  local = fp.local(optax.sgd(0.1), batch=4)
  made = fp.fedavg(toy.net(), local, uplink=chain, lowrank=False)
  return toy.Player(made, toy.people(), most=3)


def test_a_run_that_is_resumed_goes_on_with_the_same_noise():
  cohorts = [[0, 3, 6]] * 4
  whole, _ = player().play(*cohorts)
  half, _ = player().play(*cohorts[:2])
  saved = jax.tree.map(np.array, half)
  again, _ = player().play(*cohorts[2:], state=saved)
  assert toy.same_bits(jax.tree.leaves(whole), jax.tree.leaves(again))
  # Without the rounds before, it would be other noise.
  node = saved.nodes[0]
  zeros = jax.tree.map(np.zeros_like, node.shared)
  lost = saved._replace(nodes=(node._replace(shared=zeros),))
  other, _ = player().play(*cohorts[2:], state=lost)
  assert not toy.same_bits(
    jax.tree.leaves(whole.nodes[0].params),
    jax.tree.leaves(other.nodes[0].params),
  )


@pytest.mark.parametrize("rate", [1.0, 0.4])
@pytest.mark.parametrize("period", [1, 3, 4])
def test_no_client_comes_twice_within_a_period(period, rate):
  data, rounds = toy.people(), 40
  sampler = cyclic.cyclic(period, rate)
  assert cyclic.check(sampler, period) == (period, rate)
  came = np.zeros((rounds, len(data)), bool)
  for t in range(rounds):
    ids = sampling.cohort_of(sampler, data, 3, t)
    came[t, ids] = True
    assert np.all(ids % period == t % period)
  for client in range(len(data)):
    turns = np.flatnonzero(came[:, client])
    assert np.all(np.diff(turns) % period == 0)
    assert turns.size <= banded.turns(rounds, period)
  # Coins: two-sided binomial test, fixed seed, p > 0.01.
  flips = sum(
    np.sum(np.arange(len(data)) % period == t % period) for t in range(rounds)
  )
  test = scipy.stats.binomtest(int(came.sum()), int(flips), rate)
  assert test.pvalue > 0.01
  # jax-privacy's sampler keeps to the same rule.
  reference = batch_selection.CyclicPoissonSampling(
    sampling_prob=rate, iterations=rounds, cycle_length=period
  )
  where = {}
  for t, ids in enumerate(reference.batch_iterator(len(data), 0)):
    for i in ids:
      assert where.setdefault(int(i), t % period) == t % period


def test_samplers_that_promise_no_distance_are_refused():
  for sampler in (
    sampling.uniform(3),
    sampling.poisson(0.1),
    cyclic.cyclic(2, 0.5),
  ):
    with pytest.raises(ValueError, match=r"use cyclic\(3, rate"):
      cyclic.check(sampler, 3)
  cyclic.check(cyclic.cyclic(5), 3)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: banded.strategy(3, 4), "bands=3 or less"),
    (lambda: banded.strategy(3, 0), "bands"),
    (lambda: banded.noise(how(), -1.0), "std"),
    (lambda: banded.event(how(), 1.0, math.inf), "bound"),
    (lambda: banded.sensitivity(how(), 0, period=3), "rounds"),
    (lambda: banded.turns(3, 0), "period"),
    (lambda: cyclic.cyclic(0), "period"),
    (lambda: cyclic.cyclic(2, 1.5), "rate"),
    (
      lambda: banded.noise(how(), 1.0).init(
        fp.Spec({"n": jnp.zeros(2, jnp.int32)})
      ),
      "noise hides floats only",
    ),
  ],
)
def test_what_cannot_be_done_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
