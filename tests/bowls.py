"""Bowls: clients with quadratic losses, of which every round is known.

Client i has the loss 1/2 sum a_i (p - b_i)^2, and as many copies of it as it
has examples. The joint optimum is sum(n a b) / sum(n a).
"""

import functools

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import fedjax_peft as fp
import toy

SIZES = (1, 2, 4, 5)
EVERYONE = (0, 1, 2, 3)
RATE, STEPS = 0.125, 5


class Point(nnx.Module):
  """A point: three coordinates in the body, two in the head."""

  def __init__(self):
    self.body = nnx.Param(jnp.array([1.0, -1.0, 0.5]))
    self.head = nnx.Param(jnp.array([0.25, -0.5]))


def loss(module, examples, key):
  """1/2 sum a (p - b)^2."""
  del key
  p = jnp.concatenate([module.body[...], module.head[...]])
  each = 0.5 * jnp.sum(examples["a"] * (p[None] - examples["b"]) ** 2, axis=1)
  return each, {}


@functools.cache
def model() -> fp.Model:
  return fp.model(Point(), loss, precision="float32")


@functools.cache
def curves():
  """(a, b), float32 [4, 5]; a in [1/2, 2]."""
  rng = np.random.default_rng(0)
  a = 2 ** rng.uniform(-1, 1, (len(SIZES), 5))
  return a.astype(np.float32), rng.normal(size=a.shape).astype(np.float32)


@functools.cache
def people(sizes=SIZES, which=None):
  """Clients of given sizes; `which` says which bowl each has."""
  which = range(len(sizes)) if which is None else which
  rows = np.repeat(np.array(which), sizes)
  a, b = curves()
  owner = np.repeat(np.arange(len(sizes)), sizes)
  return fp.data.population({"a": a[rows], "b": b[rows]}, owner, heldout=0.0)


def how(rate=RATE, steps=STEPS, optimizer=None) -> fp.Local:
  """Full-batch steps, whoever trains."""
  optimizer = optax.sgd(rate) if optimizer is None else optimizer
  return fp.local(optimizer, batch=8, steps=steps)


def start() -> np.ndarray:
  """Where everyone begins, float64 [5]."""
  return flat(model().params)


def flat(params, prefix="") -> np.ndarray:
  """Body and head as one vector [..., 5], in float64."""
  parts = [np.asarray(params[prefix + k], np.float64) for k in ("body", "head")]
  return np.concatenate(parts, axis=-1)


def slopes(x) -> np.ndarray:
  """Gradients [4, 5] of the clients' losses at x [5] or [4, 5]."""
  a, b = (v.astype(np.float64) for v in curves())
  return a * (x - b)


def losses(x) -> np.ndarray:
  """The clients' losses [4] at x [5] or [4, 5]."""
  a, b = (v.astype(np.float64) for v in curves())
  return 0.5 * np.sum(a * (x - b) ** 2, axis=1)


def weights(cohort=EVERYONE) -> np.ndarray:
  """Share of each client in a cohort's mean, [4], zero where absent."""
  n = np.where(np.isin(np.arange(len(SIZES)), list(cohort)), SIZES, 0)
  return n / n.sum()


def optimum() -> np.ndarray:
  """Where the weighted mean of all losses is least."""
  a, b = (v.astype(np.float64) for v in curves())
  w = weights()[:, None]
  return (w * a * b).sum(0) / (w * a).sum(0)


def alone(x, steps=STEPS, rate=RATE) -> np.ndarray:
  """Where plain SGD takes every client [4, 5] from x [5] or [4, 5]."""
  y = np.broadcast_to(x, (len(SIZES), 5))
  for _ in range(steps):
    y = y - rate * slopes(y)
  return y


def fedavg(rounds) -> np.ndarray:
  """Where federated averaging is after some rounds of everyone, [5]."""
  x = start()
  for _ in range(rounds):
    x = weights() @ alone(x)
  return x


def player(algorithm, data=None, **options) -> toy.Player:
  data = people() if data is None else data
  return toy.Player(algorithm, data, model().base, **options)


def play(algorithm, *cohorts, data=None, **options):
  """The state after a round for each cohort."""
  return player(algorithm, data, **options).play(*cohorts)[0]
