"""Checks of a population: one sentence says what is wrong, and where."""

import collections
import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from fedjax_peft.data.ragged import Ragged

if TYPE_CHECKING:
  from fedjax_peft.data.clients import Population


def frozen(leaf: Any) -> np.ndarray:
  """A read-only view, so that nobody's own array changes its flags."""
  view = np.asarray(leaf).view()
  view.flags.writeable = False
  return view


def choice(name: str, value: str, choices: Sequence[str]):
  """A word is one of those there are."""
  if value not in choices:
    near = difflib.get_close_matches(str(value), choices, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
      f"{name} must be one of {', '.join(choices)}: {value!r} came{hint}"
    )


def fraction(name: str, value: float):
  """A fraction is in [0, 1)."""
  if not 0 <= value < 1:
    raise ValueError(f"{name} must be a fraction in [0, 1): {name}={value}")


def leaves(examples: Mapping[str, np.ndarray]) -> int:
  """The number of examples M, after a check of lengths and dtypes."""
  if not examples:
    raise ValueError('examples must have a leaf, for example {"x": array}')
  for key, leaf in examples.items():
    if leaf.ndim == 0 or leaf.dtype.kind in "OUSMm" or leaf.dtype.itemsize > 4:
      raise ValueError(
        "every leaf must hold one number or array of at most 32 bits per "
        f"example: leaf {key!r} came as {leaf.dtype} {list(leaf.shape)}"
      )
  lengths = {key: len(leaf) for key, leaf in examples.items()}
  if len(set(lengths.values())) > 1:
    raise ValueError(f"leaves must have the same leading axis: {lengths}")
  rows = next(iter(lengths.values()))
  if not 0 < rows < 2**31:
    raise ValueError(f"examples must number 1 to 2**31 - 1: {rows} came")
  return rows


def rows(what: str, values: Any, count: int) -> np.ndarray:
  """Rows as int32, after a check that they exist."""
  array = np.asarray(values)
  if array.size == 0:
    return np.zeros(0, np.int32)
  if array.ndim != 1 or array.dtype.kind not in "iu":
    raise ValueError(
      f"rows of {what} must be a 1-D array of integers: they came as "
      f"{array.dtype} {list(array.shape)}"
    )
  bad = array[(array < 0) | (array >= count)]
  if bad.size:
    raise ValueError(
      f"rows of {what} must be in [0, {count}), the examples there are: "
      f"{bad[0]} came"
    )
  return array.astype(np.int32)


def row_lists(what: str, lists: Ragged, count: int) -> Ragged:
  """A read-only Ragged, after a check of its rows."""
  flat = rows(what, lists.rows, count)
  indptr = np.asarray(lists.indptr, np.int64)
  if indptr[0] != 0 or indptr[-1] != len(flat) or np.any(np.diff(indptr) < 0):
    raise ValueError(
      f"indptr of {what} must rise from 0 to the number of rows, {len(flat)}: "
      f"it goes from {indptr[0]} to {indptr[-1]}; build it by Ragged.of(lists)"
    )
  return Ragged(frozen(indptr), frozen(flat))


def entries(data: "Population"):
  """Every list has one entry per client, and no client is empty."""
  lengths = {
    key: len(getattr(data, key))
    for key in ("names", "train", "heldout", "seen")
  }
  if len(set(lengths.values())) > 1 or not data.names:
    raise ValueError(f"there must be one entry per client in each of {lengths}")
  name, times = collections.Counter(data.names).most_common(1)[0]
  if times > 1:
    raise ValueError(f"client names must differ: {name!r} came {times} times")
  sizes = data.train.sizes + np.where(data.seen, 0, data.heldout.sizes)
  empty = np.flatnonzero(sizes == 0)
  if empty.size:
    names = ", ".join(repr(data.names[i]) for i in empty[:5])
    raise ValueError(
      f"every client must have an example to train on: {empty.size} of "
      f"{len(data)} have none ({names}{', ...' if empty.size > 5 else ''}); "
      "leave them out or ask the partitioner for min_size=1"
    )


def traits(values: Mapping[str, np.ndarray], clients: int) -> dict:
  """32-bit, read-only traits, after a check that every client has one."""
  checked = {}
  for name, value in values.items():
    value = np.asarray(value)
    fits = value.shape == (clients,) and value.dtype.kind in "iuf"
    if not fits or not np.isfinite(value).all():
      raise ValueError(
        f"trait {name!r} must be one finite number for each of the {clients} "
        f"clients: {value.dtype} {list(value.shape)} came"
      )
    kind = np.float32 if value.dtype.kind == "f" else np.int32
    checked[name] = frozen(value.astype(kind))
  return checked


def leaks(data: "Population"):
  """No training row is tested on by anyone."""
  held = np.zeros(len(next(iter(data.examples.values()))), bool)
  held[data.heldout.rows] = True
  held[data.test] = True
  both = np.flatnonzero(held[data.train.rows])
  if both.size:
    row = data.train.rows[both[0]]
    name = data.names[data.train.owner[both[0]]]
    side = "heldout" if row in data.heldout.rows else "test"
    raise ValueError(
      "a row must be trained on or tested on, not both: row "
      f"{row} of client {name!r} is also in {side}"
    )


def values(data: "Population"):
  """Floats are finite and labels are in range."""
  for key, leaf in data.examples.items():
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      axes = tuple(range(1, leaf.ndim))
      finite = np.asarray(np.isfinite(leaf).all(axes))
      _refuse(data, ~finite, key, "finite numbers", "nan or inf")
  label = data.examples.get("label")
  if data.classes and label is not None:
    if label.dtype.kind not in "iu":
      raise ValueError(
        f"label must be integers where classes are named: {label.dtype} came"
      )
    outside = (label < 0) | (label >= len(data.classes))
    wanted = f"labels in [0, {len(data.classes)})"
    came = str(label[outside][:1])
    bad = np.asarray(outside.any(tuple(range(1, label.ndim))))
    _refuse(data, bad, "label", wanted, came)


def _refuse(
  data: "Population", bad: np.ndarray, key: str, wanted: str, came: str
):
  """Raises, naming the first bad row and its client."""
  if not bad.any():
    return
  row = int(np.argmax(bad))
  owners = [
    repr(data.names[side.owner[np.argmax(side.rows == row)]])
    for side in (data.train, data.heldout)
    if np.any(side.rows == row)
  ]
  owner = f"client {owners[0]}" if owners else "no client"
  raise ValueError(
    f"leaf {key!r} must hold {wanted}: row {row} of {owner} has {came}"
  )
