"""LoRA: a frozen layer plus a product of two small matrices.

y = base(x) + scale * (x @ A) @ B, with A ~ normal / sqrt(fan in), B = 0.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021,
https://arxiv.org/abs/2106.09685
Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA,
2023, https://arxiv.org/abs/2312.03732
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft import validate
from fedjax_peft.peft import adapter, beside


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def side_product(
  scale: float, x: jax.Array, a: jax.Array, b: jax.Array
) -> jax.Array:
  """Scale * (x @ a) @ b in float32, with an exact zero written as -0.0.

  y + -0.0 is y bit for bit for every y, while -0.0 + 0.0 is 0.0: so an adapter
  with B = 0 leaves its layer's output as it is.

  Args:
    scale: alpha / rank.
    x: [..., K], any float dtype.
    a: float32 [K, R].
    b: float32 [R, F].

  Returns:
    float32 [..., F].

  Example:
    >>> side_product(2.0, jnp.ones((1, 3)), jnp.ones((3, 1)), jnp.ones((1, 2)))
    Array([[6., 6.]], dtype=float32)
  """
  return _side_forward(scale, x, a, b)[0]


def _side_forward(scale, x, a, b):
  """Forward rule: keeps x, A, B and the narrow product."""
  narrow = (x.astype(jnp.float32) @ a) * scale  # [..., R]
  y = narrow @ b
  return jnp.where(y == 0, -0.0, y), (x, a, b, narrow)


def _side_backward(scale, residuals, g):
  """Backward rule: dA is computed as [R, K], the fast form on CPUs."""
  x, a, b, narrow = residuals
  dnarrow = (g @ b.T) * scale  # [..., R]
  dx = (dnarrow @ a.T).astype(x.dtype)
  x = x.astype(jnp.float32)
  da = _rows(dnarrow).T @ _rows(x)  # [R, K]
  return dx, da.T, _rows(narrow).T @ _rows(g)


side_product.defvjp(_side_forward, _side_backward)


def _rows(x):
  """[..., K] -> [M, K]."""
  return x.reshape(-1, x.shape[-1])


class LoRA(beside.Beside):
  """A layer with a low-rank adapter beside it; `lora` puts it in place.

  Attributes:
    lora_base: the layer it wraps.
    lora_a: Adapter, float32 [stack, K, R]; K = the layer's inputs.
    lora_b: Adapter, float32 [stack, R, F]; F = the layer's outputs.
    lora_residual: Residual, float32 [stack, K, F], added to the kernel, or
      None.
    scale: alpha / R, or alpha / sqrt(R).
    contraction: how the layer's kernel meets its input.
  """

  def __init__(self, base, a, b, scale, shape, residual=None):
    super().__init__(base, shape)
    self.lora_a = adapter.Adapter(a)
    self.lora_b = adapter.Adapter(b)
    self.lora_residual = nnx.data(None)
    if residual is not None:
      self.lora_residual = adapter.Residual(residual)
    self.scale = scale

  def side(self, x):
    """Scale * (x @ A) @ B, plus the residual's part."""
    y = side_product(self.scale, x, self.lora_a[...], self.lora_b[...])
    if self.lora_residual is None:
      return y
    fixed = jax.lax.stop_gradient(self.lora_residual[...])
    return y + beside.silent(x.astype(jnp.float32) @ fixed)

  def delta(self):
    """Scale * A @ B, plus the residual."""
    delta = self.scale * (self.lora_a[...] @ self.lora_b[...])
    if self.lora_residual is None:
      return delta
    return delta + self.lora_residual[...]


def lora(
  module: nnx.Module,
  rank: int = 8,
  where: str = r".*/(query|value)",
  *,
  alpha: float | None = None,
  scaling: str = "rank",
  init: str = "normal",
  residual: bool = False,
  seed: int = 0,
) -> nnx.Module:
  """Puts a low-rank adapter beside every matched layer.

  Guarantees:
    the result computes what `module` computes, bit for bit (finite inputs);
    an adapter's initial value depends on (seed, layer name) only;
    a layer used in several places gets one adapter; layers stacked on leading
    axes get adapters stacked likewise.

  Args:
    module: any NNX module; untouched.
    rank: R >= 1.
    where: regex, matched in full against the "/"-joined name of each layer.
      Layers: nnx.Linear, nnx.LinearGeneral (without batch_axis), nnx.Einsum
      (one contraction); the projections of nnx.MultiHeadAttention are such.
    alpha: None is 2 * rank.
    scaling: the adapter's output is scaled by alpha / rank ("rank") or by
      alpha / sqrt(rank) ("sqrt", rsLoRA: activations and gradients keep their
      size as the rank grows).
    init: A is drawn ("normal"), or the R leading left singular vectors of the
      kernel ("svd"); B is zero.
    residual: also give each layer a residual, zero [K, F], which no client
      trains: rules that aggregate products exactly keep there what factors
      cannot say.
    seed: of the adapters' initial values.

  Returns:
    A clone with `LoRA` in place of the matched layers. It trains their lora_a
    and lora_b: rank * (K + F) entries a layer.

  Raises:
    ValueError: if `where` matches no layer (near names are listed), an Embed or
      convolution, or a layer with an adapter; if rank < 1 or alpha <= 0; if a
      kernel has fewer than `rank` singular vectors and `init` is "svd"; if the
      module is frozen already.

  Example:
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> tuned = lora(model, rank=2, where="layers/0")
    >>> x = jnp.ones((1, 4))
    >>> bool((tuned(x) == model(x)).all())
    True
    >>> tuned.layers[0].lora_a.shape, tuned.layers[0].lora_b.shape
    ((4, 2), (2, 3))
  """
  scale = scale_of(rank, alpha, scaling)
  validate.one_of(("normal", "svd"), init=init)

  def make(layer, site):
    shape, stack = site.shape, site.stack
    a = first_a(site, rank)
    if init == "svd":
      a, *_ = beside.leading(beside.matrix(layer, shape), rank, site.name)
    b = jnp.zeros((*stack, rank, shape.columns), jnp.float32)
    side = None
    if residual:
      side = jnp.zeros((*stack, shape.rows, shape.columns), jnp.float32)
    return LoRA(layer, a, b, scale, shape, side)

  return beside.wrap(module, where, "lora", make, seed)


def first_a(site: beside.Site, rank: int) -> jax.Array:
  """The initial A of a layer, float32 [stack, K, R]: normal / sqrt(K)."""
  size = (*site.stack, site.shape.rows, rank)
  a = jax.random.normal(site.key, size, jnp.float32)
  return a / math.sqrt(site.shape.rows)


def scale_of(
  rank: int, alpha: float | None = None, scaling: str = "rank"
) -> float:
  """The factor on A @ B, from arguments as those of `lora`.

  Example:
    >>> scale_of(16), scale_of(16, 8), scale_of(16, 8, "sqrt")
    (2.0, 0.5, 2.0)
  """
  validate.at_least(1, rank=rank)
  validate.one_of(("rank", "sqrt"), scaling=scaling)
  alpha = 2 * rank if alpha is None else alpha
  validate.positive(alpha=alpha)
  return alpha / (rank if scaling == "rank" else math.sqrt(rank))


def rerank(
  params: Mapping[str, jax.Array],
  rank: int,
  *,
  alpha: float | None = None,
  new_alpha: float | None = None,
  scaling: str = "rank",
) -> dict[str, jax.Array]:
  """Says the same with factors of a larger rank.

  New columns of A and new rows of B are zero, and B takes up the change of the
  scale, so that a module of the new rank computes what one of the old rank
  did, up to the order of its sums. Where A and B are both zero no gradient
  flows: new directions wake up when a receiver adds to them, as rules for
  clients of different ranks do.

  Args:
    params: {path: array} with .../lora_a [..., K, R] and .../lora_b
      [..., R, F]; others pass. R may differ between layers.
    rank: R' >= every R.
    alpha: as it was given to `lora` for the old rank.
    new_alpha: as it is given for the new rank.
    scaling: as in `lora`.

  Returns:
    The params with lora_a [..., K, R'] and lora_b [..., R', F].

  Raises:
    ValueError: if a rank would shrink, or there is no lora_a.

  Example:
    >>> p = {"q/lora_a": jnp.ones((4, 2)), "q/lora_b": jnp.ones((2, 3))}
    >>> {name: x.shape for name, x in rerank(p, 8).items()}
    {'q/lora_a': (4, 8), 'q/lora_b': (8, 3)}
  """
  new_scale = scale_of(rank, new_alpha, scaling)
  moved, found = {}, False
  for name, value in params.items():
    leaf = name.rsplit("/", 1)[-1]
    moved[name] = value
    if leaf not in ("lora_a", "lora_b"):
      continue
    found = True
    axis = -1 if leaf == "lora_a" else -2
    old = value.shape[axis]
    if old > rank:
      raise ValueError(
        f"rank must be at least that of every adapter: {rank=} but {name!r} "
        f"has {old}; zero padding cannot drop directions"
      )
    pad = [(0, 0)] * value.ndim
    pad[axis] = (0, rank - old)
    if leaf == "lora_b":
      value = value * (scale_of(old, alpha, scaling) / new_scale)
    moved[name] = jnp.pad(value, pad)
  if not found:
    raise ValueError(
      "rerank needs params with lora_a and lora_b: got "
      f"{sorted(params)[:8]}; pass split(lora(module)).params"
    )
  return moved
