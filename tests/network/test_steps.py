"""How often clients and server synchronize."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from fedjax_peft.network import steps

CHECK = hypothesis.settings(deadline=None, max_examples=100, derandomize=True)


@CHECK
@hypothesis.given(
  st.integers(1, 100), st.floats(1e-3, 1e3), st.floats(0, 1), st.floats(0, 1)
)
def test_steps_fall_with_the_loss_as_its_root(first, start, a, b):
  low, high = sorted((a, b))
  few, many = (steps.adaptive(first, start, x * start) for x in (low, high))
  assert 1 <= few <= many <= first
  # A ceiling: the least whole number that is not below the root.
  root = np.sqrt(high) * first
  assert max(root, 1) * (1 - 1e-12) <= many < max(root, 1) * (1 + 1e-12) + 1
  assert steps.adaptive(first, start, start) == first


def test_steps_are_whole_where_the_root_is():
  # F_t / F_0 = 1, 1/4, 1/16, 1/64: H halves.
  found = [steps.adaptive(16, 4.0, 4.0 / 4**i) for i in range(6)]
  assert found == [16, 8, 4, 2, 1, 1]


@CHECK
@hypothesis.given(
  st.lists(
    st.tuples(st.floats(0.01, 100), st.floats(0, 20)), min_size=1, max_size=8
  ),
  st.floats(0.1, 50),
  st.integers(0, 3),
  st.integers(3, 40),
)
def test_as_many_steps_as_fit_and_one_more_would_not(
  clients, deadline, least, most
):
  seconds, overhead = np.array(clients).T
  found = steps.within(
    deadline, seconds, overhead=overhead, least=least, most=most
  )
  assert found.dtype == np.int64
  assert ((found >= least) & (found <= most)).all()
  room = (deadline - overhead) / seconds
  assert (found[found > least] <= room[found > least]).all()
  assert (found[found < most] + 1 > room[found < most]).all()


def test_clients_without_a_link_do_the_least():
  found = steps.within(9.0, [1.0, 1.0], overhead=[np.inf, 0.0], most=5)
  np.testing.assert_array_equal(found, [1, 5])


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: steps.adaptive(0, 1.0, 1.0), "first must be an integer"),
    (lambda: steps.adaptive(1, 0.0, 1.0), "start must be a positive number"),
    (lambda: steps.adaptive(1, 1.0, np.nan), "now must be a loss of at least"),
    (lambda: steps.within(0.0, [1.0], most=2), "deadline must be a positive"),
    (lambda: steps.within(1.0, [0.0], most=2), "must be above 0, got 0.0"),
    (lambda: steps.within(1.0, 1.0, least=3, most=2), "at least 3, got most=2"),
    (
      lambda: steps.within(1.0, 1.0, overhead=-1.0, most=2),
      "overhead must be at least 0",
    ),
  ],
)
def test_options_that_make_no_sense_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
