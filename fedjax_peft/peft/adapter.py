"""Finding layers in any NNX module, and marking what trains.

A PEFT method is a function module -> module. It clones the user's module,
replaces nodes of the clone, and marks what trains by the type of its Variable:
`Adapter`. Names are "/"-joined paths, as in "layers/0/attention/query".
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from fedjax_peft import validate

# Attributes in which a wrapper holds what it wraps, from the inside out: a
# layer beside which an adapter stands, a layer that is rescaled, any module.
WRAPPED = ("lora_base", "ia3_base", "adapter_base")


# Metadata of an Adapter: how many of its first rows do not train.
STILL = "rows_that_stay"


class Adapter(nnx.Param):
  """A parameter that trains; in a module that has one, all others are frozen.

  Example:
    >>> import jax.numpy as jnp
    >>> isinstance(Adapter(jnp.zeros(3)), nnx.Param)
    True
  """


class Residual(Adapter):
  """An Adapter that no client trains: its receiver alone changes it."""


class Frozen(nnx.Param):
  """A parameter that never trains, in full fine-tuning neither.

  What adapters share (random or orthogonal factors, indices) and quantized
  kernels: `split` puts them into the base.
  """


def join(path: Iterable) -> str:
  """Name of a path: its parts joined by "/".

  A layer inside a wrapper keeps the name it had before it was wrapped: the
  attribute that holds it (one of `WRAPPED`) is left out.

  Example:
    >>> join(("layers", 0, "query", "lora_base", "kernel"))
    'layers/0/query/kernel'
  """
  return "/".join(str(part) for part in path if part not in WRAPPED)


def find(
  module: nnx.Module, types: type | tuple[type, ...]
) -> dict[tuple, tuple[nnx.Module | nnx.Variable, list[str]]]:
  """Finds the nodes of some types, each once, under all of its names.

  Args:
    module: any NNX module (attributes, List, Dict, Sequential, nested).
    types: Module or Variable types.

  Returns:
    {path: (node, names)} in traversal order; `path` is where the node is met
    first; `names` has one name for each way to reach it (tied nodes have
    several).
  """
  tied = nnx.find_duplicates(module)
  found = {}
  for path, node in nnx.iter_graph(module, graph=True):
    if isinstance(node, types):
      paths = [path]
      for first, *others in tied:
        for known in list(paths):
          if known[: len(first)] == first:
            rest = known[len(first) :]
            paths += [(*other, *rest) for other in others]
      found[path] = (node, [join(p) for p in paths])
  return found


def select(where: str, names: Mapping[tuple, list[str]], what: str) -> set:
  """Paths of which one name matches a regex in full.

  Args:
    where: regex, used with `re.fullmatch`.
    names: {path: names}.
    what: what the names are names of, for the error message.

  Returns:
    The set of paths.

  Raises:
    ValueError: if `where` is not a regex or matches nothing.
  """
  try:
    regex = re.compile(where)
  except (re.error, TypeError) as error:
    raise ValueError(
      f"where must be a regular expression: {where=} ({error}); "
      'write e.g. where=".*/query"'
    ) from error
  chosen = {p for p, ns in names.items() if any(map(regex.fullmatch, ns))}
  if not chosen:
    known = [name for ns in names.values() for name in ns]
    raise ValueError(f"where matches no {what}: {where=}{near(where, known)}")
  return chosen


def near(wanted: str, known: Iterable[str]) -> str:
  """Says which names are near a regex, or which there are, for errors.

  Example:
    >>> near(".*/(head|x)/kernal", ["head/kernel", "norm/scale"])
    "; did you mean 'head/kernel'?"
    >>> near("x", ["head/kernel", "norm/scale"])
    "; names are 'head/kernel', 'norm/scale'"
  """
  known = list(known)
  plain = re.sub(r"[^\w/]+", "", wanted)
  more = f" and {len(known) - 8} more" if len(known) > 8 else ""
  names = ", ".join(map(repr, known[:8])) or "none"
  return validate.near(plain, known) or f"; names are {names}{more}"


def replace(module: nnx.Module, fun: Callable) -> nnx.Module:
  """Clones a module and replaces Modules of the clone.

  Args:
    module: any NNX module; neither it nor its Variables are touched.
    fun: (path, node) -> node, called once for each node, children first; a
      tied Module is replaced by one Module everywhere. Variables cannot be
      replaced: see `retype`.

  Returns:
    The changed clone. Arrays that are not replaced are shared, not copied.
  """
  return nnx.recursive_map(fun, nnx.clone(module, graph=True), graph=True)


def retype(
  module: nnx.Module,
  paths: Iterable[tuple],
  new: type[nnx.Variable],
  **metadata: Any,
) -> nnx.Module:
  """Clones a module with some Variables of another type.

  Args:
    module: any NNX module; untouched.
    paths: of Variables, as `find` returns them; tied Variables stay tied.
    new: type of the new Variables; values and metadata are kept.
    **metadata: set on the new Variables.

  Returns:
    The changed clone.
  """
  paths = set(paths)
  graphdef, state = nnx.split(module, graph=True)

  def one(leaf):
    kept = {k: v for k, v in leaf.get_metadata().items() if k != STILL}
    return new.from_metadata(leaf.get_raw_value(), kept | metadata)

  leaves = [
    one(leaf) if path in paths else leaf
    for path, leaf in nnx.to_flat_state(state)
  ]
  return nnx.merge(graphdef, leaves, copy=True)


def count(params) -> int:
  """Number of entries in a pytree of arrays, e.g. of `split(module).params`.

  Example:
    >>> import jax.numpy as jnp
    >>> count({"a": jnp.zeros((4, 2)), "b": jnp.zeros(3)})
    11
  """
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
