"""Memory: a population from the user's own arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_peft.data import check
from fedjax_peft.data.clients import Population
from fedjax_peft.data.ragged import Ragged


def population(
  examples: Mapping[str, Any],
  clients: Any,
  *,
  heldout: Any = 0.2,
  test: Any = None,
  unseen: Any = 0.0,
  seed: int = 0,
  names: Sequence[str] | None = None,
  classes: Sequence[str] = (),
  name: str = "user",
) -> Population:
  """A population from arrays in memory.

  Args:
    examples: leaves [M, ...] of numbers. 64-bit leaves become 32-bit ones; an
      integer that does not fit is an error.
    clients: who owns which rows. Either one key (integer or string) per
      example, [M]: one client per distinct key, in sorted order; or one list
      of rows per client, such as a partitioner returns.
    heldout: the fraction of a client's rows that it is tested on, in [0, 1),
      drawn at random; a client with two rows or more keeps at least one on
      either side, a client with one row trains on it. Or one list of rows per
      client, and then `clients` holds the training rows only.
    test: rows of the central test set, which no client trains on. By default
      all held-out rows.
    unseen: the fraction of clients that are never trained on, in [0, 1), drawn
      at random; or a bool [N] that is True for these.
    seed: of the two draws above.
    names: [N] client names. By default the keys, or "0", "1", ...
    classes: label names. By default "0", "1", ... up to the largest label, if
      the leaf `label` is integer [M].
    name: a name of the data set, for reports.

  Returns:
    A checked `Population`.

  Raises:
    ValueError: as `Population` does, or for a fraction that is out of range.

  Example:
    >>> data = population({"x": np.eye(4)}, ["ann", "bob", "ann", "bob"])
    >>> data.names, data.train.sizes, data.heldout.sizes
    (('ann', 'bob'), array([1, 1]), array([1, 1]))
  """
  leaves = {key: _narrow(key, leaf) for key, leaf in examples.items()}
  rows = check.leaves(leaves)
  owned, keys = _owned(clients, rows)
  if test is not None:
    test = check.rows("test", test, rows)
    owned = _without(owned, test)
  rng = np.random.default_rng(seed)
  if isinstance(heldout, int | float):
    check.fraction("heldout", heldout)
    train, held = _split(owned, float(heldout), rng)
  else:
    train, held = owned, _ragged(heldout)
  if isinstance(unseen, int | float):
    check.fraction("unseen", unseen)
    hidden = rng.permutation(len(owned))[: round(unseen * len(owned))]
    seen = ~np.isin(np.arange(len(owned)), hidden)
  else:
    seen = ~np.asarray(unseen, bool)
  return Population(
    examples=leaves,
    train=train,
    heldout=held,
    names=tuple(keys if names is None else names),
    seen=seen,
    test=np.unique(held.rows) if test is None else test,
    classes=tuple(classes) or _derived_classes(leaves.get("label")),
    name=name,
  )


def _narrow(key: str, leaf: Any) -> np.ndarray:
  """64-bit numbers as 32-bit ones, as the device would hold them."""
  leaf = np.asarray(leaf)
  if leaf.dtype == np.float64:
    return leaf.astype(np.float32)
  if leaf.dtype in (np.int64, np.uint64):
    narrow = leaf.astype(np.int32)
    if not np.array_equal(narrow, leaf):
      raise ValueError(
        f"integers must fit 32 bits: leaf {key!r} reaches {leaf.max()}"
      )
    return narrow
  return leaf


def _ragged(lists: Any) -> Ragged:
  """Row lists in either form as a Ragged."""
  return lists if isinstance(lists, Ragged) else Ragged.of(lists)


def _owned(clients: Any, rows: int) -> tuple[Ragged, tuple[str, ...]]:
  """Row lists and names from a key per example or from row lists."""
  is_lists = isinstance(clients, Ragged) or (
    len(clients) > 0
    and not isinstance(clients[0], str | bytes)
    and np.ndim(clients[0]) == 1
  )
  if is_lists:
    owned = _ragged(clients)
    return owned, tuple(map(str, range(len(owned))))
  keys = np.asarray(clients)
  if keys.shape != (rows,) or keys.dtype.kind not in "iuUSb":
    raise ValueError(
      "clients must be one key per example or one list of rows per client: "
      f"{keys.dtype} {list(keys.shape)} came for {rows} examples"
    )
  values, owner = np.unique(keys, return_inverse=True)
  names = (x.decode() if isinstance(x, bytes) else str(x) for x in values)
  return Ragged.grouped(owner, len(values)), tuple(names)


def _without(ragged: Ragged, rows: np.ndarray) -> Ragged:
  """The same lists less the given rows."""
  keep = ~np.isin(ragged.rows, rows)
  return Ragged.grouped(ragged.owner[keep], len(ragged), ragged.rows[keep])


def _split(
  owned: Ragged, fraction: float, rng: np.random.Generator
) -> tuple[Ragged, Ragged]:
  """Draws each client's held-out rows; order within a client is kept."""
  sizes, owner = owned.sizes, owned.owner
  take = np.maximum(np.rint(fraction * sizes), fraction > 0)
  take = np.minimum(take, np.maximum(sizes - 1, 0)).astype(np.int64)
  shuffled = np.lexsort((rng.random(len(owner)), owner))
  place = np.empty(len(owner), np.int64)
  place[shuffled] = np.arange(len(owner)) - owned.indptr[owner[shuffled]]
  held = place < take[owner]
  train, heldout = (
    Ragged.grouped(owner[side], len(owned), owned.rows[side])
    for side in (~held, held)
  )
  return train, heldout


def _derived_classes(label: np.ndarray | None) -> tuple[str, ...]:
  """Classes "0", "1", ... for integer labels [M]."""
  if label is None or label.ndim != 1 or label.dtype.kind not in "iu":
    return ()
  low, high = int(label.min()), int(label.max())
  if low < 0 or high >= len(label):
    raise ValueError(
      "integer labels must number the classes from 0: they reach from "
      f"{low} to {high}; pass classes=, or floats for a regression"
    )
  return tuple(map(str, range(high + 1)))
