"""Stages: a model as pieces that can be computed in different places.

A stage is a piece that is not divided: embeddings, one block, a head. A part
is a run of stages as a model of its own, which holds no other variables. What
a part hands to the next is a message: {"x": float [B, ...], the stream, and
integers that later stages read}. Parts one after another are the whole model.

A model has `stages()`, `part(start, stop)`, its `span`, and a `crossing`: None,
or a module whose `arm()`, called once at the start of each forward pass,
returns `visit(i, x) -> x`; it is called with the stream after every stage i of
the model but the last.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft.models import stack

Message = dict[str, jax.Array]
Passed = Any  # an array, of the whole model, or the Message of a part
Visit = Callable[[int | jax.Array, jax.Array], jax.Array]


class Stage(NamedTuple):
  """A piece of a model that is not divided.

  Attributes:
    name: such as "embeddings" or "layers/3".
    owns: path prefixes of its variables in the whole model. Every variable of
      a model is owned by one stage, or by one for each of its rows.
    row: of variables that are stacked on a leading axis; None if it owns them
      whole.
    reads: path prefixes of variables that another stage owns (a tied output
      table); a part with one of the two stages holds them.
  """

  name: str
  owns: tuple[str, ...]
  row: int | None = None
  reads: tuple[str, ...] = ()


class Span(NamedTuple):
  """The stages that a model holds.

  Attributes:
    start: number of the first one.
    stop: one more than the number of the last.
    total: stages of the whole model.
  """

  start: int
  stop: int
  total: int

  @property
  def begins(self) -> bool:
    """Whether it gets the model's inputs, not a message."""
    return self.start == 0

  @property
  def ends(self) -> bool:
    """Whether it returns the model's output, not a message."""
    return self.stop == self.total


def layers(depth: int) -> tuple[Stage, ...]:
  """A stage for each of the stacked blocks at `layers`."""
  return tuple(Stage(f"layers/{i}", ("layers",), i) for i in range(depth))


def whole(model: Any) -> Span:
  """The span of a model that is not cut."""
  total = len(model.stages())
  return Span(0, total, total)


def part(model: Any, start: int, stop: int) -> Any:
  """Some stages as a model of its own, of the same class.

  Guarantees:
    parts one after another compute what the model does: bit for bit where it
    is unrolled, else as far as the compiler rounds shorter scans alike.
    Arrays are shared, rows of stacked ones are sliced. Variables keep their
    paths; attributes that the part does not need are None. The crossing, and
    what no stage owns, is in every part.

  Args:
    model: with `stages()` and a `span`, whole or a part itself; untouched.
    start: number of the first stage, counted in the whole model.
    stop: one more than that of the last, start < stop.

  Returns:
    A model that is called like the whole one if `start` is 0, else with the
    message of the part before; it returns what the whole one does if `stop` is
    the number of stages, else a message. A part without the stage of a prompt
    takes none.

  Raises:
    ValueError: if there are no such stages, or a cut goes through a module
      that was wrapped.

  Example:
    >>> from fedjax_peft import models
    >>> model = models.load("cnn", classes=10)
    >>> [stage.name for stage in model.stages()][:3]
    ['convolutions/0', 'convolutions/1', 'dense/0']
    >>> device, server = model.part(0, 2), model.part(2, 5)
    >>> image = jnp.ones((1, 28, 28))
    >>> message = device(image)
    >>> message["x"].shape
    (1, 4, 4, 16)
    >>> bool((server(message) == model(image)).all())
    True
  """
  span, stages = model.span, model.stages()
  if not span.start <= start < stop <= span.stop:
    raise ValueError(
      f"a part must be of stages {span.start} to {span.stop} of the model, at "
      f"least one: got {start=} {stop=}; the stages are "
      f"{', '.join(stage.name for stage in stages)}"
    )
  clone = nnx.clone(model, graph=True)
  clone.span = Span(start, stop, span.total)
  had, kept = stages[span.start : span.stop], stages[start:stop]
  for path in dict.fromkeys(p for s in had for p in (*s.owns, *s.reads)):
    before = [s.row for s in had if path in s.owns]
    after = [s.row for s in kept if path in s.owns]
    if not after and not any(path in stage.reads for stage in kept):
      _put(clone, path, None)
      if path == "prompt":
        del clone.prompt_width  # so that no prompt is put into this part
    elif after and after != before:
      first, last = after[0] - before[0], after[-1] - before[0]
      _put(clone, path, stack.rows(_take(clone, path), first, last + 1))
  return clone


def joined(parts: Sequence[Any]) -> Any:
  """Parts one after another as one model: undoes `part`.

  Args:
    parts: of one model, each beginning where the one before it ends; they may
      have been trained since. Untouched.

  Returns:
    A model of the same class, with the stages of all of them.

  Raises:
    ValueError: if they do not follow each other, rows of a stack are not alike,
      or a variable that several parts read is no longer the same in all.

  Example:
    >>> from fedjax_peft import models
    >>> model = models.load("cnn", classes=10)
    >>> again = joined([model.part(0, 2), model.part(2, 5)])
    >>> nnx.graphdef(again) == nnx.graphdef(model)
    True
  """
  spans = [part.span for part in parts]
  if any(a.stop != b.start for a, b in itertools.pairwise(spans)):
    raise ValueError(
      "parts must follow each other to be one model: got stages "
      f"{[(span.start, span.stop) for span in spans]}; give them in order"
    )
  held = [nnx.clone(part, graph=True) for part in parts]
  clone, stages = held[0], held[0].stages()
  clone.span = spans[0]._replace(stop=spans[-1].stop)
  here = stages[clone.span.start : clone.span.stop]
  for path in dict.fromkeys(p for s in here for p in s.owns):
    some = [
      part
      for part, span in zip(held, spans, strict=True)
      if any(path in s.owns for s in stages[span.start : span.stop])
    ]
    found = [_take(part, path) for part in some]
    _put(clone, path, stack.joined(found) if found[1:] else found[0])
    if path == "prompt":
      clone.prompt_width = some[0].prompt_width
  _check_copies(clone, held, stages)
  return clone


def _check_copies(whole, parts, stages) -> None:
  """Raises ValueError if copies of what stages read were trained apart."""
  for part in parts:
    for path in {p for s in stages[slice(*part.span[:2])] for p in s.reads}:
      one, two = (
        jax.tree.leaves(nnx.state(_take(x, path))) for x in (whole, part)
      )
      if not all(map(_is_same, one, two)):
        raise ValueError(
          f"{path!r} is read by several parts and must be the same in all: got "
          "copies that were trained apart, which are no one model; freeze it"
        )


def _is_same(a, b) -> bool:
  """Whether arrays are equal; of arrays without values, as far as is known."""
  if a is b or not all(isinstance(x, jax.Array) for x in (a, b)):
    return a.shape == b.shape
  return bool((a == b).all())


def message(x: jax.Array, count: int = 0, **integers: jax.Array) -> Message:
  """What a part hands to the next.

  Args:
    x: the stream, [B, ...].
    count: places at its start that belong to a prompt, to be left out by the
      last part. It is known when a program is traced, so it travels as the
      shape of an entry that is empty.
    **integers: what later stages read.
  """
  if count:
    integers["places"] = jnp.zeros((x.shape[0], count, 0), jnp.int8)
  return {"x": x, **integers}


def received(message: Mapping[str, jax.Array]) -> tuple[jax.Array, int]:
  """The stream of a message, and how many of its places are of a prompt.

  Raises:
    ValueError: if it is no message, but what the whole model takes.

  Example:
    >>> x, count = received(message(jnp.ones((2, 7, 4)), 3))
    >>> x.shape, count
    ((2, 7, 4), 3)
  """
  if not isinstance(message, Mapping):
    raise ValueError(
      "a part that does not begin the model takes the message of the part "
      f"before it, a dict with 'x': got a {type(message).__name__}"
    )
  is_prompted = "places" in message
  return message["x"], message["places"].shape[1] if is_prompted else 0


def arm(model: Any) -> Visit | None:
  """The visit of one forward pass, or None without a crossing."""
  return None if model.crossing is None else model.crossing.arm()


def after(visit: Visit | None, i: int, x: jax.Array) -> jax.Array:
  """The stream x after stage i."""
  return x if visit is None else visit(i, x)


def _owner(model, path):
  """The module that has the attribute at a path, and its name there."""
  *names, last = path.split("/")
  owner = model
  for name in names:
    owner = getattr(owner, name)
  if isinstance(owner, nnx.List):
    return owner, int(last)
  if not hasattr(owner, last):
    raise ValueError(
      f"a cut must not go through a wrapped module: {'/'.join(names)!r} is a "
      f"{type(owner).__name__}, without {last!r}; wrap the modules inside it"
    )
  return owner, last


def _take(model, path):
  """What is at a path, in a List or not."""
  owner, name = _owner(model, path)
  return owner[name] if isinstance(name, int) else getattr(owner, name)


def _put(model, path, value):
  """Replaces what is at a path."""
  owner, name = _owner(model, path)
  if isinstance(name, int):
    owner[name] = value
  else:
    setattr(owner, name, value)
