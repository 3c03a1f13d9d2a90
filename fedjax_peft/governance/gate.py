"""Gate: a round becomes the model if the model has not become worse.

The server measures every new model on examples of its own. A model that falls
below the best of the last good ones by more than a tolerance, or that is not
finite, is not kept: the run goes back to the state before the round, and on
with another cohort. What the gate remembers is part of the state, so that a run
that is stopped goes on with the same verdicts.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fedjax_peft import plan, tree, validate
from fedjax_peft import rounds as round_lib

VALUES, COUNTS = "gate/values", "gate/counts"  # what is remembered

Memory = dict[str, np.ndarray]
Measure = Callable[[round_lib.State], Mapping[str, float]]


class Verdict(NamedTuple):
  """What becomes of a round.

  Attributes:
    good: whether its state is kept.
    memory: of the gate.
    record: {name: number or words}, for the round's record.
    stop: why this round is the last, None if it is not.
  """

  good: bool
  memory: Memory
  record: dict[str, Any]
  stop: str | None = None


class Gate(NamedTuple):
  """Whether a round becomes the model; pure functions.

  Attributes:
    init: () -> memory, {name: array} of fixed shapes, before the first round.
    start: (state before the first round, memory) -> Verdict, a good one.
    judge: (state after a round, memory, ids of the cohort) -> Verdict.
  """

  init: Callable[[], Memory]
  start: Callable[[round_lib.State, Memory], Verdict]
  judge: Callable[[round_lib.State, Memory, np.ndarray], Verdict]


def init(window: int = 1) -> Memory:
  """Nothing measured, nothing counted.

  Args:
    window: good values that are remembered.
  """
  return {
    VALUES: np.full(window, np.nan),
    # The version in force, rejections in a row.
    COUNTS: np.zeros(2, np.int64),
  }


def keep_all() -> Gate:
  """Every round is good; versions are counted."""

  def start(state, memory):
    return Verdict(True, memory, {})

  def judge(state, memory, clients):
    return _verdict(memory, clients, {}, "", None, 1)

  return Gate(init, start, judge)


def gate(
  measure: Measure,
  *,
  metric: str = "accuracy",
  tolerance: float = 0.05,
  window: int = 5,
  limit: int = 3,
) -> Gate:
  """Rejects a round after which the model is worse, or not finite.

  Args:
    measure: (state) -> {metric: number}, of the model that the server holds;
      see `holdout.measure`.
    metric: which of these decides; less is better if its name ends in `loss`.
    tolerance: by how much it may fall below the best of the last good rounds;
      at least its sampling error, sqrt(p (1 - p) / examples) for a share p.
    window: how many good rounds these are; the model before the first round is
      one of them.
    limit: rejections in a row after which the run ends.

  Raises:
    ValueError: for numbers that are out of range; before the first round, if
      the metric is not measured or not finite there.
  """
  validate.at_least(1, window=window, limit=limit)
  if not 0 <= tolerance < math.inf:
    raise ValueError(
      f"tolerance must be a number of at least 0: got {tolerance=}"
    )
  sign = -1 if metric.endswith("loss") else 1

  def start(state, memory):
    found = measure(state)
    if not math.isfinite(found.get(metric, math.nan)):
      raise ValueError(
        f"a gate compares with the model before the first round, whose "
        f"{metric!r} must be a finite number: got {dict(found)}"
        f"{validate.near(metric, found)}"
      )
    memory = _remembered(memory, sign * found[metric])
    return Verdict(True, memory, {f"gate/{metric}": found[metric]})

  def judge(state, memory, clients):
    found = measure(state)
    value = sign * found[metric]
    best = float(np.nanmax(memory[VALUES]))
    why = _odd(state, found)
    if not why and best - value > tolerance:
      why = (
        f"{metric} is {sign * value:.4g}, more than {tolerance:g} from "
        f"{sign * best:.4g}, the best of the last {window} good rounds"
      )
    numbers = {f"gate/{metric}": sign * value, "gate/best": sign * best}
    return _verdict(memory, clients, numbers, why, value, limit)

  return Gate(lambda: init(window), start, judge)


def _odd(state: round_lib.State, found: Mapping[str, float]) -> str:
  """What of a state is not finite, or ''."""
  for name, value in found.items():
    if not math.isfinite(value):
      return f"{name} is not finite"
  if not bool(tree.is_finite([(x.params, x.opt) for x in state.nodes])):
    return "a leaf of the model or of its optimizer is not finite"
  return ""


def _remembered(memory: Memory, value: float) -> Memory:
  """The memory with one more good value; the oldest is forgotten."""
  return memory | {VALUES: np.append(memory[VALUES][1:], value)}


def _verdict(memory, clients, numbers, why, value, limit) -> Verdict:
  """Counts a round, and says it in words."""
  version, row = memory[COUNTS].tolist()
  version, row = (version, row + 1) if why else (version + 1, 0)
  if not why and value is not None:
    memory = _remembered(memory, value)
  memory = memory | {COUNTS: np.array([version, row])}
  ids = np.sort(np.asarray(clients, "<i4"))
  record = finite(numbers) | {
    "gate/rejected": int(bool(why)),
    "gate/version": version,
    "gate/cohort": hashlib.sha256(ids.tobytes()).hexdigest(),
  }
  if not why:
    return Verdict(True, memory, record)
  stop = None
  if row >= limit:
    stop = (
      f"{row} rounds in a row were rejected, the last since {why}; the model "
      f"is that of version {version}: find out who reports such updates, or "
      "allow more by governance.gate.tolerance or governance.limit"
    )
  return Verdict(False, memory, record | {"gate/why": why}, stop)


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
  """What of a record can be written: all but numbers that are not finite.

  Example:
    >>> finite({"round": 1, "train/loss": math.inf, "stopped": "why"})
    {'round': 1, 'stopped': 'why'}
  """
  return {
    k: v
    for k, v in record.items()
    if not isinstance(v, float) or math.isfinite(v)
  }


def taken(
  how: Gate | None, memory: Mapping[str, np.ndarray]
) -> tuple[Memory, Memory]:
  """The plan's own memory, and that of the gate which travels with it.

  Args:
    how: the gate, if there is one.
    memory: of a state.

  Raises:
    ValueError: if the state is not one of a run with this gate.
  """
  own = {} if how is None else how.init()
  for name, like in own.items():
    if np.shape(memory.get(name, ())) != like.shape:
      raise ValueError(
        f"a run with a gate goes on from a state of such a run: expected "
        f"{name!r} {list(like.shape)} in state.plan, got {sorted(memory)}; use "
        "the same gate, or start afresh"
      )
  rest = {k: v for k, v in memory.items() if k not in own}
  return rest, {k: memory[k] for k in own}


def refuse(cohort: plan.Plan, group: plan.Grouping | None) -> None:
  """Raises ValueError where a round cannot be taken back on its own.

  Args:
    cohort: who takes part.
    group: which node each client talks to.
  """
  if cohort.pool:
    raise ValueError(
      f"a gate takes whole rounds back, but plan '{cohort.name}' has clients "
      "at work on models of earlier rounds; use a clock that waits for all "
      "(synchronous or deadline), or leave the gate out"
    )
  if group is not None and cohort.waits:
    raise ValueError(
      f"a gate takes the model back, but not the clusters that '{group.name}' "
      "finds while the run goes on; group by device or planted clusters, or "
      "leave the gate out"
    )
