"""Rules on stacked adapters: every name of a layer is an adapter of its own."""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_peft as fp
import toy
from fedjax_peft import algorithms
from tolerance import tol

RANKS = {"one": 2, "two": 1}
COHORT = (0, 3, 5, 7)
HOW = fp.local(optax.sgd(0.1), batch=4)
NEAR = 50 * tol(jnp.float32, 64)  # several steps of training in between


@functools.cache
def model() -> fp.Model:
  net = algorithms.stack(toy.Net(nnx.Rngs(0)), RANKS, where="up")
  return fp.model(net, fp.losses.classification, precision="float32")


@functools.cache
def player(name, alone=False) -> toy.Player:
  """Clients under a rule; `alone` keeps the second adapter on the device."""
  algorithm = fp.fedavg(
    model(),
    HOW,
    rule=fp.rules.RULES[name](),
    placement={".*/two/lora_[ab]": "device"} if alone else None,
  )
  return toy.Player(algorithm, toy.people(), model().base)


@functools.cache
def moved(name):
  """A state whose B are not zero any more."""
  return player(name).play(COHORT)[0]


def clients(state):
  """What each client holds after its round: what it alone makes of fedit."""
  here = moved("fedit")
  node = here.nodes[0]._replace(params=state.nodes[0].params)
  here = here._replace(nodes=(node,))
  return [player("fedit").play((i,), state=here)[0].params for i in COHORT]


def added(params, name):
  a, b = (np.asarray(params[f"up/{name}/lora_{k}"], np.float64) for k in "ab")
  return 2.0 * a @ b


def share():
  sizes = np.array([toy.SIZES[i] for i in COHORT], np.float64)
  return sizes / sizes.sum()


def test_every_name_is_a_pair_with_its_own_scale():
  module = algorithms.stack(
    toy.Net(nnx.Rngs(0)), RANKS, where="up|head", alpha=4
  )
  found = {p.layer: p.scale for p in fp.rules.pairs_of(module)}
  wanted = {"one": 2.0, "two": 4.0}
  assert found == {
    f"{layer}/{name}": scale
    for layer in ("up", "head")
    for name, scale in wanted.items()
  }


def test_fedit_averages_the_factors_of_every_name():
  state = moved("fedit")
  new = player("fedit").play(COHORT, state=state)[0].params
  mine = clients(state)
  for k in new:
    wanted = sum(w * m[k] for w, m in zip(share(), mine, strict=True))
    np.testing.assert_allclose(new[k], wanted, atol=NEAR)


def test_ffa_trains_and_sends_the_right_factors_alone():
  start = player("ffa").start()
  state = player("ffa").play(COHORT, COHORT)[0]
  for name, rank in RANKS.items():
    a, b = (f"up/{name}/lora_{k}" for k in "ab")
    assert toy.same_bits(state.params[a], np.asarray(start.params[a]))
    assert state.params[b].shape == (rank, 7)
    assert np.abs(state.params[b]).max() > 1e-4
  sizes = player("ffa").algorithm.bytes(4)
  assert sizes["cloud/up_bytes"] == 4 * 7 * sum(RANKS.values()) + 4


def test_flexlora_gives_every_name_the_best_adapter_of_its_rank():
  state = moved("flexlora")
  new = player("flexlora").play(COHORT, state=state)[0].params
  mine = clients(state)
  for name, rank in RANKS.items():
    wanted = sum(w * added(m, name) for w, m in zip(share(), mine, strict=True))
    u, s, v = np.linalg.svd(wanted)
    assert s[rank] > 1e-6  # something is cut off
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    np.testing.assert_allclose(added(new, name), best, atol=NEAR)


@pytest.mark.parametrize("name", ["flexlora", "hetlora", "fedit"])
def test_an_adapter_that_stays_on_the_device_is_not_aggregated(name):
  play = player(name, alone=True)
  state, _ = play.play(COHORT, COHORT)
  assert not any("/two/" in k for k in state.params)
  rows = state.clients.local["up/two/lora_b"]
  assert len({rows[i].tobytes() for i in COHORT}) == len(COHORT)
  up = play.algorithm.bytes(4)["cloud/up_bytes"]
  assert up == 4 * RANKS["one"] * (5 + 7) + 4
  assert np.abs(state.params["up/one/lora_b"]).max() > 1e-4


def test_a_rule_that_moves_the_layer_refuses_stacked_adapters():
  with pytest.raises(ValueError, match="stacked adapters.*flexlora"):
    fp.fedavg(model(), HOW, rule=fp.rules.fedex())
