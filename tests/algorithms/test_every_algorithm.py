"""Laws of all algorithms: what runs anywhere, what is sent, who counts."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bowls
import fedjax_peft as fp
import toy
from fedjax_peft import algorithms, compose, placement
from fedjax_peft.network import topology

DATA = toy.people((2, 3, 4))
HOW = fp.local(optax.sgd(0.1), batch=4, epochs=2)


def features(module, examples):
  return jax.nn.relu(module.up(examples["x"]))


@functools.cache
def stacked():
  ranks = {"shared": 2, "cluster": 1, "personal": 1}
  module = algorithms.stack(toy.Net(nnx.Rngs(0)), ranks, where="up")
  return fp.model(module, fp.losses.classification, precision="float32")


ON_NETS = {
  "afl": functools.partial(algorithms.afl, clients=3, rate=0.1),
  "apfl": functools.partial(algorithms.apfl, adaptive=True),
  "centralized": functools.partial(algorithms.centralized, data=DATA, cohort=2),
  "clustered": functools.partial(algorithms.clustered, clusters=2),
  "ditto": functools.partial(algorithms.ditto, strength=0.1),
  "fedasync": algorithms.fedasync,
  "fedbuff": algorithms.fedbuff,
  "feddyn": functools.partial(algorithms.feddyn, alpha=0.1, clients=3),
  "fednova": algorithms.fednova,
  "fedper": functools.partial(algorithms.fedper, lowrank=False),
  "fedrep": functools.partial(algorithms.fedrep, head_steps=1),
  "gossip": functools.partial(
    algorithms.gossip, mixing=topology.metropolis(topology.ring(3))
  ),
  "hierarchical": functools.partial(algorithms.hierarchical, edges=2, period=2),
  "ifca": functools.partial(algorithms.ifca, clusters=2, spread=0.01),
  "local_only": algorithms.local_only,
  "mime_lite": algorithms.mime_lite,
  "moon": functools.partial(algorithms.moon, features=features),
  "per_fedavg": functools.partial(algorithms.per_fedavg, rate=0.1),
  "pfedme": functools.partial(
    algorithms.pfedme, strength=2.0, inner=optax.sgd(0.1), steps=2
  ),
  "qffl": functools.partial(algorithms.qffl, q=1.0, rate=0.1),
  "reptile": functools.partial(algorithms.reptile, rate=0.5, lowrank=False),
  "scaffold": functools.partial(algorithms.scaffold, clients=3),
}
ON_ADAPTERS = {
  "feddpa": algorithms.feddpa,
  "hilora": functools.partial(algorithms.hilora, edges=2),
}
EVERY = sorted({**ON_NETS, **ON_ADAPTERS})


def made(name):
  """(algorithm, model, data)."""
  data = algorithms.pooled(DATA) if name == "centralized" else DATA
  if name in ON_ADAPTERS:
    return ON_ADAPTERS[name](stacked(), HOW), stacked(), data
  return ON_NETS[name](toy.net(), HOW), toy.net(), data


def test_the_table_has_every_algorithm():
  assert set(EVERY) | set(compose.TOOLS) == set(algorithms.__all__)


def held(state):
  """All leaves, wherever they live."""
  return jax.device_get([*(n.params for n in state.nodes), state.clients.local])


@functools.cache
def two_rounds(name, executor="shard_map"):
  """(leaves, record) after two rounds."""
  algorithm, model, data = made(name)
  cohort = fp.sample.uniform(min(2, len(data)))
  settings = toy.lanes(executor, width=2, segment=2)
  rounds = fp.run(
    algorithm, model, data, cohort=cohort, rounds=2, settings=settings
  )
  *_, (state, record) = rounds
  return held(state), record


@pytest.mark.parametrize("name", EVERY)
def test_two_rounds_run_and_are_counted(name):
  algorithm, _, data = made(name)
  after, record = two_rounds(name)
  before = held(algorithm.init(clients=len(data), cohort=2))
  assert not toy.same_bits(before, after)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
  assert record["train/nonfinite"] == 0
  low = algorithm.tiers[0].name
  sent = algorithm.bytes(2)[f"{low}/up_bytes"]
  assert record["up_bytes_client"] == sent


@pytest.mark.parametrize("name", EVERY)
def test_no_leaf_that_lives_on_a_device_is_in_a_message(name):
  algorithm, model, _ = made(name)
  job = algorithm.work
  labels = job.placement
  owned = {k for k, v in labels.items() if v == placement.DEVICE}
  params = {k: jnp.asarray(v) for k, v in job.params.items()}
  sent = {k: v for k, v in params.items() if k not in owned}
  own = {k: v for k, v in params.items() if k in owned}
  examples = {k: jnp.asarray(v[:4]) for k, v in DATA.examples.items()}
  batch = fp.Batch(examples, jnp.ones(4), jax.random.key(0))

  def whole(sent, own):
    sent = fp.Sent(sent, {"round": jnp.int32(0)})
    carry = job.init(sent, model.base, own, toy.client(1, 4))
    carry, _ = job.step(carry, sent, model.base, batch)
    return job.finish(carry, sent)

  message, rows = jax.eval_shape(whole, sent, own)
  assert set(message) == set(labels) - owned
  assert set(rows) == owned
  shapes = {k: (v.shape, v.dtype) for k, v in {**message, **rows}.items()}
  assert shapes == {k: (v.shape, v.dtype) for k, v in params.items()}
  assert all(re.fullmatch(r"[\w/]+", k) for k in labels)


QUICK = ("ditto", "scaffold")


@pytest.mark.parametrize(
  "name",
  [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in EVERY
  ],
)
def test_one_client_after_another_is_the_same(name, tol):
  leaves, record = two_rounds(name)
  others, other = two_rounds(name, "debug")
  eps = 16 * tol(jnp.float32, 7 * 4)  # ratios of small losses, cosines
  for x, y in zip(
    jax.tree.leaves(leaves), jax.tree.leaves(others), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=eps, atol=eps)
  assert record["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)


# A client of 4 examples, or two clients with half of it each.
WHOLE, HALVES = bowls.people((2, 4), (0, 1)), bowls.people((2, 2, 2), (0, 1, 1))
WEIGHTED = {
  "ditto": lambda m, h, n: algorithms.ditto(m, h, strength=0.5),
  "feddyn": lambda m, h, n: algorithms.feddyn(m, h, alpha=0.5, clients=n),
  "fednova": lambda m, h, n: algorithms.fednova(m, h),
  "mime_lite": lambda m, h, n: algorithms.mime_lite(m, h),
  "qffl": lambda m, h, n: algorithms.qffl(m, h, q=2.0, rate=bowls.RATE),
  "scaffold": lambda m, h, n: algorithms.scaffold(m, h, clients=n),
}


@pytest.mark.parametrize("name", sorted(WEIGHTED))
def test_a_client_counts_as_much_as_two_of_half_its_weight(name, tol):
  def run(data):
    algorithm = WEIGHTED[name](bowls.model(), bowls.how(), len(data))
    everyone = tuple(range(len(data)))
    return bowls.play(algorithm, everyone, everyone, data=data).params

  whole, halves = run(WHOLE), run(HALVES)
  assert whole.keys() == halves.keys()
  for k, x in whole.items():
    eps = 4 * tol(jnp.float32, bowls.STEPS * 2)
    np.testing.assert_allclose(halves[k], x, rtol=eps, atol=eps)
