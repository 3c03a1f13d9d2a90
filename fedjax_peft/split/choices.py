"""Choices: which cut and how many bits, client by client.

Two tables of costs [C, L, Q], of which every client takes its least entry:

* `at_shares`: what a choice costs a client that keeps its shares of band and
  server, and sends with the least power that still makes the finish. The rest
  of the objective stays as it is, so the least entries are the exact optimum
  of this block.
* `at_prices`: what it costs where a client may take the shares that it likes,
  and pays for them. The least entries minimize the Lagrangian of the whole
  problem: they say what all clients would do together, if none of them moved
  the prices. That is a proposal, to be tried.

With x = D ln 2 / (w t) nats per second and hertz, psi(x) = 1 + (x - 1) e^x and
prices n of a hertz, h of a FLOP/s, a client that is not held back by its power
has psi(x) / (1 + sqrt(x S h / (n D ln 2))) = n g / (b N0 (T - c)); one that is
sends for D ln 2 N0 (e^x - 1) / (P g x) seconds over P g / (N0 (e^x - 1)) Hz.
"""

import math
from typing import NamedTuple

import numpy as np

from fedjax_peft.split import finish as finish_lib
from fedjax_peft.split import power as power_lib
from fedjax_peft.split import problem as problem_lib

_NEWTON = 4
_HALVINGS = 32  # a minimum is flat: its cost is then exact to rounding


def at_shares(
  problem: problem_lib.Problem,
  finish: float,
  width: np.ndarray,
  gains: np.ndarray,
  speed: np.ndarray,
) -> np.ndarray:
  """What every choice costs with the shares as they are.

  Args:
    problem: of C clients.
    finish: T, seconds.
    width: [C] Hz.
    gains: [C] linear, over that width.
    speed: [C] FLOP/s at the server.

  Returns:
    float64 [C, L, Q]; inf where it would be late or is not allowed.
  """
  load = problem_lib.load(problem)
  gains, width, speed, most = (
    x[:, None, None] for x in (gains, width, speed, problem.power_max)
  )
  left = finish - load.seconds - _over(load.flops, speed)
  able = (left >= -1e-9 * finish) & ((width > 0) | (load.bits == 0))
  sent = power_lib.for_deadline(
    np.where(able, left, 1.0),
    load.bits,
    np.where(width > 0, width, 1.0),
    gains,
    most,
    noise=problem.noise,
  )
  able &= sent.feasible & problem.allowed[:, :, None]
  joules = load.joules + sent.watts * np.where(able, left, 0)
  return np.where(able, problem.joules_weight * joules + load.error, np.inf)


def at_prices(
  problem: problem_lib.Problem,
  finish: float,
  gains: np.ndarray,
  hertz_price: float,
  flops_price: float,
  width: np.ndarray | None = None,
) -> np.ndarray:
  """What every choice costs where shares are paid for.

  Args:
    problem: of C clients.
    finish: T, seconds.
    gains: [C] linear.
    hertz_price: of a hertz, > 0, in units of the objective.
    flops_price: of a FLOP/s, > 0.
    width: [C] Hz where it is given; then a hertz is not paid for.

  Returns:
    float64 [C, L, Q]; inf where no share suffices or it is not allowed.
  """
  load = problem_lib.load(problem)
  left = finish - load.seconds
  nats = load.bits * math.log(2)
  snr = np.broadcast_to(
    (gains / problem.noise)[:, None, None], nats.shape
  )  # Hz, of a watt
  watts = np.broadcast_to(problem.power_max[:, None, None], nats.shape)
  allowed = np.broadcast_to(problem.allowed[:, :, None], nats.shape)
  if width is None:
    most = watts * snr  # nats per second over a band without end
  else:
    own = np.broadcast_to(width[:, None, None], nats.shape)
    most = own * np.log1p(watts * snr / own) * (1 + 1e-12)
  sends = allowed & (left > 0) & (nats > 0) & (most * left > nats)
  paid = np.full(nats.shape, np.inf)
  b, h = problem.joules_weight, flops_price
  needs = _Needs(left, nats, load.flops, snr, watts).where(sends)
  if width is None:
    paid[sends] = _priced(needs, b, hertz_price, h)
  else:
    paid[sends] = _divided(needs, own[sends], b, h)
  silent = allowed & (nats == 0) & (left >= 0)
  paid = np.where(silent, h * _over(load.flops, left), paid)
  return paid + b * load.joules + load.error


class _Needs(NamedTuple):
  """What choices need, of any shape."""

  left: np.ndarray  # T - c, seconds for sending and the server
  nats: np.ndarray  # D ln 2
  flops: np.ndarray  # S
  snr: np.ndarray  # g / N0, Hz per watt
  watts: np.ndarray  # P

  def where(self, mask: np.ndarray) -> "_Needs":
    """Some of them."""
    return _Needs(*(x[mask] for x in self))


def _priced(needs: _Needs, b: float, n: float, h: float) -> np.ndarray:
  """Least cost of energy, band and server where both shares are paid for."""
  left, nats, flops, snr, watts = needs
  cost = np.full(nats.shape, np.inf)
  held = np.ones(nats.shape, bool)
  if b > 0:
    x = _free(needs, b, n, h)
    root = np.sqrt(flops * (h / n) / nats * x)
    sending, served = left / (1 + root), left * root / (1 + root)
    width = nats / (x * sending)
    power = width / snr * np.expm1(x)
    held = power > watts
    cost = b * power * sending + n * width + h * _over(flops, served)
  cost[held] = _held(needs.where(held), b, n, h)
  return cost


def _free(needs: _Needs, b: float, n: float, h: float) -> np.ndarray:
  """Nats per second and hertz of those who have power enough."""
  left, nats, flops, snr, _ = needs
  pull = np.sqrt(flops * (h / n) / nats)
  level = n * snr / (b * left)
  x = np.log1p(np.sqrt(2 * level) + level)  # psi(x) is x^2 / 2 or x e^x
  guess = level * (1 + pull * np.sqrt(x))
  x = np.log1p(np.sqrt(2 * guess) + guess)
  for _ in range(_NEWTON):  # in logarithms, where it is nearly a line
    grown, root = np.exp(x), pull * np.sqrt(x)
    psi = _psi(x, grown)
    slope = x * x * grown / psi - 0.5 * root / (1 + root)
    step = np.log(psi / ((1 + root) * level)) / slope
    step = np.clip(step, -1.5, 1.5) / 2
    x = np.minimum(x * (1 - step) / (1 + step), 500.0)  # e^-step, nearly
  return x


def _held(needs: _Needs, b: float, n: float, h: float) -> np.ndarray:
  """Least cost of those who send at full power."""
  left, nats, flops, snr, watts = needs
  most = watts * snr  # Hz
  top = finish_lib.efficiency(most * left / nats)  # x if all time is sending
  first = nats / most  # seconds of sending over a band without end
  low, high = 1e-9 * top, top
  for _ in range(_HALVINGS):
    x = np.sqrt(low * high)
    grown = np.exp(x)
    over = grown - 1
    rest = left - first * over / x
    # Of a little more x: what time costs, against what band saves.
    hurry = h * flops + b * watts * rest * rest
    much = n * most / first * grown * (x * rest / over) ** 2
    more = (hurry * _psi(x, grown) < much) & (rest > 0)
    low, high = np.where(more, x, low), np.where(more, high, x)
  x = np.where((flops > 0) | (high < top), low, top)
  over = np.expm1(x)
  sending = first * over / x
  server = h * _over(flops, left - sending)
  return b * watts * sending + n * most / over + server


def _divided(needs: _Needs, width: np.ndarray, b: float, h: float):
  """Least cost of energy and server where the band is given."""
  left, nats, flops, snr, watts = needs
  first = nats / width
  all_time = first / left  # x if all time is sending
  low, high = all_time, np.maximum(np.log1p(watts * snr / width), all_time)
  for _ in range(_HALVINGS):
    x = (low + high) / 2
    rest = left - first / x
    more = b * width / snr * _psi(x, np.exp(x)) * rest * rest < h * flops
    low, high = np.where(more, x, low), np.where(more, high, x)
  x = np.where(flops > 0, high, all_time)
  sending = first / x
  energy = b * sending * width / snr * np.expm1(x)
  return energy + h * _over(flops, left - sending)


def _psi(x: np.ndarray, grown: np.ndarray) -> np.ndarray:
  """1 + (x - 1) e^x, given e^x."""
  return np.where(x < 1e-3, x * x * (0.5 + x / 3), 1 + (x - 1) * grown)


def _over(flops: np.ndarray, seconds: np.ndarray) -> np.ndarray:
  """FLOP/s that a server needs; inf without time, 0 where nothing is asked."""
  none = np.where(flops > 0, np.inf, 0.0)
  return np.divide(flops, seconds, out=none, where=(flops > 0) & (seconds > 0))
