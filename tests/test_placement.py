"""Where leaves live."""

import pytest

from fedjax_peft import placement

NAMES = ["block/lora_a", "block/lora_b", "head/bias", "head/kernel"]


def test_a_leaf_without_a_label_travels_to_the_top():
  found = placement.resolve(NAMES, None, ["edge", "cloud"])
  assert set(found.values()) == {"cloud"}
  assert list(found) == NAMES


def test_the_first_rule_that_matches_the_whole_name_wins():
  rules = {"head/bias": "frozen", "head/.*": "device", ".*lora_a": "edge"}
  found = placement.resolve(NAMES, rules, ["edge", "cloud"])
  assert found == {
    "block/lora_a": "edge",
    "block/lora_b": "cloud",
    "head/bias": "frozen",
    "head/kernel": "device",
  }


@pytest.mark.parametrize(
  ("rules", "words"),
  [
    ({"head": "device"}, ["'head'", "matches no parameter", "did you mean"]),
    ({"head/kernl": "device"}, ["'head/kernl'", "'head/kernel'"]),
    ({"head/.*": "divice"}, ["'divice'", "did you mean 'device'"]),
    ({"head/.*": "edge"}, ["one of", "'cloud'", "got 'edge'"]),
    ({".*": "frozen"}, ["nothing is left to train"]),
  ],
)
def test_a_rule_that_cannot_work_is_refused_with_a_near_name(rules, words):
  with pytest.raises(ValueError, match=".") as error:
    placement.resolve(NAMES, rules, ["cloud"])
  for word in words:
    assert word in str(error.value)


def test_a_leaf_that_the_forward_pass_changes_must_be_placed():
  names, changed = [*NAMES, "norm/mean"], {"norm/mean"}
  with pytest.raises(ValueError, match=r"'norm/mean' changes .* placement=\{"):
    placement.resolve(names, {"head/.*": "device"}, ["cloud"], changed)
  for label in ("cloud", "device", "frozen"):
    found = placement.resolve(names, {"norm/.*": label}, ["cloud"], changed)
    assert found["norm/mean"] == label
