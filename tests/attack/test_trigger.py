"""Triggers, and how often a backdoor answers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import crowd
import fedjax_peft as fp
import toy
from fedjax_peft import attack

PATCH = attack.patch(np.full((2, 3), 7.0), at=(1, 2))
PHRASE = attack.phrase([50, 51], at=2)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_a_patch_changes_its_place_and_nothing_else(dtype):
  image = np.random.default_rng(0).integers(0, 200, (3, 6, 5, 2)).astype(dtype)
  examples = {"image": image, "label": np.arange(3)}
  found = PATCH.stamp(examples)
  wanted = image.copy()
  wanted[:, 1:3, 2:5] = 7
  np.testing.assert_array_equal(found["image"], wanted)
  assert found["image"].dtype == dtype
  assert found["label"] is examples["label"]


def test_a_phrase_is_written_into_a_text_and_is_part_of_it():
  tokens = np.arange(18, dtype=np.int32).reshape(3, 6)
  length = np.array([1, 4, 6], np.int32)
  found = PHRASE.stamp({"tokens": tokens, "length": length})
  wanted = tokens.copy()
  wanted[:, 2:4] = [50, 51]
  np.testing.assert_array_equal(found["tokens"], wanted)
  np.testing.assert_array_equal(found["length"], [4, 4, 6])
  assert set(PHRASE.stamp({"tokens": tokens})) == {"tokens"}


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: attack.patch(np.zeros(3)), r"got shape \[3\]"),
    (lambda: attack.patch(np.ones((1, 1)), at=(-1, 0)), "row=-1"),
    (lambda: attack.phrase([]), "one or more"),
    (lambda: attack.phrase([0.5]), "integer"),
    (lambda: attack.phrase([1], at=-1), "at=-1"),
    (lambda: PATCH.stamp({"image": np.zeros((1, 2, 9, 1))}), "does not fit"),
    (lambda: PATCH.stamp({"pixels": np.zeros((1, 9, 9, 1))}), "feature="),
    (lambda: PHRASE.stamp({"tokens": np.zeros((2, 3), int)}), "does not fit"),
    (
      lambda: attack.patch(np.ones((2, 2, 3))).stamp(
        {"image": np.zeros((1, 9, 9, 2))}
      ),
      "does not fit",
    ),
  ],
)
def test_what_does_not_fit_is_refused(make, words):
  with pytest.raises(ValueError, match=words):
    make()


# A federation of small pictures, some of whose clients plant a backdoor.


class Seer(nnx.Module):
  """A linear classifier of pictures."""

  def __init__(self, rngs):
    self.head = nnx.Linear(16, 3, rngs=rngs)

  def __call__(self, image):
    return self.head(image.reshape(image.shape[0], -1))


MODEL = fp.model(
  Seer(nnx.Rngs(0)), fp.losses.classification, precision="float32"
)
CORNER = attack.patch(np.full((2, 2), 2.0))
GOAL = 0


def pictures():
  """Pictures of noise; the class is where the lower rows are brightest."""
  rng = np.random.default_rng(0)
  image = rng.normal(size=(240, 4, 4, 1)).astype(np.float32)
  label = image[:, 2:, :3, 0].sum(1).argmax(1).astype(np.int32)
  owner = np.repeat(np.arange(8), 30)
  return fp.data.population(
    {"image": image, "label": label}, owner, heldout=0.2
  )


DATA = attack.attackers(pictures(), [1, 5])


def trained(wrap):
  how = fp.local(optax.sgd(0.3), batch=8, epochs=2)
  job = wrap(fp.train(MODEL, how))
  algorithm = fp.federated(job, [fp.tier("cloud")])
  player = crowd.Player(algorithm, DATA, MODEL.base)
  state, _ = player.play(*[range(8)] * 6)
  return algorithm, state


def test_a_planted_backdoor_answers_and_an_absent_one_does_not():
  measure = attack.backdoor_rate(MODEL, DATA, CORNER, GOAL)
  rates, accuracies = {}, {}
  for name, wrap in {
    "honest": lambda job: attack.scale(job, 1.0),
    "planted": lambda job: attack.backdoor_image(
      attack.scale(job, 4.0), np.full((2, 2), 2.0), GOAL, fraction=0.6
    ),
  }.items():
    algorithm, state = trained(wrap)
    evaluate = fp.evaluation(algorithm, MODEL, DATA, central=measure)
    record = evaluate(state).record
    rates[name] = record["central/backdoor_rate"]
    accuracies[name] = record["test/accuracy"]
    # By hand, in NumPy.
    test = DATA.test[DATA.examples["label"][DATA.test] != GOAL]
    image = DATA.examples["image"][test].copy()
    image[:, :2, :2] = 2
    weights = {k: np.asarray(v) for k, v in state.params.items()}
    logits = image.reshape(len(test), -1) @ weights["head/kernel"]
    logits += weights["head/bias"]
    assert rates[name] == pytest.approx(np.mean(logits.argmax(1) == GOAL))
    # And client by client, on a triggered copy.
    other = fp.evaluation(
      algorithm, MODEL, attack.triggered(DATA, CORNER, GOAL)
    )
    found = other(state).record
    assert found["test/accuracy"] == pytest.approx(rates[name])
    assert found["eval/accuracy"] == pytest.approx(rates[name])
  assert rates["planted"] > 0.8
  assert rates["honest"] < 0.5
  assert accuracies["planted"] > accuracies["honest"] - 0.2  # it goes unseen


def test_a_triggered_copy_differs_in_what_is_tested_alone():
  copy = attack.triggered(DATA, CORNER, GOAL)
  label = DATA.examples["label"]
  kept = label[DATA.heldout.rows] != GOAL
  np.testing.assert_array_equal(copy.heldout.rows, DATA.heldout.rows[kept])
  np.testing.assert_array_equal(copy.heldout.owner, DATA.heldout.owner[kept])
  assert 0 < copy.test.size < DATA.test.size
  train = DATA.train.rows
  for name, leaf in DATA.examples.items():
    np.testing.assert_array_equal(copy.examples[name][train], leaf[train])
    assert copy.examples[name].dtype == leaf.dtype
  assert (copy.examples["label"][copy.test] == GOAL).all()
  np.testing.assert_array_equal(copy.examples["image"][copy.test, :2, :2], 2)
  np.testing.assert_array_equal(
    copy.traits["attacker"], [0, 1, 0, 0, 0, 1, 0, 0]
  )


def test_a_backdoor_that_cannot_be_measured_is_refused():
  data = toy.people()  # holds nothing out
  mark = attack.Trigger("none", lambda examples: examples)
  with pytest.raises(ValueError, match="'user' has none"):
    attack.backdoor_rate(toy.net(), data, mark, 0)
  numbers = fp.data.population({"x": np.eye(4)}, [0, 0, 1, 1])
  with pytest.raises(ValueError, match="integer labels"):
    attack.triggered(numbers, mark, 0)


def test_a_phrase_reaches_the_text_of_attackers_alone():
  def step(carry, sent, base, batch):
    total = jnp.sum(batch.examples["tokens"] * batch.mask[:, None].astype(int))
    return carry, {"sum": (total.astype(jnp.float32), jnp.sum(batch.mask))}

  rows = {
    "tokens": np.ones((8, 6), np.int32),
    "length": np.full(8, 6, np.int32),
    "label": np.zeros(8, np.int32),
  }
  data = fp.data.population(rows, np.repeat([0, 1], 4), heldout=0.0)
  job = toy.voices()._replace(step=step)
  job = attack.backdoor_text(job, [50, 51], 1, fraction=1.0)
  _, stats = fp.for_each_client(job, attack.attackers(data, [1]))
  total = stats["sum"][0]
  np.testing.assert_array_equal(total, [24, 4 * (4 + 101)])
  assert jax.tree.leaves(stats)
