"""Problems of allocation to test with: random, and of two kinds of models."""

import dataclasses
import itertools

import numpy as np

from fedjax_peft.network import channel
from fedjax_peft.split import outcome
from fedjax_peft.split import problem as problem_lib

BITS = np.array([32, 8, 4, 2, 16, 1])


def links(rng, clients, channels=None):
  """Gains in a cell of 500 m, with shadowing and Rayleigh fading."""
  metres = 500 * np.sqrt(rng.uniform(size=clients))
  loss = channel.path_loss_db(np.maximum(metres, 10))
  mean = channel.gain(loss + 8 * rng.normal(size=clients))
  if channels is None:
    return mean * rng.exponential(size=clients)
  return mean[:, None] * rng.exponential(size=(clients, channels))


def drawn(
  seed,
  clients=3,
  cuts=3,
  bits=3,
  *,
  weight=None,
  channels=None,
  server_each=False,
  in_turn=False,
):
  """A random problem; orders of magnitude vary, so that anything may bind."""
  rng = np.random.default_rng(seed)

  def anywhere(low, high):
    return np.exp(rng.uniform(np.log(low), np.log(high)))

  gains = links(rng, clients, channels)
  flops = np.cumsum(rng.lognormal(size=cuts))
  flops *= anywhere(1e10, 1e13) / flops[-1]
  values = np.sort(rng.lognormal(sigma=2, size=cuts))[::-1]
  values = values * anywhere(1e5, 1e8)
  q = BITS[:bits]
  up = values[:, None] * q + 1e-5 * flops[:, None]
  error = 4.0**-q * values[:, None] / values.mean()
  each = np.ones((clients, 1))
  problem = problem_lib.Problem(
    device_seconds=flops / (3e10 * rng.lognormal(size=(clients, 1))),
    compute_joules=flops
    * anywhere(1e-12, 1e-10)
    * rng.lognormal(size=each.shape),
    up_bits=np.broadcast_to(up, (clients, cuts, bits)),
    down_seconds=up / 100e6 * rng.uniform(),
    server_flops=1.3 * flops[-1] - flops,
    gains=gains,
    power_max=0.2,
    bandwidth=anywhere(1e5, 1e8),
    server_speed=1e11 * clients * anywhere(0.3, 10),
    error=error,
    server_each=server_each,
    in_turn=in_turn,
    weight=rng.uniform(0.02, 1) if weight is None else weight,
    cuts=range(1, cuts + 1),
    bits=q,
  )
  scale = outcome.equal(dataclasses.replace(problem, weight=0.5))
  return dataclasses.replace(
    problem,
    seconds_scale=float(scale.finish),
    joules_scale=float(scale.joules.sum()),
    error_weight=anywhere(0.01, 1) / error.mean() / clients,
  )


def wide(seed, weight):
  """A problem without a choice, whose clients differ by many decades."""
  rng = np.random.default_rng(seed)
  clients = int(rng.choice([1, 2, 5, 50]))

  def decades(low, high, *shape):
    return 10 ** rng.uniform(low, high, shape)

  works = rng.uniform(size=(clients, 1)) < 0.8
  return problem_lib.Problem(
    device_seconds=decades(-3, 3, clients, 1),
    compute_joules=decades(-3, 3, clients, 1),
    up_bits=decades(2, 10, clients, 1, 1),
    down_seconds=decades(-3, 2, clients, 1, 1),
    server_flops=decades(8, 15, clients, 1) * works,
    gains=decades(-15, -6, clients),
    power_max=decades(-2, 1, clients),
    bandwidth=float(decades(3, 9)),
    server_speed=float(decades(9, 16)),
    weight=weight,
    seconds_scale=float(decades(-3, 3)),
    joules_scale=float(decades(-3, 3)),
  )


def choices(problem):
  """All choices of all clients together: (cut, bits), int [(L Q)^C, C]."""
  clients, cuts, bits = problem.up_bits.shape
  each = itertools.product(range(cuts * bits), repeat=clients)
  return np.divmod(np.array(list(each)), bits)


def exhaustive(problem, channel=None):
  """The least objective of all choices."""
  return outcome.settle(problem, *choices(problem), channel).objective.min()


def model(rate_scale, values, *, clients=4, seed=0, **options):
  """A model of equal stages that hands on so many values after each."""
  rng = np.random.default_rng(seed)
  values = np.asarray(values, float)
  done = np.arange(1, values.size + 1) / values.size
  return problem_lib.Problem(
    device_seconds=10 * done * np.ones((clients, 1)),
    compute_joules=20 * done,
    up_bits=np.broadcast_to(8 * values[:, None], (clients, values.size, 1)),
    down_seconds=0.0,
    server_flops=1e12 * (1 - done),
    gains=rate_scale * links(rng, clients),
    power_max=0.2,
    bandwidth=1e6 * clients,
    server_speed=1e13,
    seconds_scale=10.0,
    joules_scale=20.0 * clients,
    **{"weight": 0.9, **options},
  )
