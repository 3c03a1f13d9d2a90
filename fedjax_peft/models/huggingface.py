"""Hugging Face model directories: config.json and safetensors to our modules.

The tables of names in `family` are exact: a tensor that is missing, left over
or of another shape is an error that lists it, since a model with a silently
random layer still trains.
"""

import dataclasses
import difflib
import fnmatch
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedjax_peft.models import (
  cnn,
  decoder,
  encoder,
  family,
  tensorfile,
  vision,
)

Config = family.Config | cnn.CNNConfig
_MODULES = {
  cnn.CNNConfig: cnn.CNN,
  decoder.DecoderConfig: decoder.Decoder,
  encoder.EncoderConfig: encoder.Encoder,
  vision.ViTConfig: vision.ViT,
}


def load(
  directory: pathlib.Path, *, classes: int = 0, seed: int = 0, **overrides
) -> nnx.Module:
  """Loads a model directory.

  Args:
    directory: `config.json` and safetensors weights, as `save_pretrained`
      writes them. BERT gives an `Encoder`; Llama, Mistral, Qwen 2 and 3,
      Gemma and Gemma 2 a `Decoder`; ViT, DeiT and DINOv2 a `ViT`, whose
      normalization is that of preprocessor_config.json, if it is there.
    classes: outputs of a head on an encoder, new unless the checkpoint has one
      of that size; 0 is none.
    seed: of the new head.
    **overrides: fields of `EncoderConfig`, `DecoderConfig` or `ViTConfig`;
      with another `image_size` the positions are interpolated.

  Returns:
    The module, all weights float32.

  Raises:
    FileNotFoundError: if a file is not there.
    ValueError: if a file is damaged, the architecture is another, or the
      weights are not those of the architecture.
  """
  settings = _settings(directory)
  kind = family.find(settings["model_type"])
  try:
    config: Config = kind.config(settings)
  except KeyError as error:
    raise ValueError(
      f"{directory / 'config.json'} lacks {error}, which"
      f" {settings['model_type']} needs"
    ) from error
  if classes:
    overrides["classes"] = classes
  config = override(config, overrides)
  with tensorfile.opened(directory) as tensors:
    return _fill(config, tensors, kind, directory, seed)


def build(config: Config, rngs: nnx.Rngs) -> nnx.Module:
  """The module of a config, with random weights."""
  return _MODULES[type(config)](config, rngs)


def override(config: Config, overrides: Mapping[str, Any]) -> Config:
  """The config with fields replaced; an unknown field lists near names."""
  fields = [field.name for field in dataclasses.fields(config)]
  for name in overrides:
    if name not in fields:
      near = difflib.get_close_matches(name, fields) or fields
      raise ValueError(
        f"{type(config).__name__} has no field {name!r}; near names: {near}"
      )
  # A list, as configuration files have it, cannot be part of a static config.
  plain: dict[str, Any] = {
    k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()
  }
  return dataclasses.replace(config, **plain)


def _settings(directory):
  """The parsed config.json, and how images are normalized."""
  path = directory / "config.json"
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} is not there: a model directory needs config.json,"
      " model.safetensors and, for text, tokenizer.json"
    )
  settings = _json(path)
  if "model_type" not in settings:
    raise ValueError(f"{path} must be a JSON object with a model_type")
  images = directory / "preprocessor_config.json"
  if images.is_file():
    wanted = ("image_mean", "image_std")
    settings |= {k: v for k, v in _json(images).items() if k in wanted}
  return settings


def _json(path):
  """The JSON object in a file."""
  try:
    value = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} must be JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} must be a JSON object with a model_type")
  return value


def _fill(config, tensors, kind, directory, seed):
  """A module of this config with these tensors."""
  module = nnx.eval_shape(lambda: build(config, nnx.Rngs(0)))
  is_new = getattr(config, "classes", 0) > 0  # no pretrained head: a new one
  if is_new:
    inputs = module.head.in_features
    module.head = nnx.Linear(inputs, config.classes, rngs=nnx.Rngs(seed))
    _take_head(module.head, tensors)
  leaves = {
    "/".join(map(str, path)): leaf
    for path, leaf in nnx.to_flat_state(nnx.state(module))
    if not (is_new and path[0] == "head")
  }
  names = {path: _names(path, kind.names, config.depth) for path in leaves}
  stored = {name.removeprefix(kind.prefix): name for name in tensors}
  unused = kind.unused
  if getattr(config, "tied", False):
    unused = (*unused, "lm_head.weight")
  wanted = {name for each in names.values() for name in each}
  _check_names(wanted, stored, unused, directory)
  for path, leaf in leaves.items():
    value = np.empty(leaf.shape, np.float32)
    parts = value if path.startswith("layers/") else [value]
    for name, part in zip(names[path], parts, strict=True):
      tensor = np.asarray(tensors[stored[name]], np.float32)
      came = kind.convert(path, tensor, config)
      if came.shape != part.shape:
        raise ValueError(
          f"tensor {name!r} in {directory} must have shape {part.shape} as"
          f" {path!r} of its config.json: {came.shape} came"
        )
      part[...] = came
    leaf.set_value(jnp.asarray(value))
  return module


def _take_head(head, tensors):
  """Fills a new head with the checkpoint's own, where that has its shape."""
  weight = tensors.get("classifier.weight")
  bias = tensors.get("classifier.bias")
  if weight is None or bias is None:
    return
  weight, bias = np.asarray(weight), np.asarray(bias)
  if weight.shape == head.kernel.shape[::-1] and bias.shape == head.bias.shape:
    head.kernel.set_value(jnp.asarray(weight.T, jnp.float32))
    head.bias.set_value(jnp.asarray(bias, jnp.float32))


def _names(path, table, depth):
  """Their names for one of our leaves: one, or one a layer."""
  if path in table:
    name = table[path]
  else:
    layer, _, leaf = path.rpartition("/")
    name = f"{table[layer]}.{family.LEAVES[leaf]}"
  return [name.format(i) for i in range(depth)] if "{}" in name else [name]


def _check_names(wanted, stored, unused, directory):
  """Raises, with a list, unless a checkpoint holds what it must and no more."""
  missing = sorted(wanted - stored.keys())
  extra = sorted(
    name
    for name in stored.keys() - wanted
    if not any(fnmatch.fnmatch(name, pattern) for pattern in unused)
  )
  if missing or extra:
    raise ValueError(
      f"the weights in {directory} are not those of its config.json:"
      f" missing {missing}, extra {extra}"
    )
