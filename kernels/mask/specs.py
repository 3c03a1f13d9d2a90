"""Shapes of `mask_add`: adapters of MiniLM, cohorts, and edges."""

import numpy as np

from fedjax_peft.kernels import specs


def arguments(rng, C, D, plus, minus):
  """Draws rows, keys and a nonce for pairs of rows.

  Args:
    rng: numpy Generator.
    C: rows.
    D: values of a row.
    plus: the row that each key's keystream is added to.
    minus: the row that it is subtracted from.
  """

  def bits(*shape):
    return rng.integers(2**32, size=shape, dtype=np.uint32)

  plus, minus = np.asarray(plus, np.int32), np.asarray(minus, np.int32)
  return bits(C, D), bits(len(plus), 8), plus, minus, bits(3)


def ring(C, neighbours):
  """Pairs of each client with those next to it, in a circle."""
  client = np.repeat(np.arange(C), neighbours)
  return client, (client + np.tile(1 + np.arange(neighbours), C)) % C


def _spec(name, C, D, pairs, bench=False):
  """A spec with these pairs."""
  return specs.Spec(name, lambda rng: arguments(rng, C, D, *pairs), {}, bench)


def _client(name, D, P, bench=False):
  """One client with P neighbours, of both signs."""
  sign = np.arange(P) % 3 == 0
  return _spec(
    name, 1, D, (np.where(sign, 0, -1), np.where(sign, -1, 0)), bench
  )


SPECS: tuple[specs.Spec, ...] = (
  _client("a LoRA leaf of MiniLM [6, 384, 8], one client", 18_432, 10, True),
  _client("the message of a round, one client", 76_038, 10, True),
  _client("a large message, one client", 1 << 20, 16, True),
  _spec("the message of a round, 16 clients", 16, 76_038, ring(16, 4), True),
  _spec("a large message, 64 clients", 64, 1 << 18, ring(64, 3), True),
  _spec("a head [6, 384], 20 clients", 20, 2_304, ring(20, 6), True),
  _spec("a factor [768, 8], two clients", 2, 6_144, ([0], [1])),
  _client("full tiles and nothing else", 3 * 16_384, 3),
  _client("one value", 1, 2),
  _client("one value after five tiles", 5 * 16_384 + 1, 2),
  _client("a tail that is a full tile, all but one", 16_383, 2),
  _client("more keys than a block of keys", 200, 67),
  _spec("more rows than a block of rows", 33, 130, ring(33, 1)),
  _spec(
    "nobody, oneself, and rows that are not there",
    3,
    2_049,
    ([-1, 1, 2, 3, -7, 0, -1], [-1, 1, -1, 0, 2, 2**31 - 1, -(2**31)]),
  ),
  _spec("no key", 2, 300, ([], [])),
  _spec("no client", 0, 300, ([-1], [0])),
  _spec("no value", 2, 0, ([0], [1])),
)
