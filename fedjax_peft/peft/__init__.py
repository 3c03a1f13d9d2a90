"""Parameter-efficient fine-tuning of any Flax NNX module.

Each method is a function module -> module; they compose by nesting:

  module = tune(lora(module, rank=8, where=".*/(query|value)"), where="head/.*")
  graph, params, rng, mutable, base = split(freeze(module))
"""

from fedjax_peft.peft.adapter import Adapter, count
from fedjax_peft.peft.frozen import FrozenLinear, freeze
from fedjax_peft.peft.lowrank import LoRA, lora, merged
from fedjax_peft.peft.partition import Graph, Split, merge, split
from fedjax_peft.peft.residual import fold, is_residual, strip
from fedjax_peft.peft.tuning import tune

__all__ = [
  "Adapter",
  "FrozenLinear",
  "Graph",
  "LoRA",
  "Split",
  "count",
  "fold",
  "freeze",
  "is_residual",
  "lora",
  "merge",
  "merged",
  "split",
  "strip",
  "tune",
]
