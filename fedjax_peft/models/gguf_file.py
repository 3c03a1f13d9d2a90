"""GGUF files of the Llama family to a Hugging Face model directory.

Done once, when a model is prepared: afterwards it loads like any other
directory, memory-mapped.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import pathlib

import gguf
import numpy as np
import tokenizers
from gguf import quants
from safetensors import numpy as safetensors_numpy

_TOP = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
_LAYER = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_SPECIAL = 3  # token type of control tokens


def convert(path: pathlib.Path, into: pathlib.Path):
  """Writes config.json, model.safetensors (float32) and tokenizer.json.

  Args:
    path: a GGUF file of architecture "llama" with a byte-level BPE.
    into: an existing directory.

  Raises:
    ValueError: if the file is of another architecture or holds unknown
      tensors.
  """
  reader = gguf.GGUFReader(path)
  fields = {name: field.contents() for name, field in reader.fields.items()}
  if fields["general.architecture"] != "llama":
    raise ValueError(
      "a GGUF file must be of architecture 'llama':"
      f" {path} has {fields['general.architecture']!r}"
    )
  heads = fields["llama.attention.head_count"]
  groups = fields["llama.attention.head_count_kv"]
  weights = {}
  for tensor in reader.tensors:
    value = quants.dequantize(tensor.data, tensor.tensor_type)
    if tensor.name.endswith("attn_q.weight"):
      value = _half_split(value, heads)
    elif tensor.name.endswith("attn_k.weight"):
      value = _half_split(value, groups)
    weights[_name(tensor.name, path)] = np.ascontiguousarray(value, np.float32)
  vocab, width = weights["model.embed_tokens.weight"].shape
  config = {
    "model_type": "llama",
    "vocab_size": vocab,
    "hidden_size": width,
    "num_hidden_layers": fields["llama.block_count"],
    "num_attention_heads": heads,
    "num_key_value_heads": groups,
    "intermediate_size": fields["llama.feed_forward_length"],
    "rms_norm_eps": float(fields["llama.attention.layer_norm_rms_epsilon"]),
    "rope_theta": float(fields["llama.rope.freq_base"]),
    "hidden_act": "silu",
    "tie_word_embeddings": "lm_head.weight" not in weights,
  }
  (into / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  safetensors_numpy.save_file(weights, into / "model.safetensors")
  _tokenizer(fields).save(str(into / "tokenizer.json"))


def _name(name, path):
  """The Hugging Face name of a GGUF tensor."""
  if name in _TOP:
    return _TOP[name]
  parts = name.split(".")
  if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER:
    return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
  raise ValueError(f"tensor {name!r} of {path} has no place in a Llama model")


def _half_split(kernel, heads):
  """Rows [out, in] from interleaved rotary pairs to (i, i + d / 2)."""
  out, width = kernel.shape
  kernel = kernel.reshape(heads, out // heads // 2, 2, width)
  return kernel.swapaxes(1, 2).reshape(out, width)


def _tokenizer(fields):
  """The byte-level BPE that the file describes."""
  tokens = fields["tokenizer.ggml.tokens"]
  merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={token: i for i, token in enumerate(tokens)}, merges=merges
    )
  )
  pre = tokenizers.pre_tokenizers
  tokenizer.pre_tokenizer = pre.Sequence(
    [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  types = fields["tokenizer.ggml.token_type"]
  tokenizer.add_special_tokens(
    [token for token, kind in zip(tokens, types) if kind == _SPECIAL]
  )
  return tokenizer
