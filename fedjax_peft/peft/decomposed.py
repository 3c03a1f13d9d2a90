"""DoRA: a low-rank adapter on the direction of a kernel, a vector on its size.

Each column of the kernel V is split into a size m and a direction:
y = x @ (m * (V + scale * A @ B) / |V + scale * A @ B|) + bias, where |.| is the
norm of a column.

Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024,
https://arxiv.org/abs/2402.09353
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft.peft import adapter, beside, frozen, lowrank

_TINY = 1e-12


class DoRA(beside.Beside):
  """A layer with a decomposed low-rank adapter; `dora` puts it in place.

  The norm of V + scale * A @ B is never taken from that matrix, which would be
  one [K, F] for each client: with D = A.T @ V, a product with the shared
  kernel, |V + s A B|^2 = |V|^2 + 2 s sum(D * B) + s^2 B.T (A.T A) B per column.

  Attributes:
    lora_base: the layer it wraps.
    lora_a: Adapter, float32 [stack, K, R].
    lora_b: Adapter, float32 [stack, R, F].
    dora_magnitude: Adapter, float32 [stack, F], m.
    dora_norm: Frozen, float32 [stack, F], |V| when the adapter was made.
    scale: alpha / R, or alpha / sqrt(R).
    detached: no gradient flows through the norm.
    contraction: how the layer's kernel meets its input.
  """

  def __init__(self, base, a, b, norm, scale, detached, shape):
    super().__init__(base, shape)
    self.lora_a = adapter.Adapter(a)
    self.lora_b = adapter.Adapter(b)
    self.dora_magnitude = adapter.Adapter(norm)
    self.dora_norm = adapter.Frozen(norm)
    self.scale = scale
    self.detached = detached

  def gain(self, down: jax.Array) -> jax.Array:
    """What columns grow by, m / |V + scale * A @ B| - 1; exactly zero at first.

    Args:
      down: A.T @ V, float32 [..., R, F].

    Returns:
      float32 [..., F].
    """
    a, b = self.lora_a[...], self.lora_b[...]
    m, norm = self.dora_magnitude[...], self.dora_norm[...]
    square = jnp.swapaxes(a, -1, -2) @ a  # [..., R, R]
    grown = 2 * (down * b).sum(-2) + self.scale * ((square @ b) * b).sum(-2)
    grown = self.scale * grown / norm**2
    if self.detached:
      grown = jax.lax.stop_gradient(grown)
    # Written so that m = norm and B = 0 give zero whatever the rounding.
    size = 1 + (m - norm) / norm
    return size / jnp.sqrt(jnp.maximum(1 + grown, _TINY)) - 1

  def delta(self):
    """What V changes by."""
    v = beside.matrix(self.lora_base, self.contraction)
    a, b = self.lora_a[...], self.lora_b[...]
    gain = self.gain(jnp.swapaxes(a, -1, -2) @ v)[..., None, :]
    return gain * v + (1 + gain) * (self.scale * (a @ b))

  def __call__(self, x: jax.Array, *args, **options) -> jax.Array:
    """The layer's output with the adapter's, in the dtype of the layer's."""
    y = self.lora_base(x, *args, **options)
    shape, a = self.contraction, self.lora_a[...]
    gain = self.gain(frozen.product(self.lora_base, shape, a.T))
    rows = shape.flatten(x)
    side = lowrank.side_product(self.scale, rows, a, self.lora_b[...])
    side = beside.silent((1 + beside.row(gain, side)) * side)
    plain = y.astype(jnp.float32)
    bias = self.lora_base.bias
    if bias is not None:
      bias = bias[...].astype(jnp.float32)
      plain = plain - shape.spread(bias, y.ndim)
    plain = beside.silent(shape.spread(gain, y.ndim) * plain)
    return y + (plain + shape.unflatten(side)).astype(y.dtype)


def dora(
  module: nnx.Module,
  rank: int = 8,
  where: str = r".*/(query|value)",
  *,
  alpha: float | None = None,
  scaling: str = "rank",
  detached: bool = True,
  seed: int = 0,
) -> nnx.Module:
  """Puts a decomposed low-rank adapter beside every matched layer.

  Guarantees:
    the result computes what `module` computes, bit for bit (finite inputs);
    stacking and initial values are as in `lora`.

  Args:
    module: any NNX module; untouched.
    rank: R >= 1.
    where: regex, matched in full against the "/"-joined name of each layer, as
      in `lora`.
    alpha: as in `lora`.
    scaling: as in `lora`.
    detached: treat the norm as a constant in the backward pass, as the paper
      does in its section 4.3 to save memory; False is the full gradient.
    seed: of the adapters' initial values.

  Returns:
    A clone with `DoRA` in place of the matched layers. It trains their lora_a,
    lora_b and dora_magnitude: rank * (K + F) + F entries a layer.

  Raises:
    ValueError: as in `lora`.

  Example:
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> tuned = dora(model, rank=2, where="layers/0")
    >>> tuned.layers[0].dora_magnitude.shape
    (3,)
  """
  scale = lowrank.scale_of(rank, alpha, scaling)

  def make(layer, site):
    a = lowrank.first_a(site, rank)
    b = jnp.zeros((*site.stack, rank, site.shape.columns), jnp.float32)
    v = beside.matrix(layer, site.shape)
    norm = jnp.maximum(jnp.linalg.norm(v, axis=-2), _TINY)  # [stack, F]
    return DoRA(layer, a, b, norm, scale, detached, site.shape)

  return beside.wrap(module, where, "dora", make, seed)
