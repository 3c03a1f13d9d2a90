"""The sets as they are; `fedjax-peft data prepare sotu shakespeare` first."""

import numpy as np
import pytest

from fedjax_peft import data
from fedjax_peft.data import records, shakespeare, sotu

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def messages():
  return data.load("sotu", tokenizer="hash:8192")


@pytest.fixture(scope="module")
def roles():
  return data.load("shakespeare", tokenizer="char")


def test_sotu_is_the_237_addresses_of_45_presidencies():
  table = sotu._paragraphs(25)
  assert len(set(table["speech"])) == 237
  assert len(set(table["president"])) == 45
  # Counted once over the files: 20,323 paragraphs of 25 words or more, of
  # which 29 occur twice.
  assert len(table["text"]) == 20_294
  shares = np.bincount(table["era"]) / len(table["text"])
  np.testing.assert_allclose(
    shares, [0.066, 0.150, 0.243, 0.148, 0.253, 0.140], atol=6e-4
  )


def test_a_thousand_sotu_clients_have_training_and_held_out_rows(messages):
  assert len(messages) == 1000
  assert messages.seen.sum() == 900
  assert messages.train.sizes.min() >= 4
  assert (messages.heldout.sizes == 8).all()
  rows = np.concatenate([np.sort(messages.train.rows), messages.test])
  np.testing.assert_array_equal(np.sort(rows), np.arange(20_294))


def test_no_sotu_test_paragraph_is_trained_on(messages):
  table = sotu._paragraphs(25)
  trained = {table["text"][row] for row in messages.train.rows}
  assert not trained & {table["text"][row] for row in messages.test}
  eras = np.bincount(table["era"][messages.test]) / len(messages.test)
  assert eras.max() < 0.3  # what a constant answer gets


def test_shakespeare_has_the_roles_that_were_counted_by_hand():
  # Another parser, written independently, found 30,348 speeches, 610 roles
  # with 10 speeches or more, 193 with 50 and 7 with 200; Hamlet has 358.
  table = records.read(
    records.prepared("shakespeare", shakespeare.VERSION), "speeches"
  )
  assert abs(len(table["text"]) - 30_348) < 100
  names = [f"{x}/{y}" for x, y in zip(table["play"], table["role"])]
  keys, counts = np.unique(names, return_counts=True)
  assert len(set(table["play"])) == 37
  assert 1_230 < len(keys) < 1_300
  assert abs((counts >= 10).sum() - 610) < 10
  assert abs((counts >= 50).sum() - 193) < 5
  assert counts[keys.tolist().index("hamlet/HAM")] == 358


@pytest.mark.parametrize(
  ("play", "role", "count"),
  [
    ("midsummer_nights_dream", "BOTTOM", 47),  # no full stop
    ("henry_iv_part_1", "FAL", 149),  # abbreviations in capitals
    ("hamlet", "P. QUEEN", 5),  # and in lower case
    ("cymbeline", "IMOGEN", 78),  # acts III and IV are missing
    ("troilus_and_cressida", "AGAMEMNON", 53),  # one marker is "AGAME"
    ("henry_vi_part_2", "1 MURDERER", 4),
  ],
)
def test_each_marker_style_is_read_in_its_play(play, role, count):
  # Counts are those of grep for the marker at the start of a line.
  table = records.read(
    records.prepared("shakespeare", shakespeare.VERSION), "speeches"
  )
  found = [x for x in zip(table["play"], table["role"]) if x == (play, role)]
  assert len(found) == count


def test_no_speech_holds_a_direction_or_a_heading():
  table = records.read(
    records.prepared("shakespeare", shakespeare.VERSION), "speeches"
  )
  for text in table["text"]:
    assert "[" not in text
    assert "gutenberg" not in text.lower()
    assert not any(x.startswith(("ACT ", "SCENE ")) for x in text.split("\n"))


def test_every_role_trains_before_it_is_tested(roles):
  assert len(roles) > 1000
  assert roles.train.sizes.min() >= 1
  assert (
    len({x.partition("/")[0] for x in np.array(roles.names)[~roles.seen]}) == 2
  )
  assert roles.examples["tokens"].max() < 98
