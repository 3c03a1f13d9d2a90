"""Patterns: what a canary looks like on a wire.

A run of a canary's values, as each of the usual casts would write it, is a
pattern of so many words of 8, 16 or 32 bits; it is looked for in all leaves of
that width, whatever they call their numbers. A code of 8 bits may have any
scale and offset: there a run of values is looked for up to those.

A pattern has at least `BITS` random bits, so that a wire that does not depend
on the canary holds it at a given place with a probability of at most 2^-BITS.
For a code that is the volume of a tube: values [k] in a cube whose distance
from a plane (all that is affine in the wire) is at most a tenth of their own
deviation.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft.trust import canary

RUN = 48  # values of a code
LIKE = 0.99  # squared correlation from which a code is that of a canary
_MOST = 24  # words of a pattern at most


class Patterns(NamedTuple):
  """What is searched for.

  Attributes:
    words: {width: unsigned [P, w]}, of 8, 16 or 32 bits each; a pattern that is
      shorter ends with words that do not count.
    lengths: {width: int [P]}, words of each.
    whose: {width: int [P]}, which canary each is of.
    codes: float32 [G, RUN], runs of mean 0 and norm 1.
    code_of: int [G], which canary each is of.
  """

  words: Mapping[int, np.ndarray]
  lengths: Mapping[int, np.ndarray]
  whose: Mapping[int, np.ndarray]
  codes: np.ndarray
  code_of: np.ndarray


def patterns(planted: canary.Canaries, bits: float = canary.BITS) -> Patterns:
  """What the canaries look like.

  Args:
    planted: the canaries.
    bits: least random bits of a pattern.

  Raises:
    ValueError: if they have too few values to be found in any cast.
  """
  found: dict[int, list] = {8: [], 16: [], 32: []}
  codes = []
  for name, span in sorted(planted.spans.items()):
    rows = planted.examples[name]
    rows = rows.reshape(len(rows), -1)
    for words, each in _casts(rows, span):
      per, width = words.shape[1] // rows.shape[1], words.dtype.itemsize * 8
      need = per * math.ceil(bits / each) if each > 0 else rows.size
      if need > min(_MOST, words.shape[1]):
        continue
      middle = (words.shape[1] - need) // 2 // per * per
      for start in sorted({0, middle}):
        for q, row in enumerate(words):
          found[width].append((row[start : start + need], q))
    if rows.shape[1] >= RUN:
      codes += [(_unit(row[:RUN]), q) for q, row in enumerate(rows)]
  if not found[32]:
    raise ValueError(
      f"a canary must have {bits:g} random bits in {_MOST} values, got fewer "
      f"in {sorted(planted.spans)}; use data of more different values"
    )
  return Patterns(
    {w: _padded([p for p, _ in v], w) for w, v in found.items() if v},
    {w: np.array([len(p) for p, _ in v]) for w, v in found.items() if v},
    {w: np.array([q for _, q in v]) for w, v in found.items() if v},
    np.array([c for c, _ in codes], np.float32).reshape(-1, RUN),
    np.array([q for _, q in codes], np.int32),
  )


def _casts(
  rows: np.ndarray, span: canary.Span
) -> Iterator[tuple[np.ndarray, float]]:
  """(words [Q, values x words of a value], random bits of a value) of each."""
  full, brief = span.bits(23), span.bits(7)
  exact = rows.astype(np.float32)
  rough = exact.astype(jnp.bfloat16)
  yield exact.view(np.uint32), full
  yield rough.astype(np.float32).view(np.uint32), brief
  yield rough.view(np.uint16), brief
  with np.errstate(over="ignore"):  # what is too large becomes infinite
    half = exact.astype(np.float16)
  yield half.view(np.uint16), span.bits(10) if np.isfinite(half).all() else 0
  yield exact.view(np.uint8), full
  steps = math.log2(max(span.high - span.low, 1))  # of integers
  if span.low >= -(2**31) and span.high < 2**31:
    for whole in (
      (np.rint(exact), np.trunc(exact)) if not span.whole else [rows]
    ):
      words = whole.astype(np.int64)
      yield words.astype(np.uint32), steps
      yield words.astype(np.uint16), min(steps, 15)
      yield words.astype(np.uint8), min(steps, 7)
  if rows.dtype == np.uint8:  # pixels
    unit = exact / np.float32(255)
    yield unit.view(np.uint32), steps
    yield (exact * np.float32(1 / 255)).view(np.uint32), steps
    yield unit.astype(jnp.bfloat16).view(np.uint16), min(steps, brief)


def _unit(run: np.ndarray) -> np.ndarray:
  """Values less their mean, of norm 1."""
  run = run.astype(np.float64)
  run = run - run.mean()
  return run / np.linalg.norm(run)


def _padded(rows: list[np.ndarray], width: int) -> np.ndarray:
  """Rows of words one below the other."""
  table = np.zeros((len(rows), max(map(len, rows))), f"uint{width}")
  for line, row in zip(table, rows, strict=True):
    line[: len(row)] = row
  return table


def false_alarm(
  made: Patterns, values: Mapping[int, int], bits: float = canary.BITS
) -> float:
  """Probability that a wire that knows nothing of the canaries holds one.

  A union bound over all patterns and all places.

  Args:
    made: what is searched for.
    values: {width: number of values of that width on the wire}.
    bits: as when they were made.
  """
  total = sum(
    len(made.words.get(width, ())) * count * 2.0**-bits
    for width, count in values.items()
  )
  return min(1.0, total + len(made.codes) * values.get(8, 0) * code_chance())


def code_chance(run: int = RUN, like: float = LIKE) -> float:
  """Bound of the probability that random values correlate with given ones.

  Values [k] uniform in a cube of side 1 whose squared correlation with any
  given ones exceeds `like`: less their mean they are at most sqrt(k) / 2 long,
  and their distance from the line of the given ones at most r = sqrt(1 - like)
  sqrt(k) / 2. So they are in a tube of radius r around a part of a plane: that
  of mean (a length of sqrt(k)) and line (one of sqrt(k)).

  Args:
    run: k.
    like: squared correlation.
  """
  radius = math.sqrt(1 - like) * math.sqrt(run) / 2
  k = run - 2
  ball = k / 2 * math.log(math.pi) - math.lgamma(k / 2 + 1)
  return min(1.0, run * math.exp(ball + k * math.log(radius)))


def sizes(tree: Any) -> dict[int, int]:
  """{width: number of values} of what is searched, of arrays or specs."""
  found: dict[int, int] = {}
  for x in jax.tree.leaves(tree):
    width = width_of(x.dtype)
    if width is not None:
      found[width] = found.get(width, 0) + math.prod(x.shape)
  return found


def width_of(dtype: Any) -> int | None:
  """Bits of a number of that dtype, None for what is not searched."""
  if not (
    jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)
  ):
    return None
  width = jnp.dtype(dtype).itemsize * 8
  return width if width in (8, 16, 32) else None
