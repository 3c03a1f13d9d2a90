"""Evaluation: metrics that add, and what is said of their spread."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_peft as fp
import toy
from fedjax_peft import evaluate

DATA = toy.people((6, 9, 14, 5, 8, 11), heldout=0.4, unseen=0.34, seed=3)
HOW = fp.local(optax.sgd(0.3), batch=4)


def by_hand(params, client):
  """(summed loss, hits, examples) of a client's held-out rows."""
  model, rows = toy.net(), DATA.heldout[client]
  examples = {k: v[rows] for k, v in DATA.examples.items()}
  loss, metrics, _ = model.loss(params, model.base, examples, jax.random.key(0))
  return float(loss.sum()), float(metrics["accuracy"][0].sum()), rows.size


@pytest.fixture(scope="module")
def measured():
  algorithm = fp.fedavg(toy.net(), HOW, lowrank=False)

  def central(params, base):
    return {"largest": max(float(jnp.abs(x).max()) for x in params.values())}

  measure = fp.evaluation(algorithm, toy.net(), DATA, batch=4, central=central)
  state = algorithm.init(clients=6, cohort=2)
  return state, measure(state)


def test_every_client_is_measured_on_its_own_examples(measured):
  state, report = measured
  assert report.clients["client"].tolist() == list(range(6))
  for client in range(6):
    loss, hits, count = by_hand(state.params, client)
    found = {k: v[client] for k, v in report.clients.items()}
    assert found["loss/numerator"] == pytest.approx(loss, rel=1e-5)
    assert found["accuracy/numerator"] == hits
    assert found["accuracy/denominator"] == count
    assert found["seen"] == DATA.seen[client]


def test_the_pooled_metric_is_the_weighted_mean_over_clients(measured):
  _, report = measured
  for prefix, which in (("eval", DATA.seen), ("unseen", ~DATA.seen)):
    top = report.clients["accuracy/numerator"][which]
    bottom = report.clients["accuracy/denominator"][which]
    mean = np.average(top / bottom, weights=bottom)
    assert report.record[f"{prefix}/accuracy"] == pytest.approx(mean, rel=1e-6)
    assert report.record[f"{prefix}/accuracy"] == top.sum() / bottom.sum()
    assert which.sum() > 1


def test_the_central_test_set_and_hook_are_recorded(measured):
  state, report = measured
  hits = sum(by_hand(state.params, c)[1] for c in range(6))
  assert report.record["test/accuracy"] == pytest.approx(hits / DATA.test.size)
  wanted = max(float(np.abs(x).max()) for x in state.params.values())
  assert report.record["central/largest"] == pytest.approx(wanted)


def test_each_client_is_measured_with_the_leaves_that_live_on_it():
  placed = {"head/.*": "device"}
  algorithm = fp.fedavg(toy.net(), HOW, placement=placed, lowrank=False)
  state = algorithm.init(clients=6, cohort=2)
  rng = np.random.default_rng(0)
  heads = rng.normal(size=(6, 7, 3)).astype(np.float32)
  rows = state.clients._replace(local={"head/kernel": jnp.asarray(heads)})
  state = state._replace(clients=rows)
  report = fp.evaluation(algorithm, toy.net(), DATA, batch=4)(state)
  for client in range(6):
    own = state.params | {"head/kernel": heads[client]}
    loss, hits, count = by_hand(own, client)
    found = {k: v[client] for k, v in report.clients.items()}
    assert found["loss/numerator"] == pytest.approx(loss, rel=1e-5)
    assert found["accuracy/numerator"] == hits
    assert found["accuracy/denominator"] == count


def test_each_client_is_measured_with_the_model_of_its_edge():
  job = fp.train(
    toy.net(), HOW, rules={"head/.*": "edge"}, tiers=("edge", "cloud")
  )
  algorithm = fp.federated(job, [fp.tier("edge", 2), fp.tier("cloud")])
  state = algorithm.init(clients=6, cohort=2)
  rng = np.random.default_rng(0)
  heads = rng.normal(size=(2, 7, 3)).astype(np.float32)
  edge = state.nodes[0]
  edge = edge._replace(params=edge.params | {"head/kernel": jnp.asarray(heads)})
  state = state._replace(nodes=(edge, state.nodes[1]))
  report = fp.evaluation(algorithm, toy.net(), DATA, batch=4)(state)
  for client in range(6):
    own = state.params | {"head/kernel": heads[client % 2]}
    loss, hits, _ = by_hand(own, client)
    assert report.clients["loss/numerator"][client] == pytest.approx(
      loss, rel=1e-5
    )
    assert report.clients["accuracy/numerator"][client] == hits


def test_a_client_may_train_before_it_is_measured(caplog):
  algorithm = fp.fedavg(toy.net(), HOW, lowrank=False)
  measure = fp.evaluation(algorithm, toy.net(), DATA, batch=4, personalize=HOW)
  state = algorithm.init(clients=6, cohort=2)
  with jax.log_compiles(), caplog.at_level("WARNING"):
    report = measure(state)
  assert "jit(step)" in caplog.text
  params = jax.tree.map(np.asarray, state.params)
  for client in range(6):
    own = toy.train(params, DATA, client, HOW, 0.3)
    loss, hits, count = by_hand(own, client)
    found = {k: v[client] for k, v in report.clients.items()}
    assert found["personal/loss/numerator"] == pytest.approx(loss, rel=1e-4)
    assert found["personal/accuracy/numerator"] == hits
    assert found["accuracy/denominator"] == count
  assert {"personal/loss", "personal_unseen/loss"} <= set(report.record)
  caplog.clear()
  with jax.log_compiles(), caplog.at_level("WARNING"):
    measure(state)
  assert "jit(step)" not in caplog.text  # compiled once for many rounds


# What is said of the spread.


def scores(rng, n):
  bottom = rng.integers(1, 30, n).astype(np.float32)
  top = np.floor(bottom * rng.random(n)).astype(np.float32)
  return {"accuracy": (top, bottom), "loss": (2 * top, bottom)}


@pytest.mark.parametrize("n", [1, 2, 9, 10, 11, 100])
def test_the_tail_is_no_better_than_the_mean_and_jain_is_in_range(n):
  rng = np.random.default_rng(n)
  found = evaluate.spread("x", scores(rng, n))
  eps = 1e-12
  assert found["x/accuracy_worst10"] <= found["x/accuracy_mean"] + eps
  assert found["x/loss_worst10"] >= found["x/loss_mean"] - eps
  assert 1 / n - eps <= found["x/accuracy_jain"] <= 1 + eps
  assert found["x/accuracy_std"] >= 0
  assert "x/loss_jain" not in found


def test_the_spread_is_that_of_numpy():
  top, bottom = scores(np.random.default_rng(0), 25)["accuracy"]
  found = evaluate.spread("x", {"accuracy": (top, bottom)})
  value = np.sort(top.astype(np.float64) / bottom)
  for name, wanted in {
    "": top.sum() / bottom.sum(),
    "_mean": value.mean(),
    "_median": np.median(value),
    "_std": value.std(),
    "_worst10": value[:3].mean(),  # a tenth of 25, rounded up
    "_jain": value.sum() ** 2 / (25 * np.sum(value**2)),
  }.items():
    assert found[f"x/accuracy{name}"] == pytest.approx(wanted, rel=1e-6)


def test_jain_is_one_when_all_are_equal_and_one_in_n_when_one_has_all():
  ones = np.ones(8, np.float32)
  equal = evaluate.spread("x", {"a": (ones / 2, ones)})
  assert equal["x/a_jain"] == pytest.approx(1)
  single = np.eye(8, dtype=np.float32)[3]
  assert evaluate.spread("x", {"a": (single, ones)})["x/a_jain"] == (
    pytest.approx(1 / 8)
  )
  assert evaluate.spread("x", {"a": (0 * ones, ones)})["x/a_jain"] == 1


def test_clients_without_examples_are_left_out_of_the_spread():
  top, bottom = np.array([1.0, 0.0, 3.0]), np.array([2.0, 0.0, 3.0])
  found = evaluate.spread("x", {"a": (top, bottom)})
  assert found["x/a_mean"] == 0.75
  assert evaluate.spread("x", {"a": (0 * top, 0 * bottom)}) == {}
