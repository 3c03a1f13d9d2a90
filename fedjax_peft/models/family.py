"""Families of Hugging Face models: their config and names, and ours.

A family is one function from its config.json to our config, one table of
names, and how a tensor is laid out. What of a config we do not implement is
refused by name.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fedjax_peft.models import decoder, encoder, image, vision

Config = encoder.EncoderConfig | decoder.DecoderConfig | vision.ViTConfig
Settings = Mapping[str, Any]


class Family(NamedTuple):
  """How to read the models of one `model_type`.

  Attributes:
    config: their config.json -> our config.
    names: our path -> their name, {} is the layer; Linear and norm layers
      are listed by module, and what they hold is named by `LEAVES`.
    prefix: of their names in a checkpoint of a whole model; may be missing.
    unused: patterns of what a checkpoint may hold beyond the model: the heads
      it was trained with, buffers of old library versions, a pooler.
    convert: (path, tensor, config) -> the tensor in our layout.
  """

  config: Callable[[Settings], Config]
  names: Mapping[str, str]
  prefix: str
  unused: tuple[str, ...]
  convert: Callable[[str, np.ndarray, Any], np.ndarray]


LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
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
_GEMMA2 = _DECODER | {
  "layers/attention_post_norm": "layers.{}.post_attention_layernorm",
  "layers/ffn_norm": "layers.{}.pre_feedforward_layernorm",
  "layers/ffn_post_norm": "layers.{}.post_feedforward_layernorm",
}
_VISION = {
  "embeddings/class_token": "embeddings.cls_token",
  "embeddings/distillation_token": "embeddings.distillation_token",
  "embeddings/registers": "embeddings.register_tokens",
  "embeddings/position": "embeddings.position_embeddings",
  "embeddings/patch": "embeddings.patch_embeddings.projection",
  "layers/attention/query": "encoder.layer.{}.attention.attention.query",
  "layers/attention/key": "encoder.layer.{}.attention.attention.key",
  "layers/attention/value": "encoder.layer.{}.attention.attention.value",
  "layers/attention/output": "encoder.layer.{}.attention.output.dense",
  "norm": "layernorm",
  "pooler": "pooler.dense",
}
_VIT = _VISION | {
  "layers/attention_norm": "encoder.layer.{}.layernorm_before",
  "layers/ffn_norm": "encoder.layer.{}.layernorm_after",
  "layers/ffn/up": "encoder.layer.{}.intermediate.dense",
  "layers/ffn/down": "encoder.layer.{}.output.dense",
}
_DINO = _VISION | {
  "layers/attention_norm": "encoder.layer.{}.norm1",
  "layers/attention_scale": "encoder.layer.{}.layer_scale1.lambda1",
  "layers/ffn_norm": "encoder.layer.{}.norm2",
  "layers/ffn/up": "encoder.layer.{}.mlp.fc1",
  "layers/ffn/down": "encoder.layer.{}.mlp.fc2",
  "layers/ffn_scale": "encoder.layer.{}.layer_scale2.lambda1",
}
_POOLER = ("pooler.dense.weight", "pooler.dense.bias")
_UNUSED_BERT = ("embeddings.position_ids", "cls.*", "classifier.*", *_POOLER)
_UNUSED_DECODER = ("layers.*.self_attn.rotary_emb.inv_freq",)
_UNUSED_VISION = ("embeddings.mask_token", "*classifier.*", *_POOLER)

_ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
}


def find(kind: str) -> Family:
  """The family of a `model_type`.

  Raises:
    ValueError: if it is none of ours.
  """
  if kind not in _FAMILIES:
    raise ValueError(
      f"model_type must be one of {sorted(_FAMILIES)}: {kind!r} came"
    )
  return _FAMILIES[kind]


def _bert(settings):
  """BERT: the first token through the pooler."""
  _refuse(settings, "position_embedding_type", (None, "absolute"))
  return encoder.EncoderConfig(
    vocab=settings["vocab_size"],
    width=settings["hidden_size"],
    depth=settings["num_hidden_layers"],
    heads=settings["num_attention_heads"],
    ffn=settings["intermediate_size"],
    positions=settings["max_position_embeddings"],
    types=settings["type_vocab_size"],
    eps=settings["layer_norm_eps"],
    activation=_activation(settings, relu="relu"),
    pool="first",
    pooler=True,
  )


def _vision(settings):
  """ViT, DeiT and both kinds of DINOv2."""
  kind, width = settings["model_type"], settings["hidden_size"]
  _refuse(settings, "qkv_bias", (None, True))
  _refuse(settings, "use_swiglu_ffn", (None, False))
  is_dino = kind.startswith("dinov2")
  ffn = width * settings["mlp_ratio"] if is_dino else None
  mean, std = vision.ViTConfig.mean, vision.ViTConfig.std
  if kind == "vit":
    mean = std = (0.5, 0.5, 0.5)
  return vision.ViTConfig(
    image_size=settings["image_size"],
    patch=settings["patch_size"],
    channels=settings["num_channels"],
    width=width,
    depth=settings["num_hidden_layers"],
    heads=settings["num_attention_heads"],
    ffn=int(ffn or settings["intermediate_size"]),
    eps=settings["layer_norm_eps"],
    activation=_activation(settings, relu="relu"),
    layer_scale=settings["layerscale_value"] if is_dino else 0.0,
    distilled=kind == "deit",
    registers=settings.get("num_register_tokens", 0) if is_dino else 0,
    mean=tuple(settings.get("image_mean", mean)),
    std=tuple(settings.get("image_std", std)),
  )


def _llama(settings):
  """Llama and its relatives."""
  kind = settings["model_type"]
  is_gemma = kind in ("gemma", "gemma2")
  _refuse(settings, "mlp_bias", (None, False))
  _refuse(settings, "use_bidirectional_attention", (None, False))
  if kind != "qwen2":  # elsewhere it gives the output projection one as well
    _refuse(settings, "attention_bias", (None, False))
  if kind == "gemma":  # means the tanh form by any name
    settings = settings | {"hidden_act": "gelu_pytorch_tanh"}
  if kind == "gemma2":
    settings = settings | {"hidden_act": settings["hidden_activation"]}
  width, heads = settings["hidden_size"], settings["num_attention_heads"]
  config = decoder.DecoderConfig(
    vocab=settings["vocab_size"],
    width=width,
    depth=settings["num_hidden_layers"],
    heads=heads,
    groups=settings.get("num_key_value_heads") or heads,
    head_width=settings.get("head_dim"),
    ffn=settings["intermediate_size"],
    eps=settings["rms_norm_eps"],
    theta=_theta(settings),
    activation=_activation(settings, silu="silu"),
    tied=settings.get("tie_word_embeddings", is_gemma),
    bias=kind == "qwen2",
    head_norm=kind == "qwen3",
    embedding_scale=width**0.5 if is_gemma else 1.0,
    window=_window(settings),
  )
  if kind != "gemma2":
    return config
  return dataclasses.replace(
    config,
    post_norm=True,
    query_scale=settings["query_pre_attn_scalar"] ** -0.5,
    attention_cap=settings["attn_logit_softcapping"],
    logit_cap=settings["final_logit_softcapping"],
  )


def _window(settings):
  """How many tokens any layer attends to; None is all."""
  if settings["model_type"].startswith("qwen"):
    on = settings.get("use_sliding_window", False)
  else:
    on = settings["model_type"] in ("mistral", "gemma2")
  return settings.get("sliding_window") if on else None


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


def _activation(settings, **more):
  """Our name of their `hidden_act`."""
  known = _ACTIVATIONS | more
  _refuse(settings, "hidden_act", tuple(known))
  return known[settings["hidden_act"]]


def _refuse(settings, name, supported):
  """Raises unless a setting has one of the values that we implement."""
  value = settings.get(name)
  if value not in supported:
    raise ValueError(
      f"{name}={value!r} of this {settings.get('model_type', 'model')} is not"
      f" supported; supported: {list(supported)}"
    )


def _transposed(path, tensor, config):
  """Dense kernels are [in, out] here."""
  del config
  return tensor.T if path.endswith("kernel") else tensor


def _gemma(path, tensor, config):
  """Norms store what is added to one."""
  tensor = _transposed(path, tensor, config)
  return tensor + 1 if path.endswith("scale") else tensor


def _pictured(path, tensor, config):
  """Patches as rows of a matrix, positions on our grid, no axis of one."""
  if path == "embeddings/patch/kernel":  # [D, C, h, w] -> [h * w * C, D]
    return tensor.transpose(2, 3, 1, 0).reshape(-1, len(tensor))
  if path == "embeddings/position":
    return _regrid(tensor[0], config)
  if path.startswith("embeddings/") and tensor.ndim == 3:
    return tensor[0] if path.endswith("registers") else tensor[0, 0]
  return _transposed(path, tensor, config)


def _regrid(position, config):
  """Positions [leading + patches, D], resized as transformers does."""
  first, patches = np.split(position, [config.leading])
  side = math.isqrt(len(patches))
  if side**2 != len(patches) or side == config.grid:
    return position
  # DINOv2 with registers was trained with another rule than the others.
  antialias = config.registers > 0
  matrix = image.cubic(side, config.grid, antialias=antialias)
  grid = patches.reshape(side, side, -1)
  grid = np.einsum("ih,jw,hwd->ijd", matrix, matrix, grid, optimize=True)
  return np.concatenate([first, grid.reshape(-1, grid.shape[-1])])


_TEXT = Family(_bert, _ENCODER, "bert.", _UNUSED_BERT, _transposed)
_CAUSAL = Family(_llama, _DECODER, "model.", _UNUSED_DECODER, _transposed)
_PICTURE = Family(_vision, _VIT, "vit.", _UNUSED_VISION, _pictured)
_FAMILIES = {
  "bert": _TEXT,
  "deit": _PICTURE._replace(prefix="deit."),
  "dinov2": _PICTURE._replace(names=_DINO, prefix="dinov2."),
  "dinov2_with_registers": _PICTURE._replace(
    names=_DINO, prefix="dinov2_with_registers."
  ),
  "gemma": _CAUSAL._replace(convert=_gemma),
  "gemma2": _CAUSAL._replace(names=_GEMMA2, convert=_gemma),
  "llama": _CAUSAL,
  "mistral": _CAUSAL,
  "qwen2": _CAUSAL,
  "qwen3": _CAUSAL,
  "vit": _PICTURE,
}
