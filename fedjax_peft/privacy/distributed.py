"""Distributed noise: every client adds a part of what hides them all.

Nobody has to be trusted with a sum without noise: integers are added on the
grid, before the mask. The grid must leave room for them, and how large they
are depends on the grid, whose rounding moves a message; so both are found
together here.

Kairouz, Liu and Steinke, The Distributed Discrete Gaussian Mechanism, 2021,
https://arxiv.org/abs/2102.06387; Agarwal et al., The Skellam Mechanism, 2021,
https://arxiv.org/abs/2110.04995
"""

import math
from typing import Literal, NamedTuple

from fedjax_peft import validate
from fedjax_peft.privacy import events, grid_events, ranges

Kind = Literal["discrete_gaussian", "skellam"]
# The grid is at least so fine that one client's noise takes so many steps, and
# that rounding moves a message by a tenth of its bound at most.
_GRAIN, _ROUNDING = 8.0, 0.1
_FLOATS = 1 + 1e-12  # so that what is rounded in float64 is not below


class Shared(NamedTuple):
  """Noise that clients share; made by `shared`.

  Attributes:
    plan: the grid; its `noise` is the std of each client's part, in steps.
    apart: how far neighbours are apart, in steps.
    event: what a round releases.
  """

  plan: ranges.Plan
  apart: grid_events.Apart
  event: events.Event


def shared(
  kind: Kind,
  multiplier: float,
  *,
  fewest: int,
  senders: int,
  bound: float,
  dimension: int,
  bits: int | None = None,
  rotation: int | None = None,
  failure: float = 1e-9,
) -> Shared:
  """The grid and each client's part of the noise.

  Neighbours differ in one client of the round, whose message is zero in one of
  them; that a client may not have been asked is not made use of.

  Args:
    kind: of the noise.
    multiplier: std of all noise / how far neighbours are apart, at least.
    fewest: clients whose noise is surely in the sum, of those that send.
    senders: most of them.
    bound: L2 bound of one client's message, its weight included.
    dimension: values of a message on the wire, after padding.
    bits: of the modulus; None: as few as leave room.
    rotation: see `ranges.plan`.
    failure: probability of a wrap, > 0, since noise has no largest value.

  Raises:
    ValueError: if an argument is out of its range, or no grid has room.
  """
  validate.one_of(["discrete_gaussian", "skellam"], kind=kind)
  validate.positive(multiplier=multiplier, bound=bound)
  validate.at_least(1, fewest=fewest)
  if fewest > senders:
    raise ValueError(
      f"noise comes from those who send: got {fewest=} of {senders=}; use "
      f"fewest={senders} or less"
    )
  levels = math.ceil(
    max(
      _GRAIN * math.sqrt(fewest) / multiplier,
      math.sqrt(dimension) / 2 / _ROUNDING,
    )
  )

  def planned(levels, bits):
    # On a finer grid rounding moves less: the noise is enough there too.
    far = grid_events.apart(levels, dimension).l2 / levels * _FLOATS
    return ranges.plan(
      senders=senders,
      clip_norm=bound,
      dimension=dimension,
      bits=bits,
      coarsest=bound / levels,
      rotation=rotation,
      noise=multiplier * bound * far / math.sqrt(fewest),
      noise_unit="message",
      noise_kind=kind,
      failure=failure,
    )

  plan = planned(levels, bits)
  for _ in range(3):  # no more noise than the grid that was found needs
    plan = planned(plan.levels, plan.bits)
  apart = grid_events.apart(plan.levels, dimension)
  event: events.Event
  if kind == "skellam":
    event = grid_events.skellam_sum(plan.noise, fewest, apart)
  else:
    event = grid_events.discrete_gaussian(plan.noise, fewest, apart)
  return Shared(plan, apart, event)
