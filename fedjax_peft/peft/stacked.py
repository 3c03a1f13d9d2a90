"""Stacked adapters: several low-rank adapters on one layer, by name.

y = base(x) + sum over names of scale * (x A) B. Each adapter is leaves of its
own, so each may live at another place: everyone's at the cloud, a cluster's at
its edge, a client's own on its device.
"""

import functools
import operator
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft.peft import adapter, beside, lowrank


class Factors(nnx.Module):
  """One low-rank adapter of a `Stacked` layer.

  Attributes:
    lora_a: Adapter, float32 [stack, K, R].
    lora_b: Adapter, float32 [stack, R, F].
    scale: alpha / rank.
  """

  def __init__(self, a: jax.Array, b: jax.Array, scale: float):
    self.lora_a, self.lora_b = adapter.Adapter(a), adapter.Adapter(b)
    self.scale = scale


class Stacked(beside.Beside):
  """A layer with several low-rank adapters; `stack` puts it in place.

  Attributes:
    lora_base: the layer it wraps.
    names: of the adapters; each is an attribute, a `Factors`.
    contraction: how the layer's kernel meets its input.
  """

  def __init__(self, base, shape, factors: Mapping[str, Factors]):
    super().__init__(base, shape)
    self.names = tuple(factors)
    for name, one in factors.items():
      setattr(self, name, one)

  def side(self, x):
    """Sum of scale * (x @ A) @ B."""
    parts = (getattr(self, name) for name in self.names)
    sides = (
      lowrank.side_product(p.scale, x, p.lora_a[...], p.lora_b[...])
      for p in parts
    )
    return functools.reduce(operator.add, sides)

  def delta(self):
    """Sum of scale * A @ B."""
    parts = (getattr(self, name) for name in self.names)
    deltas = (p.scale * (p.lora_a[...] @ p.lora_b[...]) for p in parts)
    return functools.reduce(operator.add, deltas)


def stack(
  module: nnx.Module,
  ranks: Mapping[str, int],
  where: str = r".*/(query|value)",
  *,
  alpha: float | None = None,
  seed: int = 0,
) -> nnx.Module:
  """Puts several low-rank adapters beside every matched layer.

  Guarantees:
    the result computes what `module` computes, bit for bit (finite inputs).

  Args:
    module: any NNX module; untouched.
    ranks: {name of an adapter: its rank}; the leaves of an adapter are called
      `layer/name/lora_a` and `layer/name/lora_b`.
    where: regex of the layers, as in `peft.lora`.
    alpha: as in `peft.lora`; None is twice the rank of each.
    seed: of the initial values; adapters differ.

  Returns:
    A clone with `Stacked` in place of the matched layers.

  Raises:
    ValueError: as `peft.lora` does, or for a name that is not an identifier or
      an attribute of `Stacked`.

  Example:
    >>> import jax.numpy as jnp
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> two = stack(model, {"shared": 2, "personal": 1}, where="layers/0")
    >>> two.layers[0].personal.lora_a.shape
    (4, 1)
    >>> x = jnp.ones((1, 4))
    >>> bool((two(x) == model(x)).all())
    True
  """
  taken = {"lora_base", "names", "contraction", "side", "delta"}
  if not ranks or any(not n.isidentifier() or n in taken for n in ranks):
    raise ValueError(
      f"adapters need names such as 'shared' and 'personal': got {list(ranks)}"
    )
  scales = {n: lowrank.scale_of(rank, alpha) for n, rank in ranks.items()}

  def make(layer, site):
    factors = {}
    for i, (name, rank) in enumerate(ranks.items()):
      own = site._replace(key=jax.random.fold_in(site.key, i))
      b = jnp.zeros((*site.stack, rank, site.shape.columns), jnp.float32)
      factors[name] = Factors(lowrank.first_a(own, rank), b, scales[name])
    return Stacked(layer, site.shape, factors)

  return beside.wrap(module, where, "stack", make, seed)
