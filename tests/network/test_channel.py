"""The channel: closed forms against draws, quadrature and known values."""

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from fedjax_peft.network import channel
from tolerance import tol

IDS = np.arange(200_000)
MHZ, WATTS = 1e6, channel.watts(23)
MEAN = channel.gain(channel.path_loss_db(400.0))
P = 1e-4


def near(a, b, n=64):
  np.testing.assert_allclose(a, b, rtol=tol("float64", n), atol=0)


def test_rates_without_fading_are_the_known_ones():
  # 23 dBm, 1 MHz, 128.1 + 37.6 log10(km), -174 dBm/Hz, by hand.
  gain = channel.gain(channel.path_loss_db(np.array([100, 200, 300, 500])))
  found = channel.rate(MHZ, WATTS, gain) / 1e6
  np.testing.assert_allclose(found, [15.4, 11.7, 9.5, 6.7], atol=0.05)


def test_levels_are_decibels(tol):
  near(channel.watts(np.array([0.0, 30.0, 33.0])), [1e-3, 1.0, 10**0.3])
  near(channel.gain(np.array([0.0, 10.0, 23.0])), [1.0, 0.1, 10**-2.3])
  near(channel.path_loss_db(1000.0), 128.1)
  near(channel.path_loss_db(0.0), channel.path_loss_db(1.0))


def test_the_rate_grows_with_power_gain_and_bandwidth_up_to_its_limit():
  x = np.geomspace(1e-3, 1e3, 50)
  for rates in (
    channel.rate(MHZ, WATTS * x, MEAN),
    channel.rate(MHZ, WATTS, MEAN * x),
    channel.rate(MHZ * x, WATTS, MEAN),
  ):
    assert np.all(np.diff(rates) > 0)
  # However wide the band: p g / (N0 ln 2).
  most = WATTS * MEAN / (channel.NOISE * np.log(2))
  assert np.all(channel.rate(MHZ * x, WATTS, MEAN) < most)
  near(channel.rate(1e30, WATTS, MEAN), most)


def test_all_receivers_can_follow_a_broadcast():
  gains = MEAN * channel.rayleigh(0, 0, IDS[:50])
  each = channel.rate(MHZ, WATTS, gains)
  assert channel.broadcast_rate(MHZ, WATTS, gains) == each.min()


@pytest.mark.parametrize("k", [0.0, 1.0, 10.0])
def test_fading_has_its_distribution_and_mean_one(k):
  # 2 (k + 1) |h|^2 is noncentral chi-squared: 2 degrees, noncentrality 2 k.
  x = channel.rician(0, 3, IDS, k)
  wanted = scipy.stats.ncx2(2, 2 * k) if k else scipy.stats.chi2(2)
  assert scipy.stats.kstest(2 * (k + 1) * x, wanted.cdf).pvalue > P
  assert scipy.stats.kstest(2.05 * (k + 1) * x, wanted.cdf).pvalue < P
  assert abs(x.mean() - 1) < 4 * x.std() / np.sqrt(x.size)


def test_rayleigh_fading_is_exponential_of_mean_one():
  x = channel.rayleigh(0, 3, IDS)
  assert scipy.stats.kstest(x, "expon").pvalue > P
  assert abs(x.mean() - 1) < 4 * x.std() / np.sqrt(x.size)
  assert abs(1.02 * x.mean() - 1) > 4 * x.std() / np.sqrt(x.size)


def test_shadowing_stays_with_a_client():
  x = channel.shadowing_db(0, IDS, 8.0)
  assert scipy.stats.kstest(x / 8, "norm").pvalue > P
  np.testing.assert_array_equal(channel.shadowing_db(0, IDS[5:9], 8.0), x[5:9])


@pytest.mark.parametrize("wanted", [1e6, 5e6, 8e6])
def test_outage_is_how_often_a_drawn_link_is_too_slow(wanted):
  rates = channel.rate(MHZ, WATTS, MEAN * channel.rayleigh(1, 0, IDS))
  slow = int(np.sum(rates < wanted))
  p = channel.outage(wanted, MHZ, WATTS, MEAN)
  # Exact binomial interval of 1 - 1e-4; twice the mean gain is outside.
  ci = scipy.stats.binomtest(slow, IDS.size).proportion_ci(1 - P)
  assert ci.low < p < ci.high
  wrong = channel.outage(wanted, MHZ, WATTS, 2 * MEAN)
  assert not ci.low < wrong < ci.high


def test_outage_is_certain_of_rates_that_no_channel_has():
  assert channel.outage(1e300, MHZ, WATTS, MEAN) == 1
  assert channel.outage(0.0, MHZ, WATTS, MEAN) == 0


@pytest.mark.parametrize("snr", [1e-4, 1 / 599, 1 / 601, 1e-2, 1.0, 30.0, 1e6])
def test_the_mean_rate_is_the_integral_over_the_fading(snr):
  gain = snr * channel.NOISE * MHZ / WATTS

  def integrand(u):  # x = u / (1 - u) maps (0, 1) to all gains
    x = u / (1 - u)
    return channel.rate(MHZ, WATTS, gain * x) * np.exp(-x) / (1 - u) ** 2

  wanted, error = scipy.integrate.quad(
    integrand, 0, 1, epsabs=0, epsrel=1e-10, limit=400
  )
  found = channel.ergodic_rate(MHZ, WATTS, gain)
  np.testing.assert_allclose(found, wanted, rtol=1e-9)  # the quadrature's own
  assert error < 1e-9 * wanted
  assert found < channel.rate(MHZ, WATTS, gain)  # Jensen


def test_lost_packets_are_those_whose_fading_is_below_the_threshold():
  # P(x < m / snr) for x ~ Exp(1): the waterfall.
  snr = 0.3
  gain = snr * channel.NOISE * MHZ / WATTS
  q = channel.packet_error(MHZ, WATTS, gain, m=0.1)
  near(q, scipy.stats.expon.cdf(0.1 / snr))
  weaker = channel.packet_error(MHZ, WATTS, gain * np.array([0.1, 0.5, 2.0]))
  assert np.all(np.diff(weaker) < 0)
  noisy = channel.packet_error(MHZ, WATTS, gain, m=0.1, noise=2 * channel.NOISE)
  assert noisy > q


def test_the_least_power_meets_the_deadline_exactly():
  seconds, size = np.array([0.3, 1.0, 20.0]), 500_000
  power = channel.power_for(seconds, size, MHZ, MEAN)
  near(channel.rate(MHZ, power, MEAN) * seconds, 8.0 * size)
  assert (
    channel.power_for(np.array([0.0, -1.0]), size, MHZ, MEAN).min() == np.inf
  )
  assert channel.power_for(1e-6, size, MHZ, MEAN) == np.inf


def test_energy_falls_with_the_deadline_towards_its_limit():
  seconds, size = np.geomspace(0.1, 1e5, 200), 500_000
  energy = seconds * channel.power_for(seconds, size, MHZ, MEAN)
  limit = channel.energy_limit(size, MEAN)
  assert np.all(np.diff(energy) < 0)
  assert np.all(energy > limit)
  # 2^x - 1 = x ln 2 + (x ln 2)^2 / 2 + ..., x = bits / (bandwidth seconds).
  x = 8.0 * size / (MHZ * 1e5) * np.log(2)
  np.testing.assert_allclose(energy[-1] / limit - 1, x / 2, rtol=1e-3)
