"""The Krum family, against transcriptions of the papers in plain NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import crowd
from fedjax_peft import robust

PLACES, WIDTH = 16, 7
KRUM = {f: robust.krum(f) for f in range(4)}
KRUM_ALL = {f: robust.multi_krum(f) for f in range(4)}
KRUM_ONE = robust.multi_krum(1, 1)
KRUM_TWO = robust.multi_krum(2, 2)
BULYAN = {f: robust.bulyan(f) for f in range(4)}


def messages(n, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, WIDTH)).astype(np.float32)


def combine(reduce, x, seed=0):
  return crowd.combine(reduce, *crowd.padded(x, PLACES, seed))


# Blanchard et al., section 4: the score of i is the sum of squared distances
# to its n - f - 2 closest vectors; the one with the smallest score wins.


def scores(x, f, neighbours=None):
  x = x.astype(np.float64)
  n = len(x)
  neighbours = n - f - 2 if neighbours is None else neighbours
  found = []
  for i in range(n):
    others = [np.sum((x[i] - x[j]) ** 2) for j in range(n) if j != i]
    found.append(sum(sorted(others)[:neighbours]))
  return np.array(found)


def chosen(x, f, m):
  return x[np.argsort(scores(x, f), kind="stable")[:m]]


# El Mhamdi et al., section 4: a selection of theta = n - 2 f by Krum, then of
# each coordinate the mean of the beta = theta - 2 f closest to the median.


def bulyan(x, f):
  rest, selected = list(range(len(x))), []
  theta = len(x) - 2 * f
  while len(selected) < theta:
    # With one neighbour, or none, the two closest are tied; our tie-break.
    r = max(len(rest) - f - 2, 1)
    keys = [scores(x[rest], f, k) for k in (r + 1, r)]
    best = np.lexsort(keys)[0]
    selected.append(rest.pop(best))
  kept = x[selected].astype(np.float64)
  beta, result = theta - 2 * f, []
  for column in kept.T:
    closest = np.argsort(np.abs(column - np.median(column)), kind="stable")
    result.append(column[closest[:beta]].mean())
  return np.array(result)


@pytest.mark.parametrize("f", range(4))
@pytest.mark.parametrize("seed", range(4))
def test_krum_returns_the_message_that_the_paper_chooses(f, seed):
  for n in range(2 * f + 4, PLACES + 1, 2):
    x = messages(n, seed)
    found = combine(KRUM[f], x, seed)
    assert found.tobytes() == chosen(x, f, 1)[0].tobytes()


@pytest.mark.parametrize("f", range(4))
def test_multi_krum_is_the_mean_of_those_that_the_paper_chooses(f, tol):
  for n in range(2 * f + 4, PLACES + 1):
    x = messages(n, n)
    wanted = chosen(x, f, n - f - 2).mean(0, dtype=np.float64)
    found = combine(KRUM_ALL[f], x, n)
    np.testing.assert_allclose(found, wanted, atol=tol(np.float32, n))


def test_multi_krum_keeps_as_many_as_it_is_told(tol):
  for n in range(7, PLACES + 1):
    x = messages(n, n)
    wanted = chosen(x, 2, 2).mean(0, dtype=np.float64)
    found = combine(KRUM_TWO, x, n)
    np.testing.assert_allclose(found, wanted, atol=tol(np.float32, 2))


@pytest.mark.parametrize("n", range(5, 13))
def test_multi_krum_of_one_is_krum(n):
  x = messages(n, n)
  assert combine(KRUM_ONE, x, n).tobytes() == combine(KRUM[1], x, n).tobytes()


@pytest.mark.parametrize("f", range(4))
def test_bulyan_is_that_of_the_paper(f, tol):
  for n in range(4 * f + 3, PLACES + 1):
    x = messages(n, n)
    found = combine(BULYAN[f], x, n)
    np.testing.assert_allclose(found, bulyan(x, f), atol=tol(np.float32, n))


@pytest.mark.parametrize("f", range(1, 4))
def test_with_too_few_the_result_is_the_median(f):
  for n in range(1, 2 * f + 3):
    x = messages(n, n)
    for reduce in (KRUM[f], KRUM_ALL[f], BULYAN[f]):
      np.testing.assert_array_equal(combine(reduce, x), np.median(x, 0))
  for n in range(2 * f + 3, 4 * f + 3):
    x = messages(n, n)
    np.testing.assert_array_equal(combine(BULYAN[f], x), np.median(x, 0))


@settings(max_examples=40, deadline=None)
@given(
  n=st.integers(11, PLACES),
  hostile=st.integers(0, 2),
  size=st.sampled_from([1.0, 10.0, 1e30]),
  seed=st.integers(0, 2**16),
)
def test_bulyan_is_near_the_honest_range_in_every_value(n, hostile, size, seed):
  x = messages(n, seed)
  honest = x[hostile:]
  x[:hostile] *= np.float32(size)
  low, high = honest.min(0), honest.max(0)
  found = combine(BULYAN[2], x, seed)
  assert np.all(low - (high - low) <= found)
  assert np.all(found <= high + (high - low))


@settings(max_examples=60, deadline=None)
@given(
  points=st.lists(
    st.tuples(*[st.integers(-2, 2)] * 2), min_size=7, max_size=PLACES
  ),
  seed=st.integers(0, 2**16),
)
def test_ties_do_not_go_by_the_order_of_messages(points, seed):
  # Small integers: distances are exact, and many are equal.
  x = np.zeros((len(points), WIDTH), np.float32)
  x[:, [0, 5]] = points
  moved = np.random.default_rng(seed).permutation(x)
  for reduce in (KRUM[1], KRUM_TWO, BULYAN[1]):
    one, other = (combine(reduce, rows, seed) for rows in (x, moved))
    np.testing.assert_array_equal(one, other)


def test_close_messages_far_from_zero_do_not_cancel():
  # Differences of 1e-3 around 1e2: a Gram matrix of the messages themselves,
  # in single precision, is wrong by more than they are apart.
  x = (100 + 1e-3 * messages(11)).astype(np.float32)
  x[:2] = 1e6
  wanted = chosen(x, 2, 1)[0]
  assert combine(KRUM[2], x).tobytes() == wanted.tobytes()
  gram = x @ x.T
  naive = np.diag(gram)[:, None] + np.diag(gram)[None] - 2 * gram
  true = ((x[:, None].astype(np.float64) - x[None]) ** 2).sum(-1)
  assert np.abs(naive - true)[2:, 2:].max() > true[2:, 2:].max()


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_the_choice_does_not_depend_on_the_unit(size):
  x = messages(11)
  scaled = x * np.float32(size)
  best = np.argmin(scores(x, 2))
  found = combine(KRUM[2], scaled)
  assert found.tobytes() == scaled[best].tobytes()


def test_equal_messages_of_a_majority_are_the_choice():
  x = np.concatenate([np.full((6, WIDTH), 0.1), messages(5) * 1e9])
  for reduce in (KRUM[2], BULYAN[2]):
    found = combine(reduce, x)
    np.testing.assert_array_equal(found, np.float32(0.1))


# The filter of norms.


@pytest.mark.parametrize("factor", [1.0, 1.2, 3.0])
def test_the_filter_is_the_mean_of_ordinary_norms(factor, tol):
  x = messages(11) * np.linspace(0.1, 3, 11, dtype=np.float32)[:, None]
  norms = np.linalg.norm(x.astype(np.float64), axis=1)
  kept = norms <= factor * np.median(norms)
  assert 6 <= kept.sum() < 11 or factor == 3.0
  found = combine(robust.norm_filter(factor), x)
  wanted = x[kept].mean(0, dtype=np.float64)
  np.testing.assert_allclose(found, wanted, atol=tol(np.float32, 11))
