"""A crowd: messages with hostile ones among them, and a federation of such."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_peft as fp
import toy

SPLIT = 4  # columns that are the leaf `a`; `b` has the rest


@functools.cache
def _program(reduce):
  """Compiles a reduction of two leaves; once for each shape."""

  def message(x):
    return {"a": x[..., :SPLIT], "b": x[..., SPLIT:, None]}

  @jax.jit
  def run(x, present):
    spec = jax.eval_shape(message, x[0])
    acc = reduce.init(spec, x.shape[0])
    found = reduce.finalize(reduce.update(acc, message(x), present))
    return jnp.concatenate([found["a"], found["b"][:, 0]])

  return run


def combine(reduce, x, present=None) -> np.ndarray:
  """Reduces messages float32 [C, D], held in two leaves; returns [D]."""
  x = np.asarray(x, np.float32)
  here = np.ones(len(x), bool) if present is None else np.array(present)
  return np.asarray(_program(reduce)(x, here))


def programs(reduce) -> int:
  """How many programs `combine` has compiled for a reduction."""
  return _program(reduce)._cache_size()


def padded(x, places, seed=0):
  """Rows scattered over more places, the others absent and full of nan."""
  rng = np.random.default_rng(seed)
  where = rng.permutation(places)[: len(x)]
  rows = np.full((places, x.shape[1]), np.nan, np.float32)
  present = np.zeros(places, bool)
  rows[where], present[where] = x, True
  return rows, present


@functools.cache
def people(clients=15, rows=8, seed=0) -> fp.data.Population:
  """Clients of equal size whose labels can be learned from their features."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(clients * rows, 5)).astype(np.float32)
  label = x[:, :3].argmax(1).astype(np.int32)
  owner = np.repeat(np.arange(clients), rows)
  return fp.data.population({"x": x, "label": label}, owner, heldout=0.0)


class Player(toy.Player):
  """Rounds of clients with traits."""

  def seat(self, ids, seed=0, round=0):
    cohort = super().seat(ids, seed, round)
    seats = np.maximum(cohort.clients, 0)
    traits = {k: v[seats] for k, v in self.data.traits.items()}
    return cohort._replace(traits=traits)


def loss(params, data) -> float:
  """Mean loss of the toy net over all examples of all clients."""
  model = toy.net()
  rows = dict(data.examples)
  each, _, _ = model.loss(params, model.base, rows, jax.random.key(0))
  return float(jnp.mean(each))
