"""Modules as stages: what makes a model of your own one that can be cut."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from fedjax_peft.models import stage


class Modules(nnx.Module):
  """Modules that are called one after another, each a stage.

  The first gets the inputs, each other one the array that the one before it
  returns, axis B first.

  Example:
    >>> import jax.numpy as jnp
    >>> rngs = nnx.Rngs(0)
    >>> net = Modules(
    ...   [
    ...     ("hidden", nnx.Linear(4, 8, rngs=rngs)),
    ...     ("head", nnx.Linear(8, 2, rngs=rngs)),
    ...   ]
    ... )
    >>> net.part(1, 2)(net.part(0, 1)(jnp.ones((3, 4)))).shape
    (3, 2)
  """

  def __init__(self, named: Sequence[tuple[str, Any]], *, last: bool = True):
    """Takes modules as stages.

    Args:
      named: (name, module) of each stage; names are those of attributes.
      last: whether the last module's result is the model's.

    Raises:
      ValueError: if there is no module, or a name is taken or none.
    """
    names = [name for name, _ in named]
    if not names or len(set(names)) < len(names):
      raise ValueError(
        f"stages must have different names, and at least one: got {names}"
      )
    self.names = tuple(names)
    self.last = last
    self.crossing = nnx.data(None)
    for name, module in named:
      if not name.isidentifier() or hasattr(self, name):
        raise ValueError(
          f"a stage is an attribute and must be called like one that is free, "
          f"got {name!r}; write 'block_0'"
        )
      setattr(self, name, module)

  def stages(self) -> tuple[stage.Stage, ...]:
    """The stages, in order."""
    return tuple(stage.Stage(name, (name,)) for name in self.names)

  def part(self, start: int, stop: int) -> "Modules":
    """Stages start to stop, as a module that shares their arrays."""
    clone = nnx.clone(self)
    some = [(name, getattr(clone, name)) for name in self.names[start:stop]]
    return Modules(some, last=self.last and stop == len(self.names))

  def __call__(self, *inputs, **features):
    """The last stage's result, of the inputs or of a message."""
    visit = self.crossing.arm() if self.crossing is not None else None
    if inputs and isinstance(inputs[0], dict):
      inputs = (inputs[0]["x"],)
    x: Any = None
    for i, name in enumerate(self.names):
      module = getattr(self, name)
      x = module(x) if i else module(*inputs, **features)
      if visit is not None and i + 1 < len(self.names):
        x = visit(i, x)
    return x if self.last else {"x": x}
