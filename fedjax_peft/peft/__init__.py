"""Parameter-efficient fine-tuning of any Flax NNX module.

Each method is a function module -> module; they compose by nesting:

  module = tune(lora(module, rank=8, where=".*/(query|value)"), where="head/.*")
  graph, params, rng, mutable, base = split(freeze(module))

Where a method promises that a module's output stays as it is bit for bit, that
is of each operation: of two compiled programs one may fuse, and so round, what
follows a layer in another way.

| family | methods |
| --- | --- |
| beside a layer | lora, dora, vera, core, ravan, sparse; a layer takes one |
| on a layer | ia3 |
| around a module | bottleneck, prompt, deep_prompt, prefix |
| as they are | tune, bitfit, norms, head, last; no method: everything |
| of the base | quantize_base, freeze |
"""

from fedjax_peft.peft.adapter import Adapter, Frozen, count
from fedjax_peft.peft.beside import Beside
from fedjax_peft.peft.cores import Core, Ravan, core, first_update, ravan
from fedjax_peft.peft.decomposed import DoRA, dora
from fedjax_peft.peft.frozen import FrozenLinear, freeze
from fedjax_peft.peft.inserted import Bottleneck, bottleneck
from fedjax_peft.peft.lowrank import LoRA, lora, rerank
from fedjax_peft.peft.merging import merged
from fedjax_peft.peft.methods import METHODS
from fedjax_peft.peft.partition import Graph, Split, merge, split
from fedjax_peft.peft.prompting import (
  DeepPrompt,
  Prefix,
  deep_prompt,
  prefix,
  prompt,
)
from fedjax_peft.peft.quantized import QuantizedLinear
from fedjax_peft.peft.quantizing import quantize_base
from fedjax_peft.peft.rescaling import IA3, ia3
from fedjax_peft.peft.residual import fold, is_residual, strip
from fedjax_peft.peft.sparsity import Sparse, sparse
from fedjax_peft.peft.tuning import bitfit, head, last, norms, tune
from fedjax_peft.peft.vectors import VeRA, vera

__all__ = [
  "IA3",
  "METHODS",
  "Adapter",
  "Beside",
  "Bottleneck",
  "Core",
  "DeepPrompt",
  "DoRA",
  "Frozen",
  "FrozenLinear",
  "Graph",
  "LoRA",
  "Prefix",
  "QuantizedLinear",
  "Ravan",
  "Sparse",
  "Split",
  "VeRA",
  "bitfit",
  "bottleneck",
  "core",
  "count",
  "deep_prompt",
  "dora",
  "first_update",
  "fold",
  "freeze",
  "head",
  "ia3",
  "is_residual",
  "last",
  "lora",
  "merge",
  "merged",
  "norms",
  "prefix",
  "prompt",
  "quantize_base",
  "ravan",
  "rerank",
  "sparse",
  "split",
  "strip",
  "tune",
  "vera",
]
