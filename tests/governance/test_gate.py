"""A gate: worse and infinite models are rejected, others are not."""

import math

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import fedjax_peft as fp
import toy
from fedjax_peft import plan
from fedjax_peft.governance import gate

STATE = fp.federated(toy.voices(), [fp.tier("cloud")]).init(clients=3, cohort=2)
NOBODY = np.zeros(0, np.int32)


def judged(values, metric="accuracy", state=STATE, **options):
  """Verdicts on a state whose metric takes these values, the first at start."""
  said = iter(values)
  how = gate.gate(lambda _: {metric: next(said)}, metric=metric, **options)
  verdict = how.start(state, how.init())
  found = []
  for _ in values[1:]:
    verdict = how.judge(state, verdict.memory, NOBODY)
    found.append(verdict)
  return found


numbers = st.floats(0, 1) | st.sampled_from([math.nan, math.inf, -math.inf])


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
  first=st.floats(0, 1),
  rest=st.lists(numbers, max_size=12),
  tolerance=st.floats(0, 0.5),
  window=st.integers(1, 4),
  sign=st.sampled_from([1, -1]),
)
def test_a_round_is_good_if_it_is_near_the_best_of_the_last_good_ones(
  first, rest, tolerance, window, sign
):
  metric = "accuracy" if sign == 1 else "held_loss"
  found = judged([first, *rest], metric, tolerance=tolerance, window=window)
  good = [sign * first]
  for value, verdict in zip(rest, found, strict=True):
    best = max(good[-window:])
    wanted = math.isfinite(value) and best - sign * value <= tolerance
    assert verdict.good == wanted
    assert verdict.record["gate/rejected"] == (not wanted)
    assert verdict.record["gate/best"] == sign * best
    assert all(
      math.isfinite(v) for v in verdict.record.values() if type(v) is float
    )
    if wanted:
      good.append(sign * value)
    assert verdict.record["gate/version"] == len(good) - 1


def test_good_rounds_may_creep_down_no_faster_than_the_window_forgets():
  falls = [1.0, 0.96, 0.92, 0.88]
  assert [v.good for v in judged(falls, window=1)] == [True] * 3
  assert [v.good for v in judged(falls, window=3)] == [True, False, False]


def test_rejections_in_a_row_end_the_run_and_others_do_not():
  found = judged([1.0, 0.1, 0.1, 1.0, 0.1, 0.1, 0.1], limit=3)
  assert [v.stop is not None for v in found] == [*[False] * 5, True]
  assert (
    "3 rounds in a row were rejected, the last since accuracy is 0.1, "
    in (found[-1].stop)
  )
  assert "the model is that of version 1" in found[-1].stop


def test_a_leaf_that_is_not_finite_is_rejected_though_the_metric_is_good():
  node = STATE.nodes[0]
  bad = node.params | {"sum": node.params["sum"].at[0, 0].set(jnp.nan)}
  state = STATE._replace(nodes=(node._replace(params=bad),))
  (verdict,) = judged([1.0, 1.0], state=state)
  assert not verdict.good
  assert verdict.record["gate/why"].startswith("a leaf of the model")


def test_the_cohort_is_told_whatever_its_order():
  how = gate.keep_all()
  memory = how.start(STATE, how.init()).memory
  said = [
    how.judge(STATE, memory, np.array(ids, dtype)).record["gate/cohort"]
    for ids, dtype in (
      ([3, 1, 300], np.int32),
      ([300, 3, 1], np.int64),
      ([3, 1], np.int32),
    )
  ]
  assert said[0] == said[1]
  assert said[0] != said[2]


@pytest.mark.parametrize(
  ("values", "options", "words"),
  [
    ([math.nan], {}, "'accuracy' must be a finite number: got"),
    ([1.0], {"tolerance": -0.1}, "tolerance must be a number of at least 0"),
    ([1.0], {"tolerance": math.nan}, "tolerance must be a number"),
    ([1.0], {"window": 0}, "window must be an integer of at least 1"),
    ([1.0], {"limit": 0}, "limit must be an integer of at least 1"),
  ],
)
def test_what_a_gate_cannot_do_is_refused(values, options, words):
  with pytest.raises(ValueError, match=words):
    judged(values, **options)


def test_a_metric_that_is_not_measured_names_the_near_one():
  how = gate.gate(lambda _: {"accuracy": 1.0}, metric="acuracy")
  with pytest.raises(ValueError, match="did you mean 'accuracy'"):
    how.start(STATE, how.init())


def test_a_state_of_a_run_without_the_gate_is_refused():
  how = gate.gate(lambda _: {"accuracy": 1.0}, window=3)
  memory = {"spent": np.zeros(2)} | how.init()
  rest, own = gate.taken(how, memory)
  assert (set(rest), set(own)) == ({"spent"}, set(how.init()))
  for wrong in ({}, gate.init(4)):
    with pytest.raises(ValueError, match="goes on from a state of such a run"):
      gate.taken(how, wrong)
  assert gate.taken(None, memory) == (memory, {})


def test_what_cannot_be_taken_back_is_refused():
  made = plan.sampled(fp.sample.uniform(2), toy.people(), 0)
  gate.refuse(made, None)
  with pytest.raises(ValueError, match="at work on models of earlier rounds"):
    gate.refuse(made._replace(pool=2), None)
  moving = plan.Grouping(
    "ifca", np.zeros(10, np.int32), join=lambda state, ids: ids
  )
  with pytest.raises(ValueError, match="not the clusters that 'ifca' finds"):
    gate.refuse(plan.grouped(made, moving), moving)
  fixed = moving._replace(join=None)
  gate.refuse(plan.grouped(made, fixed), fixed)
