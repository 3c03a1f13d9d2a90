"""Frozen prefixes: computed once for each example, not in every step.

Where nothing before the first wire is trained, what crosses there is the same
in every round. It becomes a feature of the data: one program, of one shape,
makes it from the examples, and steps read it. Whether that program runs once
or before every round changes no bit.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedjax_peft import data, peft, record, validate
from fedjax_peft.split import cutting

_AT = "cut/"  # features that hold a message


class Recall(nnx.Module):
  """A part that remembers what it would compute."""

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


class Prefix(NamedTuple):
  """The frozen first part of a pipeline; see `prefix_of`.

  Attributes:
    module: the part.
    rest: the pipeline, with `Recall` in place of that part.
    dtype: of the messages that are kept.
    rows: examples that are computed at once; results do not depend on which.
  """

  module: nnx.Module
  rest: cutting.Pipeline
  dtype: str
  rows: int

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
    features = {k: np.asarray(v) for k, v in examples.items() if k != "label"}
    count = len(next(iter(features.values())))
    graph, state = nnx.split(self.module)
    made: list = []
    for start in range(0, count, self.rows):
      place = np.minimum(np.arange(start, start + self.rows), count - 1)
      batch = {k: v[place] for k, v in features.items()}
      message = _compute(graph, state, batch, self.dtype)
      keep = min(self.rows, count - start)
      made.append({k: np.asarray(v)[:keep] for k, v in message.items()})
    return {k: np.concatenate([m[k] for m in made]) for k in made[0]}

  def remembered(
    self,
    population: data.Population,
    kept: MutableMapping[str, dict[str, np.ndarray]] | None = None,
  ) -> data.Population:
    """The population, whose examples hold what the part hands on.

    Args:
      population: any.
      kept: messages of earlier calls by `fingerprint`: those of the same part
        and data are used again, others are added.
    """
    kept = {} if kept is None else kept
    key = self.fingerprint(population)
    if key not in kept:
      kept[key] = self.messages(population.examples)
    more = {_AT + k: v for k, v in kept[key].items()}
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
  setattr(rest, first, Recall())
  return Prefix(getattr(frozen, first), rest, dtype, rows)


@jax.jit(static_argnames=("graph", "dtype"))
def _compute(graph, state, batch, dtype):
  """One batch; always of the same shape, so that rows have the same bits."""
  message = nnx.merge(graph, state)(**batch)
  return {
    k: v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v
    for k, v in message.items()
  }
