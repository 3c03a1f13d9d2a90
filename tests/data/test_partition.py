import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from fedjax_peft.data import Ragged, partition, skew

LABELS = np.random.default_rng(0).integers(0, 6, 3000)
MEMBERS = {
  "iid": lambda y, n, seed: partition.iid(len(y), n, seed=seed),
  "quantity": lambda y, n, seed: partition.quantity(
    len(y), n, sigma=1.5, min_size=2, seed=seed
  ),
  "dirichlet": lambda y, n, seed: partition.dirichlet(
    y, n, alpha=0.3, min_size=2, seed=seed
  ),
  "dirichlet sharp": lambda y, n, seed: partition.dirichlet(
    y, n, alpha=0.01, min_size=2, seed=seed
  ),
  "dirichlet flat": lambda y, n, seed: partition.dirichlet(
    y, n, alpha=1e4, min_size=2, seed=seed
  ),
  "shards": lambda y, n, seed: partition.shards(y, n, per_client=2, seed=seed),
}


def check_cover(ragged, clients, count, min_size):
  assert len(ragged) == clients
  np.testing.assert_array_equal(np.sort(ragged.rows), np.arange(count))
  assert ragged.sizes.min() >= min_size


@pytest.mark.parametrize("name", MEMBERS)
@hypothesis.given(
  labels=st.lists(st.integers(0, 4), min_size=40, max_size=120),
  clients=st.integers(1, 20),
  seed=st.integers(0, 2**32 - 1),
)
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
def test_a_partition_is_an_exact_cover(name, labels, clients, seed):
  labels = np.array(labels)
  ragged = MEMBERS[name](labels, clients, seed)
  least = 1 if name == "iid" else 2
  check_cover(ragged, clients, len(labels), least)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_partition_follows_its_seed(name):
  one, two, other = (MEMBERS[name](LABELS, 100, seed) for seed in (1, 1, 2))
  np.testing.assert_array_equal(one.rows, two.rows)
  np.testing.assert_array_equal(one.indptr, two.indptr)
  assert not np.array_equal(one.rows, other.rows)


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.01, 0.3, 1.0, 1e4, 1e12])
def test_dirichlet_covers_for_any_alpha(alpha):
  ragged = partition.dirichlet(LABELS, 200, alpha=alpha, min_size=3)
  check_cover(ragged, 200, len(LABELS), 3)


def test_a_large_alpha_gives_every_client_the_whole_mixture():
  counts = skew.histogram(partition.dirichlet(LABELS, 10, alpha=1e6), LABELS, 6)
  # Within one row of the share in each of 6 classes.
  assert np.abs(counts - np.bincount(LABELS) / 10).max() <= 1.5
  assert skew.distance(counts) < 0.01


def test_a_small_alpha_gives_a_client_one_class():
  ragged = partition.dirichlet(LABELS, 10, alpha=1e-3, min_size=0)
  counts = skew.histogram(ragged, LABELS, 6)
  assert (counts.max(0) / counts.sum(0)).min() > 0.99  # one client per class


def test_skew_falls_as_alpha_grows():
  distances = [
    skew.distance(
      skew.histogram(partition.dirichlet(LABELS, 50, alpha=a), LABELS, 6)
    )
    for a in (0.03, 0.1, 0.3, 1, 10, 100)
  ]
  assert distances == sorted(distances, reverse=True)


def test_the_proportions_of_a_class_are_dirichlet():
  # The share of client 0 is Beta(a, a (N - 1)): mean 1/N, variance
  # (N - 1) / (N**2 (N a + 1)). 400 shares; p < 1e-4 at 4 standard errors.
  clients, alpha, draws = 5, 0.7, 400
  labels = np.zeros(2000, int)
  share = np.array(
    [
      partition.dirichlet(
        labels, clients, alpha=alpha, min_size=0, seed=seed
      ).sizes[0]
      / 2000
      for seed in range(draws)
    ]
  )

  def variance(a):
    return (clients - 1) / (clients**2 * (clients * a + 1))

  error = np.std((share - share.mean()) ** 2) / np.sqrt(draws)
  assert abs(share.mean() - 1 / clients) < 4 * share.std() / np.sqrt(draws)
  assert abs(share.var() - variance(alpha)) < 4 * error
  assert abs(share.var() - variance(2 * alpha)) > 4 * error


def test_clients_topped_up_get_their_own_class_while_there_is_some():
  labels = np.repeat([0, 1], 500)
  ragged = partition.dirichlet(labels, 50, alpha=0.02, min_size=10, seed=3)
  counts = skew.histogram(ragged, labels, 2)
  assert skew.effective_classes(counts) < 1.2


def test_quantity_is_log_normal_beyond_the_minimum():
  ragged = partition.quantity(10**6, 2000, sigma=0.8, min_size=5)
  logs = np.log(ragged.sizes - 5)
  assert abs(logs.std() - 0.8) < 4 * 0.8 / np.sqrt(2 * 2000)
  even = partition.quantity(1003, 10, sigma=0)
  assert set(even.sizes) == {100, 101}


def test_a_shard_client_has_few_classes_and_sizes_are_even():
  ragged = partition.shards(np.repeat(np.arange(10), 100), 50, per_client=2)
  counts = skew.histogram(ragged, np.repeat(np.arange(10), 100), 10)
  assert ((counts > 0).sum(1) <= 2).all()
  assert set(ragged.sizes) == {20}


def test_by_feature_follows_the_sorted_keys():
  ragged = partition.by_feature(["mars", "earth", "mars"])
  assert [rows.tolist() for rows in ragged] == [[1], [0, 2]]


@hypothesis.given(
  size=st.integers(1, 12),
  seed=st.integers(0, 2**32 - 1),
)
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
def test_mirror_deals_the_clients_own_mixture(size, seed):
  train = partition.dirichlet(LABELS, 40, alpha=0.5, seed=seed)
  test_labels = np.random.default_rng(seed).integers(0, 6, 300)
  dealt = partition.mirror(train, LABELS, test_labels, size=size, seed=seed)
  wanted = skew.histogram(train, LABELS, 6) / train.sizes[:, None] * size
  counts = skew.histogram(dealt, test_labels, 6)
  assert (dealt.sizes == size).all()
  assert np.abs(counts - wanted).max() < 1 + 1e-6
  assert all(len(set(rows)) == size for rows in dealt)
  for cls in range(6):  # no row twice before every other one once
    rows = dealt.rows[test_labels[dealt.rows] == cls]
    uses = np.bincount(rows, minlength=300)[test_labels == cls]
    assert uses.max() - uses.min() <= 1


def test_mirror_gives_fewer_rows_where_a_class_has_none():
  train = Ragged.of([[0, 1], [2, 3], [0, 2]])
  dealt = partition.mirror(train, [0, 0, 1, 1], [0, 0, 0], size=4)
  assert dealt.sizes.tolist() == [3, 0, 3]


def test_ten_thousand_clients_and_a_million_rows_take_seconds():
  labels = np.random.default_rng(0).integers(0, 10, 10**6)
  ragged = partition.dirichlet(labels, 10**4, alpha=0.1, min_size=10)
  check_cover(ragged, 10**4, 10**6, 10)


@pytest.mark.parametrize("alpha", [0.0, -1.0, np.inf, np.nan])
def test_dirichlet_refuses_a_bad_alpha(alpha):
  with pytest.raises(ValueError, match="alpha must be finite and > 0"):
    partition.dirichlet(LABELS, 10, alpha=alpha)


def test_too_many_clients_are_refused_with_what_fits():
  with pytest.raises(ValueError, match=r"use clients in \[1, 750\]"):
    partition.dirichlet(LABELS, 1000, alpha=1.0, min_size=4)
  with pytest.raises(ValueError, match=r"use clients in \[1, 3000\]"):
    partition.iid(3000, 3001)


def test_by_name_is_the_function_of_that_name():
  for name in ("iid", "quantity", "dirichlet", "shards"):
    check_cover(partition.by_name(name, LABELS, 30), 30, len(LABELS), 1)
  one = partition.by_name("dirichlet", LABELS, 30, alpha=0.1, seed=2)
  two = partition.dirichlet(LABELS, 30, alpha=0.1, seed=2)
  np.testing.assert_array_equal(one.rows, two.rows)
  with pytest.raises(ValueError, match="did you mean 'dirichlet'"):
    partition.by_name("dirichlett", LABELS, 30)


def test_gini_is_that_of_the_mean_absolute_difference():
  sizes = np.random.default_rng(0).lognormal(0, 1, 200)
  pairs = np.abs(sizes[:, None] - sizes).mean()
  np.testing.assert_allclose(skew.gini(sizes), pairs / (2 * sizes.mean()))


def test_effective_classes_count_equal_classes():
  counts = np.array([[5, 0, 0, 0], [2, 2, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
  np.testing.assert_allclose(skew.effective_classes(counts), (1 + 2 + 4) / 3)
