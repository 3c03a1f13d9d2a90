"""Versions: each follows one, is signed by one, and stands for one state."""

import itertools

import jax
import numpy as np
import pytest

import fedjax_peft as fp
import toy
from fedjax_peft import checkpoint, record
from fedjax_peft.governance import inspection, signing, version

A, B = (signing.signer(x * 32) for x in (b"a", b"b"))


def chain(length=4, config="c" * 64):
  made = [version.first("0" * 64, config)]
  for number in range(1, length):
    made.append(version.following(made[-1], number, f"{number:064d}"))
  return made


def test_a_chain_is_accepted_version_by_version():
  made = chain()
  for parent, one in itertools.pairwise([None, *made]):
    assert version.check(version.sign(one, A), A.identity, parent) == one
    assert version.check(version.sign(one, None), None, parent) == one


def test_every_field_of_a_version_is_signed():
  one = chain()[2]
  signed, parent = version.sign(one, A), chain()[1]
  for field in version.Version._fields:
    value = getattr(one, field)
    other = value + 1 if isinstance(value, int) else "f" * 64
    forged = signed._replace(version=one._replace(**{field: other}))
    with pytest.raises(ValueError, match="signature of something else"):
      version.check(forged, A.identity, parent)


def test_signatures_by_another_key_are_refused():
  one = chain()[0]
  with pytest.raises(ValueError, match="or by another key"):
    version.check(version.sign(one, B), A.identity, None)
  with pytest.raises(ValueError, match="or by another key"):
    version.check(version.sign(one, None), A.identity, None)


@pytest.mark.parametrize(
  ("new", "parent", "words"),
  [
    (1, 1, "version 2 is expected next, .* got number=1; it was replayed"),
    (1, 2, "version 3 is expected next, .* got number=1"),
    (3, 1, "version 2 is expected next, .* got number=3"),
    (0, 1, "version 2 is expected next, .* got number=0"),
    (2, None, "version 0 is expected next, .* got number=2"),
  ],
)
def test_replayed_and_missing_numbers_are_refused(new, parent, words):
  made = chain()
  before = None if parent is None else made[parent]
  with pytest.raises(ValueError, match=words):
    version.check(version.sign(made[new], A), A.identity, before)


def test_another_parent_config_or_an_old_round_is_refused():
  parent, one = chain()[1:3]
  for change, words in (
    ({"parent": "f" * 64}, "with parent="),
    ({"config": "f" * 64}, "with config="),
    ({"round": 1}, "must be of a round after 1"),
  ):
    signed = version.sign(one._replace(**change), A)
    with pytest.raises(ValueError, match=words):
      version.check(signed, A.identity, parent)
  resumed = version.following(parent, 2, one.state, "f" * 64)
  signed = version.sign(resumed, A)
  assert version.check(signed, A.identity, parent, "f" * 64) == resumed


def test_a_version_survives_json():
  signed = version.sign(chain()[3], A)
  assert version.from_dict(version.to_dict(signed)) == signed
  good = version.to_dict(signed)
  for bad in (
    {},
    {"version": 3},
    {"version": good["version"] | {"more": 1}},
    {"version": good["version"] | {"number": True}},
    {"version": good["version"] | {"state": 1}},
  ):
    with pytest.raises(ValueError, match="a version has the fields"):
      version.from_dict(bad)


@pytest.fixture(scope="module")
def state():
  return fp.federated(toy.voices(), [fp.tier("cloud")]).init(
    clients=3, cohort=2
  )


def test_a_digest_is_of_what_receivers_hold_and_of_nothing_else(state):
  digest = version.of_state(state)
  same = state._replace(
    round=state.round + 1, plan={"x": np.zeros(2)}, clients=state.clients
  )
  assert version.of_state(same) == digest
  leaves, treedef = jax.tree.flatten(state.nodes)
  for i, leaf in enumerate(leaves):
    changed = [*leaves[:i], leaf + 1, *leaves[i + 1 :]]
    nodes = jax.tree.unflatten(treedef, changed)
    assert version.of_state(state._replace(nodes=nodes)) != digest, leaf


def test_a_checkpoint_tells_the_digest_without_the_model(state, tmp_path):
  saves = checkpoint.Checkpoints(tmp_path)
  saves.save(1, state._replace(clients=()), state.clients)
  saves.close()
  arrays = inspection._arrays(tmp_path / "1")
  assert version.of_arrays(arrays) == version.of_state(state)
  held = {k: x for k, x in arrays.items() if k.startswith(".nodes")}
  assert version.of_state(state) == record.digest(held)
