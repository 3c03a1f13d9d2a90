"""Advising: which scheme, cuts, bits and rank suit these devices and links.

Every way in which a model could be trained (`trial.Offer`) is tried on the
devices' costs, each with the best shares, powers, cuts and bits that are found
for it. Of those that keep within the limits the one is advised whose round has
the least

  weight T / T0 + (1 - weight) E / E0 + error_weight error + values_weight h

where T is the round's seconds, E the joules of its devices, T0 and E0 those of
a federated round with equal shares and full power, and h how often the values
that train are halved, from the offer with most of them. Costs say nothing of
accuracy; the last two terms are what the user says that it is worth.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_peft import validate
from fedjax_peft.network import adaptation
from fedjax_peft.split import choosing, trial, verdict
from fedjax_peft.split.trial import Candidate, Offer, Place, Trial

SCHEMES = ("federated", "splitfed", "frozen", "sequential")
BITS = (2, 4, 8, 16, 32)


class Target(NamedTuple):
  """What is wanted; see `target`."""

  weight: float
  deadline: float
  memory: float
  least_cut: int
  bits: tuple[int, ...]
  coverage: float
  error_weight: float
  values_weight: float


class Advice(NamedTuple):
  """What is advised, and why.

  Attributes:
    scheme: the name of the best.
    trial: its rounds; `trial.columns` has what every client does.
    rows: of all schemes, the best first, then by what they cost.
    sentences: one for each scheme that was not taken.
    trials: all that were tried and keep within the limits.
    target: what was wanted.
  """

  scheme: str
  trial: Trial
  rows: tuple[verdict.Row, ...]
  sentences: tuple[str, ...]
  trials: tuple[tuple[float, Trial], ...]
  target: Target

  @property
  def clients(self) -> dict[str, np.ndarray]:
    """{name: [c]}, what every client that was tried does and spends."""
    return self.trial.columns


def target(
  *,
  weight: float = 0.5,
  deadline: float | None = None,
  memory: float | None = None,
  least_cut: int = 1,
  bits: Sequence[int] = BITS,
  error: float | None = None,
  coverage: float = 1.0,
  error_weight: float = 10.0,
  values_weight: float = 0.1,
) -> Target:
  """What is wanted, checked.

  Args:
    weight: of time against energy, in [0, 1]; 0 needs a deadline.
    deadline: seconds in which a round must be done.
    memory: bytes that training may take on any device.
    least_cut: stages that every device keeps, for privacy.
    bits: of a value that crosses, to choose from.
    error: mean squared error of a value, at most, in squares of its token's
      range; fewer bits are left out.
    coverage: share of the devices that must have the memory, in (0, 1].
    error_weight: what such an error of one costs, in units of the objective.
    values_weight: what it may cost to train twice as many values.

  Raises:
    ValueError: if a number is out of its range, or no bits are left.
  """
  choosing.goal(weight, error_weight, deadline)
  validate.at_least(1, least_cut=least_cut)
  if not 0 < coverage <= 1:
    raise ValueError(f"coverage must be a share in (0, 1], got {coverage=}")
  if not 0 <= values_weight < math.inf:
    raise ValueError(f"values_weight must be at least 0, got {values_weight=}")
  if memory is not None and not memory > 0:
    raise ValueError(f"memory must be above 0 bytes, got {memory=}")
  if not all(1 <= b <= trial.FLOATS for b in bits):
    raise ValueError(f"bits of a value are 1 to 32, got {list(bits)}")
  most = math.inf if error is None else error
  kept = tuple(sorted(b for b in set(bits) if trial.rounding(b) <= most))
  if not kept:
    raise ValueError(
      f"no number of bits has so small an error: got {list(bits)} with "
      f"{error=}; allow more bits, 32 have none"
    )
  return Target(
    weight,
    math.inf if deadline is None else deadline,
    math.inf if memory is None else memory,
    least_cut,
    kept,
    coverage,
    error_weight,
    values_weight,
  )


def advise(
  offers: Sequence[Offer], place: Place, wanted: Target | None = None
) -> Advice:
  """Picks a scheme, and what each client does in it.

  Args:
    offers: ways to train, a federated one among them.
    place: devices, links and server.
    wanted: weights and limits; None takes those of `target()`.

  Returns:
    The Advice; the same for the same.

  Raises:
    ValueError: if clients do not share one cell whose rates follow from band
      and power, or nothing keeps within the limits: the sentence says what
      would have to change.
  """
  wanted = target() if wanted is None else wanted
  adaptation.cell(place.radio)
  unit = _unit(offers, place)
  most = max(offer.trained(c) for offer in offers for c in offer.cuts)
  found, rows = [], []
  for name in dict.fromkeys(offer.scheme for offer in offers):
    tried, lacks = [], []
    for candidate in _candidates(offers, name, wanted):
      share = place.fits(candidate)
      if share.mean() < wanted.coverage:
        lacks.append(candidate)
        continue
      tried.append(_tried(candidate, place, wanted, unit))
    judged = [(_cost(x, wanted, unit, most), x) for x in tried]
    found += [x for x in judged if x[1].seconds <= _late(wanted)]
    rows.append(verdict.judge(name, judged, lacks, place, _late(wanted)))
  if not found:
    raise ValueError(verdict.nothing(rows))
  # Of equals, to rounding, the one that was offered first.
  _, chosen = min(found, key=lambda x: round(x[0], 9))
  rows.sort(key=lambda row: row.cost if row.reason == "" else math.inf)
  winner = chosen.candidate.offer.scheme
  rows.sort(key=lambda row: row.scheme != winner)
  sentences = tuple(verdict.sentence(row, rows[0]) for row in rows[1:])
  return Advice(winner, chosen, tuple(rows), sentences, tuple(found), wanted)


def _late(wanted: Target) -> float:
  """Seconds of a round that is in time, to rounding."""
  return wanted.deadline * (1 + 1e-9)


def _unit(offers, place) -> trial.Scale:
  """A federated round of the largest rank, whether it fits or not."""
  whole = [offer for offer in offers if offer.scheme == "federated"]
  if not whole:
    raise ValueError(
      "offers are measured by federated training: got "
      f"{sorted({offer.scheme for offer in offers})}; add a federated one"
    )
  if not place.ids.size:
    raise ValueError("advice is for at least one client, got none")
  first = max(whole, key=lambda offer: offer.rank)
  usual = Candidate(first, (len(first.stages),), (trial.FLOATS,))
  return trial.scale(usual, place, place.cohorts())


def _candidates(offers, scheme, wanted) -> list[Candidate]:
  """What can be tried of a scheme, within the limits of memory and privacy."""
  found = []
  for offer in offers:
    if offer.scheme != scheme:
      continue
    cuts = tuple(
      c
      for c in offer.cuts
      if c >= wanted.least_cut and offer.memory(c) <= wanted.memory
    )
    if not cuts:
      continue
    if scheme == "federated":
      found.append(Candidate(offer, cuts, (trial.FLOATS,)))
    elif scheme == "splitfed":
      found.append(Candidate(offer, cuts, wanted.bits))
    else:
      found += [Candidate(offer, (c,), (b,)) for c in cuts for b in wanted.bits]
  return found


def _tried(candidate, place, wanted, unit) -> Trial:
  """The candidate's rounds, by the same goal in its own units."""
  own = trial.scale(candidate, place, place.cohorts(candidate))
  time = wanted.weight * own.seconds / unit.seconds
  energy = (1 - wanted.weight) * own.joules / unit.joules
  both, deadline = time + energy, wanted.deadline
  if candidate.offer.in_turn:
    deadline = deadline / min(place.cohort, place.fits(candidate).sum())
  return trial.run(
    candidate,
    place,
    choosing.Goal(time / both, wanted.error_weight / both, deadline),
  )


def _cost(tried: Trial, wanted, unit, most) -> float:
  """The objective."""
  offer = tried.candidate.offer
  least = min(offer.trained(c) for c in tried.candidate.cuts)
  return (
    wanted.weight * tried.seconds / unit.seconds
    + (1 - wanted.weight) * tried.joules / unit.joules
    + wanted.error_weight * tried.error
    + wanted.values_weight * math.log2(most / least)
  )
