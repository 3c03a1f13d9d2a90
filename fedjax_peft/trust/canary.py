"""Canaries: examples that nobody has, so that whoever sees one has seen data.

Some clients get one more example each. Its values are drawn at random from the
range of the feature's own, so that a model takes it like any other, and a run
of them holds so many random bits that it is found nowhere by chance. Features
of few bits (a class, a length) are those of another example of the client.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fedjax_peft import data, validate

BITS = 96  # random bits of whatever is searched for
_LEAST = 4.0  # bits of a value below which a feature is not drawn: masks


class Span(NamedTuple):
  """Between what a feature's values are drawn.

  Attributes:
    low: the least value that the data have.
    high: the greatest.
    whole: whether values are integers.
  """

  low: float
  high: float
  whole: bool

  def bits(self, mantissa: int) -> float:
    """Random bits of a drawn value in a float of so many bits of mantissa.

    At most one value in 2^bits is the same by chance.
    """
    width = self.high - self.low
    if width <= 0:
      return 0.0
    top = max(abs(self.low), abs(self.high))
    kept = math.log2(width) - math.log2(top) + mantissa
    if self.whole:
      kept = min(kept, math.log2(width + 1))
    return max(kept, 0.0)


class Canaries(NamedTuple):
  """Examples that were planted; axis Q (how many) leads.

  Attributes:
    clients: int [Q], who has each.
    rows: int [Q], where they are in the table of examples.
    examples: {feature: [Q, ...]}.
    spans: {feature: span} of those that were drawn.
  """

  clients: np.ndarray
  rows: np.ndarray
  examples: Mapping[str, np.ndarray]
  spans: Mapping[str, Span]


def plant(
  population: data.Population, count: int, *, seed: int = 0
) -> tuple[data.Population, Canaries]:
  """Gives some clients one example more to train on, a canary.

  Args:
    population: whose clients train; it is not changed.
    count: Q, how many clients get one; at most the clients that train.
    seed: of who gets one, and of its values.

  Returns:
    (population, what was planted).

  Raises:
    ValueError: if there are fewer clients, or no feature holds enough random
      bits to be told from others.

  Example:
    >>> from fedjax_peft import data
    >>> people = data.population({"x": np.eye(8)}, np.arange(8) % 2)
    >>> more, found = plant(people, 1)
    >>> len(more.examples["x"]), found.rows
    (9, array([8]))
  """
  validate.at_least(1, count=count)
  able = np.flatnonzero(population.seen)
  if count > len(able):
    raise ValueError(
      f"canaries go to different clients that train, of whom there are "
      f"{len(able)}: got {count}; use at most {len(able)}"
    )
  rng = np.random.default_rng([seed, count])
  clients = np.sort(rng.choice(able, count, replace=False))
  like = np.array([population.train[c][0] for c in clients])
  spans = spans_of(population.examples)
  planted = drawn(population.examples, spans, like, rng)
  old = len(next(iter(population.examples.values())))
  rows = old + np.arange(count)
  examples = {
    k: np.concatenate([v, planted[k]]) for k, v in population.examples.items()
  }
  owners = np.concatenate([population.train.owner, clients])
  train = data.Ragged.grouped(
    owners, len(population), np.concatenate([population.train.rows, rows])
  )
  more = dataclasses.replace(population, examples=examples, train=train)
  return more, Canaries(clients, rows, planted, spans)


def spans_of(examples: Mapping[str, np.ndarray]) -> dict[str, Span]:
  """Ranges of the features that hold enough bits to be drawn.

  Args:
    examples: {feature: [M, ...]}.

  Raises:
    ValueError: if there are none.
  """
  spans, bits = {}, {}
  for name, leaf in examples.items():
    whole = leaf.dtype.kind in "iu"
    if leaf.dtype.kind not in "iuf":
      continue
    span = Span(float(leaf.min()), float(leaf.max()), whole)
    each = span.bits(31 if whole else 23)
    bits[name] = each * leaf[0].size
    if each >= _LEAST and bits[name] >= BITS:
      spans[name] = span
  if not spans:
    some = {k: round(v) for k, v in sorted(bits.items())}
    raise ValueError(
      f"a canary needs a feature of at least {BITS} random bits: got {some}; "
      "use data of larger examples, or leave canaries out"
    )
  return spans


def drawn(
  examples: Mapping[str, np.ndarray],
  spans: Mapping[str, Span],
  like: np.ndarray,
  rng: np.random.Generator,
) -> dict[str, np.ndarray]:
  """Examples of random values.

  Args:
    examples: {feature: [M, ...]}.
    spans: of the features that are drawn.
    like: int [Q], rows that the other features are taken from.
    rng: the draws.
  """
  found = {}
  for name, leaf in sorted(examples.items()):
    rows = leaf[like]
    if name in spans:
      low, high, whole = spans[name]
      if whole:
        rows = rng.integers(int(low), int(high) + 1, rows.shape)
      else:
        rows = rng.uniform(low, high, rows.shape)
    found[name] = np.asarray(rows, leaf.dtype)
  return found
