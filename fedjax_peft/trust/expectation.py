"""Expectations: what may cross, compared with what will."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from fedjax_peft import tree, validate
from fedjax_peft.trust import boundary as boundary_lib
from fedjax_peft.trust.violation import Violation


class Expectation(NamedTuple):
  """What may cross a boundary; of what is not said anything may.

  Attributes:
    leaves: regexes; each leaf of a message must be matched whole by one.
    dtypes: of what is on the wire.
    shapes: {leaf: shape} of a message.
    most_bytes: of one message on the wire.
  """

  leaves: Sequence[str] = ()
  dtypes: Sequence[str] = ()
  shapes: Mapping[str, Sequence[int]] = {}
  most_bytes: int | None = None


def check(
  boundaries: Sequence[boundary_lib.Boundary],
  expected: Mapping[str, Expectation],
) -> None:
  """Compares what will cross every boundary with what may.

  A leaf that is placed on the device crosses nothing, whatever is expected.

  Args:
    boundaries: of a run; see `boundary.boundaries`.
    expected: {"up", "down", "notes" or "cut": what may cross there}.

  Raises:
    Violation: in one sentence, if something crosses that may not.
    ValueError: if a regex or a leaf is named that no such boundary has, or
      there is no such boundary.
  """
  validate_names(boundaries, expected)
  for at in boundaries:
    for leaf, spec in at.message.items():
      if leaf in at.private:
        raise Violation(
          f"{at.name} must not carry leaves that are placed on the device: got "
          f"'{leaf}', {boundary_lib.in_words(spec)}; place it at a tier, or "
          "leave it out of the message"
        )
    if at.way in expected:
      _compare(at, expected[at.way])


def _compare(at: boundary_lib.Boundary, may: Expectation) -> None:
  """One boundary."""
  words = boundary_lib.in_words
  for leaf, spec in at.message.items():
    if may.leaves and not any(re.fullmatch(r, leaf) for r in may.leaves):
      raise Violation(
        f"{at.name} may carry leaves {list(may.leaves)}: got '{leaf}', "
        f"{words(spec)}; add it to trust.{at.way}.leaves, or leave it out of "
        "the message"
      )
    shape = may.shapes.get(leaf)
    if shape is not None and tuple(shape) != tuple(spec.shape):
      raise Violation(
        f"{at.name} may carry '{leaf}' with shape {list(shape)}: got "
        f"{words(spec)}; change trust.{at.way}.shapes, or what is trained"
      )
  for leaf, spec in at.wire.items():
    if may.dtypes and str(spec.dtype) not in may.dtypes:
      raise Violation(
        f"{at.name} may carry dtypes {list(may.dtypes)} on the wire: got "
        f"'{leaf}', {words(spec)}; add it to trust.{at.way}.dtypes, or use "
        "other links"
      )
  if may.most_bytes is not None and at.nbytes > may.most_bytes:
    largest = max(at.wire, key=lambda k: tree.nbytes(at.wire[k]))
    raise Violation(
      f"{at.name} may carry {may.most_bytes} bytes a message: got {at.nbytes}, "
      f"most of them '{largest}', {words(at.wire[largest])}; raise "
      f"trust.{at.way}.most_bytes, or send less"
    )


def validate_names(
  boundaries: Sequence[boundary_lib.Boundary],
  expected: Mapping[str, Expectation],
) -> None:
  """Raises ValueError if something is expected of what is not there."""
  for way, may in expected.items():
    validate.one_of(boundary_lib.WAYS, way=way)
    here = [at for at in boundaries if at.way == way]
    if not here:
      raise ValueError(
        f"trust.{way} says what crosses, but nothing does: this run has "
        f"{sorted({at.way for at in boundaries})}; leave trust.{way} out"
      )
    names = sorted({leaf for at in here for leaf in at.message})
    for regex in may.leaves:
      if not any(re.fullmatch(regex, name) for name in names):
        raise ValueError(
          f"trust.{way}.leaves {regex!r} matches no leaf; the leaves are "
          f"{names[:8]}{'...' if len(names) > 8 else ''}"
          f"{validate.near(regex, names)}"
        )
    for name in may.shapes:
      validate.one_of(names, **{f"trust.{way}.shapes": name})
    for dtype in may.dtypes:
      try:
        jax.numpy.dtype(dtype)
      except TypeError:
        raise ValueError(
          f"trust.{way}.dtypes must be dtypes such as 'float32', got {dtype!r}"
        ) from None
