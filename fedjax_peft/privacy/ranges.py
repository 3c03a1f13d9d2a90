"""Ranges: a grid and a modulus on which the sum of all clients cannot wrap.

Clients round to one grid and add modulo 2^bits. If the sum's largest absolute
value stays below half the modulus, its residue is the sum; beyond, it is
garbage that nobody sees. `plan` picks the finest grid for which it can prove
that, and says how:

* worst case: whatever the clients say within the clip norm. A coordinate of
  the sum is at most total weight x clip norm.
* by Hoeffding's inequality, where messages are rotated at random: a coordinate
  is a sum of values with random signs. It fails with a stated probability, and
  against clients who chose their messages without knowing the signs.
* noise has no largest value, so it always costs a probability: discrete
  Gaussian noise has the tails of a Gaussian at most, Skellam noise those of
  Chernoff's bound.

Kairouz et al., The Distributed Discrete Gaussian Mechanism for Federated
Learning, 2021, https://arxiv.org/abs/2102.06387
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from fedjax_peft import validate
from fedjax_peft.privacy import loads, proofs

MOST_BITS = 32


class Plan(NamedTuple):
  """A grid on which no sum wraps, and why.

  Attributes:
    bits: of the modulus.
    levels: steps of the grid from zero to the clip norm.
    step: of the grid, in the unit of the message: clip_norm / levels.
    capacity: largest absolute value of a sum that is its own residue.
    largest: what no sum exceeds, in steps, <= capacity.
    noise: std of the noise of each sender, in steps.
    failure: probability that some coordinate of a sum wraps, at most; 0: never.
    bound: names of the inequalities that were used.
    proof: sentences.
    load: what was planned for.
  """

  bits: int
  levels: int
  step: float
  capacity: int
  largest: int
  noise: float
  failure: float
  bound: str
  proof: tuple[str, ...]
  load: loads.Load

  @property
  def modulus(self) -> int:
    """2^bits."""
    return 2**self.bits


def plan(
  *,
  senders: int,
  clip_norm: float,
  dimension: int,
  bits: int | None = MOST_BITS,
  coarsest: float | None = None,
  norm: Literal["l2", "linf"] = "l2",
  max_weight: int = 1,
  total_weight: int | None = None,
  rotation: int | None = None,
  noise: float = 0.0,
  noise_unit: Literal["step", "message"] = "step",
  noise_kind: loads.Noise = "discrete_gaussian",
  failure: float = 0.0,
) -> Plan:
  """The finest grid on which the sum of all senders cannot wrap.

  Messages are clipped, multiplied by their integer weight, perhaps rotated,
  rounded to a multiple of the step (to either neighbour), and noise is added.
  Whoever drops out, the rest is within the bound too.

  Args:
    senders: of the largest cohort.
    clip_norm: bound on a message before it is weighed, > 0.
    dimension: values of a message on the wire, after padding.
    bits: of the modulus, 2 to 32; None: as few as `coarsest` allows.
    coarsest: the largest step that will do, in the unit of the message; None:
      any up to the clip norm.
    norm: what is bounded: "l2", the norm of the whole message, or "linf", each
      value.
    max_weight: of one sender.
    total_weight: of all senders of a round together; None: senders x
      max_weight. The weights travel as integers too.
    rotation: length of the blocks that are rotated at random; used where
      `failure` > 0.
    noise: std of each sender's noise.
    noise_unit: "step": `noise` is in steps; "message": in the unit of the
      message, so that it takes more steps of a finer grid.
    noise_kind: what is sampled.
    failure: the probability of a wrap that is accepted, for each sum that is
      received: with edges, each of theirs is one.

  Returns:
    A Plan. Its largest sum is below half the modulus.

  Raises:
    ValueError: if an argument is out of its range, or if no such grid exists;
      names the fewest bits, the most senders or the smallest step that do.

  Example:
    >>> it = plan(senders=100, clip_norm=1.0, dimension=1000, bits=16)
    >>> it.levels, it.largest, it.capacity, it.failure
    (327, 32700, 32767, 0.0)
    >>> print(*it.proof, sep=chr(10))
    Each of 100 senders rounds values of at most 1 x weight to a grid of 327
    steps to the clip norm: an integer, so no value is rounded beyond its bound.
    Weights add up to 100 at most, so |sum| <= 100 x 327 = 32700, whatever is
    sent within the clip norm.
    32700 <= 2^15 - 1 = 32767: the sum is its own residue modulo 2^16.
  """
  validate.at_least(1, senders=senders, dimension=dimension)
  validate.at_least(1, max_weight=max_weight)
  validate.positive(clip_norm=clip_norm)
  if total_weight is None:
    total_weight = senders * max_weight
  load = loads.Load(
    senders,
    clip_norm,
    dimension,
    norm,
    max_weight,
    total_weight,
    rotation,
    noise,
    noise_unit,
    noise_kind,
  )
  loads.check(load, failure)
  validate.one_of([None, *range(2, MOST_BITS + 1)], bits=bits)
  if coarsest is not None:
    validate.positive(coarsest=coarsest)
  elif bits is None:
    raise ValueError(
      "got bits=None and coarsest=None: there is no fewest bits without a step "
      "that is small enough; say one of the two"
    )
  need = 1
  if coarsest is not None:  # an integer but for rounding is that integer
    need = max(1, math.ceil(clip_norm / coarsest * (1 - 1e-12)))
  if bits is None:
    bits = _first(
      lambda b: _finest(load, b, failure) >= need, range(2, MOST_BITS + 1)
    )
  levels = 0 if bits is None else _finest(load, bits, failure)
  if bits is None or levels < need:
    raise ValueError(_refusal(load, bits or MOST_BITS, need, levels, failure))
  return _planned(load, bits, levels, failure)


def _finest(load: loads.Load, bits: int, failure: float) -> int:
  """The most levels that are proved not to wrap; 0: not even one."""
  capacity = 2 ** (bits - 1) - 1
  if load.total_weight > capacity:
    return 0  # the weights' sum must not wrap either
  low, high = 0, 2**bits * (load.rotation or 1)
  while high - low > 1:
    middle = (low + high) // 2
    fits = loads.reach(load, middle, failure) <= capacity
    low, high = (middle, high) if fits else (low, middle)
  return low


def _planned(load: loads.Load, bits: int, levels: int, failure: float) -> Plan:
  """The plan and its proof."""
  proof = proofs.write(load, bits, levels, failure)
  return Plan(
    bits=bits,
    levels=levels,
    step=load.clip_norm / levels,
    capacity=2 ** (bits - 1) - 1,
    largest=loads.reach(load, levels, failure),
    noise=loads.steps_of_noise(load, levels),
    failure=proof.failure,
    bound=proof.bound,
    proof=proof.sentences,
    load=load,
  )


def _first(holds: Callable[[int], bool], options: range) -> int | None:
  """The first option that holds, of options that hold from some one on."""
  low, high = 0, len(options)
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if holds(options[middle]) else (middle + 1, high)
  return options[low] if low < len(options) else None


def _refusal(
  load: loads.Load, bits: int, need: int, levels: int, failure: float
) -> str:
  """Why there is no plan, and each smallest change by which there is one."""

  def fits(load, bits, need=need):
    return _finest(load, bits, failure) >= need

  def with_senders(senders):
    # Fewer senders of the same mean weight.
    weight = math.ceil(load.total_weight * senders / load.senders)
    return load._replace(senders=senders, total_weight=weight)

  changes = []
  more = _first(lambda b: fits(load, b), range(bits, MOST_BITS + 1))
  if more is not None:
    changes.append(f"bits={more}")
  fewer = _first(
    lambda n: fits(with_senders(n), bits), range(load.senders - 1, 0, -1)
  )
  if fewer is not None:
    changes.append(
      f"senders={fewer} with total_weight={with_senders(fewer).total_weight}"
    )
  if levels:
    changes.append(f"coarsest={load.clip_norm / levels!r}")
  if not changes:
    changes.append("less noise, smaller weights, or a larger failure")
  capacity = 2 ** (bits - 1) - 1
  what, top = "sum", loads.reach(load, need, failure)
  if load.total_weight > capacity:
    what, top = "total weight", load.total_weight
  return (
    f"the {what} of {load.senders} senders can reach {top} and wrap modulo "
    f"2^{bits}, which holds up to {capacity}, on a grid of {need} steps to "
    f"clip_norm={load.clip_norm:g}; use {' or '.join(changes)}"
  )
