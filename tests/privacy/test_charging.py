"""Charging: epsilon in the record of every round."""

import numpy as np
import pytest

import toy
from fedjax_peft import plan as plan_lib
from fedjax_peft import sampling
from fedjax_peft.privacy import accounting, charging, events

EVENT = events.poisson(1.1, 0.3)


def plan_of(**options):
  return charging.charged(
    plan_lib.sampled(sampling.poisson(0.3), toy.people(), 0),
    EVENT,
    1e-5,
    **options,
  )


def rounds(made, number, memory=None, first=0):
  memory = made.init() if memory is None else memory
  found = []
  for i in range(first, first + number):
    turn, memory = made.turn(memory, i, {})
    found.append(turn)
  return found, memory


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_a_record_says_the_epsilon_of_all_rounds_so_far(accountant):
  found, _ = rounds(plan_of(accountant=accountant), 3)
  for i, turn in enumerate(found):
    assert turn.record["privacy/epsilon"] == accounting.epsilon(
      EVENT, 1e-5, rounds=i + 1, accountant=accountant
    )
    assert turn.record["privacy/delta"] == 1e-5


def test_epsilon_goes_on_where_the_memory_was():
  made = plan_of()
  whole, _ = rounds(made, 6)
  first, memory = rounds(made, 2)
  rest, _ = rounds(made, 4, memory, 2)
  for a, b in zip(whole, [*first, *rest], strict=True):
    assert a.record == b.record
    np.testing.assert_array_equal(a.clients, b.clients)


def test_a_round_that_releases_nothing_costs_nothing():
  empty = {2, 3}
  count = iter(range(6))
  made = plan_of(releases=lambda turn: next(count) not in empty)
  found, _ = rounds(made, 6)
  told = [turn.record["privacy/released"] for turn in found]
  assert told == [1, 2, 2, 2, 3, 4]
  spent = [turn.record["privacy/epsilon"] for turn in found]
  assert spent[1] == spent[2] == spent[3] < spent[4]


def test_what_clients_tell_in_the_clear_is_refused():
  open_plan = plan_lib.sampled(sampling.poisson(0.3), toy.people(), 0)
  open_plan = open_plan._replace(hears=frozenset({"loss"}))
  with pytest.raises(ValueError, match="beside their noisy sum"):
    charging.charged(open_plan, EVENT, 1e-5)


def test_a_delta_that_is_no_probability_is_refused():
  made = plan_lib.sampled(sampling.poisson(0.3), toy.people(), 0)
  with pytest.raises(ValueError, match="delta_dp"):
    charging.charged(made, EVENT, 1.0)
