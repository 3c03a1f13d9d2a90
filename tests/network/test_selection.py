"""Whom the server asks: closed forms of probabilities, and best choices."""

import itertools
import math

import hypothesis
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

from fedjax_peft.network import selection

CHECK = hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
OPTIONS = {
  "by_loss": [{}, {"power": 2.0}],
  "charged": [
    {"fraction": 0.0},
    {"fraction": 0.0, "then": "power_of_choice", "d": 3},
  ],
  "deadline_aware": [{"deadline": 1e9}, {"deadline": 1e9, "serial": True}],
  "fair": [{}, {"alpha": 1.0}],
  "poisson": [{"rate": 0.5}],
  "power_of_choice": [{"d": 4}],
  "resource": [{}, {"deadline": 2.0}, {"explore": 0.0, "floor": 0.0}],
  "uniform": [{}],
}
EVERY = [(k, o) for k, many in OPTIONS.items() for o in many]


def people(n, seed=0, **columns):
  rng = np.random.default_rng(seed)
  heard = rng.random(n) < 0.7
  columns = {
    "ids": rng.permutation(5 * n)[:n].astype(np.int32),
    "examples": rng.integers(1, 50, n),
    "seconds": rng.exponential(2.0, n),
    "loss": np.where(heard, rng.exponential(size=n), np.nan),
    "last": np.where(heard, rng.integers(0, 9, n), -1),
    "battery": rng.random(n),
  } | {k: np.asarray(v) for k, v in columns.items()}
  return selection.Candidates(**columns)


def rng(seed=0):
  return np.random.Generator(np.random.Philox(seed))


def counts(chosen, candidates, size, trials, round=0):
  """How often each candidate is chosen."""
  stream, n = rng(1), candidates.ids.size
  place = {int(c): i for i, c in enumerate(candidates.ids)}
  found = np.zeros(n, np.int64)
  for _ in range(trials):
    ids = chosen.choose(stream, candidates, size, round)
    found[[place[int(c)] for c in ids]] += 1
  return found


def likely(found, trials, wanted, p=1e-3):
  """No count is rarer than `p`, corrected for how many are looked at."""
  return all(
    scipy.stats.binomtest(int(k), trials, float(q)).pvalue > p / len(found)
    for k, q in zip(found, wanted, strict=True)
  )


def test_the_table_has_all_selections():
  assert OPTIONS.keys() == selection.SELECTIONS.keys()


@pytest.mark.parametrize(("name", "options"), EVERY)
@CHECK
@hypothesis.given(n=st.integers(0, 12), size=st.integers(0, 15))
def test_different_candidates_come_as_many_as_there_are(name, options, n, size):
  chosen = selection.SELECTIONS[name](**options)
  candidates = people(n, seed=n)
  ids = chosen.choose(rng(), candidates, size, 10)
  assert ids.dtype == np.int32
  assert np.isin(ids, candidates.ids).all()
  assert np.unique(ids).size == ids.size <= chosen.most(n, size)
  if name != "poisson":  # whose number is random
    assert ids.size == min(size, n)
  again = chosen.choose(rng(), candidates, size, 10)
  np.testing.assert_array_equal(ids, again)


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_only_what_is_read_makes_a_difference(name, options):
  chosen = selection.SELECTIONS[name](**options)
  candidates = people(12)
  others = people(12, seed=1)._asdict() | {"ids": candidates.ids}
  blind = {
    k: getattr(candidates, k) if k in chosen.reads | {"ids"} else v
    for k, v in others.items()
  }
  for seed in range(5):
    a = chosen.choose(rng(seed), candidates, 5, 9)
    b = chosen.choose(rng(seed), selection.Candidates(**blind), 5, 9)
    np.testing.assert_array_equal(a, b)


def test_uniform_takes_everybody_alike():
  # 3 of 8, 4,000 times; p = 1e-3 over all clients.
  found = counts(selection.uniform(), people(8), 3, 4000)
  assert likely(found, 4000, [3 / 8] * 8)
  assert not likely(found, 4000, [3 / 7] * 8)


def test_poisson_takes_each_by_itself():
  # Counts of pairs tell independence; p = 1e-3 over all cells.
  trials, candidates = 4000, people(2, ids=np.array([0, 1], np.int32))
  stream, cells = rng(2), np.zeros((2, 2), np.int64)
  for _ in range(trials):
    ids = selection.poisson(0.3).choose(stream, candidates, 9, 0)
    cells[int(0 in ids), int(1 in ids)] += 1
  wanted = np.outer([0.7, 0.3], [0.7, 0.3]).ravel()
  assert likely(cells.ravel(), trials, wanted)
  wrong = np.outer([0.65, 0.35], [0.65, 0.35]).ravel()
  assert not likely(cells.ravel(), trials, wrong)


def test_by_loss_draws_one_after_another_in_proportion():
  # Inclusion in a draw of two: p_i + sum_j p_j p_i / (1 - p_j).
  loss = np.array([0.5, 1.0, 1.5, 3.0])
  found = counts(selection.by_loss(), people(4, loss=loss), 2, 4000)

  def inclusion(weight):
    p = weight / weight.sum()
    then = [sum(p[j] * q / (1 - p[j]) for j in range(4)) for q in p]
    return p + then - p * p / (1 - p)

  assert math.isclose(inclusion(loss).sum(), 2)
  assert likely(found, 4000, inclusion(loss))
  assert not likely(found, 4000, inclusion(loss**1.2))
  squared = counts(selection.by_loss(2.0), people(4, loss=loss), 2, 4000)
  assert likely(squared, 4000, inclusion(loss**2))


def test_by_loss_counts_the_unheard_as_the_mean():
  loss = np.array([1.0, 3.0, np.nan])
  found = counts(selection.by_loss(), people(3, loss=loss), 1, 4000)
  assert likely(found, 4000, [1 / 6, 3 / 6, 2 / 6])


def test_power_of_choice_has_the_hypergeometric_probability():
  # The client of rank r is chosen where it is among the d, with at most m - 1
  # of the r clients above it.
  n, d, m = 9, 5, 2
  loss = np.arange(n)[::-1].astype(np.float64)  # rank 0 is the highest
  found = counts(selection.power_of_choice(d), people(n, loss=loss), m, 4000)

  def chance(d):
    above = scipy.stats.hypergeom(n - 1, np.arange(n), d - 1)
    return np.clip(d / n * above.cdf(m - 1), 0, 1)

  assert math.isclose(chance(d).sum(), m)
  assert likely(found, 4000, chance(d))
  assert not likely(found, 4000, chance(d - 1))


def test_power_of_choice_takes_the_unheard_first():
  loss = np.array([9.0, np.nan, 1.0, np.nan, 5.0])
  candidates = people(5, loss=loss)
  ids = selection.power_of_choice(5).choose(rng(), candidates, 3, 0)
  assert set(ids) == set(candidates.ids[[0, 1, 3]])


CLIENTS = st.lists(
  st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=7
)


@CHECK
@hypothesis.given(CLIENTS, st.integers(1, 30), st.integers(1, 7))
def test_nobody_who_makes_the_deadline_brings_more(clients, deadline, size):
  examples, seconds = np.array(clients).T
  candidates = people(
    len(clients), examples=examples, seconds=seconds.astype(np.float64)
  )
  chosen = selection.deadline_aware(float(deadline))
  taken = np.isin(candidates.ids, chosen.choose(rng(), candidates, size, 0))
  assert (seconds[taken] <= deadline).all()
  best = max(
    examples[list(some)].sum()
    for k in range(size + 1)
    for some in itertools.combinations(range(len(clients)), k)
    if (seconds[list(some)] <= deadline).all()
  )
  assert examples[taken].sum() == best


@CHECK
@hypothesis.given(CLIENTS, st.integers(1, 60), st.integers(1, 7))
def test_on_one_link_nobody_fits_in_more_clients(clients, deadline, size):
  seconds = np.array(clients)[:, 1]
  candidates = people(len(clients), seconds=seconds.astype(np.float64))
  chosen = selection.deadline_aware(float(deadline), serial=True)
  taken = np.isin(candidates.ids, chosen.choose(rng(), candidates, size, 0))
  assert seconds[taken].sum() <= deadline
  assert taken.sum() == max(
    k
    for k in range(min(size, len(clients)) + 1)
    for some in itertools.combinations(seconds, k)
    if sum(some) <= deadline
  )


def turns(chosen, candidates, size, rounds):
  """Who takes part, bool [rounds, A], where everybody is always there."""
  last, taken = np.full(candidates.ids.size, -1), []
  for round in range(rounds):
    ids = chosen.choose(rng(round), candidates._replace(last=last), size, round)
    taken.append(np.isin(candidates.ids, ids))
    last = np.where(taken[-1], round, last)
  return np.stack(taken)


@CHECK
@hypothesis.given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 30))
def test_fair_clients_take_turns(n, size, rounds):
  taken = turns(selection.fair(), people(n), size, rounds)
  window = math.ceil(n / size)
  for start in range(rounds - window + 1):
    assert taken[start : start + window].any(axis=0).all()
  if n % size == 0:
    assert np.ptp(taken.sum(0)) <= 1


def test_proportional_turns_come_with_speed():
  # Waits are whole rounds, of which a turn takes 16 at least; hence 10 %.
  seconds = np.repeat([1.0, 2.0, 4.0, 8.0], 15)
  taken = turns(selection.fair(1.0), people(60, seconds=seconds), 2, 1500)
  found = taken[500:].sum(0) / taken[500:].sum()
  wanted = (1 / seconds) / (1 / seconds).sum()
  np.testing.assert_allclose(found, wanted, rtol=0.1)
  assert (
    np.abs(found * seconds**2 / (found * seconds**2).mean() - 1).max() > 0.5
  )


def test_charged_is_the_selection_among_the_charged():
  candidates = people(20)
  full = candidates.battery >= 0.5
  inner = selection.fair()
  for chosen in (
    selection.charged(0.5, then="fair"),
    selection.charged(0.5, then=inner),
  ):
    ids = chosen.choose(rng(), candidates, 6, 9)
    wanted = inner.choose(rng(), candidates.rows(full), 6, 9)
    np.testing.assert_array_equal(ids, wanted)
    assert (candidates.battery[np.isin(candidates.ids, ids)] >= 0.5).all()
  assert selection.charged(1.0).choose(rng(), candidates, 6, 9).size == 0


def heard(n, **columns):
  """Candidates that all were heard."""
  stream = np.random.default_rng(3)
  columns = {
    "loss": stream.exponential(size=n),
    "last": stream.integers(0, 9, n),
  } | columns
  return people(n, **columns)


def test_utility_is_the_formula(tol):
  candidates = heard(9)
  found = selection.utility(candidates, 11, deadline=1.5, alpha=2.0)
  for i in range(9):
    _, examples, seconds, loss, last, _ = (x[i] for x in candidates)
    wanted = examples * math.sqrt(loss**2)
    wanted += math.sqrt(0.1 * math.log(12) / (last + 1))
    if seconds > 1.5:
      wanted *= (1.5 / seconds) ** 2
    assert math.isclose(found[i], wanted, rel_tol=tol(np.float64, 4))


def test_utility_is_cut_at_a_quantile():
  loss = np.array([1.0, 2.0, 3.0, 4.0, 100.0])
  candidates = heard(
    5, examples=np.ones(5, np.int64), loss=loss, last=np.full(5, 3)
  )
  found = selection.utility(candidates, 3, clip=0.75)
  stale = math.sqrt(0.1 * math.log(4) / 4)
  np.testing.assert_allclose(found - stale, [1, 2, 3, 4, 4], rtol=1e-14)


def test_who_was_not_asked_for_long_gains():
  quiet = np.zeros(2)
  candidates = heard(2, loss=quiet, last=np.array([0, 40]))
  found = selection.utility(candidates, 50)
  assert found[0] > found[1]
  later = selection.utility(candidates, 500)
  assert (later > found).all()


def test_without_a_pool_the_most_useful_are_taken():
  chosen = selection.resource(explore=0.0, floor=0.0, pool=1.0, clip=1.0)
  candidates = heard(20)
  ids = chosen.choose(rng(), candidates, 6, 9)
  worth = selection.utility(candidates, 9)
  best = candidates.ids[np.argsort(-worth)[:6]]
  assert set(ids) == set(best)


def test_within_the_pool_useful_clients_are_likelier():
  # One place: utilities 2, 1.5 and 1 of which the pool of 0.7 keeps two.
  chosen = selection.resource(explore=0.0, floor=0.0, pool=0.7, clip=1.0)
  candidates = heard(
    3,
    examples=np.ones(3, np.int64),
    loss=np.array([2.0, 1.5, 1.0]),
    last=np.zeros(3, np.int64),
  )
  found = counts(chosen, candidates, 1, 4000)  # in round 0 nothing is stale
  assert likely(found, 4000, [2 / 3.5, 1.5 / 3.5, 0])
  assert not likely(found, 4000, [0.5, 0.5, 0])


@pytest.mark.parametrize("round", [0, 5, 50, 500])
def test_exploration_decays_to_its_floor(round):
  known = np.arange(60) < 40
  candidates = people(
    60,
    loss=np.where(known, 1.0, np.nan),
    last=np.where(known, 0, -1),
  )
  ids = selection.resource().choose(rng(), candidates, 20, round)
  fresh = np.isin(candidates.ids[~known], ids).sum()
  assert ids.size == 20
  assert fresh == math.ceil(max(0.9 * 0.98**round, 0.2) * 20)


def test_exploration_prefers_the_fast():
  candidates = people(
    3, loss=np.full(3, np.nan), last=np.full(3, -1), seconds=[1.0, 2.0, 4.0]
  )
  found = counts(selection.resource(), candidates, 1, 4000)
  assert likely(found, 4000, [4 / 7, 2 / 7, 1 / 7])


def test_the_pacer_waits_longer_once_gains_fall():
  rising, falling = np.arange(8.0), np.arange(8.0)[::-1]
  assert selection.pace(30.0, rising, window=4, step=5.0) == 30.0
  assert selection.pace(30.0, falling, window=4, step=5.0) == 35.0
  assert selection.pace(30.0, falling[:7], window=4, step=5.0) == 30.0


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: selection.poisson(0.0), "rate must be a probability above 0"),
    (lambda: selection.by_loss(-1.0), "power must be a positive number"),
    (lambda: selection.power_of_choice(0), "d must be an integer of at least"),
    (lambda: selection.deadline_aware(0.0), "deadline must be a positive"),
    (lambda: selection.fair(-0.5), "alpha must be a number of at least 0"),
    (lambda: selection.charged(1.5), r"fraction must be in \[0, 1\]"),
    (lambda: selection.charged(then="unifrom"), "did you mean 'uniform'"),
    (
      lambda: selection.charged(then=selection.uniform(), d=3),
      "options go with the name of a selection",
    ),
    (lambda: selection.resource(floor=2.0), r"floor must be in \[0, 1\]"),
    (lambda: selection.resource(deadline=-1.0), "deadline must be a positive"),
  ],
)
def test_options_that_make_no_sense_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
