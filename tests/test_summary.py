"""What a run reached for what it spent: laws, and examples worked by hand."""

import math

import hypothesis
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import strategies as st

from fedjax_peft import summary

CHECK = hypothesis.settings(deadline=None, max_examples=100, derandomize=True)
QUALITY = st.floats(0, 1)
# Costs grow by whole numbers, so that no two are too close to divide by.
RUNS = st.lists(
  st.tuples(st.integers(1, 50), QUALITY), min_size=1, max_size=12
).map(
  lambda steps: [
    {"cost": cost, "acc": q, "loss": -q}
    for cost, (_, q) in zip(
      np.cumsum([s for s, _ in steps]).tolist(), steps, strict=True
    )
  ]
)
RUN = [
  {"round": 1, "spent/bytes": 100, "eval/accuracy": 0.2},
  {"round": 2, "spent/bytes": 200},
  {"round": 3, "spent/bytes": 300, "eval/accuracy": 0.6},
  {"round": 4, "spent/bytes": 500, "eval/accuracy": 0.5},
]


def accuracy(value, budget):
  return summary.quality_under_budget(
    value, "eval/accuracy", "spent/bytes", budget
  )


def test_examples_worked_by_hand():
  assert accuracy(RUN, 99) is None
  assert accuracy(RUN, 299) == 0.2
  assert accuracy(RUN, 1000) == 0.6

  def cost(target):
    return summary.cost_to_target(RUN, "eval/accuracy", target, "spent/bytes")

  assert cost(0.1) == 100
  assert cost(0.4) == pytest.approx(200)
  assert cost(0.6) == 300
  assert cost(0.61) is None
  # (0.4 * 200 + 0.55 * 200) / 400, and 100 more at 0.5.
  area = summary.mean_quality(RUN, "eval/accuracy", "spent/bytes")
  assert area == pytest.approx(0.475)
  longer = summary.mean_quality(
    RUN, "eval/accuracy", "spent/bytes", until=600.0
  )
  assert longer == pytest.approx((0.475 * 400 + 50) / 500)


@CHECK
@hypothesis.given(RUNS, st.floats(0, 400), st.floats(0, 400))
def test_more_budget_is_never_worse(run, a, b):
  low, high = (
    summary.quality_under_budget(run, "acc", "cost", x) for x in sorted((a, b))
  )
  assert low is None or high >= low


@CHECK
@hypothesis.given(RUNS, QUALITY, QUALITY)
def test_a_higher_target_never_costs_less(run, a, b):
  low, high = (
    summary.cost_to_target(run, "acc", x, "cost") for x in sorted((a, b))
  )
  assert high is None or (low is not None and low <= high * (1 + 1e-12))


@CHECK
@hypothesis.given(RUNS, QUALITY)
def test_a_target_is_reached_exactly_if_some_budget_reaches_it(run, target):
  cost = summary.cost_to_target(run, "acc", target, "cost")
  best = summary.quality_under_budget(run, "acc", "cost", math.inf)
  assert (cost is None) == (best < target)
  if cost is not None:
    costs = [r["cost"] for r in run]
    assert costs[0] <= cost <= costs[-1] * (1 + 1e-12)
    # Interpolated: before it, no record was there.
    before = [r["acc"] for r in run if r["cost"] < cost * (1 - 1e-12)]
    assert all(q < target for q in before)


@CHECK
@hypothesis.given(RUNS, QUALITY)
def test_a_loss_is_the_mirror_of_a_quality(run, target):
  a = summary.cost_to_target(run, "acc", target, "cost")
  b = summary.cost_to_target(run, "loss", -target, "cost")
  assert a == b
  best = summary.quality_under_budget(run, "acc", "cost", math.inf)
  assert summary.quality_under_budget(run, "loss", "cost", math.inf) == -best


@CHECK
@hypothesis.given(RUNS)
def test_the_mean_quality_is_the_area_of_scikit_learn(run):
  found = summary.mean_quality(run, "acc", "cost")
  costs, quality = ([r[k] for r in run] for k in ("cost", "acc"))
  assert min(quality) - 1e-12 <= found <= max(quality) + 1e-12
  if len(run) > 1:
    area = sklearn.metrics.auc(costs, quality)
    np.testing.assert_allclose(
      found, area / (costs[-1] - costs[0]), rtol=1e-12, atol=1e-15
    )


@CHECK
@hypothesis.given(RUNS, st.integers(1, 100))
def test_beyond_its_end_a_run_keeps_its_last_quality(run, more):
  end = run[-1]["cost"] + more
  longer = [*run, {"cost": end, "acc": run[-1]["acc"]}]
  found = summary.mean_quality(run, "acc", "cost", until=float(end))
  wanted = summary.mean_quality(longer, "acc", "cost")
  np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-15)


@CHECK
@hypothesis.given(RUNS)
def test_a_run_is_as_robust_as_itself(run):
  found = summary.robustness(run, run, "acc", target=0.5, key="cost")
  assert found.drop == 0
  assert found.ratio == 1 or (math.isnan(found.ratio) and not run[-1]["acc"])
  assert found.extra in (0, None)
  assert found.slowdown in (1, None)


def test_harm_is_more_than_nothing_whatever_the_metric():
  clean = [{"round": 10, "acc": 0.8, "loss": 0.5}]
  faulty = [
    {"round": 10, "acc": 0.4, "loss": 1.0},
    {"round": 30, "acc": 0.6, "loss": 0.75},
  ]
  found = summary.robustness(clean, faulty, "acc", target=0.5)
  assert found.drop == pytest.approx(0.2)
  assert found.ratio == pytest.approx(0.75)
  assert found.extra == pytest.approx(10)
  assert found.slowdown == pytest.approx(2)
  found = summary.robustness(clean, faulty, "loss", target=0.6)
  assert found.drop == pytest.approx(0.25)
  assert found.ratio == pytest.approx(2 / 3)
  assert found.extra is found.slowdown is None


POINTS = st.integers(1, 3).flatmap(
  lambda columns: st.tuples(
    st.lists(
      st.tuples(*[st.integers(0, 4)] * columns), min_size=0, max_size=12
    ).map(lambda rows: np.array(rows, float).reshape(-1, columns)),
    st.lists(st.booleans(), min_size=columns, max_size=columns),
  )
)


@CHECK
@hypothesis.given(POINTS)
def test_the_front_is_what_nothing_beats(given_):
  points, higher = given_
  found = summary.pareto_front(points, higher)
  costs = np.where(higher, -points, points)

  def beats(a, b):
    return (a <= b).all() and (a < b).any()

  wanted = {
    i
    for i, point in enumerate(costs)
    if not any(beats(other, point) for other in costs)
  }
  assert set(found.tolist()) == wanted
  assert (np.diff(costs[found, 0]) >= 0).all()
  assert len(found) == len(wanted)


@CHECK
@hypothesis.given(
  st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=20),
  st.floats(1e-3, 1e3),
)
def test_jain_lies_between_one_over_n_and_one_and_knows_no_unit(values, unit):
  found = summary.jain(values)
  assert 1 / len(values) * (1 - 1e-12) <= found <= 1 + 1e-12
  scaled = [v * unit for v in values if 1e-290 < v < 1e290]
  if len(scaled) == len(values):
    np.testing.assert_allclose(summary.jain(scaled), found, rtol=1e-9)


@pytest.mark.parametrize("n", [1, 3, 10])
def test_jain_at_its_ends(n):
  assert summary.jain([7.0] * n) == pytest.approx(1.0)
  assert summary.jain([0.0] * (n - 1) + [2.0]) == pytest.approx(1 / n)
  k = (n + 1) // 2  # k of n share alike: k / n (Jain et al., 1984)
  assert summary.jain([3.0] * k + [0.0] * (n - k)) == pytest.approx(k / n)
  assert summary.jain([0.0] * n) == 1.0


@pytest.mark.parametrize(
  ("metric", "higher"),
  [
    ("eval/accuracy", True),
    ("eval/accuracy_worst10", True),
    ("central/f1", True),
    ("eval/loss", False),
    ("train/loss", False),
    ("eval/accuracy_std", False),
    ("spent/bytes", False),
    ("privacy/epsilon", False),
    ("eval/perplexity", False),
    ("eval/glossary", True),
  ],
)
def test_names_tell_which_way_is_better(metric, higher):
  assert summary.is_higher_better(metric) == higher


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: summary.curve(RUN, "eval/acuracy", "round"),
      "did you mean 'eval/accuracy'",
    ),
    (
      lambda: summary.curve(RUN[::-1], "eval/accuracy", "round"),
      "'round' must be a running total, got 3.0 after more",
    ),
    (lambda: summary.final_quality([], "loss"), "got 0 without it"),
    (
      lambda: summary.mean_quality(RUN, "eval/accuracy", "round", until=1.0),
      "until must be beyond the first record's 'round', 1.0",
    ),
    (lambda: summary.pareto_front([1.0]), r"finite numbers \[P, K\]"),
    (lambda: summary.pareto_front([[math.nan]]), "finite numbers"),
    (lambda: summary.pareto_front([[1.0, 2.0]], [True]), "each of 2 columns"),
    (lambda: summary.jain([]), "one or more numbers"),
    (lambda: summary.jain([-1.0]), "one or more numbers of at least 0"),
  ],
)
def test_what_cannot_be_summed_up_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
