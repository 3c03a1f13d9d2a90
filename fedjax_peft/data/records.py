"""Records: tensorflow-datasets builders without TensorFlow and network.

Builders write array_record files; reading goes through `as_data_source`. The
columns of a split are kept as arrays in the cache, since decoding one record
takes some 70 microseconds.
"""

import contextlib
import io
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fedjax_peft.data import cache, fetch

_NUMBERS = (tfds.features.Tensor, tfds.features.Image)

Columns = dict[str, Any]  # numbers [M, ...] or, for text, list of M strings


def directory(name: str, version: str) -> pathlib.Path:
  """Where a prepared data set lies."""
  return fetch.home() / "datasets" / name / version


def is_prepared(name: str, version: str) -> bool:
  """Whether `read` will find the data set."""
  return (directory(name, version) / "dataset_info.json").is_file()


def build(builder: tfds.core.DatasetBuilder):
  """Writes a builder's files; an interrupted run leaves nothing behind."""
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare()
  finally:
    tfds.enable_progress_bar()


def prepared(name: str, version: str) -> tfds.core.DatasetBuilder:
  """The builder of a data set of ours.

  Raises:
    FileNotFoundError: if it is not prepared; says what to run.
  """
  if not is_prepared(name, version):
    raise FileNotFoundError(
      f"dataset {name!r} is not prepared; run: fedjax-peft data prepare {name}"
    )
  return tfds.builder_from_directory(str(directory(name, version)))


def read(builder: tfds.core.DatasetBuilder, split: str) -> Columns:
  """All records of a split, by feature, in the order they were written.

  Args:
    builder: a prepared builder with array_record files.
    split: its name.

  Returns:
    For each top-level feature an array [M, ...], or a list of M strings for
    a Text feature. Features of varying shape are left out. Images need Pillow
    or OpenCV to be decoded.

  Raises:
    ValueError: for files in another format.
  """
  if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
    raise ValueError(
      f"{builder.info.full_name} must be array_record files: it is "
      f"{builder.info.file_format}; prepare it with file_format='array_record'"
    )
  files = sorted(pathlib.Path(builder.data_dir).iterdir())
  stats = [(path.name, path.stat()) for path in files]
  stamp = [f"{name} {x.st_size} {x.st_mtime_ns}" for name, x in stats]
  name = f"records-{cache.key(str(builder.data_dir), split, stamp)}"
  stored = cache.arrays(name, lambda: _columns(builder, split))
  texts = {key[:-5] for key in stored if key.endswith("/text")}
  return {
    **{key: x for key, x in stored.items() if "/" not in key},
    **{key: _strings(stored, key) for key in texts},
  }


def _columns(
  builder: tfds.core.DatasetBuilder, split: str
) -> dict[str, np.ndarray]:
  """Decodes a split; text becomes bytes end to end, with their ends."""
  source = builder.as_data_source(split=split)
  records = source.__getitems__(list(range(len(source))))
  columns = {}
  for key, feature in builder.info.features.items():
    values = [record[key] for record in records]
    if isinstance(feature, tfds.features.Text):
      columns[f"{key}/text"] = np.frombuffer(b"".join(values), np.uint8)
      columns[f"{key}/ends"] = np.cumsum([len(x) for x in values])
    elif isinstance(feature, _NUMBERS) and None not in feature.shape:
      columns[key] = np.asarray(values, feature.np_dtype)
  return columns


def _strings(stored: dict[str, np.ndarray], key: str) -> list[str]:
  """The inverse of how `_columns` stores text."""
  data, ends = stored[f"{key}/text"].tobytes(), stored[f"{key}/ends"].tolist()
  return [
    data[start:end].decode()
    for start, end in zip([0, *ends], ends, strict=False)
  ]
