"""Over the air: the noise, and who is silent."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import fedjax_peft as fp
import laws
from fedjax_peft import link as link_lib
from fedjax_peft import tree
from fedjax_peft.links.air import Analog

P = 1e-4
VALUES = 36  # of laws.SHAPES


@functools.cache
def faded(threshold, snr_db=20.0):
  """The same link for the same options, so that it is compiled once."""
  return fp.air(snr_db, threshold=threshold)


@functools.cache
def rounds(link, count=2000, weights=laws.WEIGHTS):
  """Results of many rounds with the same messages: (result, wires, stats)."""
  sent = laws.messages()
  ids = jnp.arange(len(weights), dtype=jnp.int32)
  weight = jnp.array(weights, jnp.int32)
  mine, shared = link.init(laws.spec())

  def once(key):
    roster = fp.Roster(ids, weight, key)

    def send(message, i, w):
      own = jax.random.fold_in(key, i)
      return link.send(message, mine, shared, fp.Context(own, i, w, {}, roster))

    wires, _, stats = jax.vmap(send)(sent, ids, weight)
    total = jax.tree.map(lambda x: jnp.sum(x, 0, dtype=x.dtype), wires)
    result, _ = link.receive(total, shared, roster, key)
    return result, wires, stats

  found = jax.jit(jax.vmap(once))(jax.random.split(jax.random.key(7), count))
  return jax.tree.map(np.asarray, found)


def flat(message):
  """Float leaves side by side, [rounds, n]."""
  leaves = [x for x in jax.tree.leaves(message) if tree.is_float(x)]
  return np.concatenate([x.reshape(len(x), -1) for x in leaves], 1)


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_noise_is_normal_of_the_stated_variance(threshold):
  link = faded(threshold) if threshold else fp.air(20.0, fading="none")
  result, wires, _ = rounds(link)
  heard = wires.senders.sum(1) > 0
  total = jax.tree.map(lambda x: x.sum(1), wires.message)
  noise = (flat(result) - flat(total))[heard].astype(np.float64)
  sigma = laws.deviation(20.0, threshold or 1.0)
  assert scipy.stats.kstest((noise / sigma).ravel(), "norm").pvalue > P
  # The sum of squares is chi-squared; 2/3 and 3/2 of the variance fail.
  for factor, ok in ((1, True), (2 / 3, False), (3 / 2, False)):
    z = np.sum(noise**2) / (factor * sigma**2)
    p = scipy.stats.chi2(noise.size).cdf(z)
    assert (P / 2 < p < 1 - P / 2) == ok
  # Values, and rounds, have noise of their own.
  limit = scipy.stats.norm.isf(P / 2 / VALUES**2) / math.sqrt(len(noise))
  table = np.corrcoef(noise.T) - np.eye(VALUES)
  assert np.abs(table).max() < limit
  later = np.mean(noise[1:] * noise[:-1], 0) / sigma**2
  assert np.abs(later).max() < limit


def test_the_value_is_that_of_those_who_spoke_on_average():
  result, wires, _ = rounds(faded(0.2))
  spoke = wires.senders.astype(np.float64)  # [rounds, C]
  sent = flat(laws.messages()).astype(np.float64)
  error = flat(result) - spoke @ sent
  mean, spread = error.mean(0), error.std(0) / math.sqrt(len(error))
  # The largest of 36 means: p = 36 * 6e-5.
  assert np.abs(mean / spread).max() < 4
  silent = flat(result) - sent.sum(0)
  biased = silent.mean(0) / silent.std(0) * math.sqrt(len(error))
  assert np.abs(biased).max() > 4


@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_senders_are_silent_as_often_as_their_channel_is_weak(threshold):
  _, wires, stats = rounds(faded(threshold))
  silent = stats["air/silent"]
  np.testing.assert_array_equal(silent, 1 - wires.senders)
  p = 1 - math.exp(-threshold)
  count = int(silent.sum())
  assert scipy.stats.binomtest(count, silent.size, p).pvalue > P
  assert scipy.stats.binomtest(count, silent.size, 1.2 * p).pvalue < P


def test_of_a_silent_sender_neither_message_nor_weight_is_heard():
  link = fp.chain(fp.weigh(max_weight=8), fp.air(laws.QUIET, threshold=0.5))
  result, wires, _ = rounds(link)
  spoke = wires.senders.astype(bool)
  weights = np.minimum(laws.WEIGHTS, 8)
  np.testing.assert_array_equal(wires.message.weight, spoke * weights)
  total = (spoke * weights).sum(1)
  assert np.any(~spoke)
  sent = flat(laws.messages()).astype(np.float64)
  wanted = (spoke * weights) @ sent / np.maximum(total, 1)[:, None]
  room = 6 * laws.deviation(laws.QUIET, 0.5, 8 * laws.BOUND)
  np.testing.assert_allclose(flat(result), wanted, atol=room, rtol=0)


def test_where_nobody_speaks_the_value_is_zero():
  result, wires, _ = rounds(
    fp.air(20.0, threshold=0.8), weights=(1, 0, 0, 0, 0)
  )
  nobody = wires.senders.sum(1) == 0
  assert nobody.any()
  assert not flat(result)[nobody].any()
  assert np.all(np.any(flat(result)[~nobody] != 0, 1))


def test_the_loudest_message_is_sent_with_the_power_that_is_allowed():
  # a |m|^2 / (n g) <= P with noise N: a = bound / deviation, in units of N.
  for threshold in (0.1, 0.7):
    link = fp.air(13.0, threshold=threshold)
    _, shared = link.init(laws.spec())
    amplitude = 1 / float(shared["deviation"])
    power = (amplitude * laws.BOUND) ** 2 / VALUES / threshold
    assert power == pytest.approx(10**1.3, rel=laws.tol(jnp.float32))


def test_two_receivers_have_different_noise():
  link = fp.air(0.0, fading="none")
  _, shared = link.init(laws.spec())
  nodes = jnp.array([0, 0, 1, 1, 1], jnp.int32)
  ids, key = jnp.arange(5, dtype=jnp.int32), jax.random.key(0)
  weights = jnp.ones(5, jnp.int32)
  wire = Analog(
    jax.tree.map(lambda x: jnp.zeros(x.shape), laws.SHAPES), jnp.int32(2)
  )

  def hear(e):
    here = jnp.where(nodes == e, weights, 0)
    roster = fp.Roster(ids, here, key, nodes)
    return link.receive(wire, shared, roster, key)[0]["kernel"]

  x, y = (np.asarray(hear(e)).ravel() for e in (0, 1))
  assert scipy.stats.pearsonr(x, y).pvalue > P


def test_a_message_without_a_bound_is_refused():
  for link in (
    fp.air(20.0),
    fp.chain(fp.clip(1.0), fp.weigh(), fp.air(20.0)),
  ):
    with pytest.raises(ValueError, match=r"write clip\(\.\.\.\) first"):
      link.init(fp.Spec(laws.SHAPES, senders=5))


def test_bits_are_not_sent_on_the_air():
  link = fp.chain(fp.clip(1.0), fp.fixed_point(32), fp.air(20.0))
  with pytest.raises(ValueError, match="air sends floats"):
    link.init(laws.spec())


def test_the_sum_is_needed():
  with pytest.raises(ValueError, match="works on the sum of all wires"):
    fp.chain(fp.int8(), fp.air(20.0))
  with pytest.raises(ValueError, match="sum of many wires"):
    link_lib.broadcast(fp.air(20.0))


@pytest.mark.parametrize(
  ("build", "match"),
  [
    (lambda: fp.air(math.nan), "snr_db must be a finite"),
    (lambda: fp.air(1.0, threshold=0.0), "threshold must be a positive"),
    (lambda: fp.air(1.0, fading="raleigh"), "did you mean 'rayleigh'"),
  ],
)
def test_a_bad_option_is_refused_when_the_link_is_built(build, match):
  with pytest.raises(ValueError, match=match):
    build()
