"""Robust reductions: what a few hostile clients cannot move far.

Each is a `Reduce` that keeps the messages of a cohort one by one; pass it to
`tier(..., reduce=robust.median())`. Everyone present counts the same, since a
client could lie about how many examples it has.

| reduction | withstands, of n present | cost, of messages of D values |
| --- | --- | --- |
| `median`, `trimmed_mean` | f < n / 2; f <= trim | D n log^2 n |
| `geometric_median`, `centered_clip` | f < n / 2 | steps D n |
| `norm_filter` | large messages only | D n |
| `krum`, `multi_krum` | n >= 2 f + 3 | D n^2 |
| `bulyan` | n >= 4 f + 3 | D n^2 + n^3 |

How many are present is known when a round runs, not when it is built. Where
too few are present for a rule's guarantee, its result is the coordinatewise
median, which needs none but an honest majority.
"""

from fedjax_peft.robust.center import centered_clip, geometric_median
from fedjax_peft.robust.coordinate import median, trimmed_mean
from fedjax_peft.robust.selection import (
  bulyan,
  krum,
  multi_krum,
  norm_filter,
)

__all__ = [
  "bulyan",
  "centered_clip",
  "geometric_median",
  "krum",
  "median",
  "multi_krum",
  "norm_filter",
  "trimmed_mean",
]
