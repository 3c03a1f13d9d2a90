"""Records: one line a round, on the disk before anything else happens.

A record is a flat dict of numbers. Keys under `wall/` (seconds, memory) are
the only ones that depend on the machine; they come last, so that what must be
equal between two runs is a prefix of the line.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet

PyTree = Any


def append(path: str | os.PathLike, record: Mapping[str, Any]) -> int:
  """Writes one line and waits until it is on the disk.

  Args:
    path: a JSON lines file; it is made if it does not exist.
    record: {name: number, string, bool or None}; arrays hold one value.

  Returns:
    Bytes of the file, this line included.

  Raises:
    ValueError: if a number is not finite or a value is not a scalar.
    OSError: if the line cannot be written; what stood there before is kept.
  """
  line = (json.dumps(_ordered(record), allow_nan=False) + "\n").encode()
  # One unbuffered write, so that no part of a line lingers in this process.
  with open(path, "ab", buffering=0) as file:
    before = file.seek(0, os.SEEK_END)
    try:
      written = file.write(line)
      if written != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
      os.fsync(file.fileno())
    except OSError:
      with contextlib.suppress(OSError):
        file.truncate(before)
      raise
  return before + len(line)


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Returns the records of a file, none if there is no file.

  A last line without its line end was being written when the process died; it
  is left out.

  Raises:
    ValueError: if another line is not a JSON object.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return []
  lines = path.read_bytes().split(b"\n")
  found = []
  for number, line in enumerate(lines[:-1], start=1):
    try:
      found.append(json.loads(line))
    except ValueError:
      raise ValueError(
        f"line {number} of {path} must be a JSON object, got {line[:40]!r}"
      ) from None
  return found


def truncate(path: str | os.PathLike, length: int) -> None:
  """Cuts a file of records back to `length` bytes.

  Raises:
    ValueError: if the file is shorter: its records were lost elsewhere.
  """
  path = pathlib.Path(path)
  size = path.stat().st_size if path.exists() else 0
  if size < length:
    raise ValueError(
      f"{path} must hold the {length} bytes that its checkpoint counts, got "
      f"{size}; restore the file, or start afresh in another directory"
    )
  with open(path, "ab") as file:
    file.truncate(length)
    os.fsync(file.fileno())


def _ordered(record: Mapping[str, Any]) -> dict[str, Any]:
  """Plain values, `wall/` last."""
  plain = {name: _plain(name, value) for name, value in record.items()}
  wall = {k: v for k, v in plain.items() if k.startswith("wall/")}
  return {k: v for k, v in plain.items() if k not in wall} | wall


def _plain(name: str, value: Any) -> Any:
  """A value that JSON can hold; a float32 keeps its short decimal form."""
  if value is None or isinstance(value, str | bool | int):
    return value
  array = np.asarray(value)
  if array.size != 1 or array.dtype.kind not in "biufV":
    raise ValueError(
      f"{name} of a record must be one number, got an array of shape "
      f"{array.shape} and dtype {array.dtype}; reduce it first"
    )
  if array.dtype.kind in "biu":
    return array.item()
  if array.dtype.itemsize < 4:
    array = array.astype(np.float32)
  number = float(str(array.reshape(())[()]))
  if not math.isfinite(number):
    raise ValueError(
      f"{name} of a record must be finite, got {number}; a client's data or "
      "the learning rate is the usual cause"
    )
  return number


def digest(tree: PyTree) -> str:
  """Returns the SHA-256 of a pytree: paths, dtypes, shapes and bytes.

  Equal digests mean equal bits. Random keys count as their data.

  Example:
    >>> a = {"x": np.zeros(3, np.float32)}
    >>> digest(a) == digest({"x": np.zeros(3, np.float32)})
    True
    >>> digest(a) == digest({"x": -np.zeros(3, np.float32)})
    False
  """
  total = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = host(leaf)
    name = jax.tree_util.keystr(path)
    total.update(f"{name} {array.dtype} {array.shape}\n".encode())
    total.update(np.ascontiguousarray(array).tobytes())
  return total.hexdigest()


def host(leaf: Any) -> np.ndarray:
  """Returns a leaf as a numpy array; of a random key, its data."""
  if is_key(leaf):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf)


def is_key(leaf: Any) -> bool:
  """True for a typed random key."""
  dtype = getattr(leaf, "dtype", None)
  return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def write_clients(
  folder: str | os.PathLike, number: int, table: Mapping[str, Any]
) -> pathlib.Path:
  """Writes the clients' results of one round, all of them or none.

  Args:
    folder: where the parts lie; it is made if it does not exist.
    number: the round; an older part of the same round is replaced.
    table: {column: values [N]}.

  Returns:
    The path of the part, `round-000012.parquet`.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f"round-{number:06d}.parquet"
  fresh = path.with_suffix(".tmp")
  columns = {name: np.asarray(values) for name, values in table.items()}
  pyarrow.parquet.write_table(pa.table(columns), fresh)
  replace(fresh, path)
  return path


def drop_clients(folder: str | os.PathLike, after: int) -> None:
  """Removes the parts of rounds that a resumed run is about to repeat."""
  for path in pathlib.Path(folder).glob("round-*.parquet"):
    number = re.fullmatch(r"round-(\d+)", path.stem)
    if number and int(number[1]) > after:
      path.unlink()


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes a JSON file, all of it or nothing."""
  path = pathlib.Path(path)
  fresh = path.with_suffix(".tmp")
  fresh.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
  replace(fresh, path)


def replace(fresh: pathlib.Path, path: pathlib.Path) -> None:
  """Puts a finished file in its place, on the disk, in one step."""
  with open(fresh, "rb") as file:
    os.fsync(file.fileno())
  os.replace(fresh, path)
  folder = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(folder)
  finally:
    os.close(folder)
