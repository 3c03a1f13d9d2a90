"""Restricted links: the device's leaves as ever, the servers' exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_peft as fp
import split_worlds as worlds
import toy
from fedjax_peft import link, links, split, tree
from fedjax_peft import reduce as reduce_lib

WEIGHTS, MOST = (1, 3, 20, 2), 8  # one is above the most
SENDERS = len(WEIGHTS)
WEIGHED = fp.weigh(max_weight=MOST)
CHAINS = {
  "identity": WEIGHED,
  "int8": fp.chain(WEIGHED, fp.int8(block=128)),
  "affine": fp.chain(WEIGHED, links.affine(3)),
  "top_k": fp.chain(WEIGHED, fp.top_k(0.3)),
  "feedback": fp.chain(WEIGHED, fp.error_feedback(fp.int4())),
  "fixed_point": fp.chain(fp.clip(0.5), WEIGHED, fp.fixed_point(32)),
  "mask": fp.chain(fp.clip(0.5), WEIGHED, fp.fixed_point(32), fp.mask(2)),
}


def is_own(name):
  return name.startswith("device/")


def messages():
  """What clients report of the cut net; axis C leads."""
  rng = np.random.default_rng(0)
  return {
    k: jnp.asarray(rng.normal(size=(SENDERS, *v.shape)), v.dtype)
    for k, v in worlds.plain().params.items()
  }


def only(leaves, own):
  return {k: v for k, v in leaves.items() if is_own(k) == own}


def crossed(chain, leaves):
  """(message, wires, senders' states) of an exchange of all senders."""
  exchange = link.exchange(chain, reduce_lib.sum())
  spec = link.Spec(tree.spec({k: v[0] for k, v in leaves.items()}))
  spec = spec._replace(senders=SENDERS)
  mine, shared = exchange.init(spec)
  ids, weights = jnp.arange(SENDERS), jnp.array(WEIGHTS, jnp.int32)
  roster = link.Roster(ids, weights, jax.random.key(1))

  def send(message, id, weight):
    key = jax.random.fold_in(jax.random.key(0), id)
    own = link.Context(key, id, weight, {}, roster)
    return exchange.send(message, mine, shared, own)[:2]

  wires, mine = jax.vmap(send)(leaves, ids, weights)
  present = jnp.ones(SENDERS, bool)
  acc = exchange.zeros(spec, SENDERS)
  acc = exchange.fold(acc, wires, present, shared, roster, roster.key)
  message, _ = exchange.finish(acc, shared, roster, roster.key)
  return message, wires, mine


@functools.cache
def found(name):
  """Exchanges: restricted; of the device's leaves alone; of the others."""
  chain = CHAINS[name]

  def run(leaves):
    return (
      crossed(links.only(chain, is_own), leaves),
      crossed(chain, only(leaves, True)),
      crossed(WEIGHED, only(leaves, False)),
    )

  return jax.device_get(jax.jit(run)(messages()))


@pytest.mark.parametrize("name", CHAINS)
def test_the_devices_leaves_cross_as_if_there_were_no_others(name):
  (message, wires, mine), (alone, lone_wires, lone_mine), _ = found(name)
  assert toy.same_bits(mine, lone_mine)
  assert len(jax.tree.leaves(wires)) == len(jax.tree.leaves(lone_wires)) + 2
  for path, leaf in alone.items():
    if link.parts_of(CHAINS[name])[-1].fold is None:
      assert toy.same_bits(message[path], leaf)
    else:  # a kernel adds the wires up as it decodes them
      np.testing.assert_allclose(message[path], leaf, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CHAINS)
def test_the_servers_leaves_are_averaged_exactly_whatever_the_link(name, tol):
  (message, _, _), _, (alone, _, _) = found(name)
  weights = np.minimum(WEIGHTS, MOST) / np.minimum(WEIGHTS, MOST).sum()
  for path, leaf in alone.items():
    assert toy.same_bits(message[path], leaf)
    sent = np.asarray(messages()[path], np.float64)
    wanted = np.tensordot(weights, sent, 1)
    limit = tol(jnp.float32, SENDERS) * np.abs(sent).max()
    np.testing.assert_allclose(leaf, wanted, rtol=0, atol=limit)
  assert set(message) == set(messages())


@pytest.mark.parametrize("name", CHAINS)
def test_a_restricted_chain_says_which_wire_it_sends(name):
  chain = links.only(CHAINS[name], is_own)
  leaves = {k: v[0] for k, v in messages().items()}
  spec = link.Spec(tree.spec(leaves), senders=SENDERS)
  mine, shared = chain.init(spec)
  wire = jax.eval_shape(
    lambda m: chain.send(m, mine, shared, link.alone())[0], leaves
  )
  said = tree.spec(chain.after(spec).message)
  assert jax.tree.structure(said) == jax.tree.structure(wire)
  assert jax.tree.leaves(said) == jax.tree.leaves(wire)


@pytest.mark.parametrize("name", CHAINS)
def test_counted_bytes_are_those_of_the_wire_of_the_devices_leaves(name):
  model = worlds.plain()
  made = fp.fedavg(model, worlds.LOCAL, uplink=CHAINS[name])
  made = split.splitfed(made, model, worlds.PEOPLE.examples)
  _, (_, wires, _), _ = found(name)
  one = jax.tree.map(lambda x: x[0], wires)
  sizes = made.bytes(SENDERS)
  assert sizes["cloud/up_bytes"] == tree.nbytes(one)
  assert sizes["cloud/down_bytes"] == tree.nbytes(only(model.params, True))


def test_a_bound_holds_for_what_crosses_only():
  spec = link.Spec(tree.spec({k: v[0] for k, v in messages().items()}))
  chain = links.only(fp.chain(fp.clip(0.5), WEIGHED), is_own)
  assert chain.after(spec).bound == 0.5 * MOST
  (message, _, _), (alone, _, _), _ = found("fixed_point")
  norm = np.sqrt(sum(np.sum(x**2) for x in alone.values()))
  assert 0 < norm <= 0.5
  rest = only(message, False).values()
  assert np.sqrt(sum(np.sum(x**2) for x in rest)) > 0.5


def test_what_a_link_adds_on_arrival_is_kept():
  more = link.stateless(
    "tell", lambda m, ctx: (m, {}), lambda m, roster: {**m, "told": 1.0}
  )
  chain = links.only(more, is_own)
  leaves = {k: v[0] for k, v in messages().items()}
  ctx = link.alone()
  mine, shared = chain.init(link.Spec(tree.spec(leaves)))
  wire, _, _ = chain.send(leaves, mine, shared, ctx)
  came, _ = chain.receive(wire, shared, ctx.roster, ctx.key)
  assert came.pop("told") == 1.0
  assert toy.same_bits(came, leaves)
