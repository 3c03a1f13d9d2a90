"""Spells are a two-state Markov chain that has no memory to carry."""

import hypothesis
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

from fedjax_peft.network import spell

CLIENTS = np.arange(4000)


def rare(found, share):
  """The p-value of a count of so many among independent clients."""
  return scipy.stats.binomtest(
    int(found.sum()), found.size, float(share)
  ).pvalue


def at(number, ids=CLIENTS, seed=0, share=0.3, stay=0.8):
  return spell.inside(seed, "test", number, ids, share=share, stay=stay)


@pytest.mark.parametrize("number", [0, 1, 7, 100])
def test_the_share_inside_is_the_same_at_every_step(number):
  assert rare(at(number), 0.3) > 1e-3
  assert rare(at(number), 0.34) < 1e-3


@pytest.mark.parametrize("lag", [1, 2, 5])
def test_transitions_are_those_of_the_chain(lag):
  # The oracle is the power of the matrix; p = 1e-3.
  leave, enter = 0.2 * 0.7, 0.2 * 0.3
  chain = np.array([[1 - enter, enter], [leave, 1 - leave]])
  power = np.linalg.matrix_power(chain, lag)
  before, after = at(9), at(9 + lag)
  assert rare(after[~before], power[0, 1]) > 1e-3
  assert rare(after[before], power[1, 1]) > 1e-3
  other = np.linalg.matrix_power(chain, lag + 2)
  assert rare(after[before], other[1, 1]) < 1e-3  # a wrong lag fails


def test_without_staying_steps_are_independent():
  before, after = at(3, stay=0.0), at(4, stay=0.0)
  assert rare(after[before], 0.3) > 1e-3
  assert rare(after[~before], 0.3) > 1e-3


def test_many_questions_at_once_are_as_many_alone():
  numbers = np.arange(12)[:, None]
  grid = at(numbers, CLIENTS[None, :20])
  for t in range(12):
    np.testing.assert_array_equal(grid[t], at(t, CLIENTS[:20]))
    np.testing.assert_array_equal(grid[t, ::-1], at(t, CLIENTS[:20][::-1]))


def test_seeds_and_purposes_are_apart():
  one, other = at(5), at(5, seed=1)
  assert rare(one & other, 0.09) > 1e-3
  third = spell.inside(0, "other", 5, CLIENTS, share=0.3, stay=0.8)
  assert rare(one & third, 0.09) > 1e-3


@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
@hypothesis.given(st.floats(0, 0.95), st.floats(1.0, 100.0))
def test_staying_gives_spells_of_the_mean_length(share, longer):
  mean = longer / (1 - share)
  stay = spell.staying(share, mean)
  assert 0 <= stay < 1
  # 1e-6, since 1 - stay cancels where spells are long.
  np.testing.assert_allclose(1 / ((1 - stay) * (1 - share)), mean, rtol=1e-6)


def test_spells_shorter_than_independent_draws_are_refused():
  with pytest.raises(ValueError, match="last at least 2 steps on average"):
    spell.staying(0.5, 1.5)
