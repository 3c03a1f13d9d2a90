"""Cache: arrays that took long to compute, kept by a hash of their inputs."""

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable

import numpy as np

from fedjax_peft.data import fetch


def key(*parts: str | Iterable[str]) -> str:
  """SHA-256 hex of strings and lists of strings; different parts differ.

  Example:
    >>> key("ab", ["c"]) == key("a", ["bc"])
    False
  """
  digest = hashlib.sha256()
  for part in parts:
    for text in [part] if isinstance(part, str) else part:
      data = text.encode()
      digest.update(b"%d:" % len(data) + data)
    digest.update(b";")
  return digest.hexdigest()


def arrays(
  name: str,
  make: Callable[[], dict[str, np.ndarray]],
  *,
  slow: float = 1.0,
) -> dict[str, np.ndarray]:
  """What `make` returns, computed once where that takes long.

  Args:
    name: a file name that changes whenever the result would.
    make: returns arrays by name.
    slow: seconds from which on the result is kept.
  """
  path = fetch.home() / "arrays" / f"{name}.npz"
  if path.is_file():
    with np.load(path) as stored:
      return {key: stored[key] for key in stored.files}
  start = time.monotonic()
  made = make()
  if time.monotonic() - start >= slow:
    # A cache that cannot be written (read-only, full) only costs time.
    with contextlib.suppress(OSError):
      path.parent.mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        fresh = os.path.join(scratch, "arrays.npz")
        np.savez(fresh, allow_pickle=False, **made)
        os.replace(fresh, path)
  return made
