"""Channel: how many bits a second a radio link carries, and how surely.

Path loss, shadowing and fading make a gain; gain, power and bandwidth make a
rate (Shannon). Closed forms stand beside what is drawn: outage, mean rate,
the least power that meets a deadline.

Powers are watts, gains are linear (received power over sent power), rates are
bits per second.

3GPP TR 36.814, 2010 (path loss); Chen et al., A Joint Learning and
Communications Framework for Federated Learning over Wireless Networks, 2021,
https://arxiv.org/abs/1909.07972 (lost packets)
"""

import math

import numpy as np
import numpy.typing as npt
import scipy.special

from fedjax_peft.network import draw

Numbers = float | np.ndarray

NOISE = 10 ** (-174 / 10) / 1000  # W/Hz, thermal noise at 290 K
_FAR = 600.0  # of 1 / SNR: from here on a series is exact to rounding


def watts(dbm: npt.ArrayLike) -> np.ndarray:
  """Power in watts of a level in dBm; 30 dBm is one watt."""
  return 10 ** (np.asarray(dbm, np.float64) / 10 - 3)


def path_loss_db(
  metres: npt.ArrayLike, *, at_km: float = 128.1, decade: float = 37.6
) -> np.ndarray:
  """Loss of power with distance, in dB.

  Args:
    metres: distance; nearer than one metre counts as one.
    at_km: loss at one kilometre; the default is a cell's at 2 GHz.
    decade: dB lost with every factor of ten.
  """
  km = np.maximum(np.asarray(metres, np.float64), 1.0) / 1000
  return at_km + decade * np.log10(km)


def gain(loss_db: npt.ArrayLike) -> np.ndarray:
  """Linear gain of a loss in dB."""
  return np.exp(np.asarray(loss_db, np.float64) * (-math.log(10) / 10))


def shadowing_db(seed: int, ids: npt.ArrayLike, deviation: float) -> np.ndarray:
  """Draws what buildings add to a client's loss, in dB; it does not change."""
  return deviation * draw.normal(seed, "shadowing", 0, ids)


def rayleigh(
  seed: int, number: npt.ArrayLike, ids: npt.ArrayLike
) -> np.ndarray:
  """Draws fading gains |h|^2 of mean 1 without a line of sight: Exp(1)."""
  return draw.exponential(seed, "fading", number, ids)


def rician(
  seed: int, number: npt.ArrayLike, ids: npt.ArrayLike, k_factor: float
) -> np.ndarray:
  """Draws fading gains |h|^2 of mean 1 with a line of sight.

  Args:
    seed: of the run.
    number: the round.
    ids: integers, clients.
    k_factor: power of the line of sight over that of all other paths, linear;
      0 is Rayleigh fading.
  """
  real = draw.normal(seed, "fading", number, ids) + math.sqrt(2 * k_factor)
  imaginary = draw.normal(seed, "fading/imaginary", number, ids)
  return (real * real + imaginary * imaginary) / (2 * (k_factor + 1))


def rate(
  bandwidth: Numbers,
  power: Numbers,
  gain: Numbers,
  *,
  noise: float = NOISE,
) -> np.ndarray:
  """Shannon's rate b log2(1 + p g / (N0 b)).

  Args:
    bandwidth: Hz, > 0.
    power: watts sent.
    gain: linear.
    noise: W/Hz, interference included.

  Returns:
    float64 bits per second, shaped like the broadcast arguments.

  Example:
    >>> loss = path_loss_db([100, 200, 300, 500])
    >>> np.round(rate(1e6, watts(23), 10 ** (-loss / 10)) / 1e6, 1)
    array([15.4, 11.7,  9.5,  6.7])
  """
  snr = power * gain / (noise * bandwidth)
  return bandwidth * (np.log1p(snr) * (1 / math.log(2)))


def broadcast_rate(
  bandwidth: float,
  power: float,
  gains: np.ndarray,
  *,
  noise: float = NOISE,
) -> np.ndarray:
  """The rate at which all of the receivers [C] can follow: the weakest's."""
  return rate(bandwidth, power, np.min(gains), noise=noise)


def outage(
  wanted: Numbers,
  bandwidth: Numbers,
  power: Numbers,
  gain: Numbers,
  *,
  noise: float = NOISE,
) -> np.ndarray:
  """Probability that a link with Rayleigh fading is slower than wanted.

  1 - exp(-(2^(R / b) - 1) N0 b / (p g)), where g is the mean gain.

  Args:
    wanted: R, bits per second.
    bandwidth: Hz.
    power: watts.
    gain: mean over the fading, linear.
    noise: W/Hz.
  """
  with np.errstate(over="ignore"):
    least = np.expm1(np.log(2.0) * (wanted / bandwidth))
  snr = power * gain / (noise * bandwidth)
  return -np.expm1(-least / snr)


def ergodic_rate(
  bandwidth: Numbers,
  power: Numbers,
  gain: Numbers,
  *,
  noise: float = NOISE,
) -> np.ndarray:
  """Mean rate over Rayleigh fading: b e^(1/s) E1(1/s) / ln 2, s = mean SNR.

  Alouini and Goldsmith, 1999, https://doi.org/10.1109/25.775366
  """
  x = noise * bandwidth / (power * gain)
  near = np.minimum(x, _FAR)
  far = np.maximum(x, _FAR)  # e^x overflows, and E1 vanishes
  series = sum((-1) ** k * math.factorial(k) / far**k for k in range(9)) / far
  mean = np.where(x < _FAR, np.exp(near) * scipy.special.exp1(near), series)
  return bandwidth * mean / math.log(2)


def packet_error(
  bandwidth: Numbers,
  power: Numbers,
  gain: Numbers,
  *,
  m: float = 0.023,
  noise: float = NOISE,
) -> np.ndarray:
  """Probability that a packet is lost: 1 - exp(-m (I + B N0) / (p g)).

  Args:
    bandwidth: Hz.
    power: watts.
    gain: mean over the fading, linear.
    m: waterfall threshold, an SNR below which the code fails.
    noise: W/Hz, interference included: N0 + I / B.
  """
  snr = power * gain / (noise * bandwidth)
  return -np.expm1(-m / snr)


def power_for(
  seconds: Numbers,
  bytes: Numbers,
  bandwidth: Numbers,
  gain: Numbers,
  *,
  noise: float = NOISE,
) -> np.ndarray:
  """The least power that sends a message in time.

  (N0 b / g) (2^(D / (b t)) - 1) for D bits; the energy, power times seconds,
  falls with the time that is left, towards `energy_limit`.

  Args:
    seconds: until the deadline; inf where 0 or less are left.
    bytes: of the message, > 0.
    bandwidth: Hz.
    gain: linear.
    noise: W/Hz.

  Returns:
    float64 watts; inf if it cannot be done.
  """
  left = np.asarray(seconds, np.float64)
  with np.errstate(over="ignore", divide="ignore"):
    exponent = 8.0 * bytes / (bandwidth * np.maximum(left, 0)) * math.log(2)
    return noise * bandwidth / gain * np.expm1(exponent)


def energy_limit(
  bytes: Numbers, gain: Numbers, *, noise: float = NOISE
) -> np.ndarray:
  """Joules that sending D bits takes, however slowly: D N0 ln 2 / g."""
  return np.asarray(8.0 * bytes * (noise * math.log(2)) / gain)
