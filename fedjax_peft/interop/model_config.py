"""config.json of a model: the inverse of `models.family`.

What is written is read again and compared, so that nothing of a model is lost
because a config of its kind has no word for it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from flax import nnx

from fedjax_peft.interop import naming
from fedjax_peft.models import decoder, encoder, family

# How a model is used and run, which their config does not say.
_OURS = ("pool", "pooler", "classes", "keep", "unroll", "mean", "std", "window")
_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}
_NAMES = {
  "bert": ("BertModel", "BertForSequenceClassification"),
  "deit": ("DeiTModel", "DeiTForImageClassification"),
  "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
  "dinov2_with_registers": (
    "Dinov2WithRegistersModel",
    "Dinov2WithRegistersForImageClassification",
  ),
  "vit": ("ViTModel", "ViTForImageClassification"),
}


def of(module: nnx.Module, source: pathlib.Path | None) -> dict[str, Any]:
  """The config.json of a module.

  Args:
    module: an Encoder, a Decoder or a ViT.
    source: directory of the model it was made of, whose config is kept where
      the module did not change it; or None.

  Raises:
    ValueError: if the config could not say what the module is, or `source` is
      another model.
  """
  config, kind = module.config, naming.kind_of(module)
  if source is not None:
    told = json.loads((source / "config.json").read_text())
    kind = told["model_type"]
  else:
    told = {"model_type": kind} | _written(config, kind)
  if "image_size" in told:
    told["image_size"] = config.image_size
  told |= {"dtype": "float32", "architectures": [_class(kind, module)]}
  told.pop("torch_dtype", None)
  if naming.has_classifier(module) and kind in _NAMES:
    labels = [f"LABEL_{i}" for i in range(config.classes)]
    told["id2label"] = {str(i): name for i, name in enumerate(labels)}
    told["label2id"] = {name: i for i, name in enumerate(labels)}
  _check(told, config)
  return told


def _check(told: Mapping[str, Any], config: Any) -> None:
  """Raises unless a config says what the module is."""
  read = family.find(told["model_type"]).config(told)
  read, wanted = _plain(read), _plain(config)
  fields = [
    field.name
    for field in dataclasses.fields(config)
    if field.name not in _OURS
    and getattr(read, field.name, None) != getattr(wanted, field.name)
  ]
  if fields or type(read) is not type(config):
    raise ValueError(
      f"the config of a {told['model_type']} must say what the module is: "
      f"{fields} differ; pass as base the model that it was made of"
    )


def _plain(config):
  """A config whose heads say how wide they are."""
  if hasattr(config, "head_width"):
    return dataclasses.replace(config, head_width=config.per_head)
  return config


def _class(kind, module):
  """Their class of a model."""
  if kind not in _NAMES:
    return f"{kind.capitalize()}ForCausalLM"
  return _NAMES[kind][naming.has_classifier(module)]


def _written(config, kind):
  """Their words for the fields of our config."""
  told = {
    "hidden_size": config.width,
    "num_hidden_layers": config.depth,
    "num_attention_heads": config.heads,
    "intermediate_size": config.ffn,
    "hidden_act": _ACTIVATIONS.get(config.activation, config.activation),
  }
  if isinstance(config, encoder.EncoderConfig):
    return told | {
      "vocab_size": config.vocab,
      "max_position_embeddings": config.positions,
      "type_vocab_size": config.types,
      "layer_norm_eps": config.eps,
    }
  if isinstance(config, decoder.DecoderConfig):
    return told | _decoder(config, kind)
  ratio = config.ffn / config.width
  return told | {
    "image_size": config.image_size,
    "patch_size": config.patch,
    "num_channels": config.channels,
    "layer_norm_eps": config.eps,
    "qkv_bias": True,
    "mlp_ratio": int(ratio) if ratio.is_integer() else ratio,
    "layerscale_value": config.layer_scale,
    "num_register_tokens": config.registers,
  }


def _decoder(config, kind):
  """The words of Llama and its relatives."""
  told = {
    "vocab_size": config.vocab,
    "num_key_value_heads": config.groups,
    "head_dim": config.per_head,
    "rms_norm_eps": config.eps,
    "rope_theta": config.theta,
    "rope_parameters": {"rope_type": "default", "rope_theta": config.theta},
    "tie_word_embeddings": config.tied,
    "pad_token_id": None,
  }
  if kind.startswith("gemma"):
    told["hidden_activation"] = "gelu_pytorch_tanh"
  if kind == "gemma2":
    told |= {
      "query_pre_attn_scalar": _scalar(
        config.query_scale or config.per_head**-0.5
      ),
      "attn_logit_softcapping": config.attention_cap,
      "final_logit_softcapping": config.logit_cap,
    }
  return told


def _scalar(scale):
  """The n of a factor n ** -0.5, a whole number where it can be one."""
  whole = round(scale**-2)
  return whole if whole and whole**-0.5 == scale else scale**-2
