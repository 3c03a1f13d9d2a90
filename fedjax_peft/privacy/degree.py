"""How many neighbours, and how many shares: as few as are safe enough.

Three things may go wrong when the graph is drawn. So many neighbours of a
client collude that they can put its secrets together; those who neither
collude nor drop fall into groups whose sums are told apart; or so many
neighbours of a client drop that its masks cannot be taken out. The first two
reveal something, the third only costs a round. Who colludes and who drops must
not depend on the graph; then each is an exact hypergeometric tail, summed over
the clients it could happen to (union bound).

Bell et al., Secure Single-Server Aggregation with (Poly)Logarithmic Overhead,
2020, section 3, https://eprint.iacr.org/2020/704
"""

import functools
import itertools
import math
from fractions import Fraction
from typing import NamedTuple

from fedjax_peft import validate


class Failure(NamedTuple):
  """Upper bounds of what may go wrong in a round.

  Attributes:
    secrets: probability that those who collude know a client's secrets.
    parted: probability that partial sums can be told apart.
    recovery: probability that the sum cannot be unmasked.
  """

  secrets: Fraction
  parted: Fraction
  recovery: Fraction


def parameters(
  clients: int,
  dropout: float,
  corrupt: float,
  security: float = 2**-40,
  correctness: float = 2**-20,
  *,
  lying: bool = False,
) -> tuple[int, int]:
  """The smallest ring that is safe enough, and its threshold.

  Args:
    clients: n.
    dropout: the largest fraction of clients that drops during a round.
    corrupt: the largest fraction that colludes with the server.
    security: probability that anything but the sum is revealed, at most.
    correctness: probability that a round fails, at most, if no more drop.
    lying: the server may show clients different lists of who survived, to get
      a share of either secret from different neighbours of one client; then
      more shares are needed. Otherwise it is honest but curious.

  Returns:
    (k, t): neighbours, even or n - 1, and shares needed; of all t that will
    do, the largest.

  Raises:
    ValueError: if not even all others as neighbours are enough.

  Example:
    >>> parameters(1000, 0.05, 0.1)
    (36, 23)
  """
  validate.at_least(3, clients=clients)
  for name, value in (("dropout", dropout), ("corrupt", corrupt)):
    if not 0 <= value < 1:
      raise ValueError(f"{name} must be in [0, 1), got {name}={value}")
  validate.positive(security=security, correctness=correctness)
  for k in [*range(2, clients - 1, 2), clients - 1]:
    if parted(clients, dropout, corrupt, k) > security:
      continue
    for t in range(k, 1, -1):  # with one share nothing is shared
      risk = failure(clients, dropout, corrupt, k, t, lying=lying)
      if risk.recovery > correctness:
        continue
      if risk.secrets + risk.parted <= security:
        return k, t
      break  # a smaller threshold is less secure still
  raise ValueError(
    f"no ring of {clients=} is safe with {dropout=} and {corrupt=} to "
    f"{security=} and {correctness=}; expect less dropout or corruption, or "
    "take more clients"
  )


def failure(
  clients: int,
  dropout: float,
  corrupt: float,
  neighbours: int,
  threshold: int,
  *,
  lying: bool = False,
) -> Failure:
  """Bounds of what may go wrong with a ring; arguments as `parameters`.

  Args:
    clients: n.
    dropout: fraction.
    corrupt: fraction.
    neighbours: k.
    threshold: t.
    lying: see `parameters`.
  """
  n, k, t = clients, neighbours, threshold
  bad, gone = _count(corrupt, n), _count(dropout, n)
  # An honest neighbour gives one kind of share, one that colludes both: with
  # c of them both secrets are known from k + c >= 2 t on.
  enough = max(2 * t - k, 0) if lying else t
  return Failure(
    min(Fraction(1), n * tail(n - 1, bad, k, enough)),
    parted(n, dropout, corrupt, k),
    min(Fraction(1), n * tail(n - 1, gone, k, k - t + 1)),
  )


def parted(
  clients: int, dropout: float, corrupt: float, neighbours: int
) -> Fraction:
  """Bounds the probability that those who are left fall apart.

  They do only if k / 2 in a row are missing in two places of the ring that do
  not overlap; all pairs of places are summed.

  Args:
    clients: n.
    dropout: fraction.
    corrupt: fraction.
    neighbours: k.
  """
  n, k = clients, neighbours
  missing = min(n, _count(dropout, n) + _count(corrupt, n))
  if k >= n - 1 or missing < k:
    return Fraction(0)
  pairs = Fraction(n * (n - k + 1), 2)
  both = Fraction(math.perm(missing, k), math.perm(n, k))
  return min(Fraction(1), pairs * both)


def tail(population: int, marked: int, draws: int, least: int) -> Fraction:
  """Probability that a subset holds at least so many marked ones, exactly.

  Args:
    population: size of the whole.
    marked: how many of it are marked.
    draws: size of the subset, drawn uniformly.
    least: how many marked ones to hold.

  Example:
    >>> tail(4, 2, 2, 1)
    Fraction(5, 6)
  """
  ways = _ways(population, min(marked, population), draws)
  here = ways[max(least, 0)] if least < len(ways) else 0
  return Fraction(here, math.comb(population, draws))


@functools.lru_cache(maxsize=64)
def _ways(population, marked, draws):
  """Numbers of subsets with at least 0, 1, ..., draws marked ones."""
  exactly = (
    math.comb(marked, i) * math.comb(population - marked, draws - i)
    for i in range(draws, -1, -1)
  )
  return list(itertools.accumulate(exactly))[::-1]


def explain(
  clients: int,
  dropout: float,
  corrupt: float,
  neighbours: int,
  threshold: int,
) -> str:
  """A sentence on what a ring withstands; arguments as `failure`.

  Args:
    clients: n.
    dropout: fraction.
    corrupt: fraction.
    neighbours: k.
    threshold: t.
  """
  risk = failure(clients, dropout, corrupt, neighbours, threshold)
  return (
    f"each of {clients} clients shares masks with {neighbours} others and "
    f"{threshold} of them can take them out: with {_count(corrupt, clients)} "
    f"colluding and {_count(dropout, clients)} dropped at most, more than the "
    f"sum is revealed with probability {_power(risk.secrets + risk.parted)} "
    f"and a round fails with probability {_power(risk.recovery)}"
  )


def _count(fraction, clients):
  """So many clients at most; what is a whole number but for rounding stays."""
  return math.ceil(fraction * clients - 1e-9)


def _power(probability):
  """'at most 2^-40', or '0'."""
  if not probability:
    return "0"
  exact = math.log2(probability.numerator) - math.log2(probability.denominator)
  return f"at most 2^{math.ceil(exact)}"
