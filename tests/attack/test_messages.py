"""What a client reports: honest ones as ever, attackers by the formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import crowd
import fedjax_peft as fp
import toy
from fedjax_peft import attack, factored

SIZES = (3, 8, 5, 4, 7, 6)
LIARS = (1, 4)
PLAIN = toy.people(SIZES)
DATA = attack.attackers(PLAIN, LIARS)
HONEST = [i for i in range(len(SIZES)) if i not in LIARS]
CLASSES = 3
HOW = fp.local(optax.sgd(0.3), batch=4, epochs=2)
JOB = fp.train(toy.net(), HOW)
PARAMS = {k: np.asarray(v) for k, v in toy.net().params.items()}
TARGET = {k: 2 + np.zeros_like(v) for k, v in PARAMS.items()}


def mark(examples):
  """A trigger on a row of numbers."""
  x = jnp.asarray(examples["x"])
  return {**examples, "x": x.at[:, 0].set(9)}


TRIGGER = attack.Trigger("nine", mark)
ATTACKS = {
  "backdoor": lambda job: attack.backdoor(job, TRIGGER, 2),
  "gaussian": lambda job: attack.gaussian(job, 0.5),
  "label_flip": lambda job: attack.label_flip(job, CLASSES),
  "replace": lambda job: attack.replace(job, TARGET, 3.0),
  "scale": lambda job: attack.scale(job, 10.0),
  "sign_flip": lambda job: attack.sign_flip(job, 5.0),
}


@functools.cache
def messages(name=None, twice=None, data=DATA):
  """{leaf: [N, ...]} that clients report, and their stats."""
  job = JOB if name is None else ATTACKS[name](JOB)
  job = job if twice is None else ATTACKS[twice](job)
  base = toy.net().base
  return fp.for_each_client(job, data, base=base)


def near(found, wanted, eps):
  assert found.keys() == wanted.keys()
  for k, x in wanted.items():
    np.testing.assert_allclose(found[k], x, rtol=eps, atol=eps)


def rows(tree, ids):
  return jax.tree.map(lambda x: x[np.array(ids)], tree)


@pytest.mark.parametrize("name", ATTACKS)
def test_honest_clients_report_the_same_bits(name, tol):
  (plain, stats), (found, counted) = messages(), messages(name)
  assert toy.same_bits(rows(found, HONEST), rows(plain, HONEST))
  # Sums of losses are made by two programs, each in an order of its own.
  near(rows(counted, HONEST), rows(stats, HONEST), tol(jnp.float32, 16))
  for liar in LIARS:
    assert not toy.same_bits(rows(found, [liar]), rows(plain, [liar]))


@pytest.mark.parametrize(
  ("name", "factor"), [("scale", 10.0), ("sign_flip", -5.0)]
)
def test_attackers_multiply_their_message(name, factor):
  plain, found = (rows(messages(n)[0], LIARS) for n in (None, name))
  for k, x in plain.items():
    np.testing.assert_array_equal(found[k], np.float32(factor) * x)


def test_attackers_send_noise_of_the_given_deviation():
  # 150 messages of 11 values: the sample deviation of 1,650 normals errs by
  # 1.7 %, and is within three times that with probability 0.997.
  job = attack.gaussian(toy.voices(), 0.5)

  @jax.jit
  @jax.vmap
  def said(id):
    client = toy.client(id, attacker=jnp.int32(1))
    return job.finish(job.init(None, None, {}, client), None)[0]

  noise = np.concatenate([x.ravel() for x in said(np.arange(150)).values()])
  assert noise.size == 1650
  error = 3 / np.sqrt(2 * noise.size)
  assert abs(noise.std() / 0.5 - 1) < error
  assert abs(noise.std() / 0.45 - 1) > error  # a wrong constant fails
  assert abs(noise.mean()) < 3 * 0.5 / np.sqrt(noise.size)
  assert np.unique(noise).size == noise.size  # no key is used twice


def test_attackers_put_the_model_at_their_target(tol):
  found = rows(messages("replace")[0], LIARS)
  wanted = {k: np.stack([3 * (PARAMS[k] - TARGET[k])] * 2) for k in PARAMS}
  near(found, wanted, tol(jnp.float32, 3))


def test_a_label_flip_is_training_on_flipped_labels():
  label = PLAIN.examples["label"]
  flipped = fp.data.Population(
    examples={**PLAIN.examples, "label": CLASSES - 1 - label},
    train=PLAIN.train,
    heldout=PLAIN.heldout,
    names=PLAIN.names,
    seen=PLAIN.seen,
    test=PLAIN.test,
    traits=DATA.traits,
  )
  found = rows(messages("label_flip")[0], LIARS)
  assert toy.same_bits(found, rows(messages(data=flipped)[0], LIARS))


def test_a_label_flip_is_in_the_gradient(tol):
  # The other client's is that of its own labels.
  data = attack.attackers(toy.people((8, 8)), [1])
  job = attack.label_flip(fp.gradient(toy.net(), batch=8), CLASSES)
  found, _ = fp.for_each_client(job, data, base=toy.net().base)
  label = data.examples["label"].copy()
  liar = data.train[1]
  label[liar] = CLASSES - 1 - label[liar]
  seen = data.examples["x"], np.eye(CLASSES, dtype=np.float32)[label]

  @jax.jit
  @jax.grad
  def slope(params, x, wanted):
    z = jax.nn.relu(x @ params["up/kernel"]) @ params["head/kernel"]
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(z) * wanted, axis=-1))

  for i, rows in enumerate(data.train):
    wanted = slope(PARAMS, *(v[rows] for v in seen))
    near({k: v[i] for k, v in found.items()}, wanted, tol(jnp.float32, 56))


def test_a_backdoor_is_planted_in_a_part_of_the_examples():
  seen = []

  def step(carry, sent, base, batch):
    hits = (batch.examples["x"][:, 0] == 9) & (batch.mask > 0)
    right = hits & (batch.examples["label"] != 2)
    count = {
      "stamped": (jnp.sum(hits, dtype=jnp.float32), jnp.sum(batch.mask)),
      "wrong": (jnp.sum(right, dtype=jnp.float32), jnp.sum(batch.mask)),
    }
    return carry, count

  how = fp.local(optax.identity(), batch=4, epochs=40)
  watching = toy.voices()._replace(step=step, local=how)
  for fraction in (0.25, 1.0):
    job = attack.backdoor(watching, TRIGGER, 2, fraction=fraction)
    _, stats = fp.for_each_client(job, DATA)
    (hits, total), (wrong, _) = stats["stamped"], stats["wrong"]
    assert not hits[HONEST].any()
    assert not wrong.any()
    # 600 draws: within 3 standard errors with probability 0.997.
    share, n = hits.sum() / total[list(LIARS)].sum(), total[list(LIARS)].sum()
    assert n == 600
    assert abs(share - fraction) <= 3 * np.sqrt(fraction * (1 - fraction) / n)
    seen.append(share)
  assert seen[0] < 0.5 < seen[1] == 1


def test_attacks_compose(tol):
  found = rows(messages("label_flip", "sign_flip")[0], LIARS)
  flipped = rows(messages("label_flip")[0], LIARS)
  near(found, {k: -5 * v for k, v in flipped.items()}, tol(jnp.float32))
  both = ATTACKS["sign_flip"](ATTACKS["label_flip"](JOB))
  assert both.traits == ("attacker",)
  assert ATTACKS["scale"](JOB._replace(traits=("rank",))).traits == (
    "rank",
    "attacker",
  )


@pytest.mark.parametrize("name", ATTACKS)
def test_what_stays_on_the_device_is_the_clients_own(name):
  job = ATTACKS[name](fp.train(toy.net(), HOW, rules={"head/.*": "device"}))
  sent = fp.Sent({"up/kernel": PARAMS["up/kernel"]}, {"round": jnp.int32(0)})
  local = {"head/kernel": PARAMS["head/kernel"]}
  client = toy.client(attacker=jnp.int32(1))
  message, kept = job.finish(job.init(sent, {}, local, client), sent)
  assert set(message) == {"up/kernel"}
  assert toy.same_bits(jax.device_get(kept), local)


# Refusals.


def test_jobs_that_take_several_batches_at_once_are_refused():
  job = factored.train(toy.net(), HOW, JOB, np.array([2, 2]))
  assert job.stride == 2
  for wrap in ATTACKS.values():
    with pytest.raises(ValueError, match="stride=2"):
      wrap(job)


def test_messages_in_factors_are_refused():
  job = factored.train(toy.net(), HOW, JOB, np.array([1, 4]))
  assert job.stride == 1
  job = attack.scale(job, 2.0)
  client = toy.client(attacker=jnp.int32(1))
  carry = job.init(None, None, {}, client)
  with pytest.raises(ValueError, match="got factors"):
    job.finish(carry, None)


def test_clients_without_the_trait_are_told_how_to_get_it():
  job, sent = ATTACKS["scale"](JOB), fp.Sent(PARAMS, {"round": jnp.int32(0)})
  with pytest.raises(ValueError, match=r"have \['rank'\].*attack.attackers"):
    job.init(sent, {}, {}, toy.client(rank=jnp.int32(2)))


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: attack.sign_flip(JOB, -1.0), "factor=-1.0"),
    (lambda: attack.scale(JOB, float("nan")), "factor=nan"),
    (lambda: attack.gaussian(JOB, 0.0), "sigma=0.0"),
    (lambda: attack.label_flip(JOB, 1), "classes=1"),
    (lambda: attack.backdoor(JOB, TRIGGER, -1), "target=-1"),
    (lambda: attack.backdoor(JOB, TRIGGER, 0, fraction=1.5), "fraction=1.5"),
    (lambda: attack.replace(JOB, {}, 1.0), "got no 'head/kernel'"),
    (
      lambda: attack.replace(
        JOB, {**TARGET, "head/kernel": np.zeros((2, 2))}, 1.0
      ),
      r"shape of the model's, \[7, 3\]: got \[2, 2\]",
    ),
    (lambda: attack.replace(JOB, TARGET, 0.0), "boost=0.0"),
  ],
)
def test_a_bad_argument_is_named(make, words):
  with pytest.raises(ValueError, match=words):
    make()


def test_examples_without_integer_labels_are_refused():
  job = attack.label_flip(toy.voices(), 3)
  client = toy.client(attacker=jnp.int32(1))
  sent = fp.Sent({}, {"round": jnp.int32(0)})
  carry = job.init(sent, {}, {}, client)
  for examples, words in (
    ({"x": jnp.zeros((4, 5))}, "changes 'label'"),
    ({"x": jnp.zeros((4, 5)), "label": jnp.zeros(4)}, "float32"),
  ):
    batch = fp.Batch(examples, jnp.ones(4), jax.random.key(0))
    with pytest.raises(ValueError, match=words):
      job.step(carry, sent, {}, batch)


# Who attacks.


def test_a_fraction_of_those_trained_on_attacks():
  data = toy.people((4,) * 20, unseen=0.5)
  found = [
    attack.attackers(data, 0.3, seed=s).traits["attacker"] for s in (0, 0, 1)
  ]
  assert found[0].sum() == 3
  assert found[0][~data.seen].sum() == 0
  np.testing.assert_array_equal(found[0], found[1])
  assert (found[0] != found[2]).any()
  everyone = attack.attackers(data, 1.0).traits["attacker"]
  np.testing.assert_array_equal(everyone, data.seen)
  assert attack.attackers(data, []).traits["attacker"].sum() == 0
  assert attack.attackers(data, 0.0).traits["attacker"].sum() == 0


def test_named_clients_attack_and_other_traits_stay():
  data = crowd.people().with_traits(rank=np.arange(15))
  found = attack.attackers(data, [2, 14]).traits
  np.testing.assert_array_equal(np.flatnonzero(found["attacker"]), [2, 14])
  np.testing.assert_array_equal(found["rank"], np.arange(15))


@pytest.mark.parametrize("who", [1.5, -0.1, [15], [-1], [0.5], 3])
def test_attackers_that_do_not_exist_are_refused(who):
  with pytest.raises(ValueError, match="attackers"):
    attack.attackers(crowd.people(), who)
