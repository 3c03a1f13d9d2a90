"""Who takes part in a round."""

import numpy as np
import pytest

import fedjax_peft as fp
import toy
from fedjax_peft import sampling

DATA = toy.people(sizes=(3,) * 20, unseen=0.2)
SEEN = set(np.flatnonzero(DATA.seen))


def draws(sampler, rounds=1, seed=0):
  return [sampling.cohort_of(sampler, DATA, seed, r) for r in range(rounds)]


def test_a_uniform_cohort_has_its_size_and_no_one_twice():
  for ids in draws(fp.sample.uniform(7), 50):
    assert ids.size == np.unique(ids).size == 7
    assert set(ids) <= SEEN


def test_a_uniform_sampler_takes_everyone_equally_often():
  # 16 clients, 7 of them in each of 4,000 rounds: a client's count has mean
  # 1,750 and standard deviation 31; all within 4 of them but with p < 1e-3.
  counts = np.zeros(len(DATA))
  for ids in draws(fp.sample.uniform(7), 4000):
    counts[ids] += 1
  rate = 7 / len(SEEN)
  spread = np.sqrt(4000 * rate * (1 - rate))
  each = counts[sorted(SEEN)]
  assert np.all(np.abs(each - 4000 * rate) < 4 * spread)
  assert not np.all(np.abs(each - 4000 * rate * 1.1) < 4 * spread)


def test_poisson_clients_come_by_themselves_at_the_rate():
  # 16 clients in 2,000 rounds: |z| < 4 for the total, and for pairs that come
  # together, each fails with p = 6e-5.
  found = np.zeros((2000, len(DATA)))
  for r, ids in enumerate(draws(fp.sample.poisson(0.3), 2000)):
    found[r, ids] = 1
  found = found[:, sorted(SEEN)]
  n = found.size

  def z(rate):
    return (found.sum() - n * rate) / np.sqrt(n * rate * (1 - rate))

  assert abs(z(0.3)) < 4
  assert abs(z(0.32)) > 4
  pairs = (found[:, :8] * found[:, 8:]).sum()
  m = found[:, :8].size
  assert abs(pairs - m * 0.09) < 4 * np.sqrt(m * 0.09 * 0.91)
  assert found.sum(1).min() == 0  # nobody came, and that is no error
  assert found[:, 0].var() > 0


def test_a_poisson_cohort_stays_below_what_shapes_are_made_for():
  sampler = fp.sample.poisson(0.3)
  most = sampler.most(DATA)
  assert max(ids.size for ids in draws(sampler, 500)) <= most <= len(SEEN)
  assert fp.sample.poisson(1.0).most(DATA) == len(SEEN)


@pytest.mark.parametrize(
  "make", [lambda: fp.sample.uniform(5), lambda: fp.sample.poisson(0.4)]
)
def test_a_cohort_depends_on_seed_and_round_alone(make):
  one, two = draws(make(), 6), draws(make(), 6)
  for a, b in zip(one, reversed([*reversed(two)])):
    np.testing.assert_array_equal(a, b)
  late = sampling.cohort_of(make(), DATA, 0, 5)
  np.testing.assert_array_equal(late, one[5])
  assert len({tuple(sorted(x)) for x in one}) > 1
  other = draws(make(), 6, seed=1)
  assert any(not np.array_equal(a, b) for a, b in zip(one, other))


def test_a_cohort_larger_than_the_population_is_refused():
  with pytest.raises(ValueError, match="cohort size=17, .* use size=16"):
    draws(fp.sample.uniform(17))


def own(ids, most=20):
  return fp.Sampler("own", lambda rng, round, data: ids, lambda data: most)


def test_a_sampler_of_ones_own_is_asked_every_round():
  turns = fp.Sampler(
    "turns", lambda rng, round, data: [round, round + 1], lambda data: 2
  )
  assert [list(x) for x in draws(turns, 3)] == [[0, 1], [1, 2], [2, 3]]


@pytest.mark.parametrize(
  ("ids", "words"),
  [
    ([1, 2, 1], "drew a client twice in round 0"),
    ([1, 20], r"ids in 0..19: got 1..20"),
    ([-1, 2], r"ids in 0..19: got -1..2"),
    ([0.5], "list of client ids: got float64"),
    ([[1], [2]], r"list of client ids: got int64 \[2, 1\]"),
  ],
)
def test_a_draw_that_is_not_a_set_of_clients_is_refused(ids, words):
  with pytest.raises(ValueError, match=words):
    draws(own(ids))


def test_a_draw_larger_than_announced_is_refused():
  with pytest.raises(ValueError, match="drew 3 clients in round 0, more"):
    draws(own([1, 2, 3], most=2))


@pytest.mark.parametrize("rate", [0, -0.1, 1.1, float("nan")])
def test_a_rate_that_is_no_probability_is_refused(rate):
  with pytest.raises(ValueError, match="rate must be a probability"):
    fp.sample.poisson(rate)


def test_a_cohort_of_nobody_is_refused_when_it_is_asked_for():
  with pytest.raises(ValueError, match="size must be an integer of at least 1"):
    fp.sample.uniform(0)
