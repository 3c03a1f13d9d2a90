"""Names: our paths of modules and theirs, with and without a head.

The tables are those of `models.family`, which name tensors of checkpoints. An
adapter names the modules of the library that it was trained with: those of
transformers 5 are called otherwise in vision transformers.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from flax import nnx

from fedjax_peft import validate
from fedjax_peft.models import decoder, encoder, family, vision

RELEASES = (5, 4)
_HEAD = "head"


def _five(layer, **more):
  """Modules of a vision transformer in transformers 5."""
  ours = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
  ours["output"] = "o_proj"
  names = {
    f"layers/attention/{a}": f"{layer}.attention.{b}" for a, b in ours.items()
  }
  mlp = {"layers/ffn/up": "mlp.fc1", "layers/ffn/down": "mlp.fc2"}
  return names | {k: f"{layer}.{v}" for k, v in (mlp | more).items()}


_NORMS = {
  "layers/attention_norm": "layernorm_before",
  "layers/ffn_norm": "layernorm_after",
}
_VIT = _five("layers.{}", **_NORMS)
_DINO = _five("encoder.layer.{}")
_RELEASE_5 = {
  "vit": _VIT,
  "deit": _VIT,
  "dinov2": _DINO,
  "dinov2_with_registers": _DINO,
}


class Names(NamedTuple):
  """The names of one module's parts.

  Attributes:
    kind: its `model_type`.
    prefix: before their names of everything but the head, if their model has
      one.
    depth: of its stack.
    table: our path of a module or parameter -> their name, {} is the layer.
  """

  kind: str
  prefix: str
  depth: int
  table: Mapping[str, str]


def of(module: nnx.Module, *, release: int = 5) -> Names:
  """The names of a module of the zoo.

  Args:
    module: an Encoder, a Decoder or a ViT, with adapters or without.
    release: of transformers; 4 names the modules as checkpoints do.

  Raises:
    ValueError: if the module is another, or there is no such release.

  Example:
    >>> from fedjax_peft import models
    >>> names = of(models.load("vit", layer_scale=0, classes=3))
    >>> theirs(names, "layers/ffn/up")
    ['vit.layers.0.mlp.fc1', 'vit.layers.1.mlp.fc1']
    >>> theirs(names, "head")
    ['classifier']
  """
  validate.one_of(RELEASES, release=release)
  kind = kind_of(module)
  found = family.find(kind)
  table = dict(found.names)
  if release == 5:
    table |= _RELEASE_5.get(kind, {})
  prefix = found.prefix
  if not isinstance(module.config, decoder.DecoderConfig):
    table[_HEAD] = "classifier"
    if not has_classifier(module):
      prefix = ""
  return Names(kind, prefix, module.config.depth, table)


def has_classifier(module: nnx.Module) -> bool:
  """Whether the library has a class for the head of an Encoder or a ViT.

  A head that reads another pooling than theirs is no part of their layout.
  """
  if isinstance(module.config, decoder.DecoderConfig) or module.head is None:
    return False
  pool, has_pooler = module.config.pool, module.pooler is not None
  return (pool, has_pooler) == {
    "bert": ("first", True),
    "dinov2": ("both", False),
    "dinov2_with_registers": ("both", False),
  }.get(kind_of(module), ("first", False))


def kind_of(module: nnx.Module) -> str:
  """The `model_type` that a module of the zoo is an instance of.

  What tells relatives apart is their config; where two have the same names and
  the same arithmetic (Mistral is a Llama) it is the first of them.

  Raises:
    ValueError: if it is no Encoder, Decoder or ViT.
  """
  config = getattr(module, "config", None)
  if isinstance(config, encoder.EncoderConfig):
    return "bert"
  if isinstance(config, vision.ViTConfig):
    if config.layer_scale:
      return "dinov2_with_registers" if config.registers else "dinov2"
    return "deit" if config.distilled else "vit"
  if isinstance(config, decoder.DecoderConfig):
    if config.post_norm:
      return "gemma2"
    if config.embedding_scale != 1:
      return "gemma"
    if config.head_norm:
      return "qwen3"
    return "qwen2" if config.bias else "llama"
  raise ValueError(
    "a Hugging Face layout needs an Encoder, a Decoder or a ViT of "
    f"fedjax_peft.models: got {type(module).__name__}; save the arrays of "
    "peft.split(module).params for other modules"
  )


def theirs(names: Names, path: str) -> list[str]:
  """Their names of one of our modules: one, or one a layer."""
  return [prefix_of(names, path) + name for name in plain(names, path)]


def plain(names: Names, path: str) -> list[str]:
  """Their names without the prefix."""
  name = names.table[path]
  if "{}" not in name:
    return [name]
  return [name.format(i) for i in range(names.depth)]


def prefix_of(names: Names, path: str) -> str:
  """What stands before their name of one of our modules."""
  return "" if path == _HEAD else names.prefix


def ours(names: Names) -> dict[str, tuple[str, int]]:
  """{their name, without the prefix: (our path, layer)}."""
  return {
    name: (path, layer)
    for path in names.table
    for layer, name in enumerate(plain(names, path))
  }


def targets(
  names: Names, wanted: Iterable[str], allowed: Iterable[str] | None = None
) -> list[str]:
  """The shortest ends of their names that mean some modules and no others.

  Args:
    names: of the module.
    wanted: our paths of what is meant.
    allowed: our paths of what may be meant too; None is `wanted`.

  Returns:
    Ends of names, sorted; a number of a layer is in one only where a module of
    another name ends alike.

  Example:
    >>> from fedjax_peft import models
    >>> names = of(models.load("encoder"))
    >>> targets(names, ["layers/attention/query"])
    ['query']
    >>> targets(names, ["layers/ffn/down"])
    ['0.output.dense', '1.output.dense']
  """
  wanted = list(wanted)
  allowed = set(wanted if allowed is None else allowed)
  others = [
    name
    for path in names.table
    if path not in allowed
    for name in theirs(names, path)
  ]
  found = set()
  for path in wanted:
    for name in theirs(names, path):
      parts = name.split(".")
      ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
      found.add(next(e for e in ends if not any(is_end(e, o) for o in others)))
  return sorted(found)


def is_end(end: str, name: str) -> bool:
  """Whether a name is, or ends with, some of its dotted parts."""
  return name == end or name.endswith(f".{end}")
