"""A module as a static graph and flat dicts of arrays, and back.

What trains, what is random, what mutates and what is frozen travel apart, since
each is treated differently under vmap and grad. Keys are "/"-joined paths.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft.peft import adapter

_STILL = "/still"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Graph:
  """What is static in a module; hashable.

  Attributes:
    graphdef: structure and static attributes.
    names: name of each array, in the order of `graphdef`.
  """

  graphdef: nnx.GraphDef
  names: tuple[str, ...]


class Split(NamedTuple):
  """A module taken apart by `split`; `merge(*split)` puts it together.

  Attributes:
    graph: what is static.
    params: {name: array}, what trains.
    rng: {name: array}, keys and counts of random streams, e.g. of Dropout.
    mutable: {name: array}, state that a call may change, e.g. of BatchNorm.
    base: {name: array}, what is frozen.
  """

  graph: Graph
  params: dict[str, Any]
  rng: dict[str, Any]
  mutable: dict[str, Any]
  base: dict[str, Any]


def split(module: nnx.Module) -> Split:
  """Takes a module apart.

  Args:
    module: any NNX module; untouched.

  Returns:
    A Split. `params` are the Adapters, or every nnx.Param but the Frozen ones
    if there is none (full fine-tuning); `rng` are the nnx.RngState; `mutable`
    are the Variables of other types than these and nnx.Param; `base` is the
    rest. A tied array is there once, under its first name. Of an Adapter that
    trains its last rows only (`last`), these are in `params`, and those before
    them in `base` under its name and "/still".

  Raises:
    ValueError: if two arrays have the same name.

  Example:
    >>> from fedjax_peft import peft
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> parts = split(peft.lora(model, where="layers/0"))
    >>> sorted(parts.params)
    ['layers/0/lora_a', 'layers/0/lora_b']
    >>> sorted(parts.base)
    ['layers/0/bias', 'layers/0/kernel']
  """
  graphdef, state = nnx.split(module, graph=True)
  leaves = [(adapter.join(p), leaf) for p, leaf in nnx.to_flat_state(state)]
  names = tuple(name for name, _ in leaves)
  if len(set(names)) != len(names):
    twice = sorted({name for name in names if names.count(name) > 1})
    raise ValueError(
      f"names must be unique: {twice} stand for several arrays; rename an "
      'attribute or a Dict key that contains "/" or is "lora_base"'
    )
  has_adapter = any(isinstance(leaf, adapter.Adapter) for _, leaf in leaves)
  trained = adapter.Adapter if has_adapter else nnx.Param
  parts = Split(Graph(graphdef, names), {}, {}, {}, {})
  for name, leaf in leaves:
    if not isinstance(leaf, nnx.Variable):
      parts.base[name] = leaf
      continue
    value = leaf.get_raw_value()
    if isinstance(leaf, adapter.Frozen):
      part = parts.base
    elif isinstance(leaf, trained):
      part = parts.params
    elif isinstance(leaf, nnx.Param):
      part = parts.base
    elif isinstance(leaf, nnx.RngState):
      part = parts.rng
    else:
      part = parts.mutable
    still = leaf.get_metadata().get(adapter.STILL, 0)
    if still and isinstance(leaf, adapter.Adapter):
      parts.base[name + _STILL], value = value[:still], value[still:]
    part[name] = value
  return parts


def merge(
  graph: Graph,
  params: dict[str, Any],
  rng: dict[str, Any],
  mutable: dict[str, Any],
  base: dict[str, Any],
) -> nnx.Module:
  """Puts a module together; the inverse of `split`.

  Works under jit, vmap, grad and scan: Variables are new at each call, so that
  a call of the module may change them (read them back with `split`).

  Args:
    graph: of a Split.
    params: of the same Split, or other arrays under the same names.
    rng: likewise.
    mutable: likewise.
    base: likewise.

  Returns:
    A new module that shares nothing with others but the arrays.

  Raises:
    ValueError: if a name is missing or unknown.

  Example:
    >>> import jax.numpy as jnp
    >>> parts = split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> loss = lambda params: merge(parts.graph, params, *parts[2:])(
    ...   jnp.ones(4)
    ... ).sum()
    >>> jax.grad(loss)(parts.params)["bias"]
    Array([1., 1., 1.], dtype=float32)
  """
  arrays = {**base, **mutable, **rng, **params}
  for name in [name for name in base if name.endswith(_STILL)]:
    whole = name.removesuffix(_STILL)
    if whole in params:
      rows = (jax.lax.stop_gradient(arrays.pop(name)), params[whole])
      arrays[whole] = jnp.concatenate(rows)
  if arrays.keys() != set(graph.names):
    missing = [name for name in graph.names if name not in arrays]
    unknown = [name for name in arrays if name not in set(graph.names)]
    hint = adapter.near((unknown or missing)[0], missing or graph.names)
    raise ValueError(
      f"merge needs each array of the graph, once: {missing=}, {unknown=}{hint}"
    )
  return nnx.merge(graph.graphdef, [arrays[name] for name in graph.names])
