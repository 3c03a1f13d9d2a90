"""Answers: advice as keys of a config.

A simulated network then decides every round by the same functions that gave
the advice, so a round that nothing disturbs takes what was said.
"""

from typing import Any

import numpy as np

from fedjax_peft.split import trial
from fedjax_peft.split.advising import Advice


def config(advice: Advice) -> dict[str, Any]:
  """What a config says of it, {dotted key: value}.

  Ranks of adapters, and where they are in a model that is cut, are not among
  them: they are the config's own (`model.peft`).

  Args:
    advice: any.

  Returns:
    Keys of `split`, `network`, `uplink` and `execution`.
  """
  tried = advice.trial
  candidate, offer = tried.candidate, tried.candidate.offer
  if offer.scheme in ("federated", "splitfed"):
    return _moving(advice)
  (cut,), (bits,) = candidate.cuts, candidate.bits
  wire = [{"link": "affine", "bits": bits, "per": "token"}]
  found: dict[str, Any] = {
    "split.ends": {"device": offer.stages[cut - 1]},
    "split.up": [] if bits == trial.FLOATS else wire,
    "network.allocate": _goal(tried),
  }
  if offer.scheme == "frozen":
    return found | {
      "split.cache": "float32",
      "network.clock": {"kind": "synchronous"},
    }
  return found | {
    "split.down": found["split.up"],
    "split.scheme": "sequential",
    "network.clock": {"kind": "in_turn"},
    "uplink": [{"link": "count"}],
    "execution.width": 1,
  }


def _moving(advice: Advice) -> dict[str, Any]:
  """Of a model whose cut moves; none is cut until it is told."""
  candidate = advice.trial.candidate
  chosen = _goal(advice.trial) | {"cuts": list(candidate.cuts)}
  found: dict[str, Any] = {
    "split.cuts": {"whole": 1.0},
    "network.clock": {"kind": "synchronous"},
  }
  if candidate.offer.scheme == "splitfed":
    chosen["bits"] = list(candidate.bits)
    chosen["error_weight"] = advice.trial.goal.error_weight
    found["split.bits"] = True
  return found | {"network.allocate": chosen}


def _goal(tried: trial.Trial) -> dict[str, Any]:
  """What clients are to choose by."""
  goal: dict[str, Any] = {"by": "joint", "weight": tried.goal.weight}
  if np.isfinite(tried.goal.deadline):
    goal["deadline"] = tried.goal.deadline
  return goal
