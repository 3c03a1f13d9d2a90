"""Checkpoints: what a run needs to continue as if nothing had happened.

Orbax writes each checkpoint into a directory of its own that appears under its
final name only when it is complete, so a process may die at any moment. State
and clients are any pytrees; on disk they are flat dicts of arrays under the
paths of their leaves. The clients' rows are one chunk each: one client's row
reads in milliseconds, whatever the population.
"""

import contextlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from fedjax_peft import record

PyTree = Any


class Saved(NamedTuple):
  """A checkpoint as it was loaded.

  Attributes:
    step: rounds done.
    state: the global state.
    clients: what lives on the clients, axis N leads.
    meta: what `save` was told.
  """

  step: int
  state: PyTree
  clients: PyTree
  meta: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run; saves do not keep the caller waiting.

  A class, since a save that is under way has to be waited for by somebody.
  """

  def __init__(self, directory: str | os.PathLike, *, keep: int = 2):
    """Opens a directory, and clears away what a killed process left behind.

    Args:
      directory: made if it does not exist.
      keep: how many of the newest checkpoints stay.
    """
    self.directory = pathlib.Path(directory).resolve()
    arrays = ocp.options.ArrayOptions
    self._checkpointer = ocp.training.Checkpointer(
      self.directory,
      context=ocp.Context(
        array_options=arrays(
          saving=arrays.Saving(scoped_storage_options_creator=_chunks)
        )
      ),
      preservation_policy=ocp.training.preservation_policies.LatestN(keep),
      cleanup_tmp_directories=True,
    )
    self._pending: tuple[int, Any] | None = None

  def save(
    self,
    step: int,
    state: PyTree,
    clients: PyTree = (),
    meta: Mapping[str, Any] | None = None,
  ) -> None:
    """Copies everything to the host and returns; the disk comes later.

    Args:
      step: rounds done; more than at the save before.
      state: pytree of arrays, random keys and numbers.
      clients: pytree of arrays with the population's axis N in front.
      meta: what JSON can hold.

    Raises:
      OSError: if the save before this one has failed.
    """
    self.wait()
    trees = {
      "state": _flat(state, "state"),
      "clients": _flat(clients, "clients"),
    }
    try:
      response = self._checkpointer.save_checkpointables_async(
        step,
        {name: tree for name, tree in trees.items() if tree},
        custom_metadata=dict(meta or {}),
        force=True,
      )
    except (OSError, ValueError, RuntimeError) as error:
      raise self._failure(step, error) from error
    self._pending = (step, response)

  def check(self) -> None:
    """Raises OSError if the save under way has failed; does not wait."""
    self._result(timeout=0)

  def wait(self) -> None:
    """Returns when the save under way is on the disk.

    Raises:
      OSError: if it could not be written.
    """
    self._result(timeout=None)

  def _result(self, timeout: float | None) -> None:
    """Takes the outcome of the save under way, if there is one."""
    if self._pending is None:
      return
    step, response = self._pending
    try:
      response.result(timeout)
    except TimeoutError:
      return
    except Exception as error:
      self._pending = None
      raise self._failure(step, error) from error
    self._pending = None

  def _failure(self, step: int, error: Exception) -> OSError:
    """One sentence for whatever the storage layers had to say."""
    text = str(error).strip().splitlines()
    full = "No space left on device" in str(error)
    why = "the disk is full" if full else (text[0] if text else repr(error))
    return OSError(
      f"the checkpoint of round {step} could not be written to "
      f"{self.directory}: {why}; make room and continue with --resume"
    )

  def steps(self) -> list[int]:
    """Returns the complete checkpoints, oldest first."""
    return [found.step for found in self._checkpointer.checkpoints]

  def meta(self) -> dict[str, Any] | None:
    """Returns what the newest checkpoint was told, None if there is none."""
    steps = self.steps()
    return self._meta(steps[-1]) if steps else None

  def _meta(self, step: int) -> dict[str, Any]:
    """What the checkpoint of one step was told."""
    found = self._checkpointer.checkpointables_metadata(step)
    return dict(found.custom_metadata or {})

  def latest(self, state: PyTree, clients: PyTree = ()) -> Saved | None:
    """Loads the newest complete checkpoint.

    Args:
      state: pytree of the same structure, shapes and dtypes as was saved. Its
        arrays also say on which devices the loaded ones go; for specs, numpy
        arrays are loaded. Random keys are given as keys.
      clients: the same, for the clients.

    Returns:
      The checkpoint, or None if there is none.

    Raises:
      ValueError: if it is of another run or cannot be read.
    """
    steps = self.steps()
    if not steps:
      return None
    step = steps[-1]
    where = self.directory / str(step)
    try:
      loaded = self._checkpointer.load_checkpointables(step)
      meta = self._meta(step)
    except Exception as error:
      reason = (str(error).strip().splitlines() or [repr(error)])[0]
      raise ValueError(
        f"checkpoint {where} must be readable, got {reason[:200]}; remove that "
        "directory to continue from the checkpoint before it"
      ) from error
    return Saved(
      step,
      _unflat(loaded.get("state", {}), state, "state", where),
      _unflat(loaded.get("clients", {}), clients, "clients", where),
      meta,
    )

  def row(self, step: int, client: int, clients: PyTree) -> PyTree:
    """Reads what lives on one client, and nothing else.

    Args:
      step: one of `steps()`.
      client: its place on axis N.
      clients: pytree as given to `latest`, arrays or specs.

    Returns:
      The pytree without axis N, of numpy arrays.

    Raises:
      ValueError: if there is no such step or client.
    """
    if step not in self.steps():
      raise ValueError(
        f"step must be one of the checkpoints {self.steps()}, got {step=}"
      )
    leaves, treedef = jax.tree_util.tree_flatten_with_path(clients)
    if leaves and not 0 <= client < leaves[0][1].shape[0]:
      raise ValueError(
        f"client must be in [0, {leaves[0][1].shape[0]}), got {client=}"
      )
    base = f"file://{self.directory / str(step) / 'clients'}/"
    stores = [_open(base, path, leaf) for path, leaf in leaves]
    reads = [s and s.result()[client].read() for s in stores]
    rows = [
      np.empty(leaf.shape[1:], leaf.dtype) if r is None else r.result()
      for r, (_, leaf) in zip(reads, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, rows)

  def close(self) -> None:
    """Waits for the save under way and lets go of the directory."""
    try:
      self.wait()
    finally:
      # What failed was raised once; the library would raise it again here.
      with contextlib.suppress(Exception):
        self._checkpointer.close()


def _chunks(path, value):
  """One chunk a client; everything else as the library likes it."""
  options = ocp.options.ArrayOptions.Saving.StorageOptions
  if path[0].key.startswith("clients") and value.ndim:
    size = value.nbytes // value.shape[0]
    return options(chunk_byte_size=size, shard_axes=(0,))
  return options()


def _open(base: str, path, leaf: Any) -> Any:
  """A stored leaf of the clients, on its way; None if it holds nothing."""
  if not leaf.size:
    return None
  name = f"clients{jax.tree_util.keystr(path)}/"
  kvstore = {"driver": "ocdbt", "base": base, "path": name}
  return ts.open({"driver": "zarr3", "kvstore": kvstore}, read=True)


def _flat(tree: PyTree, name: str) -> dict[str, np.ndarray]:
  """{name and path of a leaf: array}; leaves without values are left out."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  flat = {name + jax.tree_util.keystr(p): record.host(x) for p, x in leaves}
  return {key: x for key, x in flat.items() if x.size}


def _unflat(
  flat: Mapping[str, np.ndarray], like: PyTree, name: str, where: pathlib.Path
) -> PyTree:
  """The inverse of `_flat`, for a tree that looks like `like`."""
  leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
  found, unread = [], set(flat)
  for path, leaf in leaves:
    key = name + jax.tree_util.keystr(path)
    spec = _spec(leaf)
    value = flat.get(key)
    unread.discard(key)
    if value is None and not spec.size:
      value = np.zeros(spec.shape, spec.dtype)
    if value is None:
      raise ValueError(_another(where, f"{key} expected, got none"))
    if (value.shape, value.dtype) != (spec.shape, spec.dtype):
      raise ValueError(
        _another(
          where,
          f"{key} expected {spec.dtype}{list(spec.shape)}, got "
          f"{value.dtype}{list(value.shape)}",
        )
      )
    found.append(_like(value, leaf))
  if unread:
    raise ValueError(_another(where, f"{min(unread)} not expected"))
  return jax.tree.unflatten(treedef, found)


def _another(where: pathlib.Path, why: str) -> str:
  """The sentence for a checkpoint that does not fit."""
  return (
    f"{where} is a checkpoint of another config: {why}; use the config of that "
    "run, or start afresh in another directory"
  )


def _spec(leaf: Any) -> Any:
  """Shape and dtype of a leaf as it is stored."""
  if record.is_key(leaf):
    return jax.eval_shape(jax.random.key_data, leaf)
  return leaf if hasattr(leaf, "shape") else np.asarray(leaf)


def _like(value: np.ndarray, leaf: Any) -> Any:
  """A loaded array as the kind of leaf that the caller has."""
  if record.is_key(leaf):
    data = jnp.asarray(value)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
  if isinstance(leaf, jax.Array):
    if leaf.committed:
      return jax.device_put(value, leaf.sharding)
    return jnp.asarray(value)
  if isinstance(leaf, np.generic):
    return value[()]
  return value if hasattr(leaf, "shape") else type(leaf)(value.item())
