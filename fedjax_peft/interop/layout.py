"""What of a module the layout holds, by method, and what it does not hold.

An adapter directory is of one method. What stands beside it, trained as it is,
is saved whole (`modules_to_save`).
"""

from collections.abc import Mapping
from typing import NamedTuple

from flax import nnx

from fedjax_peft import peft
from fedjax_peft.interop import naming
from fedjax_peft.models import decoder, encoder, vision
from fedjax_peft.peft import adapter, beside, inserted, prompting, rescaling

_NODES = (
  beside.Beside,
  rescaling.IA3,
  prompting.Prefix,
  prompting.DeepPrompt,
  inserted.Bottleneck,
)
_METHODS = {
  peft.LoRA: "lora",
  peft.DoRA: "dora",
  peft.IA3: "ia3",
  peft.Prefix: "prefix",
}
# Leaves that belong to a method, by their last name.
_OWN = {
  "dora_magnitude",
  "ia3_gain",
  "lora_a",
  "lora_b",
  "lora_residual",
  "prefix_key",
  "prefix_value",
  "prompt",
}


class Contents(NamedTuple):
  """What a module would write.

  Attributes:
    method: "lora", "dora", "ia3", "prompt" or "prefix".
    nodes: {path: layer with an adapter}; {"prompt": Variable} of a prompt.
    saved: paths of the modules that are saved whole.
  """

  method: str
  nodes: Mapping[str, nnx.Module | nnx.Variable]
  saved: tuple[str, ...]


def contents(module: nnx.Module, names: naming.Names) -> Contents:
  """Finds what a module would write.

  Raises:
    ValueError: if the layout cannot hold it; says what to do instead.
  """
  kinds = _kinds(module)
  if len(kinds) != 1:
    raise ValueError(
      "an adapter directory is of one method (lora, dora, ia3, prompt, "
      f"prefix): the module has {sorted(kinds) or 'none'}; "
      "write a merged model instead (export_merged, --merged)"
    )
  ((method, nodes),) = kinds.items()
  _check_method(method, nodes)
  check_place(method, module)
  return Contents(method, nodes, _saved(module, names, nodes))


def check_place(method: str, module: nnx.Module) -> None:
  """Refuses methods that the other library applies in another way.

  Its prompts take part in what is pooled, and it has them for texts only. Its
  prefixes shift the words, which an encoder with learned positions notices.

  Raises:
    ValueError: if what it computes would differ.
  """
  config = module.config
  if isinstance(config, vision.ViTConfig) and method in ("prompt", "prefix"):
    why = "it has none for images"
  elif isinstance(config, encoder.EncoderConfig) and method == "prefix":
    why = "it moves the words of an encoder to later positions"
  elif (
    isinstance(config, encoder.EncoderConfig)
    and method == "prompt"
    and naming.has_classifier(module)
  ):
    why = "its classifiers read the first place of the prompt, not the text"
  elif (
    isinstance(config, decoder.DecoderConfig)
    and method == "prompt"
    and config.embedding_scale != 1
  ):
    why = "whether it scales the prompt of a Gemma depends on its release"
  else:
    return
  raise ValueError(
    f"a {method} of this {type(module).__name__} has another meaning in the "
    f"Hugging Face library: {why}; use lora, dora or ia3"
  )


def _kinds(module):
  """{method, or type of what is no such method: {path: node}}."""
  kinds: dict[str, dict] = {}
  for path, (node, _) in adapter.find(module, _NODES).items():
    method = _METHODS.get(type(node), type(node).__name__)
    kinds.setdefault(method, {})[adapter.join(path)] = node
  soft = getattr(module, "prompt", None)
  if isinstance(soft, adapter.Adapter):
    kinds["prompt"] = {"prompt": soft}
  return kinds


def _check_method(method, nodes):
  """Refuses what has no place in the layout."""
  path, node = next(iter(nodes.items()))
  if method not in (*_METHODS.values(), "prompt"):
    merges = isinstance(node, beside.Beside)
    advice = (
      "write a merged model instead (export_merged, --merged)"
      if merges
      else "it cannot be merged either: save peft.split(module).params"
    )
    raise ValueError(
      "the layout holds lora, dora, ia3, prompt and prefix: "
      f"{path!r} has {method}; {advice}"
    )
  for path, node in nodes.items():
    residual = getattr(node, "lora_residual", None)
    if residual is not None and bool((residual[...] != 0).any()):
      raise ValueError(
        f"the layout has no place for the residual of {path!r}, which its rule "
        "added to the layer itself; write a merged model instead "
        "(export_merged, --merged)"
      )


def _saved(module, names, nodes):
  """Modules with trained parameters of their own, and a head."""
  found = set()
  for path in adapter.find(module, adapter.Adapter):
    name = adapter.join(path)
    owner, _, leaf = name.rpartition("/")
    if leaf in _OWN:
      continue
    if owner not in names.table or owner in nodes:
      raise ValueError(
        "the layout saves whole modules that have no adapter beside them: "
        f"{name!r} is none; write a merged model instead (export_merged, "
        "--merged)"
      )
    found.add(owner)
  if names.table.get("head") == "classifier" and module.head is not None:
    found.add("head")  # no base has it, so it is saved even if it is frozen
  return tuple(sorted(found))
