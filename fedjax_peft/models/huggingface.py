"""Hugging Face model directories: config.json and safetensors to our modules.

Each family is one function from its config to ours and one table of names.
The tables are exact: a tensor that is missing, left over or of another shape
is an error that lists it, since a model with a silently random layer still
trains.
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

from fedjax_peft.models import decoder, encoder, tensorfile

Config = encoder.EncoderConfig | decoder.DecoderConfig

# Our path -> their name; {} is the layer. The table lists Linear and norm
# layers by module, and what they hold is named by _LEAVES.
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_ENCODER = {
  "embeddings/token/embedding": "embeddings.word_embeddings.weight",
  "embeddings/position/embedding": "embeddings.position_embeddings.weight",
  "embeddings/type/embedding": "embeddings.token_type_embeddings.weight",
  "embeddings/norm": "embeddings.LayerNorm",
  "layers/attention/query": "encoder.layer.{}.attention.self.query",
  "layers/attention/key": "encoder.layer.{}.attention.self.key",
  "layers/attention/value": "encoder.layer.{}.attention.self.value",
  "layers/attention/output": "encoder.layer.{}.attention.output.dense",
  "layers/attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
  "layers/ffn/up": "encoder.layer.{}.intermediate.dense",
  "layers/ffn/down": "encoder.layer.{}.output.dense",
  "layers/ffn_norm": "encoder.layer.{}.output.LayerNorm",
  "pooler": "pooler.dense",
}
_DECODER = {
  "embeddings/token/embedding": "embed_tokens.weight",
  "layers/attention_norm": "layers.{}.input_layernorm",
  "layers/attention/query": "layers.{}.self_attn.q_proj",
  "layers/attention/key": "layers.{}.self_attn.k_proj",
  "layers/attention/value": "layers.{}.self_attn.v_proj",
  "layers/attention/output": "layers.{}.self_attn.o_proj",
  "layers/attention/query_norm": "layers.{}.self_attn.q_norm",
  "layers/attention/key_norm": "layers.{}.self_attn.k_norm",
  "layers/ffn_norm": "layers.{}.post_attention_layernorm",
  "layers/ffn/gate": "layers.{}.mlp.gate_proj",
  "layers/ffn/up": "layers.{}.mlp.up_proj",
  "layers/ffn/down": "layers.{}.mlp.down_proj",
  "norm": "norm",
  "head": "lm_head",
}
# What a checkpoint may hold beyond the model: the heads it was trained with,
# buffers of old library versions, and the pooler where we do not use it.
_UNUSED_ENCODER = (
  *("embeddings.position_ids", "cls.*", "classifier.*"),
  *("pooler.dense.weight", "pooler.dense.bias"),
)
_UNUSED_DECODER = ("layers.*.self_attn.rotary_emb.inv_freq",)

_ENCODER_ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "relu": "relu",
}
_DECODER_ACTIVATIONS = {
  "silu": "silu",
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
}


def load(
  directory: pathlib.Path, *, classes: int = 0, seed: int = 0, **overrides
) -> nnx.Module:
  """Loads a model directory.

  Args:
    directory: `config.json` and safetensors weights, as `save_pretrained`
      writes them. BERT gives an `Encoder`; Llama, Qwen 2, Qwen 3 and Gemma
      give a `Decoder`.
    classes: outputs of a new head on an encoder; 0 is none.
    seed: of the new head.
    **overrides: fields of `EncoderConfig` or `DecoderConfig`.

  Returns:
    The module, all weights float32.

  Raises:
    FileNotFoundError: if a file is not there.
    ValueError: if a file is damaged, the architecture is another, or the
      weights are not those of the architecture.
  """
  settings = _settings(directory / "config.json")
  config = _config(settings, directory)
  if classes:
    overrides["classes"] = classes
  config = override(config, overrides)
  with tensorfile.opened(directory) as tensors:
    return _fill(config, tensors, settings["model_type"], directory, seed)


def build(config: Config, rngs: nnx.Rngs) -> nnx.Module:
  """The module of a config, with random weights."""
  if isinstance(config, encoder.EncoderConfig):
    return encoder.Encoder(config, rngs)
  return decoder.Decoder(config, rngs)


def override(config: Config, overrides: Mapping[str, Any]) -> Config:
  """The config with fields replaced; an unknown field lists near names."""
  fields = [field.name for field in dataclasses.fields(config)]
  for name in overrides:
    if name not in fields:
      near = difflib.get_close_matches(name, fields) or fields
      raise ValueError(
        f"{type(config).__name__} has no field {name!r}; near names: {near}"
      )
  return dataclasses.replace(config, **overrides)


def _settings(path):
  """The parsed config.json."""
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} is not there: a model directory needs config.json,"
      " model.safetensors and, for text, tokenizer.json"
    )
  try:
    settings = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} must be JSON: {error}") from error
  if not isinstance(settings, dict) or "model_type" not in settings:
    raise ValueError(f"{path} must be a JSON object with a model_type")
  return settings


def _config(settings, directory):
  """Our config for theirs."""
  kind = settings["model_type"]
  known = {"bert": _bert} | dict.fromkeys(
    ("llama", "qwen2", "qwen3", "gemma"), _llama
  )
  if kind not in known:
    raise ValueError(
      f"model_type must be one of {sorted(known)}: {directory} has {kind!r}"
    )
  try:
    return known[kind](settings)
  except KeyError as error:
    raise ValueError(
      f"{directory / 'config.json'} lacks {error}, which {kind} needs"
    ) from error


def _bert(settings):
  """BERT: the first token through the pooler."""
  _refuse(settings, "position_embedding_type", (None, "absolute"))
  _refuse(settings, "hidden_act", tuple(_ENCODER_ACTIVATIONS))
  return encoder.EncoderConfig(
    vocab=settings["vocab_size"],
    width=settings["hidden_size"],
    depth=settings["num_hidden_layers"],
    heads=settings["num_attention_heads"],
    ffn=settings["intermediate_size"],
    positions=settings["max_position_embeddings"],
    types=settings["type_vocab_size"],
    eps=settings["layer_norm_eps"],
    activation=_ENCODER_ACTIVATIONS[settings["hidden_act"]],
    pool="first",
    pooler=True,
  )


def _llama(settings):
  """Llama and its relatives."""
  kind = settings["model_type"]
  _refuse(settings, "use_sliding_window", (None, False))
  _refuse(settings, "mlp_bias", (None, False))
  if kind != "qwen2":  # elsewhere it gives the output projection one as well
    _refuse(settings, "attention_bias", (None, False))
  activation = settings["hidden_act"]
  if kind == "gemma":  # means the tanh form by any name
    activation = "gelu_pytorch_tanh"
  if activation not in _DECODER_ACTIVATIONS:
    _refuse(settings, "hidden_act", tuple(_DECODER_ACTIVATIONS))
  width, heads = settings["hidden_size"], settings["num_attention_heads"]
  return decoder.DecoderConfig(
    vocab=settings["vocab_size"],
    width=width,
    depth=settings["num_hidden_layers"],
    heads=heads,
    groups=settings.get("num_key_value_heads") or heads,
    head_width=settings.get("head_dim"),
    ffn=settings["intermediate_size"],
    eps=settings["rms_norm_eps"],
    theta=_theta(settings),
    activation=_DECODER_ACTIVATIONS[activation],
    tied=settings.get("tie_word_embeddings", kind == "gemma"),
    bias=kind == "qwen2",
    head_norm=kind == "qwen3",
    embedding_scale=width**0.5 if kind == "gemma" else 1.0,
  )


def _theta(settings):
  """The rotary base; only plain rotary positions are ours."""
  rotary = {
    **(settings.get("rope_scaling") or {}),
    **(settings.get("rope_parameters") or {}),
  }
  rotary.setdefault("rope_type", rotary.get("type", "default"))
  _refuse(rotary, "rope_type", ("default",))
  theta = rotary.get("rope_theta", settings.get("rope_theta"))
  return float(theta or 10_000.0)


def _refuse(settings, name, supported):
  """Raises unless a setting has one of the values that we implement."""
  value = settings.get(name)
  if value not in supported:
    raise ValueError(
      f"{name}={value!r} of this {settings.get('model_type', 'model')} is not"
      f" supported; supported: {list(supported)}"
    )


def _fill(config, tensors, kind, directory, seed):
  """A module of this config with these tensors."""
  is_encoder = isinstance(config, encoder.EncoderConfig)
  module = nnx.eval_shape(lambda: build(config, nnx.Rngs(0)))
  if is_encoder and config.classes:  # no pretrained one: a new head
    module.head = nnx.Linear(config.width, config.classes, rngs=nnx.Rngs(seed))
  leaves = {
    "/".join(map(str, path)): leaf
    for path, leaf in nnx.to_flat_state(nnx.state(module))
    if not (is_encoder and path[0] == "head")
  }
  names = {path: _names(path, is_encoder, config.depth) for path in leaves}
  prefix = "bert." if is_encoder else "model."
  stored = {name.removeprefix(prefix): name for name in tensors}
  unused = _UNUSED_ENCODER if is_encoder else _UNUSED_DECODER
  if not is_encoder and config.tied:
    unused = (*unused, "lm_head.weight")
  wanted = {name for each in names.values() for name in each}
  _check_names(wanted, stored, unused, directory)
  for path, leaf in leaves.items():
    read = [tensors[stored[name]] for name in names[path]]
    value = _leaf(path, names[path], read, leaf.shape, directory)
    if kind == "gemma" and path.endswith("scale"):
      value += 1  # stored as what is added to one
    leaf.set_value(jnp.asarray(value))
  return module


def _names(path, is_encoder, depth):
  """Their names for one of our leaves: one, or one a layer."""
  table = _ENCODER if is_encoder else _DECODER
  if path in table:
    name = table[path]
  else:
    layer, _, leaf = path.rpartition("/")
    name = f"{table[layer]}.{_LEAVES[leaf]}"
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


def _leaf(path, names, read, shape, directory):
  """One leaf, float32: layers stacked, dense kernels as [in, out]."""
  stacked = path.startswith("layers/")
  value = np.empty(shape, np.float32)
  for i, (name, tensor) in enumerate(zip(names, read, strict=True)):
    part = value[i] if stacked else value
    came = tensor.T if path.endswith("kernel") else tensor
    if came.shape != part.shape:
      raise ValueError(
        f"tensor {name!r} in {directory} must have shape"
        f" {part.T.shape if path.endswith('kernel') else part.shape} for its"
        f" config.json: {tensor.shape} came"
      )
    part[...] = came
  return value
