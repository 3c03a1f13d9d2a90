"""Stacked adapters as algorithms use them: mixed, and told apart by name.

Weights of a mixture are put on the B. The layers are those of `peft.stacked`.
"""

from collections.abc import Mapping

import jax

from fedjax_peft import validate


def mix(
  params: Mapping[str, jax.Array], weights: Mapping[str, float | jax.Array]
) -> dict[str, jax.Array]:
  """Multiplies the adapters of some names, by way of their B.

  Args:
    params: {path: array}.
    weights: {name of an adapter: scalar}; others count one.

  Example:
    >>> mix({"layer/own/lora_b": 2.0, "layer/own/lora_a": 2.0}, {"own": 0.5})
    {'layer/own/lora_b': 1.0, 'layer/own/lora_a': 2.0}
  """
  return {
    k: v * weights[name_of(k)]
    if k.endswith("/lora_b") and name_of(k) in weights
    else v
    for k, v in params.items()
  }


def name_of(path: str) -> str:
  """Name of the adapter of which a leaf is part: its last part but one.

  Example:
    >>> name_of("layers/0/query/personal/lora_a")
    'personal'
  """
  return path.split("/")[-2] if "/" in path else ""


def check(params: Mapping[str, jax.Array], names: tuple[str, ...]) -> None:
  """Raises ValueError unless a model has adapters of these names."""
  has = sorted({name_of(k) for k in params if k.endswith("/lora_a")})
  for name in names:
    if name not in has:
      ranks = ", ".join(f"{n!r}: 8" for n in names)
      raise ValueError(
        f"the model needs adapters called {list(names)}: got {has}"
        f"{validate.near(name, has)}; build them with "
        f"algorithms.stack(module, {{{ranks}}})"
      )
