"""Laws of how many clusters there are, beside scikit-learn."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from fedjax_peft.network import clustering, structure


def noise(seed, clients=16, width=30, common=1.0):
  """Updates of clients whose data are alike: a common way and noise."""
  rng = np.random.default_rng([7, seed])
  return common * rng.normal(size=width) + rng.normal(size=(clients, width))


@pytest.mark.parametrize("seed", range(5))
def test_agreement_and_silhouettes_are_those_of_scikit_learn(seed, tol):
  rng = np.random.default_rng(seed)
  a, b = rng.integers(0, 4, (2, 25))
  b = np.where(rng.random(25) < 0.5, a, b)
  found = structure.adjusted_rand_index(a, b)
  wanted = sklearn.metrics.adjusted_rand_score(a, b)
  eps = 4 * tol(jnp.float64, 25)
  assert found == pytest.approx(wanted, abs=eps)
  far = clustering.distances(rng.normal(size=(25, 6)), "euclidean")
  b[0] = 9  # a client alone
  wanted = sklearn.metrics.silhouette_score(far, b, metric="precomputed")
  assert structure.silhouette(far, b) == pytest.approx(wanted, abs=eps)


def test_agreement_is_symmetric_and_one_where_only_names_differ():
  rng = np.random.default_rng(0)
  a, b = rng.integers(0, 5, (2, 40))
  assert structure.adjusted_rand_index(a, 9 - a) == 1
  one, two = (structure.adjusted_rand_index(*x) for x in ((a, b), (b, a)))
  assert one == pytest.approx(two)
  assert structure.adjusted_rand_index(np.zeros(5), np.ones(5)) == 1
  assert structure.adjusted_rand_index(np.arange(5), np.zeros(5)) == 0
  assert structure.silhouette(np.zeros((3, 3)), [1, 1, 1]) == 0


@pytest.mark.parametrize("metric", clustering.METRICS)
@pytest.mark.parametrize("width", [4, 30])
def test_clients_who_are_alike_are_one_cluster(metric, width):
  runs, level = 30, 0.05
  choices = [
    structure.choose(
      noise(s, width=width),
      metric=metric,
      level=level,
      draws=19,
      most=3,
      seed=s,
    )
    for s in range(runs)
  ]
  split = sum(c.labels.max() > 0 for c in choices)
  # More than this has a p-value below 1e-4 at the level that was promised.
  assert split <= scipy.stats.binom.ppf(1 - 1e-4, runs, level)
  # To believe the best silhouette as it is would have split nearly all.
  believed = [max(c.silhouettes.values(), default=0) > 0 for c in choices]
  assert np.mean(believed) > 0.8
  assert all((c.labels.max() > 0) == (c.p_value <= level) for c in choices)


def test_one_client_like_no_other_is_no_cluster_unless_it_may_be():
  x = np.concatenate([noise(1, clients=15), 40 * noise(2, clients=1)])
  assert not structure.choose(x, most=3).labels.any()
  alone = structure.choose(x, most=3, least=1)
  assert alone.silhouettes[2] > 0.5


@pytest.mark.parametrize("metric", clustering.METRICS)
@pytest.mark.parametrize("clusters", [2, 3, 4])
def test_planted_clusters_are_counted_and_found(metric, clusters):
  rng = np.random.default_rng(clusters)
  labels = rng.permutation(np.repeat(np.arange(clusters), 6))
  x = 4 * rng.normal(size=(clusters, 30))[labels] + noise(clusters, labels.size)
  found = structure.choose(x, metric=metric, most=6, draws=99)
  assert found.p_value == 0.01
  assert structure.adjusted_rand_index(found.labels, labels) == 1


@pytest.mark.parametrize("metric", clustering.METRICS)
def test_clients_that_pull_in_opposite_directions_are_two_clusters(metric):
  rng = np.random.default_rng(0)
  labels = rng.permutation(np.arange(20) % 2)
  x = np.outer(2 * labels - 1, 2 * rng.normal(size=30)) + noise(0, 20, 30, 0)
  found = structure.choose(x, most=5, metric=metric)
  assert structure.adjusted_rand_index(found.labels, labels) == 1


def test_few_clients_are_one_cluster():
  for count in (1, 2):
    found = structure.choose(noise(0, clients=count))
    assert found.labels.tolist() == [0] * count
    assert found.p_value == 1


def test_a_choice_is_a_function_of_its_arguments():
  x = noise(3)
  one, two = (structure.choose(x, draws=9, level=0.2, seed=4) for _ in "ab")
  np.testing.assert_array_equal(one.labels, two.labels)
  assert one[1:] == two[1:]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"level": 0.001}, "reachable"),
    ({"most": 1}, "most must be an integer of at least 2"),
    ({"metric": "cosin"}, "did you mean 'cosine'"),
  ],
)
def test_what_cannot_be_chosen_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    structure.choose(noise(0), **options)
  with pytest.raises(ValueError, match="got 2 and 3 labels"):
    structure.adjusted_rand_index([0, 1], [0, 1, 2])
