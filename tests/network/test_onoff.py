"""On and off: one chain, looked up, stepped and jumped."""

import numpy as np
import pytest
import scipy.stats

from fedjax_peft.network import draw, onoff

IDS = np.arange(20_000)
# Slow, fast, alternating, and without memory.
CHAINS = [(0.05, 0.2), (0.6, 0.7), (1.0, 1.0), (0.3, 0.7), (0.2, 0.0)]
P = 1e-4


def histories(p_gb, p_bg, rounds, ids=IDS, seed=0):
  return [onoff.is_bad(seed, t, ids, p_gb, p_bg) for t in range(rounds)]


@pytest.mark.parametrize("chain", CHAINS)
def test_stepping_gives_what_looking_back_gives(chain):
  every = histories(*chain, 12, IDS[:500])
  state = every[0]
  for t in range(1, 12):
    state = onoff.step(state, 0, t, IDS[:500], *chain)
    np.testing.assert_array_equal(state, every[t])


@pytest.mark.parametrize("chain", CHAINS)
def test_the_fraction_of_bad_rounds_is_stationary(chain):
  p = onoff.stationary(*chain)
  assert p == chain[0] / sum(chain)
  for t in (0, 1, 30):
    bad = int(np.sum(onoff.is_bad(1, t, IDS, *chain)))
    assert scipy.stats.binomtest(bad, IDS.size, p).pvalue > P
    if p < 0.98:
      wrong = scipy.stats.binomtest(bad, IDS.size, p + 0.02)
      assert wrong.pvalue < P


@pytest.mark.parametrize("chain", CHAINS[:4])
def test_links_change_with_the_probabilities_of_the_chain(chain):
  every = histories(*chain, 6)
  for k in (1, 3):
    wanted = np.linalg.matrix_power(onoff.transition(*chain), k)
    np.testing.assert_allclose(
      onoff.transition(*chain, k), wanted, atol=1e-15, rtol=1e-14
    )
    before, after = every[1], every[1 + k]
    for state in (0, 1):
      count = int(np.sum(after[before == state]))
      total = int(np.sum(before == state))
      test = scipy.stats.binomtest(count, total, min(wanted[state, 1], 1.0))
      assert test.pvalue > P
    # The chain with both probabilities 0.02 off would be told apart.
    other = onoff.transition(*(abs(p - 0.05) for p in chain))[0, 1]
    good = every[1] == 0
    count = int(np.sum(every[2][good]))
    assert scipy.stats.binomtest(count, int(good.sum()), other).pvalue < P


def test_a_jump_over_rounds_has_the_same_distribution_as_steps():
  chain, k = (0.05, 0.2), 4
  start = onoff.is_bad(0, 0, IDS, *chain)
  jumped = onoff.advance(start, draw.uniform(5, "jump", 0, IDS), *chain, k)
  stepped = onoff.is_bad(0, k, IDS, *chain)
  for state in (False, True):
    rows = [
      [int(x[start == state].sum()), int((~x[start == state]).sum())]
      for x in (jumped, stepped)
    ]
    assert scipy.stats.chi2_contingency(rows).pvalue > P
  once = onoff.advance(start, draw.uniform(5, "jump", 0, IDS), *chain, 1)
  rows = [
    [int(x[start].sum()), int((~x[start]).sum())] for x in (once, stepped)
  ]
  assert scipy.stats.chi2_contingency(rows).pvalue < P


def test_a_link_that_never_turns_bad_is_good():
  assert not onoff.is_bad(0, 9, IDS, 0.0, 1.0).any()
  assert not onoff.is_bad(0, 9, IDS, 0.0, 0.0).any()
  assert onoff.stationary(0.0, 0.0) == 0


def test_a_clients_link_does_not_depend_on_who_else_is_asked_for():
  order = np.random.default_rng(0).permutation(IDS.size)[:300]
  every = onoff.is_bad(3, 20, IDS, 0.05, 0.2)
  np.testing.assert_array_equal(
    onoff.is_bad(3, 20, IDS[order], 0.05, 0.2), every[order]
  )
