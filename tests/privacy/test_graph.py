"""The ring, and how large it must be: against counting everything."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats

from fedjax_peft.privacy import degree, graph


@pytest.mark.parametrize(
  ("n", "k"), [(2, 1), (3, 2), (4, 3), (5, 2), (9, 4), (9, 8), (40, 6)]
)
def test_neighbours_are_mutual_and_as_many_as_asked(n, k):
  around = graph.ring(b"round", n, k)
  for i, near in enumerate(around):
    assert len(set(near)) == k
    assert i not in near
    assert list(near) == sorted(near)
    assert all(i in around[j] for j in near)


def test_every_pair_is_as_likely_to_meet():
  # 300 rings of 9 with 4 neighbours: 36 pairs, each met with probability 1/2.
  n, k, rings = 9, 4, 300
  met = np.zeros((n, n))
  for r in range(rings):
    for i, near in enumerate(graph.ring(b"%d" % r, n, k)):
      met[i, list(near)] += 1
  pairs = met[np.triu_indices(n, 1)]
  z = (pairs - rings / 2) / np.sqrt(rings / 4)
  # Largest of 36, p = 36 * 2 * (1 - Phi(4.5)) < 3e-4, fixed seeds.
  assert np.abs(z).max() < 4.5
  # The control: places that are not permuted are neighbours always or never.
  fixed = np.array([[0 < abs(i - j) <= 2 for i in range(n)] for j in range(n)])
  pairs = rings * fixed[np.triu_indices(n, 1)]
  assert np.abs((pairs - rings / 2) / np.sqrt(rings / 4)).max() > 4.5


def test_impossible_rings_are_refused():
  with pytest.raises(ValueError, match="neighbours=4"):
    graph.ring(b"", 9, 3)
  with pytest.raises(ValueError, match="at most 4 neighbours"):
    graph.ring(b"", 5, 6)


# How many.


@pytest.mark.parametrize(
  ("population", "marked", "draws"), [(9, 4, 3), (999, 50, 36), (20, 20, 6)]
)
def test_tails_are_those_of_the_hypergeometric_distribution(
  population, marked, draws
):
  other = scipy.stats.hypergeom(population, marked, draws)
  for least in range(-1, draws + 2):
    found = float(degree.tail(population, marked, draws, least))
    # SciPy sums logarithms of the gamma function, of up to 6,000 here.
    assert found == pytest.approx(other.sf(least - 1), rel=1e-9, abs=1e-300)


def is_parted(n, k, missing):
  """Whether the ring falls apart without some of its places."""
  left = [i for i in range(n) if i not in missing]
  around = graph.ring(b"any", n, k)
  seen, new = set(), {left[0]}
  while new:
    seen |= new
    new = {j for i in new for j in around[i]} - seen - set(missing)
  return len(seen) < len(left)


@pytest.mark.parametrize(
  ("n", "k", "missing"),
  [(8, 2, 2), (8, 2, 3), (9, 4, 4), (9, 4, 5), (10, 6, 6)],
)
def test_rings_fall_apart_at_most_as_often_as_said(n, k, missing):
  sets = list(itertools.combinations(range(n), missing))
  exact = Fraction(sum(is_parted(n, k, m) for m in sets), len(sets))
  bound = degree.parted(n, missing / n, 0, k)
  assert 0 < exact <= bound
  # The bound counts some sets twice, not many times.
  assert bound < 4 * exact or bound == 1
  # With one place fewer than two gaps need, it never falls apart.
  assert degree.parted(n, (k - 1) / n, 0, k) == 0
  few = itertools.combinations(range(n), k - 1)
  assert not any(is_parted(n, k, m) for m in few)


@pytest.mark.parametrize(("n", "k", "t", "bad"), [(7, 4, 2, 3), (8, 2, 2, 3)])
def test_failures_are_bounded_by_counting_every_case(n, k, t, bad):
  around = graph.ring(b"any", n, k)
  sets = list(itertools.combinations(range(n), bad))

  def often(is_bad):
    return Fraction(sum(map(is_bad, sets)), len(sets))

  known = often(
    lambda c: any(
      len(set(around[i]) & set(c)) >= t for i in range(n) if i not in c
    )
  )
  lost = often(
    lambda d: any(len(set(around[i]) - set(d)) < t for i in range(n))
  )
  risk = degree.failure(n, bad / n, bad / n, k, t)
  assert 0 < known <= risk.secrets
  assert 0 < lost <= risk.recovery


@pytest.mark.parametrize("lying", [False, True])
@pytest.mark.parametrize(
  ("n", "dropout", "corrupt"),
  [(10, 0.1, 0.1), (100, 0.05, 0.1), (1000, 0.05, 0.1), (300, 0.1, 0.2)],
)
def test_parameters_are_safe_and_the_smallest(n, dropout, corrupt, lying):
  args = n, dropout, corrupt

  def is_safe(k, t):
    risk = degree.failure(*args, k, t, lying=lying)
    revealed = risk.secrets + risk.parted
    return revealed <= 2**-40 and risk.recovery <= 2**-20

  k, t = degree.parameters(*args, lying=lying)
  graph.check(n, k)
  assert is_safe(k, t)
  assert not any(is_safe(k, more) for more in range(t + 1, k + 1))
  if k > 2:
    fewer = k - 2 + k % 2
    assert not any(is_safe(fewer, t) for t in range(1, fewer + 1))


def test_more_danger_needs_more_neighbours():
  def k(n=200, dropout=0.05, corrupt=0.1, **more):
    return degree.parameters(n, dropout, corrupt, **more)[0]

  assert k() <= k(dropout=0.1) <= k(dropout=0.2)
  assert k() <= k(corrupt=0.2) <= k(corrupt=0.3)
  assert k(security=2**-20) <= k() <= k(security=2**-60)
  assert k(correctness=2**-10) <= k() <= k(correctness=2**-30)
  assert k() < k(lying=True)
  assert k(n=200) < k(n=2000) < 2 * k(n=200)  # logarithmic, not linear


def test_a_lying_server_never_has_enough_shares_of_both_secrets():
  # Each honest neighbour gives one share, each that colludes gives both.
  k, t = degree.parameters(10, 0.1, 0.1, lying=True)
  bad = 1
  for honest in range(k - bad + 1):
    both = min(honest, k - bad - honest) + bad
    assert both < t


def test_what_cannot_be_safe_is_refused():
  with pytest.raises(ValueError, match="expect less dropout or corruption"):
    degree.parameters(10, 0.5, 0.5)
  with pytest.raises(ValueError, match="corrupt must be in"):
    degree.parameters(10, 0.1, 1.0)


def test_the_sentence_says_how_safe():
  said = degree.explain(1000, 0.05, 0.1, *degree.parameters(1000, 0.05, 0.1))
  assert "100 colluding and 50 dropped" in said
  assert "probability at most 2^-40" in said
