"""Core matrices: small trained squares between frozen factors.

core: y = base(x) + scale * x @ A @ M @ B. LoRA-XS, LoRA-SB and Fed-SB differ in
what A and B are the singular vectors of. Since only M trains, the mean of
adapters is the adapter of the mean change: aggregation is exact, and a message
has R * R entries whatever the layer.

ravan: the same with several heads of orthogonal factors.

Balazy et al., LoRA-XS, 2024, https://arxiv.org/abs/2405.17604
Ponkshe et al., LoRA-SB, 2024, https://arxiv.org/abs/2411.19557
Singhal et al., Fed-SB, 2025, https://arxiv.org/abs/2502.15436
Raje et al., RAVAN, 2025, https://arxiv.org/abs/2506.05568
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft import validate
from fedjax_peft.peft import adapter, beside, contraction, frozen, partition


class Core(beside.Beside):
  """A layer with a core between frozen factors; `core` puts it in place.

  Attributes:
    lora_base: the layer it wraps.
    core_a: Frozen, float32 [stack, K, R].
    core_m: Adapter, float32 [stack, R, R].
    core_b: Frozen, float32 [stack, R, F].
    scale: a factor on the product.
    contraction: how the layer's kernel meets its input.
  """

  def __init__(self, base, a, m, b, scale, shape):
    super().__init__(base, shape)
    self.core_a = adapter.Frozen(a)
    self.core_m = adapter.Adapter(m)
    self.core_b = adapter.Frozen(b)
    self.scale = scale

  def side(self, x):
    """The outer products are with frozen matrices, shared by all clients."""
    x = x.astype(jnp.float32)
    narrow = frozen.frozen_product(None, x.dtype, 0, x, self.core_a[...], None)
    narrow = self.scale * (narrow @ self.core_m[...])
    b = self.core_b[...]
    return beside.silent(
      frozen.frozen_product(None, x.dtype, 0, narrow, b, None)
    )

  def delta(self):
    """Scale * A @ M @ B."""
    return self.scale * (self.core_a[...] @ self.core_m[...] @ self.core_b[...])


def core(
  module: nnx.Module,
  rank: int = 8,
  where: str = r".*/(query|value)",
  *,
  update: Mapping[str, jax.Array] | None = None,
  scale: float = 1.0,
) -> nnx.Module:
  """Puts a core between frozen factors beside every matched layer.

  Guarantees:
    without `update` the result computes what `module` computes, bit for bit
    (finite inputs); with it, each kernel moves at once by the best rank-R
    approximation of its update, which is what LoRA-SB and Fed-SB start from;
    layers stacked on leading axes get stacked factors and cores.

  Args:
    module: any NNX module; untouched.
    rank: R >= 1, at most the smaller side of each matched kernel.
    where: regex, matched in full against the "/"-joined name of each layer, as
      in `lora`.
    update: {layer name: [stack, K, F]}, an estimate of what full fine-tuning
      would add to each kernel, e.g. a small multiple of `first_update`. From
      its truncated SVD U S Vt: A = U, B = Vt, M = S / scale. None takes that of
      the kernel: A = U S, B = Vt, M = 0 (LoRA-XS).
    scale: a factor on the product.

  Returns:
    A clone with `Core` in place of the matched layers. It trains core_m:
    rank * rank entries a layer.

  Raises:
    ValueError: as in `lora`; if `rank` is too large for a kernel; if `update`
      lacks a layer or has one of another shape; if `scale` is not positive.

  Example:
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> core(model, rank=2, where="layers/0").layers[0].core_m.shape
    (2, 2)
  """
  validate.at_least(1, rank=rank)
  validate.positive(scale=scale)

  def make(layer, site):
    v = beside.matrix(layer, site.shape)
    if update is None:
      u, s, vt = beside.leading(v, rank, site.name)
      m = jnp.zeros((*site.stack, rank, rank), jnp.float32)
      return Core(layer, u * s[..., None, :], m, vt, scale, site.shape)
    given = _update(update, site, v.shape)
    u, s, vt = beside.leading(given, rank, site.name)
    eye = jnp.broadcast_to(jnp.eye(rank), (*site.stack, rank, rank))
    m = s[..., None] * eye / scale
    return Core(layer, u, m, vt, scale, site.shape)

  return beside.wrap(module, where, "core", make)


def _update(update, site, shape):
  """The estimate of one layer, float32, checked."""
  given = update.get(site.name)
  if given is None or given.shape != shape:
    got = "none" if given is None else f"one of shape {list(given.shape)}"
    raise ValueError(
      f"update must have a matrix of shape {list(shape)} for every matched "
      f"layer: got {got} for {site.name!r}"
      f"{validate.near(site.name, update)}; compute it with first_update"
    )
  return jnp.asarray(given, jnp.float32)


def first_update(
  module: nnx.Module,
  loss: Callable[[nnx.Module, Any], jax.Array],
  batch: Any,
  where: str = r".*/(query|value)",
) -> dict[str, jax.Array]:
  """Where a first step of full fine-tuning would take the matched kernels.

  Args:
    module: any NNX module with plain layers; untouched.
    loss: loss(module, batch) -> scalar.
    batch: a few examples of the task; any pytree.
    where: regex, matched in full against the "/"-joined name of each layer.

  Returns:
    {layer name: minus the gradient of its kernel, float32 [stack, K, F]}.
    LoRA-SB takes the update of AdamW's first step, lr * sign of this.

  Raises:
    ValueError: if `where` matches no layer, or one that is no matrix product.

  Example:
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> x = jnp.ones((2, 4))
    >>> found = first_update(model, lambda m, x: m(x).sum(), x, "layers/0")
    >>> found["layers/0"].shape
    (4, 3)
  """
  found = adapter.find(module, contraction.LAYERS)
  names = {path: names for path, (_, names) in found.items()}
  shapes = {
    path: contraction.of(found[path][0], adapter.join(path))
    for path in adapter.select(where, names, "layer")
  }
  trained = adapter.find(module, adapter.Adapter)
  module = adapter.retype(module, trained, nnx.Param)
  kernels = [(*path, "kernel") for path in shapes]
  parts = partition.split(adapter.retype(module, kernels, adapter.Adapter))

  def scalar(params):
    return loss(partition.merge(*parts._replace(params=params)), batch)

  slope = jax.grad(scalar)(parts.params)
  return {
    adapter.join(path): -shape.matrix(
      slope[adapter.join((*path, "kernel"))]
    ).astype(jnp.float32)
    for path, shape in shapes.items()
  }


class Ravan(beside.Beside):
  """A layer with several cores beside it; `ravan` puts it in place.

  Attributes:
    lora_base: the layer it wraps.
    ravan_a: Frozen, float32 [stack, K, H * R], orthonormal columns.
    ravan_m: Adapter, float32 [stack, H, R, R].
    ravan_s: Adapter, float32 [stack, H].
    ravan_b: Frozen, float32 [stack, H * R, F], orthonormal rows.
    contraction: how the layer's kernel meets its input.
  """

  def __init__(self, base, a, b, heads, site):
    super().__init__(base, site.shape)
    rank = a.shape[-1] // heads
    m = jnp.zeros((*site.stack, heads, rank, rank), jnp.float32)
    self.ravan_a = adapter.Frozen(a)
    self.ravan_m = adapter.Adapter(m)
    self.ravan_s = adapter.Adapter(jnp.ones((*site.stack, heads), jnp.float32))
    self.ravan_b = adapter.Frozen(b)

  def _cores(self):
    """s_h * M_h, [stack, H, R, R]."""
    return self.ravan_s[...][..., None, None] * self.ravan_m[...]

  def side(self, x):
    """All heads' outer products are one frozen product on either side."""
    cores = self._cores()
    heads, rank, _ = cores.shape
    x = x.astype(jnp.float32)
    narrow = frozen.frozen_product(None, x.dtype, 0, x, self.ravan_a[...], None)
    parts = narrow.reshape(*narrow.shape[:-1], heads, rank)
    mixed = jnp.einsum("...hr,hrq->...hq", parts, cores).reshape(narrow.shape)
    b = self.ravan_b[...]
    return beside.silent(
      frozen.frozen_product(None, x.dtype, 0, mixed, b, None)
    )

  def delta(self):
    """The sum over heads of A_h @ (s_h * M_h) @ B_h."""
    cores = self._cores()
    *stack, heads, rank, _ = cores.shape
    a, b = self.ravan_a[...], self.ravan_b[...]
    a = a.reshape(*a.shape[:-1], heads, rank)
    b = b.reshape(*stack, heads, rank, b.shape[-1])
    return jnp.einsum("...khr,...hrq,...hqf->...kf", a, cores, b)


def ravan(
  module: nnx.Module,
  rank: int = 8,
  where: str = r".*/(query|value)",
  *,
  heads: int = 4,
  seed: int = 0,
) -> nnx.Module:
  """Puts several cores between orthogonal factors beside every matched layer.

  y = base(x) + sum over heads h of s_h * x @ A_h @ M_h @ B_h.

  Guarantees:
    the result computes what `module` computes, bit for bit (finite inputs);
    the columns of all A_h of a layer are orthonormal, as are the rows of all
    B_h; they depend on (seed, layer name) only.

  Args:
    module: any NNX module; untouched.
    rank: R >= 1, of one head; heads * rank is at most the smaller side of each
      matched kernel.
    where: regex, matched in full against the "/"-joined name of each layer, as
      in `lora`.
    heads: H >= 1.
    seed: of the frozen factors.

  Returns:
    A clone with `Ravan` in place of the matched layers. It trains ravan_m (zero
    at first) and ravan_s (one): heads * (rank * rank + 1) entries a layer.

  Raises:
    ValueError: as in `lora`; if heads < 1 or heads * rank is too large.

  Example:
    >>> model = nnx.Sequential(nnx.Linear(8, 6, rngs=nnx.Rngs(0)))
    >>> tuned = ravan(model, rank=2, heads=3, where="layers/0").layers[0]
    >>> tuned.ravan_m.shape, tuned.ravan_s.shape
    ((3, 2, 2), (3,))
  """
  validate.at_least(1, rank=rank, heads=heads)

  def make(layer, site):
    shape, width = site.shape, heads * rank
    if width > min(shape.rows, shape.columns):
      raise ValueError(
        "heads * rank must be at most the smaller side of a kernel: "
        f"{heads=} {rank=} for {site.name!r} of {shape.rows} x "
        f"{shape.columns}; write a smaller rank or leave it out of where"
      )
    left, right = jax.random.split(site.key)
    a = orthonormal(left, (*site.stack, shape.rows, width))
    b = orthonormal(right, (*site.stack, shape.columns, width))
    return Ravan(layer, a, jnp.swapaxes(b, -1, -2), heads, site)

  return beside.wrap(module, where, "ravan", make, seed)


def orthonormal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Random orthonormal columns, float32 [stack, K, R <= K]."""
  return jnp.linalg.qr(jax.random.normal(key, shape, jnp.float32))[0]
