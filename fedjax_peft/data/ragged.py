"""Ragged: lists of rows of different lengths, stored end to end."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Ragged:
  """One list of rows per client, stored end to end.

  `len(ragged)` is N, `ragged[i]` the rows of client i, and iterating yields
  one array per client.

  Attributes:
    indptr: int64 [N + 1]; client i owns `rows[indptr[i]:indptr[i + 1]]`.
    rows: int32 [sum of sizes]; indices into the leading axis of the examples.

  Example:
    >>> ragged = Ragged.of([[3, 1], [], [2]])
    >>> ragged.sizes, ragged[0]
    (array([2, 0, 1]), array([3, 1], dtype=int32))
  """

  indptr: np.ndarray
  rows: np.ndarray

  @classmethod
  def of(cls, lists: Sequence[Any]) -> "Ragged":
    """Stores one sequence of integer rows per client end to end."""
    arrays = [np.asarray(rows) for rows in lists]
    for client, rows in enumerate(arrays):
      if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
        raise ValueError(
          "rows must be one 1-D array of integers per client: client "
          f"{client} came as {rows.dtype} {list(rows.shape)}"
        )
    sizes = [len(rows) for rows in arrays]
    rows = np.concatenate([np.zeros(0, np.int64), *arrays])
    return cls(np.cumsum([0, *sizes]).astype(np.int64), rows.astype(np.int32))

  @classmethod
  def grouped(
    cls, owner: np.ndarray, clients: int, rows: np.ndarray | None = None
  ) -> "Ragged":
    """Groups rows by their owner, keeping their order within a client.

    Args:
      owner: integers [K] in [0, clients), the client of each row.
      clients: N.
      rows: integers [K]; by default 0, 1, ..., K - 1.
    """
    order = np.argsort(owner, kind="stable")
    sizes = np.bincount(owner, minlength=clients)
    rows = order if rows is None else np.asarray(rows)[order]
    indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return cls(indptr, rows.astype(np.int32))

  @property
  def sizes(self) -> np.ndarray:
    """Rows per client, int64 [N]."""
    return np.diff(self.indptr)

  @property
  def owner(self) -> np.ndarray:
    """The client of every stored row, int64 [sum of sizes]."""
    return np.repeat(np.arange(len(self)), self.sizes)

  def __len__(self) -> int:
    return len(self.indptr) - 1

  def __getitem__(self, client: int) -> np.ndarray:
    if not -len(self) <= client < len(self):
      raise IndexError(f"client {client} of {len(self)}")
    client %= len(self)
    return self.rows[self.indptr[client] : self.indptr[client + 1]]

  def __iter__(self) -> Iterator[np.ndarray]:
    return (self[client] for client in range(len(self)))
