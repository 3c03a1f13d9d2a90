import dataclasses

import jax
import numpy as np
import pytest

from fedjax_peft import data

KEYS = ["ann", "bob", "ann", "bob", "ann", "cem"]


def toy(**options):
  leaves = {"x": np.arange(12.0).reshape(6, 2), "label": [0, 1, 0, 1, 2, 2]}
  return data.population(leaves, KEYS, **options)


def test_every_row_trains_or_is_held_out_once():
  rng = np.random.default_rng(0)
  owner = rng.integers(0, 50, 1000)
  found = data.population({"x": np.arange(1000)}, owner, heldout=0.25)
  rows = np.concatenate([found.train.rows, found.heldout.rows])
  np.testing.assert_array_equal(np.sort(rows), np.arange(1000))
  for client in range(50):
    mine = np.flatnonzero(owner == client)
    assert set(found.train[client]) | set(found.heldout[client]) == set(mine)
    assert len(found.heldout[client]) == np.rint(0.25 * len(mine))


def test_a_client_with_one_row_trains_and_one_with_two_is_also_tested():
  found = toy(heldout=0.01)
  assert found.names == ("ann", "bob", "cem")
  assert found.train.sizes.tolist() == [2, 1, 1]
  assert found.heldout.sizes.tolist() == [1, 1, 0]
  np.testing.assert_array_equal(found.test, np.sort(found.heldout.rows))


def test_rows_of_the_central_test_set_train_nobody():
  found = toy(test=[0, 3], heldout=0.0)
  assert found.test.tolist() == [0, 3]
  assert sorted(found.train.rows) == [1, 2, 4, 5]
  assert not len(found.heldout.rows)


def test_row_lists_and_ragged_give_the_same_population():
  lists = [[0, 2], [5, 1, 3]]
  one, two = (
    data.population({"x": np.arange(6)}, rows, heldout=[[4], []])
    for rows in (lists, data.Ragged.of(lists))
  )
  assert one.fingerprint == two.fingerprint
  assert one.train[1].tolist() == [5, 1, 3]
  assert one.heldout[0].tolist() == [4]


def test_unseen_is_a_fraction_or_a_mask():
  keys = np.arange(40) % 20
  found = data.population({"x": np.arange(40)}, keys, unseen=0.25)
  assert (~found.seen).sum() == 5
  mask = np.arange(20) == 7
  found = data.population({"x": np.arange(40)}, keys, unseen=mask)
  np.testing.assert_array_equal(~found.seen, mask)


def test_spec_is_one_example_and_64_bits_become_32():
  assert toy().spec == {
    "x": jax.ShapeDtypeStruct((2,), np.float32),
    "label": jax.ShapeDtypeStruct((), np.int32),
  }
  assert toy().classes == ("0", "1", "2")


def test_the_fingerprint_follows_contents_and_nothing_else():
  assert toy().fingerprint == toy(name="other").fingerprint
  others = [toy(seed=1), toy(unseen=0.4), toy(names="abc"), toy(heldout=0)]
  prints = {x.fingerprint for x in [toy(), *others]}
  assert len(prints) == 5


def test_a_population_cannot_be_changed():
  found = toy()
  mine = np.arange(6.0, dtype=np.float32)
  data.population({"x": mine}, KEYS)
  mine[0] = 3  # the user's own array stays writeable
  with pytest.raises(ValueError, match="read-only"):
    found.examples["x"][0] = 3
  with pytest.raises(ValueError, match="read-only"):
    found.train.rows[0] = 3
  with pytest.raises(dataclasses.FrozenInstanceError):
    found.name = "else"


def test_ragged_is_a_sequence_and_a_pytree():
  ragged = data.Ragged.of([[3, 1], [], [2]])
  assert len(ragged) == 3
  assert [rows.tolist() for rows in ragged] == [[3, 1], [], [2]]
  assert ragged[-1].tolist() == [2]
  assert ragged.owner.tolist() == [0, 0, 2]
  with pytest.raises(IndexError, match="client 3 of 3"):
    ragged[3]
  doubled = jax.tree.map(lambda x: 2 * x, ragged)
  assert doubled.rows.tolist() == [6, 2, 4]


def test_the_card_states_sizes_labels_and_skew():
  card = toy(unseen=0.3).card()
  assert "user: 3 clients (2 seen, 1 unseen)" in card
  assert "4 examples; per client min 1" in card
  assert "effective classes of 3 per client" in card
  assert toy().fingerprint[:16] in toy().card()


X = np.ones((6, 2), np.float32)
NAN = np.where(np.arange(12).reshape(6, 2) == 7, np.nan, X)
BAD = {
  "nan names client and row": (
    ({"x": NAN}, KEYS),
    {},
    r"leaf 'x' must hold finite numbers: row 3 of client 'bob' has nan or inf",
  ),
  "label out of range": (
    ({"x": X, "label": [0, 1, 9, 0, 1, 0]}, KEYS),
    {"classes": ("no", "yes")},
    r"labels in \[0, 2\): row 2 of client 'ann' has \[9\]",
  ),
  "label negative": (
    ({"x": X, "label": [0, -1, 1, 0, 1, 0]}, KEYS),
    {},
    "integer labels must number the classes from 0: they reach from -1 to 1",
  ),
  "float label with classes": (
    ({"x": X, "label": np.ones(6)}, KEYS),
    {"classes": ("no", "yes")},
    "label must be integers where classes are named: float32 came",
  ),
  "empty client": (
    ({"x": X}, [[0, 1], [], [2]]),
    {"names": ("ann", "bob", "cem"), "heldout": 0.0},
    r"1 of 3 have none \('bob'\)",
  ),
  "lengths": (
    ({"x": X, "y": np.ones(5)}, KEYS),
    {},
    r"leaves must have the same leading axis: \{'x': 6, 'y': 5\}",
  ),
  "row out of range": (
    ({"x": X}, [[0], [6]]),
    {"heldout": 0.0},
    r"rows of train must be in \[0, 6\), the examples there are: 6 came",
  ),
  "row on both sides": (
    ({"x": X}, [[0], [1, 2]]),
    {"heldout": [[2], []]},
    "row 2 of client '1' is also in heldout",
  ),
  "test row trained on": (
    ({"x": X}, [[0], [1, 2]]),
    {"heldout": [[0], []]},
    "row 0 of client '0' is also in heldout",
  ),
  "fractional rows": (
    ({"x": X}, [[0.5], [1.0]]),
    {},
    "one 1-D array of integers per client: client 0 came as float64",
  ),
  "wrong number of keys": (
    ({"x": X}, ["ann", "bob"]),
    {},
    r"<U3 \[2\] came for 6 examples",
  ),
  "no such fraction": (({"x": X}, KEYS), {"heldout": 1.0}, "heldout=1.0"),
  "same names": (({"x": X}, KEYS), {"names": "aab"}, "'a' came 2 times"),
  "too few names": (({"x": X}, KEYS), {"names": "ab"}, "'names': 2"),
  "objects": (
    ({"x": np.array(["a"] * 6)}, KEYS),
    {},
    r"leaf 'x' came as <U1 \[6\]",
  ),
  "wide integers": (
    ({"x": np.full(6, 2**40)}, KEYS),
    {},
    "leaf 'x' reaches 1099511627776",
  ),
  "nothing": (({}, KEYS), {}, "examples must have a leaf"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_sentence(case):
  arguments, options, message = BAD[case]
  with pytest.raises(ValueError, match=message) as error:
    data.population(*arguments, **options)
  assert "\n" not in str(error.value)
