"""Laws of k-means: a local optimum, as good as scikit-learn's."""

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.cluster

from fedjax_peft.network import centroid, structure


def features(seed, kinds=4, each=10):
  """(compute and latency [C, 2], kind of device [C])."""
  rng = np.random.default_rng(seed)
  labels = rng.permutation(np.repeat(np.arange(kinds), each))
  kind = np.array([[1e9, 0.2], [1e9, 0.01], [2e10, 0.2], [2e10, 0.01]])
  return kind[labels] * rng.lognormal(0, 0.1, (labels.size, 2)), labels


@pytest.mark.parametrize("seed", range(4))
def test_kinds_of_devices_are_found(seed):
  x, labels = features(seed)
  found = centroid.kmeans(centroid.standardize(x), 4)
  assert structure.adjusted_rand_index(found.labels, labels) == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("clusters", [1, 3, 6])
def test_the_inertia_is_no_worse_than_that_of_scikit_learn(seed, clusters, tol):
  x = np.random.default_rng(seed).normal(size=(60, 2))
  found = centroid.kmeans(x, clusters, restarts=16)
  oracle = sklearn.cluster.KMeans(clusters, n_init=16, random_state=0).fit(x)
  assert found.inertia <= oracle.inertia_ * 1.01
  own = np.sum((x - found.centers[found.labels]) ** 2)
  assert found.inertia == pytest.approx(own, rel=tol(jnp.float64, 120))


@pytest.mark.parametrize("seed", range(4))
def test_everyone_is_nearest_to_its_center_and_centers_are_means(seed, tol):
  x = np.random.default_rng(seed).normal(size=(50, 3))
  found = centroid.kmeans(x, 5, seed=seed)
  far = np.sum((x[:, None] - found.centers) ** 2, axis=-1)
  np.testing.assert_array_equal(found.labels, far.argmin(axis=1))
  for k in range(5):
    np.testing.assert_allclose(
      found.centers[k],
      x[found.labels == k].mean(axis=0),
      atol=tol(jnp.float64, 50),
    )
  firsts = np.unique(found.labels, return_index=True)[1]
  assert (np.diff(firsts) > 0).all()


def test_more_restarts_are_never_worse_and_the_same_seed_is_the_same():
  x = np.random.default_rng(0).normal(size=(40, 2))
  runs = [centroid.kmeans(x, 6, restarts=r).inertia for r in (1, 4, 16)]
  assert runs == sorted(runs, reverse=True)
  assert runs[0] > runs[-1]
  one, two = (centroid.kmeans(x, 6, seed=5) for _ in "ab")
  np.testing.assert_array_equal(one.labels, two.labels)
  np.testing.assert_array_equal(one.centers, two.centers)


def test_no_cluster_is_empty_even_where_points_coincide():
  x = np.array([[0.0], [0], [0], [1]])
  for k in (2, 3, 4):
    found = centroid.kmeans(x, k)
    assert np.unique(found.labels).tolist() == list(range(k))
  assert centroid.kmeans(x, 4).inertia == 0


def test_standardized_features_have_mean_zero_and_variance_one(tol):
  x, _ = features(0)
  x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
  found = centroid.standardize(x)
  eps = tol(jnp.float64, len(x))
  np.testing.assert_allclose(found.mean(axis=0), 0, atol=4 * eps)
  np.testing.assert_allclose(found.std(axis=0), [1, 1, 0], atol=eps)


def test_more_clusters_than_clients_are_refused():
  with pytest.raises(ValueError, match="got clusters=4 and 3 clients"):
    centroid.kmeans(np.zeros((3, 1)), 4)
