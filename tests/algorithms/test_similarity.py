"""Similarity of adapters: groups are found, a gauge changes nothing."""

import functools
import itertools

import numpy as np
import optax
import pytest
import scipy.linalg
import sklearn.metrics
from flax import nnx

import fedjax_peft as fp
import toy
from fedjax_peft import algorithms, peft, rules
from fedjax_peft.algorithms import similarity

PAIRS = (rules.Pair("up", 2.0), rules.Pair("deep/query", 0.5))
SHAPES = {"up": (), "deep/query": (3,)}
K, F, R, C = 9, 7, 2, 6
KINDS = np.array([0, 1, 1, 0, 2, 1])
EVERY = pytest.mark.parametrize("by", ["product", "a", "b"])


@functools.cache
def clients(noise=0.1, seed=0):
  """Factors of C clients of three kinds, {path: [C, stack, ...]}."""
  rng = np.random.default_rng(seed)
  found = {}
  for pair in PAIRS:
    stack = SHAPES[pair.layer]
    for name, shape in ((pair.a, (K, R)), (pair.b, (R, F))):
      kinds = rng.normal(size=(3, *stack, *shape))
      x = kinds[KINDS]
      found[name] = x + noise * rng.normal(size=x.shape)
  return found


def regauged(adapters, seed=1):
  """The same adapters, with factors (A G, G^-1 B)."""
  rng = np.random.default_rng(seed)
  found = {}
  for pair in PAIRS:
    a, b = adapters[pair.a], adapters[pair.b]
    g = rng.normal(size=(*a.shape[:-2], R, R)) + 2 * np.eye(R)
    found[pair.a], found[pair.b] = a @ g, np.linalg.inv(g) @ b
  return found


def same(a, b):
  """Whether two groupings are the same, whatever their numbers."""
  return sklearn.metrics.adjusted_rand_score(a, b) == 1


@EVERY
def test_planted_groups_are_found(by):
  alike = similarity.alike(clients(), PAIRS, by)
  for count in (3, None):
    found = similarity.groups(alike, count)
    assert found.dtype == np.int32
    assert found.tolist() == [0, 1, 1, 0, 2, 1]


@EVERY
def test_a_gauge_changes_nothing(by):
  one = similarity.alike(clients(), PAIRS, by)
  other = similarity.alike(regauged(clients()), PAIRS, by)
  np.testing.assert_allclose(other, one, atol=1e-9)
  np.testing.assert_allclose(np.diag(one), 1, atol=1e-12)
  np.testing.assert_allclose(one, one.T, atol=1e-12)


def test_factors_compared_as_they_are_would_fail_this_test():
  def naive(adapters):
    x = np.concatenate(
      [adapters[n].reshape(C, -1) for p in PAIRS for n in (p.a, p.b)], axis=1
    )
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T

  here = naive(clients())
  assert np.abs(naive(regauged(clients())) - here).max() > 0.1


def test_products_are_compared_as_matrices_would_be():
  flat = []
  for pair in PAIRS:
    whole = pair.scale * clients()[pair.a] @ clients()[pair.b]
    flat.append(whole.reshape(C, -1))
  x = np.concatenate(flat, axis=1)
  np.testing.assert_allclose(
    similarity.alike(clients(), PAIRS),
    sklearn.metrics.pairwise.cosine_similarity(x),
    atol=1e-12,
  )


def test_spaces_are_compared_by_their_principal_angles():
  alike = similarity.alike(clients(), PAIRS[:1], "a")
  a = clients()["up/lora_a"]
  for i, j in itertools.combinations(range(C), 2):
    angles = scipy.linalg.subspace_angles(a[i], a[j])
    np.testing.assert_allclose(alike[i, j], np.mean(np.cos(angles) ** 2))


def test_a_space_within_a_larger_one_is_not_the_same():
  a = np.zeros((2, K, 2))
  a[0, 0, 0] = a[1, 0, 0] = a[1, 1, 1] = 1.0
  adapters = {"up/lora_a": a, "up/lora_b": np.ones((2, 2, F))}
  alike = similarity.alike(adapters, PAIRS[:1], "a")
  np.testing.assert_allclose(alike, [[1, 0.5], [0.5, 1]], atol=1e-12)


def test_an_adapter_that_is_zero_is_like_nobody():
  here = {k: np.where(np.arange(C) == 2, 0, np.moveaxis(v, 0, -1)) for k, v in
          clients().items()}  # fmt: skip
  here = {k: np.moveaxis(v, -1, 0) for k, v in here.items()}
  for by in ("product", "a", "b"):
    alike = similarity.alike(here, PAIRS, by)
    assert not alike[2].any()
    assert np.isfinite(alike).all()


def test_what_cannot_be_compared_is_refused():
  with pytest.raises(ValueError, match=r"peft\.lora"):
    similarity.alike(clients(), ())
  with pytest.raises(ValueError, match="no 'up/lora_b'"):
    similarity.alike({"up/lora_a": clients()["up/lora_a"]}, PAIRS[:1])
  with pytest.raises(ValueError, match=r"symmetric.*\[2, 3\]"):
    similarity.groups(np.ones((2, 3)), 2)
  with pytest.raises(ValueError, match="count=1"):
    similarity.groups(np.eye(2))
  with pytest.raises(ValueError, match="3 clients"):
    similarity.groups(np.eye(3), 4)


@functools.cache
def opposed():
  """Clients of two kinds: each knows one label, whatever the example."""
  rng = np.random.default_rng(0)
  kinds = (0, 1, 1, 0, 1)
  x = rng.normal(size=(len(kinds), 8, 5)).astype(np.float32)
  owner = np.repeat(np.arange(len(kinds)), 8)
  label = np.array(kinds, np.int32)[owner]
  return kinds, fp.data.population(
    {"x": x.reshape(-1, 5), "label": label}, owner, heldout=0.0
  )


def test_clients_that_train_alone_show_which_edge_they_belong_to():
  kinds, data = opposed()
  module = peft.lora(toy.Net(nnx.Rngs(0)), 2, "up|head")
  model = fp.model(module, fp.losses.classification, precision="float32")
  how = fp.local(optax.sgd(0.1), batch=8, epochs=8)
  nodes = algorithms.find_nodes(model, how, data, count=2, settings=toy.lanes())
  assert nodes.dtype == np.int32
  assert same(nodes, kinds)
  assert not same(np.arange(len(kinds)) % 2, kinds)  # what ids would say
