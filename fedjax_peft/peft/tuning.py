"""Selective fine-tuning: existing parameters train as they are.

Heads, norms, biases (BitFit: Ben Zaken et al., 2021,
https://arxiv.org/abs/2106.10199), or any parameters a regex can name.
"""

import jax.numpy as jnp
from flax import nnx

from fedjax_peft.peft import adapter, frozen


def tune(module: nnx.Module, where: str = r"head/.*") -> nnx.Module:
  """Marks existing parameters as trainable.

  Args:
    module: any NNX module; untouched.
    where: regex, matched in full against the "/"-joined name of each nnx.Param.
      Tied parameters have several names and train as one.

  Returns:
    A clone whose matched parameters are Adapters with the same values.

  Raises:
    ValueError: if `where` matches no parameter (near names are listed) or one
      that is not of a float dtype; if the module is frozen already.

  Example:
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> tuned = tune(model, where=".*/bias")
    >>> type(tuned.layers[0].bias).__name__, type(model.layers[0].bias).__name__
    ('Adapter', 'Param')
  """
  frozen.refuse(module, "tune")
  found = adapter.find(module, nnx.Param)
  names = {path: names for path, (_, names) in found.items()}
  chosen = adapter.select(where, names, "parameter")
  for path in chosen:
    dtype = found[path][0].dtype
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f"a trainable parameter must be of a float dtype: {where=} matches "
        f"{adapter.join(path)!r} of dtype {dtype}; leave it out of where"
      )
  return adapter.retype(module, chosen, adapter.Adapter)
