"""Boundaries: what will cross, known before anything is computed.

Shapes and dtypes are static, so that what a sender says and what is on the wire
can be listed for every boundary of an algorithm when it is built.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import ingredients, link, placement, tree

PyTree = Any
Way = Literal["up", "down", "notes", "cut"]
WAYS: tuple[Way, ...] = ("up", "down", "notes", "cut")


class Boundary(NamedTuple):
  """Where a message leaves its sender.

  Attributes:
    name: for messages, such as "uplink to 'cloud'".
    way: what kind of boundary it is.
    message: {leaf: spec} of what a sender says.
    wire: {leaf: spec} of what crosses. Links that make one vector of all leaves
      leave no name but their own.
    private: names of the leaves that are placed on the device.
  """

  name: str
  way: Way
  message: Mapping[str, jax.ShapeDtypeStruct]
  wire: Mapping[str, jax.ShapeDtypeStruct]
  private: frozenset[str] = frozenset()

  @property
  def nbytes(self) -> int:
    """Bytes of one message on the wire."""
    return tree.nbytes(dict(self.wire))


def boundaries(
  made: algorithm_lib.Algorithm,
  *,
  cohort: int = 1,
  notes: Sequence[ingredients.Note] = (),
) -> list[Boundary]:
  """The boundaries of an algorithm, lowest first.

  Args:
    made: in the form that will run.
    cohort: most senders to the lowest tier.
    notes: what clients tell beside their message.
  """
  job = made.work
  private = frozenset(
    k for k, v in job.placement.items() if v == placement.DEVICE
  )
  found, said, senders = [], ingredients.message(job), cohort
  for i, tier in enumerate(made.tiers):
    labels = {*(t.name for t in made.tiers[i:]), placement.SERVED}
    held = {
      k: v
      for k, v in tree.spec(dict(job.params)).items()
      if job.placement[k] in labels
    }
    up = link.Spec(held if i else said, senders=senders)
    ways: tuple[tuple[Way, link.Spec, link.Link], ...] = (
      ("up", up, tier.link),
      ("down", link.Spec(held), tier.down),
    )
    for way, spec, at in ways:
      name = f"{way}link {'to' if way == 'up' else 'from'} '{tier.name}'"
      wire = at.after(spec).message
      found.append(
        Boundary(name, way, named(spec.message), named(wire), private)
      )
    senders = tier.size
  if notes:
    told = {n.name: jax.ShapeDtypeStruct(n.shape, jnp.float32) for n in notes}
    found.append(Boundary("notes", "notes", told, told, private))
  return found


def named(values: PyTree) -> dict[str, Any]:
  """{name: leaf}; the keys of a path and the names of fields, joined by "/"."""
  flat, _ = jax.tree_util.tree_flatten_with_path(values)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): x
    for path, x in flat
  }


def keys_of(values: PyTree) -> list[str]:
  """Names of the leaves, in order."""
  return list(named(values))


def in_words(spec: Any) -> str:
  """'float32[3, 4]'."""
  shape = ", ".join(map(str, spec.shape))
  return f"{spec.dtype}[{shape}]"
