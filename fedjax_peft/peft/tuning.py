"""Selective fine-tuning: existing parameters train as they are.

Heads, norms, biases (BitFit), the last layers, or any parameters a regex can
name.

Ben Zaken et al., BitFit, 2021, https://arxiv.org/abs/2106.10199
"""

import re

import jax.numpy as jnp
from flax import nnx

from fedjax_peft import validate
from fedjax_peft.peft import adapter, frozen

_NORMS = (
  nnx.LayerNorm,
  nnx.RMSNorm,
  nnx.GroupNorm,
  nnx.BatchNorm,
  nnx.InstanceNorm,
)


def tune(module: nnx.Module, where: str = r"head/.*") -> nnx.Module:
  """Marks existing parameters as trainable.

  Args:
    module: any NNX module; untouched.
    where: regex, matched in full against the "/"-joined name of each nnx.Param.
      Tied parameters have several names and train as one.

  Returns:
    A clone whose matched parameters are Adapters with the same values. It
    trains as many entries as they have.

  Raises:
    ValueError: if `where` matches no parameter (near names are listed) or one
      that is not of a float dtype; if the module is frozen already.

  Example:
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> tuned = tune(model, where=".*/bias")
    >>> type(tuned.layers[0].bias).__name__, type(model.layers[0].bias).__name__
    ('Adapter', 'Param')
  """
  chosen = _chosen(module, where, "tune", _names(module))
  return adapter.retype(module, chosen, adapter.Adapter)


def bitfit(module: nnx.Module, where: str = ".*") -> nnx.Module:
  """Trains biases, those of norms too, and nothing else (BitFit).

  Args:
    module: any NNX module; untouched.
    where: regex, matched in full against the names of parameters called "bias".

  Returns:
    A clone that trains sum(F) entries, over the matched biases [stack, F].

  Raises:
    ValueError: as in `tune`.

  Example:
    >>> from fedjax_peft import peft
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> sorted(peft.split(bitfit(model)).params)
    ['layers/0/bias']
  """
  names = {p: n for p, n in _names(module).items() if p[-1] == "bias"}
  chosen = _chosen(module, where, "bitfit", names)
  return adapter.retype(module, chosen, adapter.Adapter)


def norms(module: nnx.Module, where: str = ".*") -> nnx.Module:
  """Trains the scales and biases of normalization layers.

  Args:
    module: any NNX module; untouched.
    where: regex, matched in full against the names of their parameters.

  Returns:
    A clone that trains 2 * D entries a norm, D without a bias.

  Raises:
    ValueError: as in `tune`.

  Example:
    >>> from fedjax_peft import peft
    >>> model = nnx.Dict(norm=nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    >>> sorted(peft.split(norms(model)).params)
    ['norm/bias', 'norm/scale']
  """
  places = adapter.find(module, _NORMS)
  names = {p: n for p, n in _names(module).items() if p[:-1] in places}
  chosen = _chosen(module, where, "norms", names)
  return adapter.retype(module, chosen, adapter.Adapter)


def head(module: nnx.Module, where: str = r"(.*/)?head/.*") -> nnx.Module:
  """Trains the head: linear probing.

  Args:
    module: any NNX module; untouched.
    where: regex, matched in full against the names of parameters.

  Returns:
    A clone that trains D * classes + classes entries, for a dense head.

  Raises:
    ValueError: as in `tune`.

  Example:
    >>> from fedjax_peft import peft
    >>> model = nnx.Dict(head=nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> sorted(peft.split(head(model)).params)
    ['head/bias', 'head/kernel']
  """
  return tune(module, where)


def last(
  module: nnx.Module, layers: int = 1, where: str = r"layers/.*"
) -> nnx.Module:
  """Trains the last layers of a deep model whole.

  Of layers stacked on a leading axis the last rows train: `split` gives those
  to `params` and leaves the others in the base, so that they can neither move
  nor be sent. Under vmap over adapters the whole stack is put together for each
  client, and so multiplied for each client: prefer few matched parameters.

  Args:
    module: any NNX module; untouched.
    layers: how many, >= 1, at most as many as there are.
    where: regex, matched in full against the names of the layers' parameters.
      In a List layers are told apart by the first number in their names.

  Returns:
    A clone that trains layers / depth of the entries of what is matched.

  Raises:
    ValueError: as in `tune`; if the matched parameters do not agree on the
      depth; if there are fewer than `layers`.

  Example:
    >>> from fedjax_peft import peft
    >>> model = nnx.Dict(
    ...   layers=nnx.List(nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(3))
    ... )
    >>> sorted(peft.split(last(model, 1)).params)
    ['layers/2/bias', 'layers/2/kernel']
  """
  validate.at_least(1, layers=layers)
  chosen = _chosen(module, where, "last", _names(module))
  numbers = {path: _number(path) for path in chosen}
  found = adapter.find(module, nnx.Param)
  if all(n is None for n in numbers.values()):
    depths = {found[path][0].shape[:1] for path in chosen}
    if len(depths) != 1 or not min(depths):
      raise ValueError(
        "last needs parameters that are stacked on one leading axis, or whose "
        f"names hold the number of a layer: {where=} matches leading axes "
        f"{sorted(depths)}; match those of the stack only"
      )
    ((depth,),) = depths
    _check_depth(layers, depth)
    rows = {adapter.STILL: depth - layers}
    return adapter.retype(module, chosen, adapter.Adapter, **rows)
  if None in numbers.values():
    raise ValueError(
      f"last needs a layer's number in every name: {where=} matches "
      f"{[adapter.join(p) for p, n in numbers.items() if n is None][:4]} too"
    )
  depth = 1 + max(numbers.values())
  _check_depth(layers, depth)
  kept = [path for path, n in numbers.items() if n >= depth - layers]
  return adapter.retype(module, kept, adapter.Adapter)


def _check_depth(layers, depth):
  """Refuses more layers than there are."""
  if layers > depth:
    raise ValueError(
      f"layers must be at most the {depth} that there are: {layers=}"
    )


def _number(path):
  """The first number in a path, or None."""
  found = [p for p in path if re.fullmatch(r"\d+", str(p))]
  return int(found[0]) if found else None


def _names(module):
  """{path: names} of what can train."""
  return {
    path: names
    for path, (leaf, names) in adapter.find(module, nnx.Param).items()
    if not isinstance(leaf, adapter.Frozen)
  }


def _chosen(module, where, method, names):
  """Paths of matched parameters; refuses those that cannot train."""
  frozen.refuse(module, method)
  chosen = adapter.select(where, names, "parameter")
  found = adapter.find(module, nnx.Param)
  for path in chosen:
    dtype = found[path][0].dtype
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f"a trainable parameter must be of a float dtype: {where=} matches "
        f"{adapter.join(path)!r} of dtype {dtype}; leave it out of where"
      )
  return chosen
