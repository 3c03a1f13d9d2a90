"""Canaries: a bound from below that holds, and that finds wrong noise."""

import dp_accounting
import jax
import numpy as np
import pytest

import audit_world as world
from fedjax_peft import audit
from fedjax_peft.audit import canary, table

DELTA = table.DELTA
KEY = jax.random.key(0)


def normal(mu, runs, seed):
  rng = np.random.default_rng(seed)
  return canary.Scores(rng.normal(mu, 1, runs), rng.normal(0, 1, runs))


@pytest.mark.parametrize("mu", [0.0, 0.3, 2.0])
def test_a_bound_exceeds_the_truth_as_seldom_as_it_says(mu):
  # Of 400 bounds with confidence 0.9 the expected 40 exceed, 25 to 57 with
  # p > 0.005; of a truth that is a fifth of a standard deviation lower, more.
  bounds = [canary.separation(normal(mu, 200, s), 0.9) for s in range(400)]
  above = np.sum(np.array(bounds) > mu)
  assert 25 <= above <= 57
  assert np.sum(np.array(bounds) > mu - 0.2) > 57


def test_epsilon_of_a_separation_is_that_of_the_gaussian_mechanism():
  found = normal(1.0, 20000, 1)
  bound = canary.gaussian_lower_bound(found, DELTA)
  true = dp_accounting.get_epsilon_gaussian(1.0, DELTA)
  assert 0.95 * true < bound < true


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_for_any_mechanism_is_below_that_for_a_gaussian(seed):
  found = normal(1.0, 500, seed)
  for_any = canary.lower_bound(found, DELTA)
  assert 0 < for_any < canary.gaussian_lower_bound(found, DELTA)


def test_two_worlds_that_are_one_prove_nothing():
  for seed in range(5):
    found = normal(0.0, 300, seed)
    assert canary.lower_bound(found, DELTA) == 0
    assert canary.gaussian_lower_bound(found, DELTA, confidence=0.999) == 0
  same = canary.Scores(np.ones(5), np.ones(5))
  assert canary.gaussian_lower_bound(same, DELTA) == 0
  apart = canary.Scores(np.ones(5), np.zeros(5))
  assert canary.gaussian_lower_bound(apart, DELTA) == np.inf


def audited(seen, runs):
  """(lower bound, accounted) of a boundary."""
  mine, other = (
    {k: x[0] for k, x in world.clients(1, seed=s).items()} for s in (1, 2)
  )
  found = canary.scores(seen, mine, other, KEY, runs)
  bound = canary.gaussian_lower_bound(found, DELTA)
  return bound, table.epsilon_accounted(seen)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["client_dp", "local_dp", "distributed_dp"])
def test_the_accountant_is_above_what_a_canary_proves(name):
  # It fails with probability 0.05 at most, and the key is fixed.
  bound, accounted = audited(world.seen(name), 300)
  assert 0 < bound < accounted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["client_dp", "local_dp"])
def test_half_the_noise_is_found_out(name):
  # Made with half the noise, or a quarter where the canary's two messages are
  # closer to each other than any two can be, and accounted as if with all.
  share = 2 if name == "client_dp" else 4
  whole = world.subject()
  less = audit.find(name, whole._replace(multiplier=whole.multiplier / share))
  claimed = less._replace(multiplier=world.seen(name).multiplier)
  bound, accounted = audited(claimed, 600)
  assert bound > accounted


def test_what_promises_nothing_tells_the_worlds_apart():
  mine, other = (
    {k: x[0] for k, x in world.clients(1, seed=s).items()} for s in (1, 2)
  )
  for name in ("full_gradient", "secure_sum"):
    found = canary.scores(world.seen(name), mine, other, KEY, 64)
    assert found.present.min() > found.absent.max()
    assert canary.lower_bound(found, DELTA) > 2
    assert table.epsilon_accounted(world.seen(name)) is None


def test_a_masked_wire_does_not():
  # At a confidence of 0.999, fixed key.
  mine, other = (
    {k: x[0] for k, x in world.clients(1, seed=s).items()} for s in (1, 2)
  )
  found = canary.scores(world.seen("secure_wire"), mine, other, KEY, 128)
  assert canary.lower_bound(found, DELTA) == 0
  assert canary.gaussian_lower_bound(found, DELTA, confidence=0.999) == 0


def test_what_is_out_of_range_is_refused():
  with pytest.raises(ValueError, match="delta_dp=1"):
    canary.lower_bound(normal(1.0, 5, 0), 1.0)
  with pytest.raises(ValueError, match="confidence=0.5"):
    canary.gaussian_lower_bound(normal(1.0, 5, 0), DELTA, confidence=0.5)
  with pytest.raises(ValueError, match="runs"):
    canary.scores(world.seen("adapters"), {}, {}, KEY, 0)
