"""Messages that are wrong, and examples that change: inside the program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_peft as fp
import toy
from fedjax_peft import factored, vectorize
from fedjax_peft.network import corruption, drift, fault

SIZES = (3, 8, 5, 4, 7, 6)
HIT = (1, 4)
WELL = tuple(i for i in range(len(SIZES)) if i not in HIT)
PLAIN = toy.people(SIZES)
CLASSES = 3
HOW = fp.local(optax.sgd(0.3), batch=4, epochs=2)
JOB = fp.train(toy.net(), HOW)
LANES = toy.lanes(devices=2, width=1, segment=16)
PROGRAMS: dict = {}


def marked(trait, bit=1):
  """The same clients, of whom two have the trait."""
  bits = np.zeros(len(SIZES), np.int32)
  bits[list(HIT)] = bit
  return PLAIN.with_traits(**{trait: bits})


def said(job, data, round=0):
  """What clients report; a job is compiled once."""
  if id(job) not in PROGRAMS:
    PROGRAMS[id(job)] = job, vectorize.compiled(job, LANES)
  found, _ = fp.for_each_client(
    job,
    data,
    base=toy.net().base,
    round=round,
    settings=LANES,
    step=PROGRAMS[id(job)][1],
  )
  return found


@functools.cache
def plain(round=0):
  return said(JOB, PLAIN, round)


@functools.cache
def corrupted(kind, flips=1e-3):
  wrap = fault.corrupt(0.3, kind, flips=flips).wrap
  return said(wrap(JOB), marked("corrupt", corruption.BITS[kind]))


def rows(tree, ids):
  return jax.tree.map(lambda x: x[np.array(ids)], tree)


# Corruption.


@pytest.mark.parametrize("kind", sorted(corruption.BITS))
def test_who_is_not_hit_reports_the_same_bits(kind):
  flips = 0.5 if kind == "bitflip" else 1e-3
  found = corrupted(kind, flips)
  assert toy.same_bits(rows(found, WELL), rows(plain(), WELL))
  for client in HIT:
    assert not toy.same_bits(rows(found, [client]), rows(plain(), [client]))


@pytest.mark.parametrize(("kind", "value"), [("nan", np.nan), ("zero", 0.0)])
def test_broken_messages_have_one_value(kind, value):
  for x in rows(corrupted(kind), HIT).values():
    np.testing.assert_array_equal(x, np.full_like(x, value))


def test_flipped_values_differ_in_one_bit():
  found, true = (rows(x, HIT) for x in (corrupted("bitflip", 0.5), plain()))
  pairs = [(found[k].ravel(), true[k].ravel()) for k in true]
  bits = np.concatenate(
    [np.bitwise_count(a.view(np.uint32) ^ b.view(np.uint32)) for a, b in pairs]
  )
  # 112 values of which half flip: 30 to 82 with probability 1 - 1e-6.
  assert bits.size == 112
  assert set(np.unique(bits)) == {0, 1}
  assert 30 <= bits.sum() <= 82


def test_noise_is_in_units_of_the_leaf():
  # 150 messages of 11 values each around a constant: a sample deviation of
  # 1,650 normals is within three standard errors with probability 0.997.
  def init(sent, base, local, client):
    return {"a": jnp.full((2, 3), 4.0), "b": jnp.full(5, -0.5)}

  def finish(carry, sent):
    return carry, {}

  steady = toy.voices()._replace(init=init, finish=finish)
  job = corruption.wrapper("noise", sigma=0.25)(steady)

  @jax.jit
  @jax.vmap
  def messages(id):
    client = toy.client(id, corrupt=jnp.int32(corruption.BITS["noise"]))
    return job.finish(job.init(None, None, {}, client), None)[0]

  found = messages(np.arange(150))
  for name, level in (("a", 4.0), ("b", 0.5)):
    x = np.asarray(found[name]).ravel()
    noise = (x - np.sign(x.mean()) * level) / level
    error = 3 / np.sqrt(2 * noise.size)
    assert abs(noise.std() / 0.25 - 1) < error
    assert abs(noise.std() / 0.3 - 1) > error  # a wrong constant fails
    assert np.unique(noise).size > 0.99 * noise.size  # keys are not reused


def test_a_corruption_hits_by_its_own_bit():
  both = fault.compose(fault.corrupt(0.1, "nan"), fault.corrupt(0.1, "zero"))
  job = both.wrap(toy.voices())
  for bits, wanted in ((1, np.nan), (4, 0.0), (2, None), (0, None)):
    client = toy.client(0, corrupt=jnp.int32(bits))
    found = job.finish(job.init(None, None, {}, client), None)[0]
    if wanted is None:
      true = toy.voices().init(None, None, {}, client)
      assert toy.same_bits(jax.device_get(found), jax.device_get(true))
    else:
      for x in found.values():
        np.testing.assert_array_equal(x, np.full_like(x, wanted))


@pytest.mark.parametrize("kind", sorted(corruption.BITS))
def test_factors_are_corrupted_as_factors(kind):
  general = factored.train(toy.net(), HOW, JOB, np.array([1, 4]))
  data = marked("corrupt", corruption.BITS[kind])
  job = corruption.wrapper(kind, flips=0.5)(general)
  assert job.stride == general.stride
  found, true = said(job, data), factors()
  assert toy.same_bits(rows(found, WELL), rows(true, WELL))
  assert jax.tree.structure(found) == jax.tree.structure(true)
  whole = {k: np.asarray(x.expand()) for k, x in rows(found, HIT).items()}
  value = {"nan": np.nan, "zero": 0.0}.get(kind)
  if value is not None:
    for x in whole.values():
      np.testing.assert_array_equal(x, np.full_like(x, value))
  else:
    assert not toy.same_bits(rows(found, HIT), rows(true, HIT))


@functools.cache
def factors():
  return said(factored.train(toy.net(), HOW, JOB, np.array([1, 4])), PLAIN)


def test_what_stays_on_the_device_is_not_touched():
  rules = {"head/.*": "device"}
  job = corruption.wrapper("nan")(fp.train(toy.net(), HOW, rules=rules))
  params = toy.net().params
  sent = fp.Sent({"up/kernel": params["up/kernel"]}, {"round": jnp.int32(0)})
  local = {"head/kernel": params["head/kernel"]}
  client = toy.client(corrupt=jnp.int32(1))
  message, kept = job.finish(job.init(sent, {}, local, client), sent)
  assert np.isnan(np.asarray(message["up/kernel"])).all()
  assert toy.same_bits(jax.device_get(kept), jax.device_get(local))


def test_a_round_drops_what_is_nan_and_averages_the_others(tol):
  # Ten clients whose messages are known; two of them break.
  data = toy.people()
  one = fault.corrupt(0.3, "nan")
  bits = one.traits(np.arange(len(data)), 0, 1)["corrupt"]
  assert 0 < (bits > 0).sum() < len(data)
  algorithm = fp.federated(one.wrap(toy.voices()), [fp.tier("cloud")])
  player = toy.Player(algorithm, data.with_traits(corrupt=bits))
  state, outcome = player.play(np.arange(len(data)))
  assert outcome.record["train/nonfinite"] == (bits > 0).sum()
  heard = {c: toy.voice(data, c) for c in np.flatnonzero(bits == 0)}
  wanted, eps = toy.mean(heard, data), tol(jnp.float32, len(data))
  for k, x in state.params.items():
    np.testing.assert_allclose(-x, wanted[k], rtol=eps, atol=eps)


# Drift.


def training_on(**features):
  """The messages of round 0 on other examples, with the keys of a round."""
  return fp.data.Population(
    examples={**PLAIN.examples, **features},
    train=PLAIN.train,
    heldout=PLAIN.heldout,
    names=PLAIN.names,
    seen=PLAIN.seen,
    test=PLAIN.test,
  )


LABELS = fault.drift_labels(4, CLASSES).wrap(JOB)
FEATURES = fault.drift_features(4, 2.0).wrap(JOB)


@pytest.mark.parametrize(
  ("job", "trait"),
  [(LABELS, "drift_labels"), (FEATURES, "drift_features")],
)
def test_drift_begins_with_nothing_and_spares_the_others(job, trait):
  data = marked(trait)
  assert toy.same_bits(said(job, data), plain())
  later = said(job, data, 3)
  assert toy.same_bits(rows(later, WELL), rows(plain(3), WELL))
  for client in HIT:
    assert not toy.same_bits(rows(later, [client]), rows(plain(3), [client]))


@pytest.mark.parametrize("round", [4, 9])
def test_drift_of_labels_ends_with_other_labels(round):
  found = said(LABELS, marked("drift_labels"), round)
  label = (PLAIN.examples["label"] + 1) % CLASSES
  wanted = said(JOB, training_on(label=label), round)
  assert toy.same_bits(rows(found, HIT), rows(wanted, HIT))


@pytest.mark.parametrize("round", [1, 2, 6])
def test_drift_of_features_moves_them_with_the_round(round):
  found = said(FEATURES, marked("drift_features"), round)
  away = np.float32(2.0 * min(round / 4, 1))
  wanted = said(JOB, training_on(x=PLAIN.examples["x"] + away), round)
  assert toy.same_bits(rows(found, HIT), rows(wanted, HIT))


@functools.cache
def watched(stride):
  """A job whose message is the labels that it saw in 500 steps' rows."""

  def step(carry, sent, base, batch):
    return carry + batch.examples["label"], {}

  job = toy.voices()._replace(
    init=lambda sent, base, local, client: jnp.zeros(2000, jnp.int32),
    step=step,
    finish=lambda carry, sent: ({"seen": carry}, {}),
    stride=stride,
  )
  return drift.labels(10, 2, trait="drift")(job)


@pytest.mark.parametrize("stride", [1, 4])
def test_drift_of_labels_is_gradual(stride):
  job = watched(stride)
  keys = (
    jax.random.key(0)
    if stride == 1
    else jax.random.split(jax.random.key(0), stride)
  )
  batch = fp.Batch({"label": jnp.zeros(2000, jnp.int32)}, jnp.ones(2000), keys)

  @jax.jit
  def seen(round):
    sent = fp.Sent({}, {"round": round})
    carry = job.init(sent, {}, {}, toy.client(drift=jnp.int32(1)))
    carry, _ = job.step(carry, sent, {}, batch)
    return job.finish(carry, sent)[0]["seen"]

  # 2,000 draws: the mean errs by 0.011 at most, three of that is p = 0.003.
  for round, share in ((0, 0.0), (3, 0.3), (7, 0.7), (12, 1.0)):
    found = float(jnp.mean(seen(jnp.int32(round)).astype(jnp.float32)))
    assert abs(found - share) <= 3 * np.sqrt(share * (1 - share) / 2000)
  half = np.asarray(seen(jnp.int32(5))).reshape(4, 500)
  assert (half[0] != half[1]).any()  # rows of several keys are apart


def test_whole_features_round_and_saturate():
  change = fault.drift_features(2, 100.6, feature="image").wrap
  seen = []

  def step(carry, sent, base, batch):
    seen.append(batch.examples)
    return carry, {}

  job = change(toy.voices()._replace(step=step))
  image = jnp.array([[0, 100, 200, 255]], jnp.uint8)
  other = jnp.array([[1.0]])
  batch = fp.Batch({"image": image, "x": other}, jnp.ones(1), jax.random.key(0))
  for round, wanted in ((1, [50, 150, 250, 255]), (5, [101, 201, 255, 255])):
    sent = fp.Sent({}, {"round": jnp.int32(round)})
    client = toy.client(drift_features=jnp.int32(1))
    job.step(job.init(sent, {}, {}, client), sent, {}, batch)
    np.testing.assert_array_equal(seen[-1]["image"], [wanted])
    assert seen[-1]["image"].dtype == jnp.uint8
    np.testing.assert_array_equal(seen[-1]["x"], other)


# Refusals.


@pytest.mark.parametrize(
  ("wrap", "message"),
  [
    (corruption.wrapper("nan"), "reads the trait 'corrupt'"),
    (fault.drift_labels(3, 3).wrap, "reads the trait 'drift_labels'"),
    (fault.drift_features(3, 1.0).wrap, "reads the trait 'drift_features'"),
  ],
)
def test_clients_without_the_trait_are_refused(wrap, message):
  with pytest.raises(ValueError, match=message):
    wrap(toy.voices()).init(None, None, {}, toy.client())


@pytest.mark.parametrize(
  ("one", "examples", "message"),
  [
    (
      fault.drift_labels(3, 3),
      {"label": jnp.zeros(1)},
      "changes an integer 'label', the examples have {'label': 'float32'}",
    ),
    (
      fault.drift_features(3, 1.0),
      {"tokens": jnp.zeros((1, 2), jnp.int32)},
      "moves 'leaves of floats', the examples have {'tokens': 'int32'}",
    ),
    (
      fault.drift_features(3, 1.0, feature="tokens"),
      {"tokens": jnp.zeros((1, 2), jnp.int32)},
      "moves 'tokens'",
    ),
  ],
)
def test_examples_that_cannot_drift_are_refused(one, examples, message):
  trait = next(iter(one.traits(np.arange(1), 0, 0)))
  job = one.wrap(toy.voices())
  sent = fp.Sent({}, {"round": jnp.int32(0)})
  carry = job.init(sent, {}, {}, toy.client(**{trait: jnp.int32(1)}))
  batch = fp.Batch(examples, jnp.ones(1), jax.random.key(0))
  with pytest.raises(ValueError, match=message):
    job.step(carry, sent, {}, batch)
