"""Boundaries: what a receiver sees, as something that can be attacked.

A boundary is where a message leaves its sender. An audit asks what whoever
receives it can learn, so it holds no more and no less than that receiver: the
wires as our links make them, decoded as far as the receiver can, and whatever
else it is told. New boundaries join by a decorator, and every attack runs on
them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_peft import validate
from fedjax_peft.audit import voice as voice_lib

PyTree = Any
Examples = Mapping[str, Any]  # {feature: array}


class Around(NamedTuple):
  """What the message of one client meets on its way.

  Attributes:
    others: messages of the rest of its cohort [C - 1, ...]; {} where every
      message is seen alone.
    here: bool scalar, whether the client takes part; True where a client's
      absence would be seen.
    key: of the round's randomness: rounding, masks, noise.
  """

  others: PyTree
  here: jax.Array
  key: jax.Array


class Boundary(NamedTuple):
  """Where a message is seen by somebody else.

  Attributes:
    name: for the table.
    voice: what a client says, and the weights that everybody knows.
    cross: (message, Around) -> what the receiver sees, of the message's
      structure: floats, decoded as far as the receiver can.
    crowd: messages [P, ...] of which the rest of a cohort is drawn; None where
      messages are seen alone.
    cohort: C, how many are seen as one.
    told: what the attacker knows besides.
    multiplier: std of the noise / how far what is seen can move, so that the
      accountant can tell epsilon; None where nothing is promised.
    event: what the accountant is told (`privacy.events.Event`); None: normal
      noise of that multiplier.
    rows: whether what is seen has a row for each example.
    absence: whether that a client takes no part is to be hidden too; else
      only what it holds.
  """

  name: str
  voice: voice_lib.Voice
  cross: Callable[[PyTree, Around], PyTree]
  crowd: PyTree | None = None
  cohort: int = 1
  told: str = "the model; labels"
  multiplier: float | None = None
  event: Any = None
  rows: bool = False
  absence: bool = False


class Subject(NamedTuple):
  """What is audited: a model, adapted in several ways, and other clients.

  Attributes:
    full: everything is trained.
    adapters: only adapters are.
    device: the first part of the model, cut.
    crowd: {feature: [P, n, ...]}, examples of clients that are not attacked.
    cohort: C, at most P + 1.
    clip_norm: L2 bound of one message, where there is one.
    multiplier: std of the noise / `clip_norm`.
  """

  full: voice_lib.Voice
  adapters: voice_lib.Voice
  device: voice_lib.Voice
  crowd: Examples
  cohort: int = 16
  clip_norm: float = 0.1
  multiplier: float = 4.0


BOUNDARIES: dict[str, Callable[[Subject], Boundary]] = {}  # by name


def boundary(name: str) -> Callable:
  """Registers a function (Subject) -> Boundary under a name.

  Raises:
    ValueError: if the name is taken.
  """
  if name in BOUNDARIES:
    raise ValueError(f"a boundary {name!r} is there already; use another name")

  def register(make: Callable[[Subject], Boundary]):
    BOUNDARIES[name] = make
    return make

  return register


def find(name: str, subject: Subject) -> Boundary:
  """The boundary of that name.

  Raises:
    ValueError: if there is none.
  """
  validate.one_of(BOUNDARIES, boundary=name)
  return BOUNDARIES[name](subject)


def observe(
  seen: Boundary,
  examples: Examples,
  key: jax.Array,
) -> PyTree:
  """What the receiver sees of many clients, each with a cohort of its own.

  Args:
    seen: the boundary.
    examples: {feature: [M, n, ...]}.
    key: of the cohorts, and of their randomness.

  Returns:
    Numpy pytree [M, ...].
  """
  messages = voice_lib.of_many(seen.voice, examples)
  count = len(jax.tree.leaves(messages)[0])
  draws, keys = jax.random.split(key, (2, count))
  others = seats(seen, draws)
  return cross_many(seen, messages, others, np.ones(count, bool), keys)


def seats(seen: Boundary, keys: jax.Array) -> np.ndarray:
  """Who else is in each of many cohorts: rows of the crowd [M, C - 1]."""
  if seen.crowd is None:
    return np.zeros((len(keys), 0), np.int32)
  size = len(jax.tree.leaves(seen.crowd)[0])
  drawn = jax.vmap(lambda key: jax.random.permutation(key, size))(keys)
  return np.asarray(drawn[:, : seen.cohort - 1], np.int32)


def cross_many(
  seen: Boundary,
  messages: PyTree,
  others: np.ndarray,
  here: np.ndarray,
  keys: jax.Array,
) -> PyTree:
  """What the receiver sees of many messages.

  Args:
    seen: the boundary.
    messages: [M, ...].
    others: int32 [M, C - 1], rows of the crowd; see `seats`.
    here: bool [M], see `Around`.
    keys: [M].

  Returns:
    Numpy pytree [M, ...].
  """
  run = _crossing(seen.cross)
  return voice_lib.in_chunks(
    lambda *rows: run(seen.crowd, *rows), (messages, others, here, keys)
  )


@functools.lru_cache(maxsize=32)
def _crossing(cross):
  """Many crossings at once, compiled once a boundary."""

  def one(crowd, message, rows, here, key):
    others = {} if crowd is None else jax.tree.map(lambda x: x[rows], crowd)
    return cross(message, Around(others, here, key))

  return jax.jit(jax.vmap(one, (None, 0, 0, 0, 0)))
