"""Banded noise: noise that later rounds take back in part.

What matters is the sum of all rounds' releases, the model. Noise of round t is
a combination of numbers z of the rounds up to t, so chosen that much of it
cancels in that sum: with G the rounds' sums one below the other, what is
released is G + std C^-1 Z, as informative as C G + std Z. C is lower triangular
and has the same `bands` diagonals everywhere, so that a client whose rounds are
at least as many apart meets orthogonal columns: each of its rounds is one
Gaussian release, of multiplier std / (bound |c|).

Kairouz et al., Practical and Private (Deep) Learning without Sampling or
Shuffling, 2021, https://arxiv.org/abs/2103.00039; Choquette-Choo et al.,
(Amplified) Banded Matrix Factorization, 2023, https://arxiv.org/abs/2306.08153;
McKenna, Scaling up the Banded Matrix Factorization Mechanism, 2024,
https://arxiv.org/abs/2405.15913. The strategies are jax-privacy's.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax_privacy.matrix_factorization import toeplitz

from fedjax_peft import link, validate
from fedjax_peft.links import noising
from fedjax_peft.privacy import events

_BANDED = 0x62616E64  # sets the receiver's key apart from those of senders


class Strategy(NamedTuple):
  """The matrix C; made by `strategy`.

  Attributes:
    coefficients: of its diagonals, from the main one; >= 0, not increasing.
  """

  coefficients: tuple[float, ...]

  @property
  def bands(self) -> int:
    """How many diagonals are not zero."""
    return len(self.coefficients)

  @property
  def norm(self) -> float:
    """L2 norm of a column: sensitivity to one round of a client."""
    return math.sqrt(math.fsum(c * c for c in self.coefficients))


def strategy(rounds: int, bands: int) -> Strategy:
  """The strategy whose model is least noisy over a run, on average.

  Args:
    rounds: of the run. The noise of longer runs is as private and less good.
    bands: diagonals, 1 to `rounds`; the fewest rounds between two of one
      client. 1 is independent noise.

  Returns:
    A Strategy of norm 1.

  Raises:
    ValueError: if an argument is out of its range.
  """
  validate.at_least(1, rounds=rounds, bands=bands)
  if bands > rounds:
    raise ValueError(
      f"there are no more bands than rounds: got {bands=} {rounds=}; use "
      f"bands={rounds} or less"
    )
  # It mixes dtypes and ranks as jax does by default.
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    found = toeplitz.optimize_banded_toeplitz(rounds, bands)
  values = np.asarray(found, np.float64)
  # The sensitivity is that of participations as early and often as possible
  # for these only; an optimum has them but for the last bit.
  values = np.minimum.accumulate(np.maximum(values, 0))
  return Strategy(tuple((values / np.linalg.norm(values)).tolist()))


def noise(how: Strategy, std: float) -> link.Link:
  """Adds noise to the sum of all messages, correlated over rounds.

  Guarantees:
    over T rounds every float value of the sums has noise of covariance
    std^2 C^-1 C^-T, independent of all other values. What it needs of earlier
    rounds, `bands` - 1 messages, is state of the receiver, kept with the run.

  Args:
    how: the strategy.
    std: of the numbers z, in the unit of the sum at this place of the chain.

  Returns:
    A link with `receive_on="sum"`; the wire is the message. Its `init` raises
    ValueError if a leaf is not a float.

  Raises:
    ValueError: if `std` is negative or not finite.
  """
  plain = noising.noise(std)
  inverse = toeplitz.inverse_as_streaming_matrix(
    jnp.asarray(how.coefficients, jnp.float32)
  )

  def init(spec):
    plain.init(spec)  # refuses integers
    z = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), spec.message)
    return (), inverse.init_multiply(z)

  def receive(wire, shared, roster, key):
    key = jax.random.fold_in(key, _BANDED)
    if roster.nodes is not None:  # every receiver has a noise of its own
      key = jax.random.fold_in(key, roster.nodes[jnp.argmax(roster.weights)])
    leaves, treedef = jax.tree.flatten(wire)
    keys = jax.random.split(key, len(leaves))
    z = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
    y, shared = inverse.multiply_next(jax.tree.unflatten(treedef, z), shared)

    def add(x, y):
      return (x.astype(jnp.float32) + jnp.float32(std) * y).astype(x.dtype)

    return jax.tree.map(add, wire, y), shared

  return plain._replace(init=init, receive=receive)


def sensitivity(
  how: Strategy, rounds: int, *, period: int, most: int | None = None
) -> float:
  """How far C G moves, over a whole run, by one client of bound 1.

  Args:
    how: the strategy.
    rounds: of the run.
    period: the fewest rounds between two of one client, >= `how.bands`; see
      `cyclic.check`.
    most: rounds of one client; None: as many as fit.

  Returns:
    The largest L2 norm of a sum of columns of C that one client can reach.

  Raises:
    ValueError: if a count is below 1, or `period` below the number of bands.
  """
  validate.at_least(1, rounds=rounds, period=period)
  if period < how.bands:
    raise ValueError(
      f"columns of {how.bands} bands overlap if a client takes part every "
      f"{period} rounds: got {period=}; use strategy(rounds, bands={period})"
    )
  count = math.ceil(rounds / period)
  if most is not None:
    validate.at_least(1, most=most)
    count = min(count, most)
  # Orthogonal columns, of which the later ones are cut short by the end.
  squares = np.square(how.coefficients)
  return math.sqrt(
    math.fsum(np.sum(squares[: rounds - i * period]) for i in range(count))
  )


def event(
  how: Strategy, std: float, bound: float, *, rate: float = 1.0
) -> events.Poisson:
  """What one turn of a client releases, to be charged once a period.

  Args:
    how: the strategy.
    std: as in `noise`.
    bound: L2 bound of one client's message, its weight included.
    rate: probability that a client takes part in its turn, by its own coin.

  Returns:
    An event that happens `turns(rounds, period)` times, for neighbours with
    and without one client, whose turn depends on its own id only.

  Raises:
    ValueError: if an argument is out of its range.

  Example:
    >>> event(Strategy((0.8, 0.6)), 2.0, 0.5, rate=0.1)
    Poisson(multiplier=4.0, rate=0.1)
  """
  validate.positive(bound=bound)
  return events.poisson(std / (bound * how.norm), rate)


def turns(rounds: int, period: int) -> int:
  """How often one client can have taken part after so many rounds."""
  validate.at_least(1, period=period)
  return math.ceil(rounds / period)
