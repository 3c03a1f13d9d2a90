"""Frozen prefixes: computed once for each example, not in every step.

Where nothing before the first wire is trained, what crosses there is the same
in every round. It becomes a feature of the data: one program, of one shape,
makes it from the examples, and steps read it. Whether that program runs once
or before every round changes no bit.

The server remembers what it got: an example's message crosses the first wire
once, alone, and never in a step.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedjax_peft import data, link, peft, record, validate
from fedjax_peft.split import cutting

_AT = "cut/"  # features that hold a message


class Recall(nnx.Module):
  """A part that remembers what it would compute.

  Attributes:
    wire: what messages crossed before they were remembered.
  """

  def __init__(self, wire: cutting.Wire = cutting.PLAIN):
    self.wire = wire

  def __call__(self, *inputs, **features) -> dict[str, jax.Array]:
    """The message, of features that hold it."""
    names = [k for k in features if k.startswith(_AT)]
    if not names:
      raise ValueError(
        "the first part's messages must be among the features: got "
        f"{sorted(features)}; train on what Prefix.remembered returns"
      )
    found = {k.removeprefix(_AT): features[k] for k in names}
    return {
      k: v.astype(jnp.float32) if jnp.issubdtype(v.dtype, jnp.floating) else v
      for k, v in found.items()
    }


def crossed(pipe: cutting.Pipeline) -> cutting.Wire | None:
  """What messages crossed that the server remembers; None if it has none."""
  first = pipe.parts()[0]
  home, then = (cutting.is_at_home(name) for name in pipe.names[:2])
  is_kept = isinstance(first, Recall) and home and not then
  return first.wire if is_kept else None


class Prefix(NamedTuple):
  """The frozen first part of a pipeline; see `prefix_of`.

  Attributes:
    module: the part.
    rest: the pipeline, with `Recall` in place of that part; where that is on
      the device and the next is not, nothing crosses between them any more.
    dtype: of the messages that are kept.
    rows: examples that are computed at once; results do not depend on which.
    wire: what an example's message crosses once; None: it stays on the device.
    key: of the wire's randomness.
  """

  module: nnx.Module
  rest: cutting.Pipeline
  dtype: str
  rows: int
  wire: cutting.Wire | None
  key: jax.Array

  @property
  def is_exact(self) -> bool:
    """Whether what is kept is what was computed."""
    return self.dtype == "float32"

  def fingerprint(self, population: data.Population) -> str:
    """Tells what the messages depend on: leaves, program, data, dtype."""
    graph, state = nnx.split(self.module)
    leaves = {
      "/".join(map(str, path)): leaf[...]
      for path, leaf in nnx.to_flat_state(state)
    }
    parts = (
      record.digest(leaves),
      str(graph),
      population.fingerprint,
      self.dtype,
      str(self.rows),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()

  def messages(self, examples: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the part hands on for every example.

    Args:
      examples: {feature: [M, ...]}.

    Returns:
      {name: [M, ...]}, in the dtype that is kept.
    """
    features = {k: v for k, v in examples.items() if k != "label"}
    graph, state = nnx.split(self.module)

    def run(batch, place):
      return _compute(graph, state, batch, self.dtype)

    return _in_blocks(run, features, self.rows)

  def sent(self, messages: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the next part gets of every example's message.

    Args:
      messages: {name: [M, ...]}, what the part hands on.

    Returns:
      The same shapes and dtypes. The m-th message depends on itself, on m and
      on the wire.
    """
    if self.wire is None or not link.parts_of(self.wire.up):
      return dict(messages)

    def run(batch, place):
      return _cross(self.wire, self.key, batch, place)

    return _in_blocks(run, messages, self.rows)

  def remembered(
    self,
    population: data.Population,
    kept: MutableMapping[str, dict[str, np.ndarray]] | None = None,
  ) -> data.Population:
    """The population, whose examples hold what the next part gets.

    Args:
      population: any.
      kept: messages of earlier calls by `fingerprint`, before they cross:
        those of the same part and data are used again, others are added.
    """
    kept = {} if kept is None else kept
    key = self.fingerprint(population)
    if key not in kept:
      kept[key] = self.messages(population.examples)
    more = {_AT + k: v for k, v in self.sent(kept[key]).items()}
    return dataclasses.replace(
      population, examples={**population.examples, **more}
    )


def prefix_of(
  pipe: cutting.Pipeline,
  *,
  precision: Literal["bf16", "float32"] = "bf16",
  dtype: Literal["float32", "bfloat16"] = "float32",
  rows: int = 64,
) -> Prefix:
  """Takes the frozen first part off a pipeline.

  Args:
    pipe: adapters are in later parts only.
    precision: of the frozen products, as in `fp.model`.
    dtype: that messages are kept in; bfloat16 takes half the memory and is
      not exact.
    rows: examples that are computed at once.

  Raises:
    ValueError: if the first part is trained.

  Example:
    >>> from fedjax_peft import models, split
    >>> tiny = models.load("encoder", vocab=9, width=8, depth=2, heads=2)
    >>> pipe = split.pipeline(tiny, {"device": "layers/0", "server": None})
    >>> pipe = peft.lora(pipe, rank=2, where=r"server/.*query")
    >>> prefix_of(pipe).is_exact
    True
  """
  validate.at_least(1, rows=rows)
  validate.one_of(["float32", "bfloat16"], dtype=dtype)
  first = pipe.names[0]
  trained = [k for k in peft.split(pipe).params if k.startswith(f"{first}/")]
  if trained:
    raise ValueError(
      f"a prefix must not change to be remembered, but '{trained[0]}' is "
      f"trained; put adapters into {', '.join(pipe.names[1:])} only"
    )
  frozen: Any = peft.freeze(pipe, precision=precision)
  rest: Any = nnx.clone(pipe)
  wire, key = None, pipe.rngs.cut.key[...]
  if cutting.is_at_home(first) and not cutting.is_at_home(pipe.names[1]):
    wire, *others = pipe.wires
    rest.wires = (cutting.Wire(down=None), *others)
  setattr(rest, first, Recall(wire or cutting.PLAIN))
  return Prefix(getattr(frozen, first), rest, dtype, rows, wire, key)


def _in_blocks(
  run: Callable, columns: Mapping[str, Any], rows: int
) -> dict[str, np.ndarray]:
  """What (rows of the columns, their places) gives, of as many at a time."""
  columns = {k: np.asarray(v) for k, v in columns.items()}
  count = len(next(iter(columns.values())))
  made: list = []
  for start in range(0, count, rows):
    place = np.minimum(np.arange(start, start + rows), count - 1)
    found = run({k: v[place] for k, v in columns.items()}, place)
    keep = min(rows, count - start)
    made.append({k: np.asarray(v)[:keep] for k, v in found.items()})
  return {k: np.concatenate([m[k] for m in made]) for k in made[0]}


@jax.jit(static_argnames="wire")
def _cross(wire, key, messages, place):
  """Each of some messages as it is received, sent alone."""

  def one(message, number):
    alone = {
      k: v[None].astype(jnp.float32)
      if jnp.issubdtype(v.dtype, jnp.floating)
      else v[None]
      for k, v in message.items()
    }
    own = jax.random.fold_in(key, number)
    came = cutting.cross(wire, alone, own)
    return {k: v[0].astype(message[k].dtype) for k, v in came.items()}

  return jax.vmap(one)(messages, place)


@jax.jit(static_argnames=("graph", "dtype"))
def _compute(graph, state, batch, dtype):
  """One batch; always of the same shape, so that rows have the same bits."""
  message = nnx.merge(graph, state)(**batch)
  return {
    k: v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v
    for k, v in message.items()
  }
