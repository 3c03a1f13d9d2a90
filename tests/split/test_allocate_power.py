"""Equal finish and powers: closed forms against SciPy and other divisions."""

import math

import hypothesis
import numpy as np
import pytest
import scipy.optimize
from hypothesis import strategies as st

import allocation_world as world
from fedjax_peft.network import channel
from fedjax_peft.split import finish, power
from tolerance import tol

NEAR = tol("float64", 256)


def drawn(seed, clients):
  rng = np.random.default_rng(seed)
  seconds = rng.lognormal(size=clients)
  bits = 1e7 * rng.lognormal(size=clients)
  watts = 0.1 * rng.lognormal(size=clients)
  return seconds, bits, watts, world.links(rng, clients)


def done(share, seconds, bits, watts, gains):
  return seconds + bits / channel.rate(share, watts, gains)


def test_the_least_width_carries_the_message_exactly_or_none_would():
  rng = np.random.default_rng(0)
  seconds, bits = np.exp(rng.uniform(-9, 9, (2, 1000)))
  watts = np.exp(rng.uniform(-3, 3, 1000))
  # Energy over what is needed at least: from too little to plenty.
  surplus = np.exp(rng.uniform(-1, 5, 1000))
  gains = surplus * channel.energy_limit(bits / 8, 1.0) / (watts * seconds)
  width = finish.least_width(seconds, bits, watts, gains)
  able = np.isfinite(width)
  np.testing.assert_array_equal(able, surplus > 1)
  sent = seconds[able] * channel.rate(width[able], watts[able], gains[able])
  np.testing.assert_allclose(sent, bits[able], rtol=NEAR)
  assert finish.least_width(1.0, 0.0, 0.1, 1e-9) == 0
  assert finish.least_width(0.0, 1.0, 0.1, 1e-9) == np.inf


@pytest.mark.parametrize("clients", [1, 2, 10, 1000])
def test_all_finish_together_and_the_band_is_used_up(clients):
  terms = drawn(clients, clients)
  found = finish.band(*terms, 1e7)
  np.testing.assert_allclose(found.share.sum(), 1e7, rtol=NEAR)
  np.testing.assert_allclose(done(found.share, *terms), found.finish, rtol=1e-9)
  even = done(1e7 / clients, *terms).max()
  assert found.finish <= even * (1 + NEAR)
  if clients > 1:
    assert found.finish < 0.97 * even


@hypothesis.given(st.integers(0, 10**6), st.integers(2, 6))
@hypothesis.settings(deadline=None, max_examples=50)
def test_no_other_division_of_the_band_is_faster(seed, clients):
  terms = drawn(seed, clients)
  found = finish.band(*terms, 1e6)
  rng = np.random.default_rng(seed)
  # Others: anywhere, and close to the one that is found.
  near = found.share * np.exp(1e-3 * rng.normal(size=(20, clients)))
  other = np.concatenate([rng.dirichlet(np.ones(clients), 20), near])
  other *= 1e6 / other.sum(-1, keepdims=True)
  times = done(np.maximum(other, 1e-9), *terms).max(-1)
  assert np.all(times >= found.finish * (1 - 1e-9))


@pytest.mark.parametrize("seed", range(3))
def test_two_and_three_clients_finish_as_the_optimizer_says(seed):
  terms = drawn(seed, 2)
  found = finish.band(*terms, 1e6)
  best = scipy.optimize.minimize_scalar(
    lambda w: done(np.array([w, 1e6 - w]), *terms).max(),
    bounds=(1.0, 1e6 - 1),
    method="bounded",
    options={"xatol": 1e-4},
  )
  np.testing.assert_allclose(found.finish, best.fun, rtol=1e-6)
  terms = drawn(seed, 3)
  found = finish.band(*terms, 1e6)
  slack = {
    "type": "ineq",
    "fun": lambda x: x[3] - done(1e6 * x[:3], *terms) / found.finish,
  }
  whole = {"type": "eq", "fun": lambda x: x[:3].sum() - 1}
  best = scipy.optimize.minimize(
    lambda x: x[3],
    [0.33, 0.33, 0.34, 5.0],
    bounds=[(1e-4, 1)] * 3 + [(0, 100)],
    constraints=[slack, whole],
    method="SLSQP",
    options={"maxiter": 500, "ftol": 1e-12},
  )
  assert best.success
  np.testing.assert_allclose(best.fun, 1, rtol=1e-6)


def test_who_sends_nothing_takes_nothing_and_order_is_no_matter():
  seconds, bits, watts, gains = drawn(1, 6)
  bits[2] = 0
  found = finish.band(seconds, bits, watts, gains, 1e6)
  assert found.share[2] == 0
  order = np.array([3, 1, 5, 0, 2, 4])
  again = finish.band(
    seconds[order], bits[order], watts[order], gains[order], 1e6
  )
  np.testing.assert_allclose(again.share, found.share[order], rtol=1e-9)
  with pytest.raises(ValueError, match="client 1 has bits to send but no"):
    finish.band(seconds, bits, np.where(bits == bits[1], 0, watts), gains, 1e6)


def test_twice_of_everything_takes_as_long():
  seconds, bits, watts, gains = drawn(2, 7)
  once = finish.band(seconds, bits, watts, gains, 1e6)
  twice = finish.band(seconds, 2 * bits, 2 * watts, gains, 2e6)
  np.testing.assert_allclose(twice.share, 2 * once.share, rtol=1e-9)
  np.testing.assert_allclose(twice.finish, once.finish, rtol=1e-9)
  more = finish.band(seconds, 2 * bits, watts, gains, 2e6)
  assert more.finish > once.finish  # the power is spread over twice the band


@pytest.mark.parametrize("clients", [1, 2, 9])
def test_a_server_is_divided_so_that_all_finish_together(clients):
  rng = np.random.default_rng(clients)
  seconds = rng.lognormal(size=clients)
  flops = 1e12 * rng.lognormal(size=clients)
  found = finish.server(seconds, flops, 3e12)
  np.testing.assert_allclose(found.share.sum(), 3e12, rtol=NEAR)
  np.testing.assert_allclose(
    seconds + flops / found.share, found.finish, rtol=1e-9
  )
  other = 3e12 * rng.dirichlet(np.ones(clients), 100)
  times = (seconds + flops / other).max(-1)
  assert np.all(times >= found.finish * (1 - 1e-9))


def test_a_deadline_is_met_exactly_within_the_limit_or_reported():
  rng = np.random.default_rng(0)
  _, bits, _, gains = drawn(0, 1000)
  seconds = rng.lognormal(size=1000)
  found = power.for_deadline(seconds, bits, 1e6, gains, 0.2)
  assert found.watts.max() <= 0.2
  assert 0.05 < found.feasible.mean() < 0.95
  sent = seconds * channel.rate(1e6, found.watts, gains)
  np.testing.assert_allclose(
    sent[found.feasible], bits[found.feasible], rtol=1e-8
  )
  late = ~found.feasible
  assert np.all(found.watts[late] == 0.2)
  assert np.all(sent[late] < bits[late])
  first = int(np.flatnonzero(late)[0])
  assert found.why_not.startswith(f"client {first} and {late.sum() - 1} more ")
  assert power.for_deadline(9.0, 1e6, 1e6, 1e-9, 0.2).why_not == ""
  # Twice of the power would be needed: a limit of half of that is not enough.
  need = power.for_deadline(seconds, bits, 1e6, gains, np.inf).watts
  assert not power.for_deadline(
    seconds, bits, 1e6, gains, need / 2
  ).feasible.any()
  assert power.for_deadline(seconds, bits, 1e6, gains, need).feasible.all()


def test_energy_falls_with_time_to_its_limit():
  seconds, gain = np.geomspace(0.5, 1e6, 100), 1e-12
  found = power.for_deadline(seconds, 1e7, 1e6, gain, np.inf)
  joules = found.watts * seconds
  limit = channel.energy_limit(1e7 / 8, gain)
  assert np.all(np.diff(joules) < 0)
  assert np.all(joules > limit)
  # The next term of the series: x / 2, x = D ln 2 / (w t).
  x = 1e7 * math.log(2) / (1e6 * seconds[-1])
  np.testing.assert_allclose(joules[-1] / limit - 1, x / 2, rtol=1e-4)


@pytest.mark.parametrize("seconds_weight", [1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_the_power_of_a_trade_is_that_of_the_optimizer(seconds_weight):
  gains = world.links(np.random.default_rng(3), 40)
  width = np.geomspace(1e4, 1e7, 40)
  free = power.trade(
    width, gains, np.inf, seconds_weight=seconds_weight, joules_weight=1.0
  )
  for w, g, p in zip(width, gains, free, strict=True):

    def cost(log, w=w, g=g):
      watts = math.exp(log)
      return (seconds_weight + watts) / channel.rate(w, watts, g)

    best = scipy.optimize.minimize_scalar(
      cost, bounds=(math.log(p) - 3, math.log(p) + 3), method="bounded"
    )
    # At a minimum the square root of the precision is left of the place.
    np.testing.assert_allclose(math.log(p), best.x, atol=1e-4)
    assert cost(math.log(p)) <= best.fun * (1 + NEAR)
  held = power.trade(
    width, gains, 0.2, seconds_weight=seconds_weight, joules_weight=1.0
  )
  np.testing.assert_array_equal(held, np.minimum(free, 0.2))


def test_the_power_of_a_trade_has_no_slope_even_where_digits_are_lost():
  # (a + b p) / ln(1 + c p) has no slope where b x ln x = (a + b p) c, and
  # x = 1 + c p.
  ratio = np.geomspace(1e-14, 1e12, 200)
  p = power.trade(
    1.0, ratio * channel.NOISE, np.inf, seconds_weight=1.0, joules_weight=1.0
  )
  x = p * ratio
  left = (1 + x) * np.log1p(x) - x
  # The difference of two numbers near x is some x^2 / 2.
  assert np.all(np.abs(left - ratio) <= NEAR * ratio + tol("float64") * x)
  assert np.all(np.diff(x) > 0)


def test_without_a_price_of_energy_the_limit_is_best():
  found = power.trade(
    1e6, np.array([1e-12, 1e-9]), 0.2, seconds_weight=1.0, joules_weight=0.0
  )
  np.testing.assert_array_equal(found, 0.2)
