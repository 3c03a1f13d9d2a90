"""VeRA: random factors that all layers share, and two trained vectors a layer.

y = base(x) + (((x @ A) * d) @ B) * b, with A and B random and frozen.

Kopiczko et al., VeRA: Vector-based Random Matrix Adaptation, 2023,
https://arxiv.org/abs/2310.11454
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft import validate
from fedjax_peft.peft import adapter, beside, frozen


class VeRA(beside.Beside):
  """A layer with two vectors beside it; `vera` puts it in place.

  Attributes:
    lora_base: the layer it wraps.
    vera_a: Frozen, float32 [stack, at least K, R], tied between layers.
    vera_b: Frozen, float32 [stack, R, at least F], tied between layers.
    vera_d: Adapter, float32 [stack, R].
    vera_scale: Adapter, float32 [stack, F], the vector b.
    contraction: how the layer's kernel meets its input.
  """

  def __init__(self, base, a, b, first, site):
    super().__init__(base, site.shape)
    rank = a.shape[-1]
    self.vera_a, self.vera_b = a, b
    d = jnp.full((*site.stack, rank), first, jnp.float32)
    self.vera_d = adapter.Adapter(d)
    columns = (*site.stack, site.shape.columns)
    self.vera_scale = adapter.Adapter(jnp.zeros(columns, jnp.float32))

  def _factors(self):
    """This layer's part of A [stack, K, R] and B [stack, R, F], scaled."""
    a = self.vera_a[...][..., : self.contraction.rows, :]
    b = self.vera_b[...][..., : self.contraction.columns]
    return a / math.sqrt(a.shape[-2]), b / math.sqrt(b.shape[-2])

  def side(self, x):
    """Both products are with frozen matrices, shared by all clients."""
    a, b = self._factors()
    x = x.astype(jnp.float32)
    narrow = frozen.frozen_product(None, x.dtype, 0, x, a, None)
    narrow = narrow * beside.row(self.vera_d[...], narrow)
    y = frozen.frozen_product(None, x.dtype, 0, narrow, b, None)
    return beside.silent(y * beside.row(self.vera_scale[...], y))

  def delta(self):
    """(A * d) @ B * b."""
    a, b = self._factors()
    a = a * self.vera_d[...][..., None, :]
    return (a @ b) * self.vera_scale[...][..., None, :]


def vera(
  module: nnx.Module,
  rank: int = 256,
  where: str = r".*/(query|value)",
  *,
  first: float = 0.1,
  seed: int = 0,
) -> nnx.Module:
  """Puts two trained vectors beside every matched layer.

  One pair of random factors serves all layers, each of which takes the rows
  and columns it needs. Layers stacked on leading axes hold one copy of it a
  layer, since a scan takes a slice of whatever its layers hold; it is in the
  base, so no client sends or owns any of it.

  Guarantees:
    the result computes what `module` computes, bit for bit (finite inputs);
    the factors depend on (seed, rank, the largest layer) only.

  Args:
    module: any NNX module; untouched.
    rank: R >= 1, larger than for LoRA.
    where: regex, matched in full against the "/"-joined name of each layer, as
      in `lora`.
    first: initial value of the vector d; the vector b is zero.
    seed: of the random factors, of variance 1 / K and 1 / R.

  Returns:
    A clone with `VeRA` in place of the matched layers. It trains vera_d and
    vera_scale: R + F entries a layer.

  Raises:
    ValueError: as in `lora`; if `first` is not positive.

  Example:
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> tuned = vera(model, rank=16, where="layers/0").layers[0]
    >>> tuned.vera_d.shape, tuned.vera_scale.shape
    ((16,), (3,))
  """
  validate.at_least(1, rank=rank)
  validate.positive(first=first)
  sites: list[beside.Site] = []

  def note(layer, site):
    sites.append(site)
    return layer

  beside.wrap(module, where, "vera", note)
  rows = max(site.shape.rows for site in sites)
  columns = max(site.shape.columns for site in sites)
  left, right = jax.random.split(jax.random.key(seed))
  a = jax.random.normal(left, (rows, rank), jnp.float32)
  b = jax.random.normal(right, (rank, columns), jnp.float32)
  tied = {
    stack: [
      adapter.Frozen(jnp.broadcast_to(x, (*stack, *x.shape))) for x in (a, b)
    ]
    for stack in {site.stack for site in sites}
  }

  def make(layer, site):
    a, b = tied[site.stack]
    return VeRA(layer, a, b, first, site)

  return beside.wrap(module, where, "vera", make)
