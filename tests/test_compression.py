"""Compressing links: what each sends, loses, and makes up for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_peft as fp
import laws
import toy
from fedjax_peft import link as link_lib
from fedjax_peft import reduce as reduce_lib
from fedjax_peft import tree
from fedjax_peft.links import Weighed

SHAPES = {
  "a": jax.ShapeDtypeStruct((33, 40), jnp.float32),
  "b": jax.ShapeDtypeStruct((9,), jnp.float32),
  "c": jax.ShapeDtypeStruct((2, 16, 12), jnp.float32),
}
SIZE = tree.size(SHAPES)


def drawn(seed=0):
  rng = np.random.default_rng(seed)
  return {
    k: rng.normal(size=x.shape).astype(np.float32) for k, x in SHAPES.items()
  }


def crossed(link, message, ctx=None):
  """(wire, what the receiver makes of it)."""
  ctx = link_lib.alone() if ctx is None else ctx
  mine, shared = link.init(fp.Spec(tree.spec(message)))
  wire, _, _ = link.send(message, mine, shared, ctx)
  return wire, link.receive(wire, shared, ctx.roster, ctx.key)[0]


def vector(message):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(message)])


@pytest.mark.parametrize("fraction", [1e-9, 0.1, 1.0])
def test_top_k_sends_the_largest_values_and_where_they_are(fraction):
  message = drawn()
  wire, back = crossed(fp.top_k(fraction), message)
  k = max(1, math.ceil(fraction * SIZE))
  assert wire.values.shape == wire.indices.shape == (k,)
  sent, flat = np.asarray(vector(back)), vector(message)
  largest = np.argsort(-np.abs(flat), kind="stable")[:k]
  wanted = np.zeros_like(flat)
  wanted[largest] = flat[largest]
  np.testing.assert_array_equal(sent, wanted)
  np.testing.assert_array_equal(wire.indices, np.sort(largest))


def test_rand_k_draws_other_places_in_other_rounds_and_the_same_for_all():
  link, message = fp.rand_k(0.3), drawn()

  def places(round, sender):
    roster = link_lib.alone()._replace(key=jax.random.key(sender)).roster
    roster = roster._replace(key=jax.random.key(round))
    ctx = link_lib.alone()._replace(key=jax.random.key(sender), roster=roster)
    return np.flatnonzero(vector(crossed(link, message, ctx)[1]))

  np.testing.assert_array_equal(places(0, 1), places(0, 2))
  assert places(0, 1).size == math.ceil(0.3 * SIZE)
  assert not np.array_equal(places(0, 1), places(1, 1))


def shared_bias(link, message, rounds=2000):
  """Largest |mean error| over rounds, in standard errors."""

  @jax.jit
  @jax.vmap
  def error(key):
    ctx = link_lib.alone()
    ctx = ctx._replace(roster=ctx.roster._replace(key=key))
    back = crossed(link, message, ctx)[1]
    return jax.tree.map(jnp.subtract, back, message)

  errors = error(jax.random.split(jax.random.key(0), rounds))
  worst = 0.0
  for x in jax.tree.leaves(errors):
    x = np.asarray(x, np.float64)
    spread = x.std(0, ddof=1) / math.sqrt(rounds)
    worst = max(worst, np.max(np.abs(x.mean(0)) / np.maximum(spread, 1e-9)))
  return worst


def test_rand_k_is_unbiased_over_rounds():
  # Of 30 values one is 4.9 standard errors off with probability 3e-5.
  message = {"a": np.linspace(1, 3, 30, dtype=np.float32)}
  plain = fp.rand_k(0.4)

  def shrunk(message, mine, shared, ctx):  # the control: D / K left out
    wire, mine, stats = plain.send(message, mine, shared, ctx)
    wire = jax.tree.map(lambda x: x * jnp.float32(0.4), wire)
    return wire, mine, stats

  assert shared_bias(plain, message) < 4.9
  assert shared_bias(plain._replace(send=shrunk), message) > 4.9


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_quantizing_errs_by_less_than_a_step_and_is_unbiased(bits):
  message = {"a": drawn()["b"]}
  link = fp.quantize(bits)
  back = crossed(link, message)[1]["a"]
  peak = np.abs(message["a"]).max()
  step = 2 * peak if bits == 1 else peak / (2 ** (bits - 1) - 1)
  assert np.abs(back - message["a"]).max() < step * (1 + 1e-6)
  # Of 9 values one is 4.6 standard errors off with probability 4e-5.
  assert laws.bias(link, message, 4000) < 4.6


@pytest.mark.parametrize(
  ("link", "wanted"),
  [
    (fp.int8(), SIZE + 4 * (6 + 1 + 2)),
    (fp.int4(), None),
    (fp.quantize(1), None),
    (fp.sign(), None),
    (fp.top_k(0.1), 8 * math.ceil(0.1 * SIZE)),
    (fp.rand_k(0.1), 4 * math.ceil(0.1 * SIZE)),
    (fp.lowrank(2), 4 * (2 * (33 + 40) + 9 + 2 * 2 * (16 + 12))),
  ],
  ids=lambda x: getattr(x, "name", None),
)
def test_wires_are_as_small_as_they_claim(link, wanted):
  size = tree.nbytes(link.after(fp.Spec(SHAPES)).message)
  if wanted is not None:
    assert size == wanted
  bits = {"int4": 4, "quantize(1)": 1, "sign": 1}.get(link.name)
  if bits:  # a scale for each block, and less than a block of padding a leaf
    assert 0 <= size - SIZE * bits / 8 <= 4 * 9 + 3 * 128


def test_a_rotation_spreads_what_a_coarse_grid_would_lose():
  message = {"a": np.zeros(256, np.float32)}
  message["a"][:16] = np.linspace(0.01, 1, 16)
  plain, turned = fp.quantize(2), fp.chain(fp.rotate(256), fp.quantize(2))

  def error(link, seed):
    ctx = link_lib.alone(seed=seed)
    return laws.norm(
      jax.tree.map(np.subtract, crossed(link, message, ctx)[1], message)
    )

  draws = range(20)
  apart = [error(turned, s) < error(fp.quantize(1), s) for s in draws]
  assert all(apart)
  nearest = fp.chain(fp.rotate(256), fp.quantize(4, stochastic=False))
  assert np.mean([error(nearest, s) for s in draws]) < 0.5 * np.mean(
    [error(plain, s) for s in draws]
  )


@pytest.mark.parametrize("rank", [1, 3])
def test_a_matrix_of_that_rank_crosses_exactly(rank, tol):
  rng = np.random.default_rng(0)
  left, right = rng.normal(size=(4, 20, rank)), rng.normal(size=(4, rank, 30))
  message = {"m": (left @ right).astype(np.float32), "v": drawn()["b"]}
  wire, back = crossed(fp.lowrank(rank), message)
  np.testing.assert_allclose(
    back["m"], message["m"], rtol=0, atol=30 * tol(np.float32, 30)
  )
  np.testing.assert_array_equal(back["v"], message["v"])
  assert wire["m"].left.shape == (4, 20, rank)


def test_the_sign_is_sent_with_the_mean_magnitude(tol):
  message = drawn()
  back = crossed(fp.sign(), message)[1]
  for k, x in message.items():
    wanted = np.where(x >= 0, 1, -1) * np.abs(x).mean()
    np.testing.assert_allclose(back[k], wanted, rtol=tol(np.float32, x.size))


@pytest.mark.parametrize(
  "inner",
  [
    fp.top_k(0.1),
    fp.sign(),
    fp.int4(),
    fp.lowrank(1),
    fp.chain(fp.top_k(0.5)),
    fp.rand_k(0.5),
  ],
  ids=lambda link: link.name,
)
def test_what_was_not_said_is_said_later(inner, tol):
  link = fp.error_feedback(inner)
  mine, shared = link.init(fp.Spec(SHAPES))
  said, meant = [], []
  for seed in range(6):
    ctx = link_lib.alone(seed=seed)
    wire, mine, _ = link.send(drawn(seed), mine, shared, ctx)
    said.append(link.receive(wire, shared, ctx.roster, ctx.key)[0])
    meant.append(drawn(seed))
  heard = vector(jax.tree.map(lambda *x: sum(x), *said))
  held = vector(jax.tree.unflatten(jax.tree.structure(SHAPES), mine[0]))
  wanted = vector(jax.tree.map(lambda *x: sum(x), *meant))
  scale = max(np.abs(held).max(), np.abs(heard).max())
  np.testing.assert_allclose(
    heard + held, wanted, rtol=0, atol=scale * tol(np.float32, 6)
  )
  assert np.abs(held).max() > 0


def test_feedback_has_no_bound_until_it_is_clipped():
  link = fp.error_feedback(fp.rand_k(0.5))
  assert link.after(fp.Spec(SHAPES, 1.0)).bound == math.inf
  with pytest.raises(ValueError, match="write clip"):
    fp.chain(link, fp.fixed_point()).init(fp.Spec(SHAPES, 1.0))
  with pytest.raises(ValueError, match="'weigh' .* error_feedback"):
    fp.error_feedback(fp.weigh())


FOLDED = (fp.int8(), fp.int4(), fp.quantize(1), fp.sign(), fp.top_k(0.3))


@pytest.mark.parametrize("link", FOLDED, ids=lambda link: link.name)
@pytest.mark.parametrize("weighed", [False, True])
def test_folding_wires_equals_adding_what_each_says(link, weighed, tol):
  senders, here = 5, np.array([True, False, True, True, False])
  whole = fp.chain(fp.weigh(max_weight=4), link) if weighed else link
  exchange = fp.exchange(whole, reduce_lib.sum())
  mine, shared = exchange.init(fp.Spec(SHAPES, senders=senders))
  rows = jax.tree.map(lambda *x: np.stack(x), *map(drawn, range(senders)))
  keys = jax.random.split(jax.random.key(0), senders)
  ctx = link_lib.alone(3)

  def send(message, key):
    own = ctx._replace(key=key)
    return exchange.send(message, mine, shared, own)[0]

  wires = jax.vmap(send)(rows, keys)
  wires = jax.tree.map(  # the absent hold anything
    lambda x: x.at[1].set(jnp.nan) if tree.is_float(x) else x, wires
  )
  zeros = exchange.zeros(fp.Spec(SHAPES, senders=senders), senders)
  args = (shared, ctx.roster, ctx.key)
  found = jax.jit(exchange.fold)(zeros, wires, here, *args)
  said = exchange.decode(wires, *args)
  wanted = exchange.reduce.update(zeros, said, here)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      x, y, rtol=0, atol=60 * tol(np.float32, senders)
    ),
    found,
    wanted,
  )
  if weighed:
    assert isinstance(found, Weighed)
    assert found.weight == 9


@pytest.mark.slow
@pytest.mark.parametrize("link", FOLDED, ids=lambda link: link.name)
def test_rounds_over_folded_wires_are_near_those_without(link):
  model = toy.net()
  local = fp.local(optax.sgd(0.1), batch=4)
  found = []
  for uplink in (fp.weigh(), fp.chain(fp.weigh(), link)):
    algorithm = fp.fedavg(model, local, uplink=uplink, lowrank=False)
    player = toy.Player(algorithm, toy.people(), base=model.base)
    found.append(player.play(range(10))[0].params)
  exact, rough = found
  for k in exact:
    moved = np.abs(exact[k] - model.params[k]).max()
    assert np.abs(rough[k] - exact[k]).max() < 3 * moved
    assert np.abs(rough[k] - model.params[k]).max() > 0


def test_what_a_client_holds_back_is_its_own_and_kept_when_it_arrives():
  model, data = toy.net(), toy.people()
  local = fp.local(optax.sgd(0.1), batch=4)
  with pytest.raises(ValueError, match="'weigh'"):
    fp.chain(fp.error_feedback(fp.top_k(0.1)), fp.weigh())
  uplink = fp.chain(fp.weigh(), fp.error_feedback(fp.top_k(0.1)))
  algorithm = fp.fedavg(model, local, uplink=uplink, lowrank=False)
  features = data.examples["x"].copy()
  features[data.train[4]] = np.nan
  player = toy.Player(algorithm, data, base=model.base).over(x=features)
  state, _ = player.play((1, 4, 7))
  held = jax.tree.leaves(state.clients.mine)
  norms = sum(np.square(x).reshape(len(data), -1).sum(1) for x in held)
  assert np.all(np.flatnonzero(norms) == [1, 7])
