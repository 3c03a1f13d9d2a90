"""Sparse fine-tuning: a trained change of a few entries of each kernel.

Which entries is decided once, on what all clients know, so that a message holds
values only: the first stage of SLoRA with random ones, otherwise those of
large magnitude or large Fisher information.

Babakniya et al., SLoRA, 2023, https://arxiv.org/abs/2308.06522
Sung et al., Training Neural Networks with Fixed Sparse Masks, 2021,
https://arxiv.org/abs/2111.09839
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft import validate
from fedjax_peft.peft import adapter, beside


class Sparse(beside.Beside):
  """A layer with a sparse change beside it; `sparse` puts it in place.

  Attributes:
    lora_base: the layer it wraps.
    sparse_values: Adapter, float32 [stack, n].
    sparse_index: Frozen, int32 [stack, n], places in the kernel as a matrix
      [K, F] read row by row, ascending.
    contraction: how the layer's kernel meets its input.
  """

  def __init__(self, base, index, shape):
    super().__init__(base, shape)
    values = jnp.zeros(index.shape, jnp.float32)
    self.sparse_values = adapter.Adapter(values)
    self.sparse_index = adapter.Frozen(index)

  def delta(self):
    """The change, spread to [stack, K, F]."""
    index, values = self.sparse_index[...], self.sparse_values[...]
    rows, columns = self.contraction.rows, self.contraction.columns

    def spread(index, values):
      return (
        jnp.zeros(rows * columns)
        .at[index]
        .set(values, indices_are_sorted=True, unique_indices=True)
      )

    for _ in index.shape[:-1]:
      spread = jax.vmap(spread)
    flat = spread(index, values)
    return flat.reshape(*flat.shape[:-1], rows, columns)

  def side(self, x):
    """A product with the spread change: dense products are the fast ones."""
    return beside.silent(x.astype(jnp.float32) @ self.delta())


def sparse(
  module: nnx.Module,
  density: float = 0.01,
  where: str = r".*/(query|value)",
  *,
  choose: str = "random",
  fisher: Mapping[str, jax.Array] | None = None,
  seed: int = 0,
) -> nnx.Module:
  """Puts a trained change of a fixed few entries beside every matched kernel.

  Messages and adapters are compact. A step spreads the values of each client to
  one K x F matrix for each matched layer, and multiplies by it.

  Guarantees:
    the result computes what `module` computes, bit for bit (finite inputs);
    each kernel of a stack has as many entries; random ones depend on (seed,
    layer name) only.

  Args:
    module: any NNX module; untouched.
    density: share of each kernel's entries that train, in (0, 1]; at least one
      entry does.
    where: regex, matched in full against the "/"-joined name of each layer, as
      in `lora`.
    choose: "random", "magnitude" (the largest |kernel|) or "fisher" (the
      largest of `fisher`).
    fisher: {layer name: [stack, K, F]}, e.g. the mean over examples of the
      squares of `first_update`; for choose="fisher".
    seed: of random entries.

  Returns:
    A clone with `Sparse` in place of the matched layers. It trains
    sparse_values: max(1, round(density * K * F)) entries a layer.

  Raises:
    ValueError: as in `lora`; if `density` is not in (0, 1]; if `fisher` is
      missing, lacks a layer or has one of another shape.

  Example:
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> tuned = sparse(model, 0.5, where="layers/0", choose="magnitude")
    >>> tuned.layers[0].sparse_values.shape
    (6,)
  """
  validate.positive(density=density)
  validate.one_of(("random", "magnitude", "fisher"), choose=choose)
  if density > 1:
    raise ValueError(f"density must be at most 1, got {density=}")
  if (choose == "fisher") != (fisher is not None):
    raise ValueError(
      'choose="fisher" goes with fisher={layer name: [K, F]}: got '
      f"{choose=} and fisher={'given' if fisher is not None else None}"
    )

  def make(layer, site):
    rows, columns = site.shape.rows, site.shape.columns
    if choose == "random":
      size = (*site.stack, rows * columns)
      score = jax.random.uniform(site.key, size)
    else:
      kernel = beside.matrix(layer, site.shape)
      score = (
        jnp.abs(kernel)
        if fisher is None
        else _fisher(fisher, site, kernel.shape)
      )
      score = score.reshape(*site.stack, rows * columns)
    kept = max(1, round(density * rows * columns))
    index = jnp.sort(jax.lax.top_k(score, kept)[1], axis=-1)
    return Sparse(layer, index.astype(jnp.int32), site.shape)

  return beside.wrap(module, where, "sparse", make, seed)


def _fisher(fisher, site, shape):
  """The given information of one layer, checked."""
  given = fisher.get(site.name)
  if given is None or given.shape != shape:
    got = "none" if given is None else f"one of shape {list(given.shape)}"
    raise ValueError(
      f"fisher must have a matrix of shape {list(shape)} for every matched "
      f"layer: got {got} for {site.name!r}{validate.near(site.name, fisher)}"
    )
  return given
