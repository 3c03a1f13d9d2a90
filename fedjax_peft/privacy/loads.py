"""Loads: what a round adds up on a grid, and how large the sum can get.

Three things make a sum large: what clients say within their clip norm, the
rounding of each to the grid, and noise. The bound of each is here; `ranges`
chooses a grid by them.
"""

import math
from typing import Literal, NamedTuple

from fedjax_peft import validate
from fedjax_peft.privacy import tails

Noise = Literal["discrete_gaussian", "skellam"]

FLOATS = 1e-5  # what float32 loses in a rotation, of a message's norm
_TAILS = {
  "discrete_gaussian": tails.discrete_gaussian,
  "skellam": tails.skellam,
}


class Load(NamedTuple):
  """What is to be added up.

  Attributes:
    senders: of the largest cohort.
    clip_norm: L2 norm, or largest value, of a message before it is weighed.
    dimension: values of a message on the wire.
    norm: "l2" or "linf", what `clip_norm` bounds.
    max_weight: of one sender.
    total_weight: of all senders of a round together.
    rotation: values that are rotated together; None: no rotation.
    noise: std of the noise of each sender, in `noise_unit`.
    noise_unit: "step" of the grid, or "message": the unit of the clip norm.
    noise_kind: "discrete_gaussian" or "skellam".
  """

  senders: int
  clip_norm: float
  dimension: int
  norm: Literal["l2", "linf"]
  max_weight: int
  total_weight: int
  rotation: int | None
  noise: float
  noise_unit: Literal["step", "message"]
  noise_kind: Noise


def reach(load: Load, levels: int, failure: float) -> int:
  """What no coordinate of a round's sum exceeds, in steps of the grid."""
  rotation, noise = shares(load, failure)
  return math.ceil(
    message_reach(load, levels, rotation) + noise_reach(load, levels, noise)
  )


def message_reach(load: Load, levels: int, failure: float) -> float:
  """What no coordinate of the sum without noise exceeds, in steps."""
  worst = load.total_weight * levels
  if load.rotation is None or failure == 0:
    return worst
  # Here a value lies anywhere between two points of the grid.
  ratio = tails.rotated(load.rotation, failure) + FLOATS
  return min(worst, ratio * worst + load.senders)


def noise_reach(load: Load, levels: int, failure: float) -> float:
  """What no coordinate of the sum of all noise exceeds, in steps."""
  if load.noise == 0:
    return 0.0
  variance = load.senders * steps_of_noise(load, levels) ** 2
  tail = _TAILS[load.noise_kind]
  return tail(variance, load.dimension, failure)


def shares(load: Load, failure: float) -> tuple[float, float]:
  """How much of the failure probability the rotation and the noise may use."""
  if load.noise == 0:
    return (0.0 if load.rotation is None else failure), 0.0
  if load.rotation is None or tails.rotated(load.rotation, failure / 2) == 1:
    return 0.0, failure
  return failure / 2, failure / 2


def steps_of_noise(load: Load, levels: int) -> float:
  """Std of each sender's noise in steps."""
  if load.noise_unit == "step":
    return load.noise
  return load.noise * levels / load.clip_norm


def check(load: Load, failure: float) -> None:
  """Raises ValueError if an argument is out of its range."""
  validate.one_of(["l2", "linf"], norm=load.norm)
  validate.one_of(["discrete_gaussian", "skellam"], noise_kind=load.noise_kind)
  validate.one_of(["step", "message"], noise_unit=load.noise_unit)
  if not 1 <= load.total_weight <= load.senders * load.max_weight:
    raise ValueError(
      "total_weight must be from 1 to senders x max_weight = "
      f"{load.senders * load.max_weight}, got {load.total_weight}"
    )
  if not 0 <= failure < 1:
    raise ValueError(f"failure must be a probability in [0, 1), got {failure=}")
  if not 0 <= load.noise < math.inf:
    raise ValueError(f"noise must be a finite std >= 0, got {load.noise}")
  if load.noise and failure == 0:
    raise ValueError(
      "noise has no largest value, so no sum of it is safe for certain: got "
      f"noise={load.noise} failure=0; use failure=1e-9, or no noise"
    )
  if load.rotation is not None:
    validate.at_least(2, rotation=load.rotation)
    if load.norm == "linf":
      raise ValueError(
        "a rotation can gather values that are bounded one by one into one of "
        f"them: got norm='linf' rotation={load.rotation}; clip by norm='l2', "
        "or use rotation=None"
      )
