"""All methods by name, for configurations."""

from collections.abc import Callable
from typing import Final

from flax import nnx

from fedjax_peft.peft import (
  cores,
  decomposed,
  inserted,
  lowrank,
  prompting,
  rescaling,
  sparsity,
  tuning,
  vectors,
)

# Name -> (module, **options) -> module. Without any, all parameters train.
METHODS: Final[dict[str, Callable[..., nnx.Module]]] = {
  "bitfit": tuning.bitfit,
  "bottleneck": inserted.bottleneck,
  "core": cores.core,
  "deep_prompt": prompting.deep_prompt,
  "dora": decomposed.dora,
  "head": tuning.head,
  "ia3": rescaling.ia3,
  "last": tuning.last,
  "lora": lowrank.lora,
  "norms": tuning.norms,
  "prefix": prompting.prefix,
  "prompt": prompting.prompt,
  "ravan": cores.ravan,
  "sparse": sparsity.sparse,
  "tune": tuning.tune,
  "vera": vectors.vera,
}
