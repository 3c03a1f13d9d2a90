"""Builder: any other prepared tensorflow-datasets builder as a population.

The data must lie on the disk as array_record files, with a feature that names
the client of each example, or to be partitioned. Nothing is downloaded.
"""

import os
import pathlib
import re
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fedjax_peft.data import check, fetch, memory, records
from fedjax_peft.data import partition as partitions
from fedjax_peft.data import tokens as tokens_lib
from fedjax_peft.data.clients import Population

_VERSION = re.compile(r"\d+\.\d+\.\d+")


def load(
  name: str,
  *,
  seed: int = 0,
  client_id: str | None = None,
  partition: str | None = None,
  clients: int = 100,
  alpha: float = 0.3,
  min_size: int = 1,
  per_client: int = 2,
  sigma: float = 1.0,
  label: str | None = None,
  text: str | None = None,
  tokens: int = 64,
  tokenizer: tokens_lib.Tokenizer = "minilm",
  split: str = "train",
  test_split: str | None = None,
  heldout: float = 0.2,
  unseen: float = 0.0,
  data_dir: str | os.PathLike[str] | None = None,
) -> Population:
  """A population from a prepared builder.

  Args:
    name: the directory of a prepared builder (or of its versions: the highest
      is read), or a name such as "mnist" or "glue/sst2" looked for in
      `data_dir`.
    seed: of all draws.
    client_id: the feature, integer or text, that names an example's client. By
      default "client_id" where there is such a feature and no `partition`.
    partition: instead of `client_id`: "dirichlet", "iid", "quantity" or
      "shards", with `clients`, `alpha`, `min_size`, `per_client` and `sigma` as
      in `fedjax_peft.data.partition.by_name`.
    clients: N, for a partition.
    alpha: of "dirichlet".
    min_size: of "dirichlet" and "quantity".
    per_client: of "shards".
    sigma: of "quantity".
    label: the feature that becomes the leaf `label`; by default "label" where
      there is such a feature. Text labels become the classes in sorted order.
    text: a Text feature that becomes the leaves `tokens` and `length`. Other
      Text features are not used.
    tokens: T, for `text`.
    tokenizer: for `text`, see `tokens.rows`.
    split: the split whose examples the clients own.
    test_split: a split that becomes the central test set; by default that is
      all held-out rows.
    heldout: the fraction of each client's rows that it is tested on.
    unseen: the fraction of clients that are never trained on.
    data_dir: where names are looked for; by default what is prepared in our
      cache, then TFDS_DATA_DIR, then ~/tensorflow_datasets.

  Raises:
    FileNotFoundError: if there are no prepared files.
    ValueError: for a feature or split that is not there; names the nearest.
  """
  prepared = tfds.builder_from_directory(str(_directory(name, data_dir)))
  splits = [split] if test_split is None else [split, test_split]
  for wanted in splits:
    check.choice("the split", wanted, list(prepared.info.splits))
  parts = [records.read(prepared, wanted) for wanted in splits]
  label = label or ("label" if "label" in parts[0] else None)
  if client_id and partition:
    raise ValueError(
      "clients come from a feature or from a partition, not both: "
      f"{client_id=} {partition=}"
    )
  client_id = client_id or ("" if partition else "client_id")
  for feature in filter(None, (client_id, label, text)):
    check.choice("the feature", feature, list(parts[0]))
  table = {key: _joined([part[key] for part in parts]) for key in parts[0]}
  used = {client_id, label, text}
  leaves = {
    key: column
    for key, column in table.items()
    if key not in used and isinstance(column, np.ndarray)
  }
  classes: tuple[str, ...] = ()
  if label is not None:
    leaves["label"], classes = _labels(table[label], prepared, label)
  if text is not None:
    leaves |= tokens_lib.rows(table[text], tokenizer, tokens)
  count, *tested = (prepared.info.splits[x].num_examples for x in splits)
  if client_id:
    keys = np.asarray(table[client_id])[:count]
    owned = partitions.by_feature(keys)
    names = [str(key) for key in np.unique(keys)]
  else:
    names = None
    owned = partitions.by_name(
      partition or "",
      leaves["label"][:count] if label else np.zeros(count),
      clients,
      alpha=alpha,
      min_size=min_size,
      per_client=per_client,
      sigma=sigma,
      seed=seed,
    )
  return memory.population(
    leaves,
    owned,
    heldout=heldout,
    test=None if test_split is None else count + np.arange(tested[0]),
    unseen=unseen,
    seed=seed,
    names=names,
    classes=classes,
    name=prepared.info.full_name,
  )


def _directory(
  name: str, data_dir: str | os.PathLike[str] | None
) -> pathlib.Path:
  """The directory of the prepared files, in their highest version."""
  roots = (
    [data_dir]
    if data_dir
    else [
      fetch.home() / "datasets",
      os.environ.get("TFDS_DATA_DIR"),
      pathlib.Path.home() / "tensorflow_datasets",
    ]
  )
  places = [pathlib.Path(name), *(pathlib.Path(x, name) for x in roots if x)]
  for place in places:
    found = [path.parent for path in place.glob("*/dataset_info.json")]
    found = [path for path in found if _VERSION.fullmatch(path.name)]
    if (place / "dataset_info.json").is_file():
      return place
    if found:
      return max(found, key=lambda x: tuple(map(int, x.name.split("."))))
  raise FileNotFoundError(
    f"dataset {name!r} must be prepared, with a dataset_info.json: none is in "
    f"{', '.join(map(str, places))}"
  )


def _joined(columns: list[Any]) -> Any:
  """Columns of several splits as one."""
  if isinstance(columns[0], list):
    return [text for column in columns for text in column]
  return np.concatenate(columns)


def _labels(
  column: Any, prepared: tfds.core.DatasetBuilder, feature: str
) -> tuple[np.ndarray, tuple[str, ...]]:
  """Labels as numbers, with their names where there are some."""
  if isinstance(column, list):
    names, numbers = np.unique(column, return_inverse=True)
    return numbers.astype(np.int32), tuple(map(str, names))
  return column, tuple(
    getattr(prepared.info.features[feature], "names", None) or ()
  )
