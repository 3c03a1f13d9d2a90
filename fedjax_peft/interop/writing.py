"""Writing an adapter directory: adapter_config.json, adapter_model.safetensors.

Their LoRA is y = x W' + s (x A') B' with A [R, K] and B [F, R], of one layer
each: the transposes of ours, one after another.
"""

import pathlib
from collections.abc import Mapping

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

from fedjax_peft import objective, peft, record, split
from fedjax_peft.interop import arrays, layout, naming, rotation, settings
from fedjax_peft.models import decoder, encoder, family

WEIGHTS = "adapter_model.safetensors"
HEAD = "head.safetensors"
Tensors = dict[str, np.ndarray]
_CLASSIFIER = "classifier"


def export_adapter(
  parts: nnx.Module | objective.Model | peft.Split,
  params: Mapping[str, jax.Array] | None,
  directory: str | pathlib.Path,
  *,
  base: str | pathlib.Path,
  release: int = 5,
) -> pathlib.Path:
  """Writes an adapter as the Hugging Face PEFT library does.

  A head on a pooling that none of their classifiers has (the mean over a text)
  goes into a file of its own, head.safetensors: the adapter is then one of the
  model without a head, whose features the head reads.

  Guarantees:
    `import_adapter` gives back the same bits, but for two things: keys of a
    prefix, which are turned (see `rotation`), and norms of a Gemma, which are
    stored less one; both to within rounding. A directory that
    was imported is written with the same tensors, bit for bit, with the same
    two exceptions.

  Args:
    parts: an Encoder, Decoder or ViT with adapters of one method (lora, dora,
      ia3, prompt or prefix), not frozen, cut or not (`split.whole`); or one
      taken apart by `objective.model` or `peft.split`.
    params: {path: array}, of what trains; others keep the module's values.
      None keeps all. Factors may have a smaller rank than the module's.
    directory: made if it is not there.
    base: name or path of the model that the adapter belongs to.
    release: of transformers; in 5 the modules of vision transformers have
      other names than in 4. The names of other models are the same in both.

  Returns:
    The directory.

  Raises:
    ValueError: if the layout cannot hold the module; says what to do instead.

  Example:
    >>> import tempfile
    >>> from fedjax_peft import interop, models
    >>> model = peft.lora(models.load("encoder"), rank=2)
    >>> with tempfile.TemporaryDirectory() as there:
    ...   path = export_adapter(model, None, there, base="encoder")
    ...   sorted(file.name for file in path.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
  """
  module = split.whole(arrays.filled(parts, params))
  names = naming.of(module, release=release)
  found = layout.contents(module, names)
  method, kind = _METHODS[found.method]
  told, tensors = method(module, names, found.nodes)
  saved = _saved(module, names, found.saved)
  head = None if naming.has_classifier(module) else saved.pop(_CLASSIFIER, None)
  about = {
    "peft_type": kind,
    "task_type": _task(module),
    "base_model_name_or_path": str(base),
    "inference_mode": True,
    "modules_to_save": sorted(saved) or None,
  }
  for one in saved.values():
    tensors |= one
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  write(tensors, directory / WEIGHTS)
  write_head(head, directory)
  record.write_json(directory / settings.FILE, about | told)
  return directory


def write(tensors: Tensors, path: pathlib.Path) -> None:
  """Writes a safetensors file in one step, as PyTorch libraries expect it."""
  plain = {k: np.ascontiguousarray(x) for k, x in tensors.items()}
  fresh = path.with_name(f".{path.name}")
  safetensors.numpy.save_file(plain, fresh, metadata={"format": "pt"})
  fresh.replace(path)


def write_head(
  head: Mapping[str, np.ndarray] | None, directory: pathlib.Path
) -> None:
  """Writes a head that is no part of their model, or removes an old one."""
  path = directory / HEAD
  if head is None:
    path.unlink(missing_ok=True)
  else:
    write(
      {k.removeprefix("base_model.model."): x for k, x in head.items()}, path
    )


def _factors(module, names, nodes):
  """LoRA and DoRA."""
  how, alphas = settings.scaling(nodes)
  ranks = {path: settings.rank_of(node) for path, node in nodes.items()}
  rank, rank_pattern = settings.patterns(ranks, names)
  alpha, alpha_pattern = settings.patterns(alphas, names)
  tensors: Tensors = {}
  for path, node in nodes.items():
    tensors |= _layers(
      names, path, "lora_A.weight", node.lora_a, transpose=True
    )
    tensors |= _layers(
      names, path, "lora_B.weight", node.lora_b, transpose=True
    )
    if isinstance(node, peft.DoRA):
      magnitude = node.dora_magnitude
      tensors |= _layers(names, path, "lora_magnitude_vector", magnitude)
  told = {
    "r": rank,
    "lora_alpha": alpha,
    "rank_pattern": rank_pattern,
    "alpha_pattern": alpha_pattern,
    "use_rslora": how == "sqrt",
    "use_dora": isinstance(node, peft.DoRA),
    "target_modules": naming.targets(names, nodes),
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
  }
  return told, tensors


def _gains(module, names, nodes):
  """IA3: a row on inputs, a column on outputs."""
  tensors: Tensors = {}
  for path, node in nodes.items():
    gain = node.ia3_gain[...]
    column = gain[..., None, :] if node.side == "input" else gain[..., None]
    tensors |= _layers(names, path, "ia3_l", column)
  inputs = [path for path, node in nodes.items() if node.side == "input"]
  told = {
    "target_modules": naming.targets(names, nodes),
    "feedforward_modules": naming.targets(names, inputs),
    "fan_in_fan_out": False,
    "init_ia3_weights": True,
  }
  return told, tensors


def _prompt(module, names, nodes):
  """A prompt [P, D]."""
  value = np.asarray(nodes["prompt"][...])
  width, config = module.config.width, module.config
  told = _virtual(len(value), width, config.heads, config)
  told |= {"prompt_tuning_init": "RANDOM"}
  return told, {"prompt_embeddings": value}


def _prefix(module, names, nodes):
  """A prefix [P, layers * 2 * groups * d], key and value of a layer in turn."""
  config = module.config
  if nodes.keys() != {"layers/attention/prefix"}:
    raise ValueError(
      "the layout holds one prefix for all attentions: got one at "
      f"{sorted(nodes)}"
    )
  (node,) = nodes.values()
  key, value = (
    np.asarray(x[...]) for x in (node.prefix_key, node.prefix_value)
  )
  _, length, groups, width = key.shape
  key = rotation.turned(key, length, config.theta)
  both = np.stack([key, value], axis=1)  # [layers, 2, P, groups, d]
  flat = np.moveaxis(both, 2, 0).reshape(length, -1)
  told = _virtual(length, groups * width, groups, config)
  told |= {"prefix_projection": False, "encoder_hidden_size": groups * width}
  return told, {"prompt_embeddings": flat}


def _virtual(length, width, heads, config):
  """What all prompts and prefixes tell."""
  return {
    "num_virtual_tokens": length,
    "token_dim": width,
    "num_attention_heads": heads,
    "num_layers": config.depth,
    "num_transformer_submodules": 1,
  }


_METHODS = {
  "lora": (_factors, "LORA"),
  "dora": (_factors, "LORA"),
  "ia3": (_gains, "IA3"),
  "prompt": (_prompt, "PROMPT_TUNING"),
  "prefix": (_prefix, "PREFIX_TUNING"),
}


def _layers(names, path, leaf, value, *, transpose=False):
  """{their name: tensor} of one array, unstacked."""
  found = naming.theirs(names, path)
  value = np.asarray(value[...])
  parts = value if path.startswith("layers/") else [value]
  return {
    f"base_model.model.{name}.{leaf}": part.T if transpose else part
    for name, part in zip(found, parts, strict=True)
  }


def _saved(module, names, paths):
  """{their name of a module that is saved whole: its tensors}."""
  flat, found = arrays.held(module), {}
  for path in paths:
    own = {k: x for k, x in flat.items() if k.rpartition("/")[0] == path}
    for layer, name in enumerate(naming.theirs(names, path)):
      found[name] = {}
      for key, value in own.items():
        part = np.asarray(value)
        part = part[layer] if path.startswith("layers/") else part
        part = arrays.theirs(key, part, names.kind, module.config)
        leaf = family.LEAVES[key.rpartition("/")[2]]
        found[name][f"base_model.model.{name}.{leaf}"] = part
  return found


def _task(module):
  """Their name of what the model is for; they have none for images."""
  if isinstance(module.config, decoder.DecoderConfig):
    return "CAUSAL_LM"
  if isinstance(module.config, encoder.EncoderConfig):
    is_classifier = naming.has_classifier(module)
    return "SEQ_CLS" if is_classifier else "FEATURE_EXTRACTION"
  return None
