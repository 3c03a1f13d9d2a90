"""Proofs: why a sum cannot wrap on a grid, in sentences."""

from typing import NamedTuple

from fedjax_peft.privacy import loads

_NAMES = {
  "discrete_gaussian": ("sub-Gaussian", "Discrete Gaussian"),
  "skellam": ("Chernoff", "Skellam"),
}


class Proof(NamedTuple):
  """Why a sum does not wrap.

  Attributes:
    bound: names of the inequalities that are used.
    sentences: each follows from those before.
    failure: probability that a sum wraps, at most.
  """

  bound: str
  sentences: tuple[str, ...]
  failure: float


def write(load: loads.Load, bits: int, levels: int, failure: float) -> Proof:
  """The proof that a load fits a grid of `levels` steps to the clip norm.

  Args:
    load: what is to be added up.
    bits: of the modulus, whose half is not below `loads.reach`.
    levels: steps of the grid from zero to the clip norm.
    failure: probability that may be used up.
  """
  rotation, noise = loads.shares(load, failure)
  rounding = (
    f"Each of {load.senders} senders rounds values of at most "
    f"{load.clip_norm:g} x weight to a grid of {levels} steps to the clip "
    "norm: an integer, so no value is rounded beyond its bound."
  )
  parts = [_messages(load, levels, rotation)]
  if load.noise:
    parts.append(_noise(load, levels, noise))
  spent = sum(failure for _, _, failure in parts)
  top, capacity = loads.reach(load, levels, failure), 2 ** (bits - 1) - 1
  end = f", but with probability {spent:g}." if spent else "."
  conclusion = (
    f"{top} <= 2^{bits - 1} - 1 = {capacity}: the sum is its own residue "
    f"modulo 2^{bits}{end}"
  )
  sentences = (rounding, *(said for _, said, _ in parts), conclusion)
  return Proof(" + ".join(name for name, _, _ in parts), sentences, spent)


def _messages(load, levels, failure) -> tuple[str, str, float]:
  """Inequality, sentence and failure of what the clients say."""
  worst = load.total_weight * levels
  reach = loads.message_reach(load, levels, failure)
  if reach == worst:
    said = (
      f"Weights add up to {load.total_weight} at most, so |sum| <= "
      f"{load.total_weight} x {levels} = {worst}, whatever is sent within the "
      "clip norm."
    )
    return "worst case", said, 0.0
  said = (
    f"Weights add up to {load.total_weight} at most, so the sum's norm to "
    f"{worst} steps. Rotated by random signs in blocks of {load.rotation}, of "
    "which the messages know nothing, it has no coordinate beyond "
    f"{reach:.9g}, but with probability {failure:g} (Hoeffding, union over the "
    "block): each sender's rounding, and "
    f"{loads.FLOATS:g} of the norm for that of floats, is in it."
  )
  return "Hoeffding (random rotation)", said, failure


def _noise(load, levels, failure) -> tuple[str, str, float]:
  """Inequality, sentence and failure of the noise."""
  name, kind = _NAMES[load.noise_kind]
  said = (
    f"{kind} noise of std {loads.steps_of_noise(load, levels):.6g} steps from "
    "each sender adds at most "
    f"{loads.noise_reach(load, levels, failure):.9g} to any of "
    f"{load.dimension} coordinates, but with probability {failure:g} ({name}, "
    "union over the coordinates)."
  )
  return f"{name} ({kind} noise)", said, failure
