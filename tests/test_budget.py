"""A run stops when something has run out, and says what."""

import hypothesis
import pytest
from hypothesis import strategies as st

from fedjax_peft import budget

AMOUNT = st.floats(1e-3, 1e12)
LIMITS = st.dictionaries(st.sampled_from(sorted(budget.KEYS)), AMOUNT)
SPENT = st.fixed_dictionaries(dict.fromkeys(budget.KEYS, AMOUNT))


@hypothesis.settings(deadline=None, max_examples=100, derandomize=True)
@hypothesis.given(LIMITS, SPENT)
def test_exactly_what_has_run_out_is_named(limits, spent):
  record = {budget.KEYS[k]: v for k, v in spent.items()}
  found = budget.exceeded(budget.Budget(**limits), record) or ""
  for name in budget.KEYS:
    gone = name in limits and spent[name] >= limits[name]
    assert (f"budget of {name} has run out" in found) == gone


def test_a_limit_that_is_met_has_run_out():
  limit = budget.Budget(seconds=10.0)
  assert budget.exceeded(limit, {"spent/seconds": 9.999}) is None
  assert budget.exceeded(limit, {"spent/seconds": 10.0}) == (
    "the budget of seconds has run out: 10 spent of 10"
  )


def test_without_limits_nothing_is_asked_for():
  assert budget.exceeded(budget.Budget(), {}) is None


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_record_that_does_not_count_is_refused(value):
  record = {"spent/joules": value, "spent/bytes": 3}
  assert budget.exceeded(budget.Budget(bytes=4), record) is None
  with pytest.raises(ValueError, match="needs the record's 'spent/joules'"):
    budget.exceeded(budget.Budget(joules=1.0), record)


@pytest.mark.parametrize("limit", [0, -1.0, float("inf"), float("nan")])
def test_limits_are_positive_numbers(limit):
  with pytest.raises(ValueError, match="dollars must be a positive number"):
    budget.Budget(dollars=limit)
