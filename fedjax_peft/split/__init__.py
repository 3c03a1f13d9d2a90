"""Split federated fine-tuning: models whose parts compute in different places.

| what | where |
| --- | --- |
| `pipeline`, `Wire` | a model cut into parts, and what crosses between them |
| `movable`, `hybrid` | cuts that differ between clients, in one program |
| `Modules` | any modules as a model that can be cut |
| `splitfed`, `in_turn`, `lockstep` | who trains which part, and when |
| `prefix_of` | a frozen first part, computed once for each example |
| `local_loss`, `with_head` | a device that learns without waiting |
| `table` | what each stage of a model costs |
| `allocate`, `power`, ... | bandwidth, power, bits and cuts of each client |
| `adapting` | the same in every round of a simulated network |
"""

from fedjax_peft.split.cost import Split
from fedjax_peft.split.cutting import Pipeline, Wire, pipeline
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
  "with_head",
]
