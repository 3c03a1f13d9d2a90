"""Who shares a mask with whom: the nearest on a ring in random order.

Every client has the same number of neighbours, half of them on either side
(a Harary graph). Each finds its own from the round's seed, so that nobody
chooses them for it. Those who are left can only fall apart where half a
neighbourhood in a row is missing, in two places of the ring.

Bell et al., Secure Single-Server Aggregation with (Poly)Logarithmic Overhead,
2020, https://eprint.iacr.org/2020/704
"""

import functools
import hashlib

from fedjax_peft import validate


@functools.lru_cache(maxsize=8)
def ring(
  seed: bytes, clients: int, neighbours: int
) -> tuple[tuple[int, ...], ...]:
  """The neighbours of every client.

  Guarantees:
    i is a neighbour of j if j is one of i; every client has `neighbours`; the
    neighbours of a client are a uniformly random subset of the others, as far
    as SHA-256 of the seed is random.

  Args:
    seed: bytes that everyone knows, new in every round.
    clients: n, at least 2.
    neighbours: k, even, or n - 1 for all others.

  Returns:
    n sorted tuples of k places in 0..n-1.

  Raises:
    ValueError: if no such ring exists.

  Example:
    >>> ring(b"seed", 5, 4)[0]
    (1, 2, 3, 4)
  """
  check(clients, neighbours)

  def drawn(place):
    return hashlib.sha256(seed + place.to_bytes(4, "little")).digest()

  order = sorted(range(clients), key=drawn)
  if neighbours == clients - 1:
    steps = list(range(1, clients))
  else:
    half = range(1, neighbours // 2 + 1)
    steps = [*half, *(-s for s in half)]
  around = {
    place: tuple(sorted(order[(at + s) % clients] for s in steps))
    for at, place in enumerate(order)
  }
  return tuple(around[place] for place in range(clients))


def check(clients: int, neighbours: int) -> None:
  """Raises ValueError unless so many clients can have so many neighbours."""
  validate.at_least(2, clients=clients)
  validate.at_least(1, neighbours=neighbours)
  if neighbours >= clients:
    raise ValueError(
      f"{clients=} have at most {clients - 1} neighbours: got {neighbours=}; "
      f"use neighbours={clients - 1}"
    )
  if neighbours % 2 and neighbours != clients - 1:
    raise ValueError(
      "neighbours must be even, as many on either side of the ring, or all "
      f"others: got {neighbours=} of {clients=}; use "
      f"neighbours={neighbours + 1}"
    )
