"""Records: a line is on the disk whole, or not at all."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest

from fedjax_peft import record


def test_append_returns_where_the_file_ends(tmp_path):
  path = tmp_path / "records.jsonl"
  for number in range(3):
    length = record.append(path, {"round": number})
    assert length == path.stat().st_size
  assert record.read(path) == [{"round": n} for n in range(3)]


def test_wall_keys_come_last(tmp_path):
  path = tmp_path / "records.jsonl"
  record.append(path, {"wall/seconds": 1.0, "round": 1, "train/loss": 2.0})
  assert list(record.read(path)[0]) == ["round", "train/loss", "wall/seconds"]


@pytest.mark.parametrize(
  ("value", "line"),
  [
    (jnp.float32(0.1), "0.1"),
    (np.float64(0.1), "0.1"),
    (jnp.int32(3), "3"),
    (jnp.array([True]), "true"),
    (jnp.bfloat16(0.5), "0.5"),
    (2**40, "1099511627776"),
    ("text", '"text"'),
    (None, "null"),
  ],
)
def test_numbers_of_every_kind_are_plain(tmp_path, value, line):
  path = tmp_path / "records.jsonl"
  record.append(path, {"x": value})
  assert path.read_text() == f'{{"x": {line}}}\n'


def test_a_float32_reads_back_bit_for_bit(tmp_path):
  path = tmp_path / "records.jsonl"
  values = np.random.default_rng(0).normal(size=50).astype(np.float32)
  record.append(path, {str(i): x for i, x in enumerate(values)})
  back = np.array(list(record.read(path)[0].values()), np.float32)
  np.testing.assert_array_equal(back, values)


@pytest.mark.parametrize("value", [float("nan"), jnp.float32(jnp.inf)])
def test_a_number_that_is_not_finite_is_refused(tmp_path, value):
  path = tmp_path / "records.jsonl"
  record.append(path, {"round": 0})
  with pytest.raises(ValueError, match="train/loss of a record must be finite"):
    record.append(path, {"round": 1, "train/loss": value})
  assert record.read(path) == [{"round": 0}]


def test_an_array_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"one number, got .* shape \(3,\)"):
    record.append(tmp_path / "r", {"x": jnp.zeros(3)})


def test_a_line_that_was_being_written_is_left_out(tmp_path):
  path = tmp_path / "records.jsonl"
  record.append(path, {"round": 0})
  with open(path, "a") as file:
    file.write('{"round": 1, "tr')
  assert record.read(path) == [{"round": 0}]


def test_a_broken_line_is_named(tmp_path):
  path = tmp_path / "records.jsonl"
  path.write_text('{"round": 0}\nround 1\n{"round": 2}\n')
  with pytest.raises(ValueError, match=r"line 2 of .*must be a JSON object"):
    record.read(path)


def test_truncate_cuts_back_to_a_checkpoint(tmp_path):
  path = tmp_path / "records.jsonl"
  length = record.append(path, {"round": 0})
  record.append(path, {"round": 1})
  record.truncate(path, length)
  assert record.read(path) == [{"round": 0}]


def test_lost_records_are_refused(tmp_path):
  path = tmp_path / "records.jsonl"
  length = record.append(path, {"round": 0})
  with pytest.raises(ValueError, match=f"{length + 9} bytes .* got {length}"):
    record.truncate(path, length + 9)


@pytest.mark.skipif(
  not pathlib.Path("/dev/full").exists(), reason="needs /dev/full"
)
def test_a_full_disk_is_reported_as_such(tmp_path):
  path = tmp_path / "records.jsonl"
  path.symlink_to("/dev/full")
  with pytest.raises(OSError, match="No space left on device"):
    record.append(path, {"round": 0})


def test_digest_sees_paths_dtypes_shapes_and_bits():
  base = {"a": jnp.zeros((2, 3)), "b": jax.random.key(0)}
  others = [
    {"c": base["a"], "b": base["b"]},
    {"a": jnp.zeros((3, 2)), "b": base["b"]},
    {"a": jnp.zeros((2, 3), jnp.int32), "b": base["b"]},
    {"a": -base["a"], "b": base["b"]},
    {"a": base["a"], "b": jax.random.key(1)},
  ]
  found = {record.digest(tree) for tree in [base, *others]}
  assert len(found) == 1 + len(others)
  assert record.digest(base) == record.digest(jax.tree.map(jnp.array, base))


def test_client_tables_are_replaced_whole_and_reproducibly(tmp_path):
  table = {"client": np.arange(4), "accuracy": np.linspace(0, 1, 4)}
  path = record.write_clients(tmp_path, 3, table)
  first = path.read_bytes()
  assert record.write_clients(tmp_path, 3, table) == path
  assert path.read_bytes() == first
  back = pyarrow.parquet.read_table(path).to_pydict()
  assert back == {k: v.tolist() for k, v in table.items()}
  assert [p.name for p in tmp_path.iterdir()] == ["round-000003.parquet"]


def test_client_tables_of_later_rounds_are_dropped(tmp_path):
  for number in (2, 4, 6):
    record.write_clients(tmp_path, number, {"client": [0]})
  record.drop_clients(tmp_path, after=4)
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "round-000002.parquet",
    "round-000004.parquet",
  ]


def test_a_json_file_is_replaced_whole(tmp_path):
  path = tmp_path / "config.json"
  record.write_json(path, {"a": 1})
  with pytest.raises(ValueError, match="not JSON compliant"):
    record.write_json(path, {"a": float("nan")})
  assert json.loads(path.read_text()) == {"a": 1}
  assert os.listdir(tmp_path) == ["config.json"]
