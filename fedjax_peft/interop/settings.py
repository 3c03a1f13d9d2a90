"""adapter_config.json: what it says, and what of it we do not implement.

A key that changes what an adapter computes, and that we do not know, is
refused by name: with a setting silently dropped an adapter still loads.
"""

import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_peft.interop import naming
from fedjax_peft.peft import lowrank

FILE = "adapter_config.json"
TYPES = ("LORA", "IA3", "PROMPT_TUNING", "PREFIX_TUNING")
Settings = Mapping[str, Any]

# What is read, and what says how it was trained and not what it computes.
_READ = {
  "alpha_pattern",
  "exclude_modules",
  "feedforward_modules",
  "init_lora_weights",
  "lora_alpha",
  "modules_to_save",
  "num_attention_heads",
  "num_layers",
  "num_virtual_tokens",
  "peft_type",
  "r",
  "rank_pattern",
  "target_modules",
  "token_dim",
  "use_dora",
  "use_rslora",
}
_TRAINING = {
  "auto_mapping",
  "base_model_name_or_path",
  "corda_config",
  "encoder_hidden_size",
  "ensure_weight_tying",
  "eva_config",
  "inference_mode",
  "init_ia3_weights",
  "init_weights",
  "layers_pattern",
  "loftq_config",
  "lora_dropout",
  "lora_ga_config",
  "megatron_core",
  "num_transformer_submodules",
  "peft_version",
  "prompt_tuning_init",
  "prompt_tuning_init_text",
  "qalora_group_size",
  "revision",
  "runtime_config",
  "task_type",
  "tokenizer_kwargs",
  "tokenizer_name_or_path",
}
_NEUTRAL = (None, False, "", "none")
# Others begin with a base that is not the one named in the config.
_STARTS = (None, True, False, "eva", "gaussian", "orthogonal")


def read(directory: pathlib.Path) -> dict[str, Any]:
  """Reads the config of an adapter.

  Raises:
    FileNotFoundError: if it is not there.
    ValueError: if it is damaged, or asks for what we do not implement.
  """
  path = directory / FILE
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} is not there: an adapter's directory needs {FILE} and "
      "adapter_model.safetensors"
    )
  try:
    settings = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} must be JSON: {error}") from error
  if not isinstance(settings, dict) or "peft_type" not in settings:
    raise ValueError(f"{path} must be a JSON object with a peft_type")
  kind = settings["peft_type"]
  if kind not in TYPES:
    raise ValueError(
      f"{path} must have a peft_type of {', '.join(TYPES)}: {kind!r} came"
    )
  for key, value in sorted(settings.items()):
    if key in _READ | _TRAINING or value in _NEUTRAL or value in ([], {}):
      continue
    raise ValueError(
      f"{key}={value!r} in {path} is not supported: it changes what the "
      "adapter computes; merge the adapter in the library that made it"
    )
  start = settings.get("init_lora_weights")
  if start not in _STARTS:
    raise ValueError(
      f"init_lora_weights={start!r} in {path} is not supported: such an "
      "adapter changes its base too; save it as a plain LoRA "
      "(path_initial_model_for_weight_conversion)"
    )
  return settings


def scaling(nodes: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
  """How A @ B are scaled, in their words.

  Only the factor is kept in our layers, and the same factor can be said in two
  ways; one in which every alpha is a whole number is preferred.

  Args:
    nodes: {path: LoRA or DoRA}.

  Returns:
    ("rank" or "sqrt", {path: alpha}), such that `lowrank.scale_of` gives every
    layer's factor bit for bit.

  Example:
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> tuned = lowrank.lora(
    ...   model, 2, where="layers/0", alpha=4, scaling="sqrt"
    ... )
    >>> scaling({"layers/0": tuned.layers[0]})
    ('sqrt', {'layers/0': 4})
  """
  for how in ("rank", "sqrt"):
    alphas = {path: _whole(node, how) for path, node in nodes.items()}
    if all(alphas.values()):
      return how, alphas
  return "rank", {path: _alpha(node) for path, node in nodes.items()}


def rank_of(node: Any) -> int:
  """R of a layer; of a stack, that of each of its layers."""
  return node.lora_a.shape[-1]


def _whole(node, how):
  """The whole alpha of a layer, or 0."""
  rank = rank_of(node)
  alpha = round(node.scale * (rank if how == "rank" else math.sqrt(rank)))
  exact = alpha > 0 and lowrank.scale_of(rank, alpha, how) == node.scale
  return alpha if exact else 0


def _alpha(node):
  """The alpha of a layer: scale * rank, to the bit that gives scale again."""
  rank = rank_of(node)
  alpha = node.scale * rank
  near = (alpha, math.nextafter(alpha, 0), math.nextafter(alpha, math.inf))
  return next((a for a in near if a / rank == node.scale), alpha)


def patterns(
  values: Mapping[str, Any], names: naming.Names
) -> tuple[Any, dict[str, Any]]:
  """The commonest value, and the others by ends of their modules' names.

  Args:
    values: {path: value}.
    names: of the module.
  """
  each = list(values.values())
  usual = max(each, key=each.count)
  other = {}
  for path, value in values.items():
    if value != usual:
      other |= dict.fromkeys(naming.targets(names, [path]), value)
  return usual, other


def pattern(found: Settings | None, name: str, usual: Any) -> Any:
  """The value for a module of some name, as the library looks it up."""
  for key, value in (found or {}).items():
    if re.match(rf"(.*\.)?({key})$", name):
      return value
  return usual


def is_target(wanted: str | Sequence[str] | None, name: str) -> bool:
  """Whether `target_modules` means a module, as the library looks it up."""
  if not wanted or wanted == "all-linear":
    return False
  if isinstance(wanted, str):
    return re.fullmatch(wanted, name) is not None
  return any(naming.is_end(end, name) for end in wanted)
