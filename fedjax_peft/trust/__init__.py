"""Trust: what may cross a boundary, and what stops a run that lets more cross.

Before anything is compiled, what each boundary will carry is compared with
what was said of it: leaves, shapes, dtypes, bytes, none that is private. While
the run goes on, all that clients report is searched for examples that were
planted for it.
"""

from fedjax_peft.trust.boundary import Boundary, boundaries
from fedjax_peft.trust.canary import Canaries, plant
from fedjax_peft.trust.cuts import refuse_plain
from fedjax_peft.trust.expectation import Expectation, check
from fedjax_peft.trust.pattern import false_alarm, patterns
from fedjax_peft.trust.violation import Violation
from fedjax_peft.trust.watching import Watch, watched

__all__ = [
  "Boundary",
  "Canaries",
  "Expectation",
  "Violation",
  "Watch",
  "boundaries",
  "check",
  "false_alarm",
  "patterns",
  "plant",
  "refuse_plain",
  "watched",
]
