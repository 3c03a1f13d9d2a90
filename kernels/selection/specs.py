"""Shapes of messages that are thinned out, and of what receivers add up."""

import numpy as np

from fedjax_peft.kernels.specs import Spec


def _message(width, ties=False):
  """One message: normal, or of few values so that most of them tie."""

  def draw(rng):
    x = rng.standard_normal(width).astype(np.float32)
    return (np.round(x) if ties else x,)

  return draw


def _hard(rng):
  """Zeros of both signs, subnormals, infinities and nans of both signs."""
  odd = np.array([0, -0.0, 1e-45, -3e-45, np.inf, -np.inf, np.nan, -np.nan, 1])
  return (rng.choice(odd, 700).astype(np.float32),)


def _kept(clients, width, k):
  """What clients kept: indices ascend and differ; every third is absent."""

  def draw(rng):
    acc = rng.standard_normal(width).astype(np.float32)
    values = rng.standard_normal((clients, k)).astype(np.float32)
    indices = np.zeros((clients, k), np.int32)
    for row in indices:
      row[:] = np.sort(rng.choice(width, k, replace=False))
    weight = rng.integers(1, 99, clients).astype(np.float32)
    weight[2::3] = 0
    return acc, values, indices, weight

  return draw


def _outside(rng):
  """Indices in no order, some of them negative or too large."""
  acc, values, _, weight = _kept(4, 50, 30)(rng)
  return acc, values, rng.integers(-60, 110, (4, 30), np.int32), weight


SPECS: tuple[Spec, ...] = (
  Spec("LoRA leaf of rank 8 of MiniLM", _message(18432), {"k": 184}, True),
  Spec("message of 76,038 values", _message(76038), {"k": 760}, True),
  Spec("the same, a tenth kept", _message(76038), {"k": 7603}, True),
  Spec("one matrix of rank 8", _message(768 * 8), {"k": 61}, True),
  Spec("head of six classes", _message(6 * 384), {"k": 23}),
  Spec("odd tail", _message(1001), {"k": 37}),
  Spec("mostly ties", _message(3000, ties=True), {"k": 900}),
  Spec("hard values", _hard, {"k": 300}),
  Spec("fewer numbers than k", _hard, {"k": 600}),
  Spec("all entries", _message(129), {"k": 129}),
  Spec("one entry", _message(1), {"k": 1}),
)

SCATTER_ADD_SPECS: tuple[Spec, ...] = (
  Spec("32 clients, 76,038 values", _kept(32, 76038, 760), {}, True),
  Spec("1024 clients, LoRA leaf", _kept(1024, 18432, 184), {}, True),
  Spec("odd tail", _kept(5, 1001, 37)),
  Spec("indices outside", _outside),
  Spec("one client", _kept(1, 129, 7)),
  Spec("no client", _kept(0, 129, 7)),
  Spec("nothing kept", _kept(3, 129, 0)),
)
