"""Laws of clusterings of updates, beside scikit-learn and brute force."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.cluster
import sklearn.metrics

from fedjax_peft.network import clustering, structure


def blobs(seed, clusters=3, each=6, width=20, noise=0.3):
  """(points [C, D], labels [C]) around random directions."""
  rng = np.random.default_rng(seed)
  centers = rng.normal(size=(clusters, width))
  labels = rng.permutation(np.repeat(np.arange(clusters), each))
  return centers[labels] + noise * rng.normal(size=(labels.size, width)), labels


def same(a, b):
  return np.array_equal(clustering.in_order(a), clustering.in_order(b))


def test_similarities_are_those_of_scikit_learn(tol):
  x, _ = blobs(0)
  x[4] = 0
  found = clustering.cosine(x)
  wanted = sklearn.metrics.pairwise.cosine_similarity(x)
  wanted[4, 4] = 1
  np.testing.assert_allclose(found, wanted, atol=tol(jnp.float64, 20))
  assert not clustering.distances(x).diagonal().any()
  far = clustering.distances(x, "euclidean")
  wanted = np.sqrt(((x[:, None] - x) ** 2).sum(-1))
  np.testing.assert_allclose(far, wanted, rtol=tol(jnp.float64, 20))


@pytest.mark.parametrize("linkage", clustering.LINKAGES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stop", [{"clusters": 4}, {"threshold": 0.5}])
def test_agglomerated_clusters_are_those_of_scikit_learn(linkage, seed, stop):
  far = clustering.distances(blobs(seed)[0])
  found = clustering.agglomerate(far, linkage=linkage, **stop)
  oracle = sklearn.cluster.AgglomerativeClustering(
    n_clusters=stop.get("clusters"),
    distance_threshold=stop.get("threshold"),
    metric="precomputed",
    linkage=linkage,
  )
  assert same(found, oracle.fit_predict(far))
  assert found.dtype == np.int32


def test_ties_leave_as_many_clusters_as_asked():
  far = 1.0 - np.eye(7)
  for k in range(1, 8):
    found = clustering.agglomerate(far, clusters=k)
    assert np.unique(found).tolist() == list(range(k))


def test_clusters_are_numbered_by_their_first_members():
  np.testing.assert_array_equal(
    clustering.in_order(["c", "a", "c", "b"]), [0, 1, 0, 2]
  )
  assert clustering.agglomerate(np.zeros((1, 1)), threshold=1.0).tolist() == [0]


@pytest.mark.parametrize("seed", range(6))
def test_single_linkage_is_the_best_of_all_bipartitions(seed):
  rng = np.random.default_rng(seed)
  similarity = clustering.cosine(rng.normal(size=(7, 4)))

  def across(part):
    return similarity[np.ix_(part == 0, part == 1)].max()

  every = (np.array((0, *rest)) for rest in itertools.product((0, 1), repeat=6))
  best = min(across(part) for part in every if part.any())
  found = clustering.bipartition(similarity)
  assert found[0] == 0
  assert across(found) == best


@pytest.mark.parametrize("seed", range(3))
def test_complete_linkage_splits_as_the_published_code_does(seed):
  similarity = clustering.cosine(blobs(seed, noise=1.0)[0])
  oracle = sklearn.cluster.AgglomerativeClustering(
    metric="precomputed", linkage="complete"
  )
  wanted = oracle.fit_predict(-similarity)
  assert same(clustering.bipartition(similarity, linkage="complete"), wanted)


def test_a_bipartition_does_not_depend_on_the_order_of_clients():
  x, _ = blobs(1, noise=1.0)
  order = np.random.default_rng(0).permutation(len(x))
  one = clustering.bipartition(clustering.cosine(x))
  two = clustering.bipartition(clustering.cosine(x[order]))
  assert same(one[order], two)


@pytest.mark.parametrize("linkage", clustering.LINKAGES)
def test_clients_that_pull_apart_are_divided_until_each_part_agrees(linkage):
  corners = np.array([[1.0, 0], [-1, 0.1], [0, -1.1], [0, 1]])
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 5))
  rng = np.random.default_rng(1)
  x = corners[labels] + 0.02 * rng.normal(size=(20, 2))
  # The mean of two neighbouring corners is 0.7 long, that of one corner 1.
  found = clustering.divide(x, eps1=0.85, eps2=0.9, linkage=linkage)
  assert structure.adjusted_rand_index(found.labels, labels) == 1
  assert found.parents.tolist() == [0, 0, 0, 0]
  assert found.labels[0] == 0
  again = clustering.divide(x, found.labels, eps1=0.85, eps2=0.9)
  np.testing.assert_array_equal(again.labels, found.labels)
  assert again.parents.tolist() == [0, 1, 2, 3]


def test_a_new_cluster_knows_which_it_came_from():
  x = np.array([[1.0, 0], [1, 0], [0, 1], [0, -1], [0, 1]])
  found = clustering.divide(x, [0, 0, 1, 1, 1], eps1=0.5, eps2=0.9)
  assert found.labels.tolist() == [0, 0, 1, 2, 1]
  assert found.parents.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
  ("eps1", "eps2"),
  [(0.1, 0.5), (0.5, 3.0)],  # still moving as a whole; all have converged
)
def test_nothing_is_divided_unless_both_conditions_hold(eps1, eps2):
  x = np.array([[1.0, 0.2], [-1, 0.2], [1, 0.2], [-1, 0.2]])
  assert not clustering.is_split(x, eps1=eps1, eps2=eps2)
  found = clustering.divide(x, eps1=eps1, eps2=eps2)
  assert found.labels.tolist() == [0, 0, 0, 0]
  assert clustering.is_split(x, eps1=0.5, eps2=0.9)


def test_clients_who_are_alike_are_not_divided_while_they_still_learn():
  x = 1 + 0.2 * np.random.default_rng(0).normal(size=(12, 30))
  found = clustering.divide(x, eps1=1.0, eps2=2.0)
  assert found.labels.max() == 0


def test_sketches_keep_inner_products_without_bias():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 300)) + 1
  seeds, size = 400, 16
  found = []
  for seed in range(seeds):
    leaves = {"a": np.stack([x, y])[:, :200], "b": np.stack([x, y])[:, 200:]}
    one, two = clustering.sketch(leaves, size=size, seed=seed)
    found.append(one @ two)
  bound = ((x @ x) * (y @ y) + (x @ y) ** 2) / size
  error = np.sqrt(bound / seeds)
  assert abs(np.mean(found) - x @ y) < 4 * error  # p-value 6e-5
  assert abs(np.mean(found)) > 4 * error  # as if the signs were no signs
  assert np.var(found) < 1.5 * bound


def test_a_sketch_is_linear_and_the_same_for_every_client_and_round(tol):
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 3, 4, 5))
  together = clustering.sketch({"w": a + 2 * b}, size=8, seed=1)
  apart = clustering.sketch({"w": a}, size=8, seed=1)
  apart = apart + 2 * clustering.sketch({"w": b}, size=8, seed=1)
  np.testing.assert_allclose(together, apart, atol=8 * tol(jnp.float64, 20))
  alone = clustering.sketch({"w": a[1:2]}, size=8, seed=1)
  np.testing.assert_array_equal(
    alone[0], clustering.sketch({"w": a}, size=8, seed=1)[1]
  )


@pytest.mark.parametrize("seed", range(3))
def test_planted_clusters_are_found_in_sketches_of_wide_updates(seed):
  x, labels = blobs(seed, width=5000, noise=1.0)
  short = clustering.sketch({"w": x}, size=128)
  found = clustering.agglomerate(clustering.distances(short), clusters=3)
  assert structure.adjusted_rand_index(found, labels) == 1


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: clustering.agglomerate(np.eye(2)), "give one of the two"),
    (
      lambda: clustering.agglomerate(np.eye(2), clusters=1),
      "0 on the diagonal",
    ),
    (
      lambda: clustering.agglomerate(np.zeros((2, 2)), clusters=3),
      "no more clusters than clients",
    ),
    (
      lambda: clustering.agglomerate(
        np.zeros((2, 2)), clusters=1, linkage="avrage"
      ),
      "did you mean 'average'",
    ),
    (lambda: clustering.divide(np.eye(2), eps1=2, eps2=1), "below eps2"),
    (
      lambda: clustering.divide(np.eye(2), [0], eps1=1, eps2=2),
      "each of 2 clients",
    ),
    (lambda: clustering.cosine(np.full((2, 2), np.nan)), "4 of them"),
    (lambda: clustering.distances(np.eye(2), "cos"), "metric must be one of"),
    (lambda: clustering.sketch({}), "nothing to sketch"),
  ],
)
def test_what_cannot_be_clustered_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
