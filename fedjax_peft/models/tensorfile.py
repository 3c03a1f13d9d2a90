"""Weight files: safetensors, memory-mapped, in one file or in shards.

The names are known before anything is read, so that a wrong, missing or
truncated file is one sentence and not a model of garbage.

Format: https://github.com/huggingface/safetensors
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import safetensors

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Tensors(Mapping[str, np.ndarray]):
  """Tensors by name; reading one maps its bytes, nothing is read before."""

  def __init__(self, files: Mapping[str, safetensors.safe_open]):
    self._files = dict(files)

  def __getitem__(self, name: str) -> np.ndarray:
    return self._files[name].get_tensor(name)

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __len__(self) -> int:
    return len(self._files)


@contextlib.contextmanager
def opened(directory: pathlib.Path) -> Iterator[Tensors]:
  """Opens the weights of a Hugging Face model directory.

  Args:
    directory: holds `model.safetensors`, or shards and
      `model.safetensors.index.json`.

  Yields:
    The tensors by name.

  Raises:
    FileNotFoundError: if there are no weights, or a shard is not there.
    ValueError: if a file is truncated or damaged, or the index is wrong.
  """
  with contextlib.ExitStack() as stack:
    files: dict[str, safetensors.safe_open] = {}
    for path in _shards(directory):
      file = stack.enter_context(_open(path))
      files |= dict.fromkeys(file.keys(), file)
    yield Tensors(files)


def _shards(directory):
  """The files that hold the weights."""
  index = directory / _INDEX
  if not index.is_file():
    if not (directory / _FILE).is_file():
      raise FileNotFoundError(
        f"{directory} must hold {_FILE} or {_INDEX}: it has"
        f" {sorted(path.name for path in directory.iterdir())}"
      )
    return [directory / _FILE]
  try:
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise ValueError(
      f"{index} must be JSON with a weight_map: {error!r}; copy it again"
    ) from error
  lacking = [name for name in names if not (directory / name).is_file()]
  if lacking:
    raise FileNotFoundError(
      f"{directory} lacks {len(lacking)} of {len(names)} shards named in"
      f" {_INDEX}: {lacking}; copy them there"
    )
  return [directory / name for name in names]


def _open(path):
  """Maps one file; its header must cover the file exactly."""
  try:
    return safetensors.safe_open(path, framework="numpy")
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path} is truncated or damaged ({path.stat().st_size} bytes):"
      f" {error}; remove its directory and prepare or copy it again"
    ) from error
