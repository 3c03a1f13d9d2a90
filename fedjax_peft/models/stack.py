"""Stacked layers: one block whose variables carry a leading depth axis.

The forward pass scans over that axis, so the compiled program holds one block
whatever the depth, and the end of each block is a fusion barrier: without one,
XLA's CPU backend recomputes the residual stream in every layernorm.
"""

import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx


def _is_product(primitive, *_, **__) -> bool:
  """Whether a value is a matrix product, or that of a frozen layer."""
  return primitive.name in ("dot_general", "custom_vjp_call")


# Under a scan every stored value is copied into a stacked buffer, so storing
# only matrix products and redoing what lies between takes a third less memory
# and no more time.
KEEP = {
  "all": jax.checkpoint_policies.everything_saveable,
  "dots": _is_product,
  "none": jax.checkpoint_policies.nothing_saveable,
}

# Metadata that `peft.last` sets: how many of the first rows do not train.
_STILL = "rows_that_stay"


def build(
  make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs
) -> nnx.Module:
  """Builds `depth` blocks as one module with a leading axis on each variable.

  Args:
    make: builds one block from its own random streams.
    depth: number of blocks, >= 1.
    rngs: where the per-block keys come from.

  Returns:
    A module of the structure of `make(rngs)`; every leaf is `[depth, ...]`.
  """
  keys = jax.random.split(rngs.params(), depth)
  return nnx.vmap(lambda key: make(nnx.Rngs(key)))(keys)


def rows(layers: nnx.Module, start: int, stop: int) -> nnx.Module:
  """Blocks start to stop of a stacked module, as one; untouched.

  Returns:
    A module of the same structure; every leaf is `[stop - start, ...]`.
  """
  graph, state = nnx.split(layers, graph=True)

  def some(leaf):
    if not isinstance(leaf, nnx.Variable):
      return leaf[start:stop]
    kind, metadata = type(leaf), dict(leaf.get_metadata())
    still = min(metadata.pop(_STILL, 0) - start, stop - start)
    if still > 0:
      metadata[_STILL] = still
    if still == stop - start:  # none of these rows trains: an empty leaf would
      kind = nnx.Param
      del metadata[_STILL]
    return kind.from_metadata(leaf.get_raw_value()[start:stop], metadata)

  leaves = [some(leaf) for _, leaf in nnx.to_flat_state(state)]
  return nnx.merge(graph, leaves, copy=True)


def joined(parts: Sequence[nnx.Module]) -> nnx.Module:
  """Stacked modules as one, block after block: undoes `rows`.

  Args:
    parts: stacks of the same blocks; untouched.

  Returns:
    A module of the same structure; every leaf is `[depth, ...]`, as many as
    there are blocks in all parts. If a leaf is trained in some parts, it is in
    all, but for the first blocks where it was not.

  Raises:
    ValueError: if the blocks are not alike.
  """
  split = [nnx.split(part, graph=True) for part in parts]
  leaves = [nnx.to_flat_state(state) for _, state in split]
  _check_alike(leaves)
  graphs = {_plain(graph, flat) for (graph, _), flat in zip(split, leaves)}
  if len(graphs) > 1:
    raise ValueError(
      f"{_ALIKE}: got the same arrays, but other constants beside them, such "
      f"as the factor of an adapter; {_MERGE}"
    )
  rows = zip(*([leaf for _, leaf in flat] for flat in leaves), strict=True)
  return nnx.merge(split[0][0], [_one(some) for some in rows], copy=True)


_ALIKE = "blocks that become one stack must be alike"
_MERGE = "fold adapters into their layers before (peft.merged, --merged)"


def _check_alike(leaves) -> None:
  """Raises ValueError unless all parts have leaves of the same shapes."""
  first, *others = (
    {"/".join(map(str, path)): leaf.shape[1:] for path, leaf in flat}
    for flat in leaves
  )
  for other in others:
    for name in sorted(first.keys() | other.keys()):
      one, two = (x.get(name, "missing") for x in (first, other))
      if one != two:
        raise ValueError(
          f"{_ALIKE}: got blocks in which {name!r} is "
          f"{_shape(one)}, and others in which it is {_shape(two)}; {_MERGE}"
        )


def _shape(found) -> str:
  return found if isinstance(found, str) else f"{list(found)}"


def _plain(graph, flat) -> nnx.GraphDef:
  """What is static in a stack, whatever of it is trained."""
  values = [
    nnx.Param(leaf.get_raw_value()) if isinstance(leaf, nnx.Variable) else leaf
    for _, leaf in flat
  ]
  return nnx.graphdef(nnx.merge(graph, values, copy=True))


def _one(leaves):
  """A leaf of all blocks, of one for each part."""
  if not isinstance(leaves[0], nnx.Variable):
    return jnp.concatenate(leaves)
  trained = [leaf for leaf in leaves if type(leaf) is not nnx.Param]
  metadata = dict((trained or leaves)[-1].get_metadata())
  metadata.pop(_STILL, None)
  kind, still = type((trained or leaves)[-1]), 0
  for leaf in leaves:
    count = leaf.shape[0]
    rests = leaf.get_metadata().get(_STILL, 0)
    rests = count if trained and type(leaf) is nnx.Param else rests
    still += min(rests, count)
    if rests < count:
      break
  if still:
    metadata[_STILL] = still
  value = jnp.concatenate([leaf.get_raw_value() for leaf in leaves])
  return kind.from_metadata(value, metadata)


def apply(
  layers: nnx.Module | None,
  x: jax.Array,
  *shared,
  keep: str = "dots",
  unroll: bool = False,
  visit: Callable[[int | jax.Array, jax.Array], jax.Array] | None = None,
  first: int = 0,
) -> jax.Array:
  """Runs `x = block(x, *shared)` over the leading axis of `layers`.

  Args:
    layers: a stacked block, from `build`; its projections may since have been
      replaced by other layers whose variables carry the same leading axis;
      None is no block.
    x: the residual stream, any shape; every block keeps shape and dtype.
    *shared: what all blocks read (masks, rotations); arrays, trees or None.
    keep: what of a block is stored for the backward pass, a key of `KEEP`.
    unroll: repeat the block in the program instead of scanning: faster on a
      CPU for few layers, but compile time grows with depth.
    visit: (i, x) -> x, what becomes of the stream after block i; i is an int
      if unrolled, else int32. Its values are stored for the backward pass.
    first: number of the first block, for `visit`.

  Returns:
    The stream after the last block.
  """
  if layers is None:
    return x
  graph, state = nnx.split(layers)
  depth = jax.tree.leaves(state)[0].shape[0]

  def step(x, state):
    return nnx.merge(graph, state)(x, *shared), None

  if keep != "all":
    step = jax.checkpoint(step, policy=KEEP[keep], prevent_cse=unroll)
  if unroll:
    for i in range(depth):
      x, _ = step(x, jax.tree.map(operator.itemgetter(i), state))
      x = x if visit is None else visit(first + i, x)
    return x
  if visit is None:
    return jax.lax.scan(step, x, state)[0]

  def visited(x, numbered):
    i, state = numbered
    return visit(i, step(x, state)[0]), None

  numbers = first + jnp.arange(depth, dtype=jnp.int32)
  return jax.lax.scan(visited, x, (numbers, state))[0]


def check(config, *positive: str):
  """Raises ValueError unless the named fields are >= 1 and `keep` is known."""
  for name in positive:
    if getattr(config, name) < 1:
      raise ValueError(
        f"{name} must be at least 1: {name}={getattr(config, name)}"
      )
  if config.keep not in KEEP:
    raise ValueError(
      f"keep must be one of {sorted(KEEP)}: keep={config.keep!r}"
    )
