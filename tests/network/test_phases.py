"""How long a round takes, and where it ends."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from fedjax_peft.network import phases

SECONDS = st.floats(0, 1e6)
CHECK = hypothesis.settings(deadline=None, max_examples=100, derandomize=True)


@CHECK
@hypothesis.given(
  st.lists(st.tuples(SECONDS, SECONDS, SECONDS, SECONDS), min_size=1)
)
def test_what_arrives_takes_the_sum_of_its_phases(rows):
  times = np.array(rows).T
  round = phases.timed(*times[:3], delay=times[3])
  assert round.arrived.all()
  np.testing.assert_allclose(round.seconds, times.sum(0), rtol=1e-15)
  np.testing.assert_array_equal(round.copies, 1)


@CHECK
@hypothesis.given(
  st.tuples(SECONDS, SECONDS, SECONDS, SECONDS),
  st.sampled_from(sorted(phases.PHASES.values())),
  st.floats(0, 1),
)
def test_what_is_lost_takes_the_time_until_then(times, where, moment):
  *parts, delay = times
  round = phases.lose(phases.timed(*parts, delay=delay), where, moment)
  assert not round.arrived.any()
  wanted = sum(parts[: where - 1]) + moment * parts[where - 1]
  np.testing.assert_allclose(round.seconds, [wanted], rtol=1e-15)
  spent = [float(x[0]) for x in round.spent]
  assert spent[where:] == [0.0] * (3 - where)  # later phases do not happen
  reached = [bool(round.reaches(p)[0]) for p in range(1, 4)]
  assert reached == [p <= where for p in range(1, 4)]


@CHECK
@hypothesis.given(
  st.integers(0, 3), st.integers(0, 3), st.floats(0, 1), st.floats(0, 1)
)
def test_a_message_is_lost_where_it_is_first(a, b, when, then):
  whole = phases.timed(2.0, 3.0, 5.0, delay=7.0)
  both = phases.lose(phases.lose(whole, a, when), b, then)
  first = min((p for p in (a, b) if p), default=0)
  moment = when if first == a else then
  wanted = phases.lose(whole, first, moment)
  assert both.lost == wanted.lost
  np.testing.assert_array_equal(both.seconds, wanted.seconds)


def test_a_phase_without_end_does_not_arrive_but_can_be_lost_before():
  round = phases.timed(1.0, 2.0, [np.inf, np.inf, 3.0])
  np.testing.assert_array_equal(round.arrived, [False, False, True])
  cut = phases.lose(round, [phases.UP, phases.COMPUTE, 0], 0.0)
  np.testing.assert_array_equal(cut.seconds, [3.0, 1.0, 6.0])


def test_rows_are_picked_by_place_and_by_mask():
  round = phases.timed([1.0, 2.0, 3.0], 4.0, 5.0)
  np.testing.assert_array_equal(round.rows([2, 0]).down, [3, 1])
  np.testing.assert_array_equal(round.rows(round.down > 1).seconds, [11, 12])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (([-1.0], 0.0, 0.0), "down must be seconds of at least 0, got down=-1.0"),
    ((0.0, np.nan, 0.0), "compute must be seconds of at least 0"),
    (([1.0, 2.0], [1.0, 2.0, 3.0], 0.0), "arrays of one length"),
    (([[1.0]], 0.0, 0.0), "arrays of one length"),
  ],
)
def test_times_that_are_none_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    phases.timed(*arguments)
