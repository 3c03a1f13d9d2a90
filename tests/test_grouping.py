"""Grouping: planted groups of a tiny linear problem are found while it runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_peft as fp
import toy
from fedjax_peft import algorithms, grouping, plan, preference
from fedjax_peft.network import structure

CLIENTS, EACH, CLASSES, WIDTH = 18, 24, 3, 6
HOW = fp.local(optax.sgd(0.5), batch=EACH, steps=3)
SETTINGS = toy.lanes(width=6, segment=6)
EVERYONE = fp.sample.uniform(CLIENTS)


class Linear(nnx.Module):
  """One layer."""

  def __init__(self, rngs):
    self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

  def __call__(self, x):
    return self.head(x)


@functools.cache
def model():
  return fp.model(
    Linear(nnx.Rngs(0)), fp.losses.classification, precision="float32"
  )


@functools.cache
def people(groups):
  """Clients whose labels a linear teacher gives, named in each group's way."""
  rng = np.random.default_rng(1)
  x = rng.normal(size=(CLIENTS * EACH, WIDTH)).astype(np.float32)
  label = (x @ rng.normal(size=(WIDTH, CLASSES))).argmax(1).astype(np.int32)
  owner = np.repeat(np.arange(CLIENTS), EACH)
  some = fp.data.population(
    {"x": x, "label": label},
    owner,
    heldout=1 / 3,
    classes=tuple("abc"[:CLASSES]),
  )
  return fp.data.planted(some, groups, seed=5)


def played(algorithm, data, how=None, rounds=8):
  """(state, records) of a run, its last round evaluated."""
  cohort = plan.sampled(EVERYONE, data, 0)
  run = fp.run(
    algorithm,
    model(),
    data,
    cohort=cohort if how is None else plan.grouped(cohort, how),
    rounds=rounds,
    settings=SETTINGS,
    evaluate=fp.evaluation(algorithm, model(), data, settings=SETTINGS),
    every=rounds,
    group=how,
  )
  every = list(run)
  return jax.device_get(every[-1][0]), [record for _, record in every]


@functools.cache
def one_model(groups):
  """A run of federated averaging."""
  algorithm = fp.fedavg(model(), HOW, lowrank=False)
  return played(algorithm, people(groups))


@functools.cache
def by_update(groups, clusters=None):
  algorithm = algorithms.clustered(model(), HOW, clusters=3)
  how = grouping.by_update(CLIENTS, 3, at=(2,), clusters=clusters)
  return played(algorithm, people(groups), how)


@pytest.mark.parametrize("clusters", [None, 3])
def test_planted_groups_are_found_in_updates_and_each_gets_a_model(clusters):
  truth = people(3).traits["group"]
  state, lines = by_update(3, clusters)
  found = structure.adjusted_rand_index(truth, state.plan["nodes"])
  assert found > 0.9
  # Any deal that knows nothing of the groups fails the same test.
  blind = np.random.default_rng(0).permutation(state.plan["nodes"])
  assert structure.adjusted_rand_index(truth, blind) < 0.5
  alone = one_model(3)[1]
  accuracy = "eval/accuracy"
  assert lines[-1][accuracy] > alone[-1][accuracy] + 0.3
  assert lines[-1]["train/loss"] < alone[-1]["train/loss"] - 0.3
  # Up to the split there was one model, the same as without clusters.
  for a, b in zip(lines[:2], alone, strict=False):
    assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)


def test_where_there_are_no_groups_none_are_found_and_nothing_is_lost(tol):
  state, lines = by_update(1)
  assert not state.plan["nodes"].any()
  alone, others = one_model(1)
  eps = tol(jnp.float32, EACH * 3 * len(lines))
  for a, b in zip(lines, others, strict=True):
    np.testing.assert_allclose(a["train/loss"], b["train/loss"], rtol=eps)
  assert lines[-1]["eval/accuracy"] == others[-1]["eval/accuracy"]
  for name, x in alone.params.items():
    mine = state.nodes[0].params[name][0]
    np.testing.assert_allclose(mine, x, rtol=eps, atol=eps)


def test_a_split_that_is_asked_for_where_there_are_no_groups_costs_accuracy():
  # What the test above guards against: half of the data for each model.
  _, forced = by_update(1, 3)
  _, free = by_update(1)
  assert forced[-1]["eval/loss"] > free[-1]["eval/loss"]


@functools.cache
def by_loss(groups=3):
  data = people(groups)
  algorithm = algorithms.ifca(model(), HOW, clusters=3, spread=0.3, seed=4)
  choose = preference.choose(algorithm, model(), data, SETTINGS, batch=64)
  how = grouping.by_loss(CLIENTS, choose)
  return algorithm, played(algorithm, data, how)


def test_clients_join_the_model_they_like_and_are_tested_with_it():
  data = people(3)
  algorithm, (state, lines) = by_loss()
  nodes = state.plan["nodes"]
  found = structure.adjusted_rand_index(data.traits["group"], nodes)
  assert found > 0.9
  accuracy = "eval/accuracy"
  assert lines[-1][accuracy] > one_model(3)[1][-1][accuracy] + 0.3
  # With the models of others the same clients are worse off.
  test = fp.evaluation(algorithm, model(), data, settings=SETTINGS)
  swapped = state._replace(plan={**state.plan, "nodes": (nodes + 1) % 3})
  assert test(state).record[accuracy] == lines[-1][accuracy]
  assert test(swapped).record[accuracy] < lines[-1][accuracy] - 0.3


def test_groups_that_are_given_stay():
  data = people(3)
  algorithm = algorithms.clustered(model(), HOW, clusters=3)
  first = data.traits["group"] % 3
  how = grouping.fixed(first)
  state, _ = played(algorithm, data, how, rounds=1)
  np.testing.assert_array_equal(state.plan["nodes"], first)


def test_what_is_found_once_is_looked_for_once():
  asked = []

  def find():
    asked.append(1)
    return np.arange(CLIENTS) % 3

  data = people(3)
  algorithm = algorithms.clustered(model(), HOW, clusters=3)
  how = grouping.by_adapters(CLIENTS, find)
  state, _ = played(algorithm, data, how, rounds=3)
  assert len(asked) == 1
  np.testing.assert_array_equal(state.plan["nodes"], np.arange(CLIENTS) % 3)


@pytest.mark.parametrize(
  ("build", "sentence"),
  [
    (lambda: grouping.by_update(4, 0), "nodes must be an integer of at least"),
    (
      lambda: grouping.by_update(4, 2, clusters=3),
      r"clusters must be in 1\.\.2",
    ),
    (
      lambda: plan.grouped(
        plan.grouped(
          plan.sampled(EVERYONE, people(1), 0), grouping.fixed([0] * CLIENTS)
        ),
        grouping.fixed([0] * CLIENTS),
      ),
      "both stations and a grouping",
    ),
  ],
)
def test_what_cannot_be_grouped_is_refused_in_one_sentence(build, sentence):
  with pytest.raises(ValueError, match=sentence):
    build()
