"""Planted groups: the same examples, under names that a group agrees on."""

import dataclasses

import numpy as np
import pytest

from fedjax_peft import data

CLASSES, CLIENTS = 6, 10


def people(classes=CLASSES):
  """Clients of unequal size; x tells every example apart."""
  rng = np.random.default_rng(0)
  owner = np.repeat(np.arange(CLIENTS), rng.integers(3, 9, CLIENTS))
  label = rng.integers(0, CLASSES, owner.size).astype(np.int32)
  label[:CLASSES] = np.arange(CLASSES)
  x = np.arange(owner.size, dtype=np.float32)
  some = data.population(
    {"x": x, "label": label}, owner, heldout=0.3, classes=tuple("abcdef")
  )
  return dataclasses.replace(some, classes=some.classes[:classes])


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_clients_keep_their_examples_and_a_group_agrees_on_names(groups):
  before, after = people(), data.planted(people(), groups, seed=3)
  group = after.traits["group"]
  count = np.bincount(group, minlength=groups)
  assert count.max() - count.min() <= 1
  for name in ("train", "heldout"):
    mine, theirs = getattr(after, name), getattr(before, name)
    np.testing.assert_array_equal(mine.sizes, theirs.sizes)
    for client in range(CLIENTS):
      now, then = mine[client], theirs[client]
      x, label = after.examples["x"][now], after.examples["label"][now]
      np.testing.assert_array_equal(x, before.examples["x"][then])
      shift = (label - before.examples["label"][then]) % CLASSES
      np.testing.assert_array_equal(shift, group[client] * (CLASSES // groups))
  assert after.test.size == 0
  assert after.fingerprint != before.fingerprint


def test_the_deal_depends_on_the_seed_alone():
  one, two = (data.planted(people(), 3, seed=3) for _ in range(2))
  other = data.planted(people(), 3, seed=4)
  np.testing.assert_array_equal(one.traits["group"], two.traits["group"])
  assert (one.traits["group"] != other.traits["group"]).any()


@pytest.mark.parametrize(
  ("groups", "classes", "sentence"),
  [
    (7, CLASSES, r"groups must be in 1\.\.6"),
    (0, CLASSES, "groups must be an integer of at least 1"),
    ("3", CLASSES, "groups must be an integer of at least 1"),
    (2, 0, "leave data.groups out"),
  ],
)
def test_what_cannot_be_planted_is_refused(groups, classes, sentence):
  with pytest.raises(ValueError, match=sentence):
    data.planted(people(classes), groups)
