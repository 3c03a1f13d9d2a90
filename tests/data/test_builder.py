import struct
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from fedjax_peft import data
from fedjax_peft.data import records


class Pictures(tfds.core.GeneratorBasedBuilder):
  """Six grey PNG images, image r of brightness r."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, source, **options):
    self._source = source
    super().__init__(file_format="array_record", **options)

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(4, 4, 1)),
          "label": tfds.features.ClassLabel(num_classes=2),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    def chunk(kind, body):
      crc = struct.pack(">I", zlib.crc32(kind + body))
      return struct.pack(">I", len(body)) + kind + body + crc

    for row in range(6):
      path = self._source / f"{row}.png"
      pixels = zlib.compress((b"\0" + bytes([row] * 4)) * 4)
      path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
      )
      yield row, {"image": str(path), "label": row % 2}


class Watch(tfds.core.GeneratorBasedBuilder):
  """Readings of four wearers, with a note of each."""

  VERSION = tfds.core.Version("1.2.0")

  def __init__(self, **options):
    super().__init__(file_format="array_record", **options)

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "client_id": tfds.features.Text(),
          "team": np.int64,
          "reading": tfds.features.Tensor(shape=(3,), dtype=np.float32),
          "note": tfds.features.Text(),
          "sport": tfds.features.Text(),
          "label": tfds.features.ClassLabel(names=("rest", "run")),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {
      "train": self._generate_examples(40),
      "test": self._generate_examples(8),
    }

  def _generate_examples(self, count):
    for row in range(count):
      yield (
        row,
        {
          "client_id": "wearer-" + "abcd"[row % 4],
          "team": row % 2,
          "reading": np.full(3, row, np.float32),
          "note": f"row {row} r\u00e9sum\u00e9",
          "sport": "swim" if row % 3 else "bike",
          "label": row // 2 % 2,
        },
      )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("watch")
  records.build(Watch(data_dir=path))
  return path


@pytest.fixture
def prepared(folder, home):
  """The directory of a prepared builder, and an empty cache."""
  return folder / "watch"


def test_a_builder_directory_gives_one_client_per_client_id(prepared):
  for name in (prepared, prepared / "1.2.0"):
    found = data.load(str(name))
    assert found.names == tuple(f"wearer-{x}" for x in "abcd")
    assert found.classes == ("rest", "run")
    assert set(found.examples) == {"team", "reading", "label"}
    for client in range(4):
      rows = np.concatenate([found.train[client], found.heldout[client]])
      np.testing.assert_array_equal(np.sort(rows), np.arange(client, 40, 4))
    assert found.examples["reading"][7].tolist() == [7, 7, 7]
    assert found.examples["team"].dtype == np.int32


def test_a_name_is_looked_for_in_the_data_directories(prepared, monkeypatch):
  assert len(data.load("watch", data_dir=prepared.parent)) == 4
  monkeypatch.setenv("TFDS_DATA_DIR", str(prepared.parent))
  assert data.load("watch").name == "watch/1.2.0"


def test_any_feature_can_name_the_client_or_the_label(prepared):
  found = data.load(str(prepared), client_id="team", label="sport")
  assert found.names == ("0", "1")
  assert found.classes == ("bike", "swim")
  assert found.examples["label"][:4].tolist() == [0, 1, 1, 0]


def test_a_partition_replaces_the_client_id(prepared):
  found = data.load(
    str(prepared), partition="dirichlet", clients=5, min_size=2, heldout=0.0
  )
  np.testing.assert_array_equal(np.sort(found.train.rows), np.arange(40))
  assert found.train.sizes.min() >= 2


def test_a_test_split_is_the_central_test_set(prepared):
  found = data.load(str(prepared), test_split="test")
  assert found.test.tolist() == list(range(40, 48))
  assert found.examples["reading"][47, 0] == 7
  assert found.train.rows.max() < 40


def test_text_becomes_tokens(prepared):
  found = data.load(str(prepared), text="note", tokenizer="char", tokens=16)
  assert found.examples["length"][:11].tolist() == [12] * 10 + [13]
  assert found.spec["tokens"].shape == (16,)


def test_the_cache_of_records_equals_the_records(prepared, monkeypatch):
  builder = tfds.builder_from_directory(str(prepared / "1.2.0"))
  plain = records.read(builder, "train")
  keep = records.cache.arrays
  monkeypatch.setattr(
    records.cache, "arrays", lambda name, make: keep(name, make, slow=0.0)
  )
  for _ in range(2):  # written, then read back
    found = records.read(builder, "train")
    assert found["note"] == plain["note"]
    assert found["note"][3] == "row 3 r\u00e9sum\u00e9"
    np.testing.assert_array_equal(found["reading"], plain["reading"])


BAD = {
  "feature": ({"client_id": "teem"}, "did you mean 'team'"),
  "label": ({"label": "lable"}, "did you mean 'label'"),
  "split": ({"split": "trian"}, "did you mean 'train'"),
  "both": ({"client_id": "team", "partition": "iid"}, "not both"),
  "option": ({"tokenzer": "char"}, "did you mean 'tokenizer'"),
  "partition": ({"partition": "idd"}, "did you mean 'iid'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_there_names_the_nearest(prepared, case):
  options, message = BAD[case]
  with pytest.raises(ValueError, match=message):
    data.load(str(prepared), **options)


def test_what_is_not_prepared_is_never_downloaded(home):
  with pytest.raises(
    FileNotFoundError, match="dataset 'mnist' must be prepared"
  ):
    data.load("mnist", label="label")


def test_other_file_formats_are_refused(prepared, tmp_path):
  copy = tmp_path / "1.2.0"
  copy.mkdir()
  for path in (prepared / "1.2.0").iterdir():
    (copy / path.name).write_bytes(path.read_bytes())
  info = copy / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(ValueError, match="prepare it with file_format='array_"):
    data.load(str(copy))


def test_images_are_arrays(home, tmp_path):
  pytest.importorskip("PIL", reason="tensorflow-datasets decodes with Pillow")
  records.build(Pictures(tmp_path, data_dir=tmp_path))
  found = data.load(str(tmp_path / "pictures"), partition="iid", clients=3)
  assert found.spec["image"].shape == (4, 4, 1)
  assert found.examples["image"][:, 2, 1, 0].tolist() == list(range(6))
