"""Audit: attacks on what really crosses a boundary, as its receiver sees it.

| module | what it holds |
| --- | --- |
| `boundaries`, `voice`, `crossing` | what is seen; said; sent over links |
| `reports`, `sums`, `cuts` | boundaries: of one message, a cohort, a cut |
| `inversion` | the examples again, by search |
| `membership` | whether an example took part |
| `properties` | what a client's data are like as a whole |
| `canary` | a lower bound on epsilon (needs the extra `privacy`) |
| `score` | AUC, intervals, decibels |
| `deal`, `table` | clients to attack; all attacks on one boundary |

A success is worth what the accountant's upper bound beside it says: an attack
that fails proves nothing, one that does better than the bound disproves it.
`python scripts/audit.py` prints the table.
"""

from fedjax_peft.audit import cuts, reports, sums
from fedjax_peft.audit.boundaries import (
  BOUNDARIES,
  Around,
  Boundary,
  Subject,
  boundary,
  find,
  observe,
)

__all__ = [
  "BOUNDARIES",
  "Around",
  "Boundary",
  "Subject",
  "boundary",
  "cuts",
  "find",
  "observe",
  "reports",
  "sums",
]
