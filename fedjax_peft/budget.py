"""Budgets: when a run has spent enough."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fedjax_peft import validate

KEYS = {
  "bytes": "spent/bytes",
  "joules": "spent/joules",
  "dollars": "spent/dollars",
  "seconds": "spent/seconds",
  "epsilon": "privacy/epsilon",
}


@dataclasses.dataclass(frozen=True)
class Budget:
  """What a run may spend; None = as much as it takes.

  Attributes:
    bytes: over all links, up and down.
    joules: of all devices.
    dollars: of all that is paid for.
    seconds: of simulated time.
    epsilon: of differential privacy, at the run's delta.

  Raises:
    ValueError: if a limit is not positive.
  """

  bytes: float | None = None
  joules: float | None = None
  dollars: float | None = None
  seconds: float | None = None
  epsilon: float | None = None

  def __post_init__(self):
    validate.positive(**self.limits)

  @property
  def limits(self) -> dict[str, float]:
    """{name: limit} of what is limited."""
    every = dataclasses.asdict(self)
    return {name: limit for name, limit in every.items() if limit is not None}


def exceeded(budget: Budget, record: Mapping[str, Any]) -> str | None:
  """Says what has run out.

  A limit that is met exactly has run out: another round would go beyond.

  Args:
    budget: the limits.
    record: of the last round, with the running totals `spent/bytes`,
      `spent/joules`, `spent/dollars`, `spent/seconds`, `privacy/epsilon` as
      far as they are limited.

  Returns:
    A sentence, or None where something is left of everything.

  Raises:
    ValueError: if the record does not say how much of something is spent.

  Example:
    >>> exceeded(Budget(bytes=1e6), {"spent/bytes": 999_999})
    >>> exceeded(Budget(bytes=1e6), {"spent/bytes": 1_250_000})
    'the budget of bytes has run out: 1.25e+06 spent of 1e+06'
  """
  gone = []
  for name, limit in budget.limits.items():
    key = KEYS[name]
    spent = record.get(key)
    if spent is None or math.isnan(spent):
      raise ValueError(
        f"a budget of {name} needs the record's '{key}', got {spent} among "
        f"{len(record)} keys{validate.near(key, record)}; simulate what it "
        f"counts, or leave {name} out of the budget"
      )
    if spent >= limit:
      gone.append(
        f"the budget of {name} has run out: {spent:.6g} spent of {limit:.6g}"
      )
  return "; ".join(gone) or None
