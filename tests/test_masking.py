"""Masks: what one wire hides and what the sum reveals, whoever drops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import fedjax_peft as fp
import toy
from fedjax_peft.links import masking


def roster(clients, weights=None, nodes=None, arrived=None, seed=3):
  clients = jnp.asarray(clients, jnp.int32)
  weights = jnp.ones_like(clients) if weights is None else jnp.asarray(weights)
  nodes = None if nodes is None else jnp.asarray(nodes, jnp.int32)
  arrived = None if arrived is None else jnp.asarray(arrived)
  return fp.Roster(
    clients, weights.astype(jnp.int32), jax.random.key(seed), nodes, arrived
  )


def wires(link, messages, who):
  """What every sender of a roster sends; axis C leads."""
  contexts = fp.Context(
    jax.random.split(jax.random.key(0), who.clients.size),
    who.clients,
    who.weights,
    {},
    who,
  )
  axes = fp.Context(0, 0, 0, None, None)
  send = jax.vmap(lambda m, ctx: link.send(m, (), (), ctx)[0], (0, axes))
  return jax.jit(send)(messages, contexts)


def integers(senders, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "a": rng.integers(0, 2**32, (senders, 40, 70), np.uint32),
    "b": rng.integers(0, 2**16, (senders, 9)).astype(np.uint16),
  }


def total(rows, here):
  return {k: v[np.asarray(here)].sum(0, dtype=v.dtype) for k, v in rows.items()}


@pytest.mark.parametrize("senders", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("neighbours", [2, 4, 32])
def test_masks_cancel_in_the_sum(senders, neighbours):
  link, who = fp.mask(neighbours), roster(np.arange(senders) * 7)
  sent = integers(senders)
  hidden = jax.device_get(wires(link, sent, who))
  everyone = [True] * senders
  assert toy.same_bits(total(hidden, everyone), total(sent, everyone))
  if senders > 1:
    for k in sent:
      for i in range(senders):
        assert np.mean(hidden[k][i] == sent[k][i]) < 0.2


@pytest.mark.parametrize("senders", [2, 3, 4, 5, 6, 7, 40])
@pytest.mark.parametrize("neighbours", [2, 4, 6])
def test_neighbours_are_mutual_and_as_many_as_asked(senders, neighbours):
  who = roster(np.arange(senders) + 100)
  one = jax.jit(lambda i: masking.pairs_of(who, i, neighbours))
  signs, keys = {}, {}
  for i in range(senders):
    pairs = jax.device_get(one(i))
    for key, plus, minus, j in zip(*pairs, strict=True):
      if plus or minus:
        assert (i, int(j)) not in signs  # nobody is met twice
        signs[i, int(j)] = int(plus) - int(minus)
        keys[i, int(j)] = key.tolist()
  degree = {i: sum(a == i for a, _ in signs) for i in range(senders)}
  assert set(degree.values()) == {min(neighbours, senders - 1)}
  for i, j in signs:
    assert signs[i, j] == -signs[j, i]
    assert keys[i, j] == keys[j, i]
  assert len({tuple(k) for k in keys.values()}) == len(keys) // 2


def test_the_ring_changes_with_the_round():
  def met(seed):
    who = roster(np.arange(20), seed=seed)
    return np.asarray(masking.pairs_of(who, 0, 4).place).tolist()

  assert met(1) == met(1)
  assert met(1) != met(2)


def test_the_absent_are_in_no_ring():
  who = roster([4, 5, -1, 6, 7], weights=[1, 0, 1, 2, 1])
  sent = integers(5)
  hidden = jax.device_get(wires(fp.mask(2), sent, who))
  here = [True, False, False, True, True]
  assert toy.same_bits(total(hidden, here), total(sent, here))
  assert toy.same_bits(hidden["a"][1], sent["a"][1])


@pytest.mark.parametrize("gone", [[2], [0, 3], [1, 2, 3, 4, 5]])
def test_what_the_dropped_leave_behind_is_taken_out_again(gone):
  link, sent = fp.mask(4), integers(6)
  here = np.array([i not in gone for i in range(6)])
  hidden = jax.device_get(wires(link, sent, roster(range(6))))
  heard = total(hidden, here)
  assert not toy.same_bits(heard, total(sent, here))
  who = roster(range(6), arrived=here)
  found, _ = jax.jit(lambda w: link.receive(w, (), who, who.key))(heard)
  assert toy.same_bits(jax.device_get(found), total(sent, here))


def test_receivers_have_rings_of_their_own():
  nodes = np.array([0, 1, 0, 1, 1, 0, 1])
  sent = integers(7)
  hidden = jax.device_get(
    wires(fp.mask(4), sent, roster(range(7), None, nodes))
  )
  for e in (0, 1):
    assert toy.same_bits(total(hidden, nodes == e), total(sent, nodes == e))


def p_uniform(words):
  """p-value of a chi-square test on the bytes of integers."""
  counts = np.bincount(np.frombuffer(words.tobytes(), np.uint8), minlength=256)
  return scipy.stats.chisquare(counts).pvalue


def test_all_wires_but_one_are_uniform_together():
  sent = {"a": np.zeros((5, 40_000), np.uint32)}
  hidden = jax.device_get(wires(fp.mask(2), sent, roster(range(5))))["a"]
  # Any four wires, and their sum; a false alarm has probability 1e-6 each.
  for left in range(5):
    rest = np.delete(hidden, left, axis=0)
    assert p_uniform(rest) > 1e-6
    assert p_uniform(rest.sum(0, dtype=np.uint32)) > 1e-6
  assert p_uniform(hidden.sum(0, dtype=np.uint32)) < 1e-6  # the control


def test_what_is_no_unsigned_integer_is_refused():
  with pytest.raises(ValueError, match=r"float32\[3\] .* fixed_point\(\)"):
    fp.mask().init(fp.Spec({"a": jax.ShapeDtypeStruct((3,), jnp.float32)}))
  with pytest.raises(ValueError, match="neighbours=4"):
    fp.mask(3)
  with pytest.raises(ValueError, match="'mask' .* 'int8'"):
    fp.chain(fp.int8(), fp.mask())


# In rounds.


def play(uplink, data, cohorts, *, settings=None, change=None, tiers=None):
  model = toy.net()
  local = fp.local(optax.sgd(0.1), batch=4)
  if tiers is None:
    algorithm = fp.fedavg(model, local, uplink=uplink, lowrank=False)
  else:
    names = ("edge", "cloud")
    work = fp.train(model, local, tiers=names)
    algorithm = fp.federated(
      work,
      [
        fp.tier("edge", tiers, link=uplink),
        fp.tier("cloud", link=uplink),
      ],
    )
  player = toy.Player(algorithm, data, base=model.base, settings=settings)
  if change is not None:
    player = player.over(x=change)
  return player.play(*cohorts)


def link(*more):
  return fp.chain(
    fp.clip(1.0), fp.weigh(max_weight=8), fp.fixed_point(32), *more
  )


@pytest.mark.parametrize(("tiers", "devices"), [(None, 2), (2, 1)])
def test_masked_rounds_equal_unmasked_ones_bit_for_bit(tiers, devices):
  data, cohorts = toy.people(), [range(10), (3, 5, 1, 8)]
  settings = toy.lanes(devices=devices, width=2, segment=2)
  plain, masked = (
    play(x, data, cohorts, settings=settings, tiers=tiers)
    for x in (link(), link(fp.mask(4)))
  )
  assert toy.same_bits(plain[0].params, masked[0].params)
  assert toy.same_bits(plain[1].record, masked[1].record)


@pytest.mark.parametrize("tiers", [None, 2])
def test_a_client_that_breaks_takes_its_masks_out_with_it(tiers):
  data = toy.people()
  features = data.examples["x"].copy()
  features[data.train[4]] = np.nan
  cohorts = [range(10)]
  plain, masked = (
    play(x, data, cohorts, change=features, tiers=tiers)
    for x in (link(), link(fp.mask(4)))
  )
  assert plain[1].record["train/nonfinite"] == 1
  assert toy.same_bits(plain[0].params, masked[0].params)
