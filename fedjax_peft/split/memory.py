"""Memories: what a client keeps of a step, for those that follow.

A memory is a leaf that lives on the client, under the path `memory/...`. Its
own "gradient" is what it is to become and its "step" is to become that, so
that whatever is known in a forward or in a backward pass can be remembered.
There are two: the last gradient that came, for a device whose link is gone
(`offline`), and what a wire has not said yet (`feedback`).

A memory lasts from round to round, as other leaves of a client do: with a few
steps in a round it would have nothing to tell if it began anew. So a
population of N clients takes N times its bytes.

  pipe = feedback.with_memory(pipe, batch, examples)
  model = fp.model(pipe, loss)
  local = memory.remembering(local)
  made = fp.fedavg(model, local, placement=memory.PLACEMENT)
  made = split.splitfed(made, model, examples)
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fedjax_peft import tree, work
from fedjax_peft.peft import adapter
from fedjax_peft.split import cutting

PREFIX = "memory/"
PLACEMENT = {f"{PREFIX}.*": "device"}


class Memory(nnx.Module):
  """What a client remembers.

  Attributes:
    offline: of the last gradient (`offline.Offline`), or None.
    feedback: {number of a wire: `feedback.Held`}, of those that lose something.
  """

  def __init__(self):
    self.offline = nnx.data(None)
    self.feedback = nnx.Dict()

  def arrive(
    self, message: dict[str, jax.Array], real: jax.Array | None
  ) -> tuple[dict[str, jax.Array], jax.Array | None]:
    """The first part's message as it goes on, and rows that are said.

    Args:
      message: {name: [B, ...]}.
      real: [B], 0 for rows that are padding; None: nobody trains on them.
    """
    if self.offline is None:
      return message, real
    if real is not None:  # without a link nothing is said
      real = jnp.where(self.offline.online[...], real, jnp.zeros_like(real))
    return self.offline(message), real


def with_part(pipe: cutting.Pipeline, name: str, part: Any) -> cutting.Pipeline:
  """A clone of a pipeline that has a memory, or one more.

  Args:
    pipe: any.
    name: attribute of `Memory`.
    part: its value.
  """
  clone: Any = nnx.clone(pipe)
  if clone.memory is None:
    clone.memory = Memory()
  setattr(clone.memory, name, part)
  return clone


def kind(pipe: cutting.Pipeline) -> type[nnx.Variable]:
  """What marks a leaf of this pipeline as one that changes in a step."""
  return adapter.Adapter if adapter.find(pipe, adapter.Adapter) else nnx.Param


def messages(
  pipe: cutting.Pipeline, batch: int, features: Mapping[str, Any]
) -> list[dict[str, jax.ShapeDtypeStruct]]:
  """Specs of the messages that come to each wire.

  Args:
    pipe: any.
    batch: examples of a client's batch, B.
    features: {name: [M, ...]}, for shapes.
  """
  first = {
    k: jax.ShapeDtypeStruct((batch, *v.shape[1:]), v.dtype)
    for k, v in features.items()
    if k != "label"
  }
  graphs, states = zip(*map(nnx.split, pipe.parts()), strict=True)

  def run(states, first):
    parts = [nnx.merge(*pair) for pair in zip(graphs, states, strict=True)]
    found = [parts[0](**first)]
    for wire, part in zip(pipe.wires[:-1], parts[1:-1], strict=True):
      came = cutting.cross(wire, found[-1], jax.random.key(0))
      found.append(part(came))
    return found

  return jax.eval_shape(run, states, first)


def remembering(local: work.Local) -> work.Local:
  """The same local training, in which memories become what they shall."""

  def becomes(updates, state, params=None):
    return jax.tree.map(jnp.subtract, updates, params), state

  remember = optax.GradientTransformation(lambda _: optax.EmptyState(), becomes)

  def label(params):
    return {k: "remember" if k.startswith(PREFIX) else "train" for k in params}

  def optimizer(round):
    return optax.partition(
      {"train": local.optimizer(round), "remember": remember}, label
    )

  return local._replace(optimizer=optimizer)


def kept(job: work.Work, pipe: cutting.Pipeline) -> work.Work:
  """The same job, which knows what rows its memories are of.

  What is evaluated is a model without memories.

  Args:
    job: of a model that was made of `pipe`; one without a memory stays as it
      is.
    pipe: with a memory or without.

  Raises:
    ValueError: if memories leave their client, or an optimizer moves them.
  """
  if pipe.memory is None:
    return job
  none = {
    k: v
    for k, v in job.params.items()
    if k.startswith(PREFIX) and tree.is_float(v)
  }
  for k in none:
    if job.placement[k] != "device":
      raise ValueError(
        f"a memory is of one client: got '{k}' placed at "
        f"{job.placement[k]!r}; write placement={{**split.memory.PLACEMENT, "
        "...}}"
      )
  if not _is_remembering(job.local):
    raise ValueError(
      "a memory becomes what it shall and goes along no gradient: got a local "
      "training whose optimizer moves it; write "
      "split.memory.remembering(local)"
    )

  def step(carry, sent, base, batch):
    examples = {**batch.examples, cutting.REAL: batch.mask}
    return job.step(carry, sent, base, batch._replace(examples=examples))

  def view(params):
    empty = {k: jnp.zeros(v.shape, v.dtype) for k, v in none.items()}
    return {**job.view(params), **empty}

  return job._replace(step=step, view=view)


def _is_remembering(local: work.Local) -> bool:
  """Whether a step makes a memory what its gradient is."""
  before, after = ({PREFIX: jnp.float32(x)} for x in (1, 3))
  optimizer = optax.with_extra_args_support(local.optimizer(jnp.int32(0)))
  state = optimizer.init(before)
  updates, _ = optimizer.update(after, state, before, sent=before)
  return bool(optax.apply_updates(before, updates)[PREFIX] == 3)
