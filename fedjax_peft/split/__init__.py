"""Split federated fine-tuning: models whose parts compute in different places.

| where | what |
| --- | --- |
| `pipeline`, `Wire` (`cutting`) | a model cut into parts, and what crosses |
| `whole` | what was cut as one model again |
| `movable`, `hybrid` | cuts that differ between clients, in one program |
| `Modules` | any modules as a model that can be cut |
| `splitfed`, `in_turn`, `lockstep` | who trains which part, and when |
| `prefix_of` | a frozen first part, computed once for each example |
| `local_loss`, `offline` | a device without an answer, or without a link |
| `feedback`; `memory` | what a wire could not say; what is remembered |
| `cost`; `table`, `held`, `piece` | what steps, and stages, cost each side |
| `problem`, `allocate`, `bound` | what is divided, the best way, its limit |
| `shares`, `interior`, `power`, `finish` | of it: band, server and powers |
| `choices`, `matching`, `blocks`, `sequence` | cuts, bits, channels, turns |
| `outcome`, `explain` | what an allocation comes to, and why |
| `adapting`, `menu`, `choosing` | the same in each round of a network |
| `advising`, `trial`, `verdict`, `answer` | which scheme suits a fleet |

Modules are loaded when they are first used.
"""

import importlib

from fedjax_peft.split.cost import Split
from fedjax_peft.split.cutting import Pipeline, Wire, pipeline
from fedjax_peft.split.joining import whole
from fedjax_peft.split.local import local_loss, with_head
from fedjax_peft.split.modules import Modules
from fedjax_peft.split.moving import hybrid, movable
from fedjax_peft.split.prefix import Prefix, prefix_of
from fedjax_peft.split.schemes import in_turn, lockstep, splitfed
from fedjax_peft.split.turns import relay

__all__ = [
  "Modules",
  "Pipeline",
  "Prefix",
  "Split",
  "Wire",
  "hybrid",
  "in_turn",
  "local_loss",
  "lockstep",
  "movable",
  "pipeline",
  "prefix_of",
  "relay",
  "splitfed",
  "whole",
  "with_head",
]

_MODULES = (
  "adapting",
  "advising",
  "allocate",
  "bound",
  "cost",
  "explain",
  "feedback",
  "held",
  "memory",
  "offline",
  "outcome",
  "power",
  "problem",
  "table",
)


def __getattr__(name: str):
  """Loads a module when it is first used (PEP 562)."""
  if name in _MODULES:
    return importlib.import_module(f"{__name__}.{name}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
