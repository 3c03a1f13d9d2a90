"""Stacked adapters, and the algorithms that place them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_peft as fp
import toy
from fedjax_peft import algorithms

DATA = toy.people((2, 3, 4, 4))
COHORT = (0, 1, 2, 3)
HOW = fp.local(optax.sgd(0.25), batch=4, epochs=2)
NAMES = ("shared", "cluster", "personal")


@functools.cache
def model(*names):
  ranks = {name: 1 + i for i, name in enumerate(names)}
  module = algorithms.stack(toy.Net(nnx.Rngs(0)), ranks, where="up")
  return fp.model(module, fp.losses.classification, precision="float32")


@functools.cache
def drawn(*names):
  """The model's leaves with a B that is not zero."""
  rng = np.random.default_rng(0)
  return {
    k: jnp.asarray(v if "lora_a" in k else rng.normal(size=v.shape), v.dtype)
    for k, v in model(*names).params.items()
  }


def near(found, wanted, eps):
  assert found.keys() == wanted.keys()
  for k, x in wanted.items():
    np.testing.assert_allclose(found[k], x, rtol=eps, atol=eps)


def test_a_layer_adds_all_its_adapters_up(tol):
  params, module = drawn(*NAMES), model(*NAMES)
  x = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
  up = module.origin.up
  wanted = x @ np.asarray(up.lora_base.kernel[...])
  for name in NAMES:
    a, b = (params[f"up/{name}/lora_{k}"] for k in "ab")
    wanted = wanted + 2.0 * np.asarray(x @ a @ b)
  found = module.module(params, module.base).up(jnp.asarray(x))
  np.testing.assert_allclose(found, wanted, atol=8 * tol(jnp.float32, 5))


def test_merged_is_the_same_function(tol):
  module = algorithms.stack(
    toy.Net(nnx.Rngs(0)), {"shared": 2, "personal": 1}, where=".*"
  )
  rng = np.random.default_rng(2)
  for layer in (module.up, module.head):
    for one in (layer.shared, layer.personal):
      one.lora_b[...] = jnp.asarray(
        rng.normal(size=one.lora_b.shape), jnp.float32
      )
  x = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
  plain = fp.peft.merged(module)
  assert type(plain.up) is nnx.Linear
  np.testing.assert_allclose(
    plain(x), module(x), rtol=0, atol=64 * tol(jnp.float32, 7)
  )


@pytest.mark.parametrize("ranks", [{}, {"lora_base": 2}, {"a/b": 2}])
def test_names_that_cannot_be_are_refused(ranks):
  with pytest.raises(ValueError, match="adapters need names"):
    algorithms.stack(toy.Net(nnx.Rngs(0)), ranks, where="up")


def test_a_model_without_the_adapters_is_refused_with_what_to_write():
  with pytest.raises(ValueError, match=r"'personal'\]: got \[\].*stack\("):
    algorithms.feddpa(toy.net(), HOW)


# FedDPA.


def slope(weights, names):
  """Gradient by the leaves of some adapters, others as they are.

  weights: {adapter: its weight}.
  """
  module = model("shared", "personal")

  def mean_loss(some, rest, rows):
    params = algorithms.mix(rest | some, weights)
    each, _, _ = module.loss(params, module.base, rows, jax.random.key(0))
    return jnp.mean(each)

  def run(params, rows):
    some = {k: v for k, v in params.items() if k.split("/")[1] in names}
    return jax.jit(jax.grad(mean_loss))(some, params, rows)

  return run


def loop(rounds, weight, active):
  """FedDPA by hand; active: (round) -> names of adapters that train."""
  alone = slope({"personal": 0.0}, ("shared",))
  mixed = slope({"personal": weight, "shared": 1 - weight}, ("personal",))
  start = {
    k: np.asarray(v) for k, v in model("shared", "personal").params.items()
  }
  shared = {k: v for k, v in start.items() if "shared" in k}
  own = [{k: v for k, v in start.items() if "personal" in k} for _ in COHORT]
  for number in range(rounds):
    new = {}
    for c in COHORT:  # every client's examples fit one batch
      rows = {k: v[DATA.train[c]] for k, v in DATA.examples.items()}
      params = shared | own[c]
      for _ in range(2):
        grads = alone(params, rows) | mixed(params, rows)
        params = {
          k: v - 0.25 * grads[k] if k.split("/")[1] in active(number) else v
          for k, v in params.items()
        }
      new[c] = {k: np.asarray(params[k]) for k in shared}
      own[c] = {k: np.asarray(params[k]) for k in own[c]}
    shared = {k: v.astype(np.float32) for k, v in toy.mean(new, DATA).items()}
  return shared, own


@pytest.mark.slow
@pytest.mark.parametrize("after", [None, 2])
def test_feddpa_is_its_paper_in_a_plain_loop(after, tol):
  module = model("shared", "personal")
  algorithm = algorithms.feddpa(module, HOW, weight=0.75, after=after)
  player = toy.Player(algorithm, DATA, module.base)
  state = player.play(*[COHORT] * 3)[0]

  def active(number):
    if after is None:
      return ("shared", "personal")
    return ("shared",) if number < after else ("personal",)

  shared, own = loop(3, 0.75, active)
  eps = 4 * tol(jnp.float32, 7 * 6)
  near(state.params, shared, eps)
  for c in COHORT:
    near({k: v[c] for k, v in state.clients.local.items()}, own[c], eps)
  moved = state.clients.local["up/personal/lora_b"]
  assert np.abs(moved).max() > 1e-3
  size = sum(v.nbytes for v in shared.values())
  assert algorithm.bytes(4) == {
    "cloud/up_bytes": size + 4,
    "cloud/down_bytes": size,
  }


def test_a_client_uses_the_mixture():
  algorithm = algorithms.feddpa(model("shared", "personal"), HOW, weight=0.75)
  params = drawn("shared", "personal")
  seen = algorithm.work.view(params)
  for name, share in (("shared", 0.25), ("personal", 0.75)):
    wanted = params[f"up/{name}/lora_b"] * share
    assert toy.same_bits(seen[f"up/{name}/lora_b"], wanted)
    assert toy.same_bits(seen[f"up/{name}/lora_a"], params[f"up/{name}/lora_a"])


# HiLoRA.


@functools.cache
def hilora(stages=None):
  algorithm = algorithms.hilora(model(*NAMES), HOW, edges=2, stages=stages)
  player = toy.Player(algorithm, DATA, model(*NAMES).base)
  return algorithm, player.play(*[COHORT] * 3)[0]


def test_every_adapter_lives_where_it_is_placed():
  algorithm, state = hilora()
  edge, cloud = state.nodes
  assert {k.split("/")[1] for k in cloud.params} == {"shared"}
  assert {k.split("/")[1] for k in edge.params} == {"shared", "cluster"}
  assert {k.split("/")[1] for k in state.clients.local} == {"personal"}
  same = edge.params["up/shared/lora_b"]
  assert toy.same_bits(same[0], same[1])
  apart = edge.params["up/cluster/lora_b"]
  assert np.abs(apart[0] - apart[1]).max() > 1e-3
  own = state.clients.local["up/personal/lora_b"]
  assert len({row.tobytes() for row in own}) == 4
  nbytes = {
    n: sum(v.nbytes for k, v in model(*NAMES).params.items() if f"/{n}/" in k)
    for n in NAMES
  }
  sizes = algorithm.bytes(4)
  assert sizes["edge/down_bytes"] == nbytes["shared"] + nbytes["cluster"]
  assert sizes["cloud/down_bytes"] == nbytes["shared"]


def test_adapters_are_trained_one_stage_after_another():
  start = model(*NAMES).params["up/shared/lora_b"]
  _, state = hilora(stages=(0, 1))
  edge, _ = state.nodes
  assert toy.same_bits(edge.params["up/shared/lora_b"][0], start)
  assert np.abs(edge.params["up/cluster/lora_b"]).max() > 1e-3
  assert np.abs(state.clients.local["up/personal/lora_b"]).max() > 1e-3
