"""Draws: the right distributions, and a function of their names alone."""

import zlib

import numpy as np
import pytest
import scipy.stats

from fedjax_peft.data import hashing
from fedjax_peft.network import draw

IDS = np.arange(50_000)
KINDS = [
  (draw.uniform, scipy.stats.uniform()),
  (draw.normal, scipy.stats.norm()),
  (draw.exponential, scipy.stats.expon()),
]
P = 1e-4  # of each test, were its seed not fixed


def test_words_are_mixed_as_in_splitmix64():
  # The first outputs of Java's SplittableRandom(0), and of Vigna's
  # splitmix64.c with the state 0.
  golden = 0x9E3779B97F4A7C15
  states = np.array([0, golden - 2**64], np.int64)
  wanted = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
  np.testing.assert_array_equal(hashing.mix(states), np.array(wanted, "u8"))


@pytest.mark.parametrize(("fun", "wanted"), KINDS)
def test_draws_have_their_distribution_and_no_other_scale(fun, wanted):
  for x in (fun(3, "a", 5, IDS), fun(3, "a", IDS, 5)):
    assert x.dtype == np.float64
    assert scipy.stats.kstest(x, wanted.cdf).pvalue > P
    for wrong in (1.05, 1 / 1.05):
      assert scipy.stats.kstest(x * wrong, wanted.cdf).pvalue < P


def unmixed(state, bits):
  """The word that turns a state into the given bits: SplitMix64 backwards."""
  ring = 2**64

  def unshift(x, shift):
    y = x
    for _ in range(64 // shift + 1):
      y = x ^ (y >> shift)
    return y

  x = unshift(bits, 31)
  x = unshift(x * pow(0x94D049BB133111EB, -1, ring) % ring, 27)
  x = unshift(x * pow(0xBF58476D1CE4E5B9, -1, ring) % ring, 30)
  return np.uint64((x - 0x9E3779B97F4A7C15 - state) % ring).astype(np.int64)


def test_draws_of_the_lowest_and_the_highest_bits_are_inside_the_interval():
  state = hashing.mix(0, zlib.crc32(b"a"), 0)
  for bits, side in ((0, -1), (2**64 - 1, 1)):
    client = unmixed(int(state), bits)
    assert hashing.mix(0, zlib.crc32(b"a"), 0, client) == bits
    assert 0 < draw.uniform(0, "a", 0, client) < 1
    assert 8 < side * draw.normal(0, "a", 0, client) < 9
    assert 0 < draw.exponential(0, "a", 0, client) < 37


@pytest.mark.parametrize("fun", [fun for fun, _ in KINDS])
def test_a_clients_draw_does_not_depend_on_the_others(fun):
  order = np.random.default_rng(0).permutation(IDS.size)[:500]
  every = fun(1, "a", 7, IDS)
  np.testing.assert_array_equal(fun(1, "a", 7, IDS[order]), every[order])
  assert fun(1, "a", 7, int(order[0])) == every[order[0]]
  assert fun(1, "a", 7, IDS.astype(np.int32)).tolist() == every.tolist()


def test_rounds_and_clients_broadcast():
  rounds = np.arange(3)[:, None]
  both = draw.uniform(1, "a", rounds, IDS[:5])
  assert both.shape == (3, 5)
  np.testing.assert_array_equal(both[2], draw.uniform(1, "a", 2, IDS[:5]))


def test_seeds_purposes_rounds_and_clients_are_independent():
  x = draw.uniform(1, "a", 7, IDS)
  others = (
    draw.uniform(2, "a", 7, IDS),
    draw.uniform(1, "b", 7, IDS),
    draw.uniform(1, "a", 8, IDS),
    draw.uniform(1, "a", 7, IDS + 1),
    draw.uniform(1, "a", IDS, 7),
  )
  for y in others:
    assert scipy.stats.pearsonr(x, y).pvalue > P
    assert scipy.stats.spearmanr(np.abs(x - 0.5), y).pvalue > P
  assert scipy.stats.pearsonr(x, x + others[0] * 20).pvalue < P
