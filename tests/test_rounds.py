"""What a round computes: federated algorithms against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_peft as fp
import toy
from fedjax_peft import link

DATA = toy.people()
COHORT = (0, 2, 4, 7, 8)
PARAMS = {k: np.asarray(v) for k, v in toy.net().params.items()}


def play(algorithm, *cohorts, data=DATA, model=None, **options):
  model = toy.net() if model is None else model
  return toy.Player(algorithm, data, model.base, **options).play(*cohorts)


def fedavg(rate=0.1, batch=4, epochs=1, **options):
  how = fp.local(optax.sgd(rate), batch=batch, epochs=epochs)
  return fp.fedavg(toy.net(), how, lowrank=False, **options)


def near(found, wanted, eps):
  assert found.keys() == wanted.keys()
  for k, x in wanted.items():
    np.testing.assert_allclose(found[k], x, rtol=eps, atol=eps)


def moved(state):
  """How far the model went, in one number."""
  return max(np.abs(x - PARAMS[k]).max() for k, x in state.params.items())


def rows_of(cohort, data=DATA):
  return np.concatenate([data.train[c] for c in cohort])


# Federated averaging, written by hand.


@functools.cache
def proximal(mu):
  """Two rounds of FedProx."""
  how = fp.local(optax.sgd(0.2), batch=4, epochs=2)
  algorithm = fp.fedprox(toy.net(), how, mu=mu, lowrank=False)
  return how, *play(algorithm, COHORT, COHORT)


@pytest.mark.parametrize("mu", [0.0, 2.0])
def test_a_round_is_federated_averaging_in_a_plain_loop(mu, tol):
  # Clients have 1, 3, 5, 9 and 11 examples and batches of 4: the loop has no
  # padding, no lanes and no segments. Products of length 7, 12 steps.
  how, state, outcome = proximal(mu)
  params = PARAMS
  for number in range(2):
    new = {
      c: toy.train(params, DATA, c, how, 0.2, mu, round=number) for c in COHORT
    }
    params = toy.mean(new, DATA)
  near(state.params, params, tol(jnp.float32, 7 * 12))
  assert moved(state) > 0.1
  assert outcome.record["train/examples"] == 29


def test_fedprox_without_its_term_is_fedavg_bit_for_bit():
  plain, _ = play(fedavg(0.2, epochs=2), COHORT, COHORT)
  assert toy.same_bits(proximal(0.0)[1].params, plain.params)
  assert not toy.same_bits(proximal(2.0)[1].params, plain.params)


def test_a_proximal_term_holds_clients_near_their_start():
  assert moved(proximal(2.0)[1]) < 0.9 * moved(proximal(0.0)[1])


def test_one_full_batch_step_is_a_step_on_the_pooled_loss(tol):
  state, _ = play(fedavg(rate=0.3, batch=16), COHORT, COHORT)
  params = PARAMS
  for _ in range(2):
    slope = toy.gradient(params, DATA, rows_of(COHORT))
    params = {k: v - 0.3 * slope[k] for k, v in params.items()}
  near(state.params, params, tol(jnp.float32, 29 * 2))
  assert moved(state) > 0.05


@pytest.mark.parametrize("cohort", [(8,), tuple(range(10))])
def test_fedsgd_is_the_pooled_gradient_of_any_number_of_clients(cohort, tol):
  server = optax.sgd(0.3)
  algorithm = fp.fedsgd(toy.net(), batch=4, server=server)
  state, outcome = play(algorithm, cohort)
  slope = toy.gradient(PARAMS, DATA, rows_of(cohort))
  wanted = {k: v - 0.3 * slope[k] for k, v in PARAMS.items()}
  near(state.params, wanted, tol(jnp.float32, 61))
  assert outcome.record["train/clients"] == len(cohort)


def test_the_server_optimizer_is_fed_the_mean_delta(tol):
  # FedAdam in two rounds: the deltas from a plain loop, the step of Reddi et
  # al., Algorithm 2.
  how = fp.local(optax.sgd(0.2), batch=4)
  algorithm = fp.fedadam(
    toy.net(), how, learning_rate=0.1, eps=0.01, lowrank=False
  )
  state, _ = play(algorithm, COHORT, COHORT)
  params = PARAMS
  m = {k: np.zeros_like(v) for k, v in params.items()}
  v = {k: np.full_like(x, 1e-4) for k, x in params.items()}
  for number in range(2):
    new = toy.mean(
      {c: toy.train(params, DATA, c, how, 0.2, round=number) for c in COHORT},
      DATA,
    )
    for k in params:
      delta = new[k] - params[k]
      m[k] = 0.9 * m[k] + 0.1 * delta
      v[k] = 0.99 * v[k] + 0.01 * delta**2
    params = {k: params[k] + 0.1 * m[k] / (np.sqrt(v[k]) + 0.01) for k in m}
  # An error of a delta is magnified by rate / eps, here 10.
  near(state.params, params, 10 * tol(jnp.float32, 7 * 6))


def test_the_learning_rate_follows_a_schedule_of_the_round(tol):
  def rate(number):
    return 0.4 * 0.5 ** jnp.asarray(number, jnp.float32)

  how = fp.local(lambda number: optax.sgd(rate(number)), batch=4)
  algorithm = fp.fedavg(toy.net(), how, lowrank=False)
  state, _ = play(algorithm, COHORT, COHORT, COHORT)
  params = PARAMS
  for number in range(3):
    new = {
      c: toy.train(params, DATA, c, how, 0.4 * 0.5**number, round=number)
      for c in COHORT
    }
    params = toy.mean(new, DATA)
  near(state.params, params, tol(jnp.float32, 7 * 9))


# Placement.


@pytest.fixture(scope="module")
def placed():
  """Heads on the devices, the rest in the cloud; two rounds."""
  algorithm = fedavg(placement={"head/.*": "device"})
  return algorithm, *play(algorithm, COHORT, (2, 5, 7, 8, 0))


def test_leaves_on_the_device_differ_between_clients(placed):
  _, state, _ = placed
  heads = state.clients.local["head/kernel"]
  assert heads.shape == (10, 7, 3)
  assert set(state.clients.local) == {"head/kernel"}
  assert len({heads[c].tobytes() for c in (0, 2, 4, 5, 7, 8)}) == 6


def test_the_leaves_of_who_was_not_drawn_stay_as_they_were(placed):
  _, state, _ = placed
  for client in (1, 3, 6, 9):
    head = state.clients.local["head/kernel"][client]
    assert head.tobytes() == PARAMS["head/kernel"].tobytes()


def test_leaves_on_the_device_are_in_no_message_and_no_model(placed):
  algorithm, state, _ = placed
  assert set(state.params) == {"up/kernel"}
  up = PARAMS["up/kernel"].nbytes
  sizes = algorithm.bytes(5)
  assert sizes == {"cloud/up_bytes": up + 4, "cloud/down_bytes": up}
  job = algorithm.work
  sent = fp.Sent({"up/kernel": PARAMS["up/kernel"]}, {"round": 0})
  local = {"head/kernel": PARAMS["head/kernel"]}
  carry = job.init(sent, {}, local, toy.client())
  message, kept = job.finish(carry, sent)
  assert set(message) == {"up/kernel"}
  assert set(kept) == {"head/kernel"}


def test_a_client_goes_on_with_its_own_leaves(placed, tol):
  # Client 2 trains twice: from the shared head, then from its own.
  _, state, _ = placed
  how = fp.local(optax.sgd(0.1), batch=4)
  first = {c: toy.train(PARAMS, DATA, c, how, 0.1) for c in COHORT}
  up = toy.mean({c: {"up": x["up/kernel"]} for c, x in first.items()}, DATA)
  start = {
    "head/kernel": first[2]["head/kernel"],
    "up/kernel": up["up"].astype(np.float32),
  }
  second = toy.train(start, DATA, 2, how, 0.1, round=1)
  np.testing.assert_allclose(
    state.clients.local["head/kernel"][2],
    second["head/kernel"],
    atol=tol(jnp.float32, 7 * 6),
  )


def test_frozen_leaves_stay_bit_for_bit_and_are_in_no_message():
  algorithm = fedavg(placement={"up/.*": "frozen"})
  state, _ = play(algorithm, COHORT, COHORT)
  assert state.params["up/kernel"].tobytes() == PARAMS["up/kernel"].tobytes()
  assert moved(state) > 0
  assert algorithm.bytes(5)["cloud/up_bytes"] == (
    PARAMS["head/kernel"].nbytes + 4
  )


def test_training_alone_is_every_leaf_on_its_device(tol):
  state, _ = play(fedavg(placement={".*": "device"}), COHORT)
  assert state.params == {}
  how = fp.local(optax.sgd(0.1), batch=4)
  for c in COHORT:
    found = {k: v[c] for k, v in state.clients.local.items()}
    wanted = toy.train(PARAMS, DATA, c, how, 0.1)
    near(found, wanted, tol(jnp.float32, 7 * 3))


class Normed(nnx.Module):
  """A network with running statistics."""

  def __init__(self, rngs):
    self.norm = nnx.BatchNorm(5, momentum=0.9, rngs=rngs)
    self.head = nnx.Linear(5, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(self.norm(x))


def test_running_statistics_must_be_placed_and_are_then_averaged(tol):
  model = fp.model(
    Normed(nnx.Rngs(0)), fp.losses.classification, precision="float32"
  )
  assert model.mutable == {"norm/mean", "norm/var"}
  how = fp.local(optax.sgd(0.1), batch=4)
  with pytest.raises(ValueError, match=r"'norm/mean' changes .* 'cloud'"):
    fp.fedavg(model, how)
  algorithm = fp.fedavg(
    model, how, placement={"norm/(mean|var)": "cloud"}, lowrank=False
  )
  data = toy.people((4, 4, 4, 4))
  state, _ = play(algorithm, (0, 1, 3), data=data, model=model)
  x = data.examples["x"][rows_of((0, 1, 3), data)]
  np.testing.assert_allclose(
    state.params["norm/mean"], 0.1 * x.mean(0), atol=tol(jnp.float32, 12)
  )
  var = np.mean(
    [data.examples["x"][data.train[c]].var(0) for c in (0, 1, 3)], axis=0
  )
  np.testing.assert_allclose(
    state.params["norm/var"], 0.9 + 0.1 * var, atol=tol(jnp.float32, 12)
  )


class Adapted(nnx.Module):
  """One frozen and one trained layer."""

  def __init__(self, rngs):
    self.up = nnx.Linear(5, 7, rngs=rngs)
    self.head = nnx.Linear(7, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(jnp.tanh(self.up(x)))


def test_the_base_is_the_same_bit_for_bit_after_training():
  module = fp.peft.lora(Adapted(nnx.Rngs(0)), rank=2, where="up")
  model = fp.model(module, fp.losses.classification)
  assert {k.split("/")[-1] for k in model.params} == {"lora_a", "lora_b"}
  before = jax.tree.map(lambda x: np.array(x, copy=True), model.base)
  algorithm = fp.fedavg(model, fp.local(optax.sgd(0.5), batch=4))
  player = toy.Player(algorithm, DATA, model.base)
  state, _ = player.play(COHORT)
  assert toy.same_bits(jax.device_get(player.base), before)
  assert any(np.any(x) for k, x in state.params.items() if "lora_b" in k)


# What links and bytes say of a round.


def test_clients_start_from_what_the_downlink_says(tol):
  # And what the links say of themselves is in the record.
  down = fp.int8(stochastic=False)
  up = fp.chain(fp.clip(1e3), fp.weigh())
  algorithm = fedavg(uplink=up, downlink=down)
  state, outcome = play(algorithm, COHORT)
  ctx = link.alone()
  coarse, _, _, wire = fp.broadcast(down)(toy.net().params, (), (), ctx)
  coarse = {k: np.asarray(v) for k, v in coarse.items()}
  how = fp.local(optax.sgd(0.1), batch=4)
  new = toy.mean(
    {c: toy.train(coarse, DATA, c, how, 0.1) for c in COHORT}, DATA
  )
  # The server applies how far they went to its own, finer model.
  wanted = {k: PARAMS[k] + new[k] - coarse[k] for k in PARAMS}
  near(state.params, wanted, tol(jnp.float32, 7 * 3))
  assert np.abs(coarse["up/kernel"] - PARAMS["up/kernel"]).max() > 1e-3
  held = sum(x.nbytes for x in jax.tree.leaves(wire))
  assert algorithm.bytes(5)["cloud/down_bytes"] == held < 4 * (35 + 21)
  assert outcome.record["cloud/clip/fraction"] == 0
  assert outcome.record["cloud/clip/nonfinite"] == 0


@pytest.mark.parametrize("part", ["the loss", "numerator of 'hits'"])
def test_a_loss_that_is_a_mean_is_refused_in_a_sentence(part):
  def loss(module, examples, key):
    each = jnp.sum(module(examples["x"]), axis=1)
    whole = {"the loss": jnp.mean(each)}.get(part, each)
    top = jnp.mean(each) if part != "the loss" else each
    return whole, {"hits": (top, jnp.ones_like(each))}

  model = fp.model(toy.Net(nnx.Rngs(0)), loss)
  rows = {"x": jnp.ones((4, 5))}
  with pytest.raises(ValueError, match=rf"example, \[4\].* got {part} .*\[\]"):
    model.loss(model.params, model.base, rows, jax.random.key(0))
