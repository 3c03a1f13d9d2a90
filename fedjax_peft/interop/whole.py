"""Writing a whole model: adapters folded in, as `save_pretrained` writes it."""

import pathlib
import shutil
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from fedjax_peft import objective, peft, record, split
from fedjax_peft.interop import arrays, model_config, naming, writing
from fedjax_peft.models import family, pretrained, tensorfile, vision
from fedjax_peft.peft import adapter, inserted, prompting

_FILE = "model.safetensors"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_IMAGES = "preprocessor_config.json"
_APART = (inserted.Bottleneck, prompting.DeepPrompt, prompting.Prefix)


def export_merged(
  parts: nnx.Module | objective.Model | peft.Split,
  params: Mapping[str, jax.Array] | None,
  directory: str | pathlib.Path,
  *,
  base: str | pathlib.Path | None = None,
) -> pathlib.Path:
  """Writes a model with its adapters folded into its layers.

  The directory loads with `models.load` and with transformers, 4 or 5. Their
  config does not say how an encoder is pooled: give `models.load` the same
  `pool` and `pooler`, and `classes`. A head is stored as their `classifier`,
  or in head.safetensors if it reads another pooling than theirs.

  Args:
    parts: an Encoder, Decoder or ViT, with adapters that `peft.merged` folds
      or trained as it is, cut or not; or one taken apart. Not frozen, not
      quantized.
    params: {path: array}, as in `export_adapter`.
    directory: made if it is not there; model.safetensors, config.json.
    base: name or path of the model that it was made of: its config.json is
      kept, its tokenizer and what it normalizes images with are copied. None,
      or a name without a directory, writes a config from the module's.

  Returns:
    The directory.

  Raises:
    ValueError: if something is left that is no part of the plain model
      (bottlenecks, prompts, prefixes), a kernel is quantized, or `base` is
      another model.

  Example:
    >>> import tempfile
    >>> from fedjax_peft import models
    >>> model = peft.lora(models.load("decoder"), rank=2)
    >>> with tempfile.TemporaryDirectory() as there:
    ...   again = models.load(export_merged(model, None, there))
    >>> bool((again.norm.scale[...] == model.norm.scale[...]).all())
    True
  """
  module = split.whole(peft.merged(arrays.filled(parts, params)))
  _check_plain(module)
  source = directory_of(base)
  told = model_config.of(module, source)
  tensors = _tensors(module, told["model_type"])
  head = None
  if getattr(module.config, "classes", 0) and not naming.has_classifier(module):
    head = {k: x for k, x in tensors.items() if k.startswith("classifier.")}
    tensors = {k: x for k, x in tensors.items() if k not in head}
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  if source is not None:
    tensors = _spare(module, source) | tensors
    _copy(source, directory)
  elif isinstance(module.config, vision.ViTConfig):
    images = {"image_mean": module.config.mean, "image_std": module.config.std}
    record.write_json(directory / _IMAGES, images)
  record.write_json(directory / "config.json", told)
  writing.write_head(head, directory)
  writing.write(tensors, directory / _FILE)
  return directory


def directory_of(base: str | pathlib.Path | None) -> pathlib.Path | None:
  """Where the files of a model are, None if there are none."""
  if base is None:
    return None
  try:
    return pretrained.directory(base)
  except FileNotFoundError:
    return None


def _check_plain(module):
  """Refuses what no plain model has."""
  left = {
    adapter.join(path): type(node).__name__
    for path, (node, _) in adapter.find(module, _APART).items()
  }
  if getattr(module, "prompt", None) is not None:
    left["prompt"] = "Prompt"
  if left:
    raise ValueError(
      f"a merged model must be plain: {left} cannot be folded into layers; "
      "export prompts and prefixes as adapters"
    )


def _tensors(module, kind):
  """{their name: tensor} of all that the module holds."""
  names = naming.of(module, release=4)
  names = names._replace(
    table={**family.find(kind).names, "head": names.table["head"]}
  )
  found = {}
  for path, value in arrays.held(module).items():
    owner, _, leaf = path.rpartition("/")
    alone = path in names.table
    each = naming.theirs(names, path if alone else owner)
    array = np.asarray(value, np.float32)
    layers = array if path.startswith("layers/") else [array]
    for name, part in zip(each, layers, strict=True):
      name = name if alone else f"{name}.{family.LEAVES[leaf]}"
      found[name] = arrays.theirs(path, part, kind, module.config)
  return found


def _spare(module, source):
  """{their name: tensor} of the source that theirs has and ours may lack.

  A pooler that is not used, and what stands for masked patches in pretraining.
  """
  names = naming.of(module, release=4)
  prefix = family.find(names.kind).prefix
  with tensorfile.opened(source) as stored:
    plain = {name.removeprefix(prefix): name for name in stored}
    return {
      names.prefix + name: stored[whole]
      for name, whole in plain.items()
      if name.startswith(_spared(module))
    }


def _spared(module):
  """Beginnings of the names that `_spare` takes."""
  is_image = isinstance(module.config, vision.ViTConfig)
  pooler = (
    () if is_image and naming.has_classifier(module) else ("pooler.dense.",)
  )
  return (*pooler, "embeddings.mask_token")


def _copy(source, directory):
  """What else a model needs, if the source has it."""
  for name in (*_TOKENIZER, _IMAGES):
    if (source / name).is_file() and source.resolve() != directory.resolve():
      shutil.copyfile(source / name, directory / name)
