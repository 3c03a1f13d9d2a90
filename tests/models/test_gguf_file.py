"""GGUF conversion, on a small file written by the gguf library."""

import json
import pathlib

import gguf
import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import numpy as safetensors_numpy

from fedjax_peft import models
from fedjax_peft.models import gguf_file

LLAMA = pathlib.Path(__file__).parent / "reference" / "llama"
NAMES = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
  "input_layernorm": "attn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "post_attention_layernorm": "ffn_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
  "model.layers": "blk",
}


def interleave(kernel, heads):
  """The row order of llama.cpp's own converter (`permute`)."""
  out, width = kernel.shape
  kernel = kernel.reshape(heads, 2, out // heads // 2, width)
  return kernel.swapaxes(1, 2).reshape(out, width)


def write(path, architecture="llama", extra=()):
  config = json.loads((LLAMA / "config.json").read_text())
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_block_count(config["num_hidden_layers"])
  writer.add_head_count(config["num_attention_heads"])
  writer.add_head_count_kv(config["num_key_value_heads"])
  writer.add_feed_forward_length(config["intermediate_size"])
  writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
  writer.add_rope_freq_base(config["rope_theta"])
  writer.add_token_list(["<s>", "a", "b", "ab", "1", "2", "Ġ"])
  writer.add_token_types([3, 1, 1, 1, 1, 1, 1])
  writer.add_token_merges(["a b"])
  for name, value in safetensors_numpy.load_file(
    LLAMA / "model.safetensors"
  ).items():
    heads = {"q": config["num_attention_heads"], "k": 2}
    for kind, count in heads.items():
      if f"{kind}_proj" in name:
        value = interleave(value, count)
    for theirs, ours in NAMES.items():
      name = name.replace(theirs, ours)
    writer.add_tensor(name, np.ascontiguousarray(value))
  for name in extra:
    writer.add_tensor(name, np.zeros(4, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def test_a_converted_model_equals_its_original(tmp_path):
  write(tmp_path / "x.gguf")
  gguf_file.convert(tmp_path / "x.gguf", tmp_path)
  came, original = models.load(tmp_path), models.load(LLAMA)
  pairs = zip(
    jax.tree.leaves(nnx.state(came)),
    jax.tree.leaves(nnx.state(original)),
    strict=True,
  )
  for a, b in pairs:
    np.testing.assert_array_equal(a, b)
  assert came.config.theta == original.config.theta
  np.testing.assert_allclose(came.config.eps, original.config.eps, rtol=1e-6)


def test_its_tokenizer_merges_and_splits_digits(tmp_path):
  write(tmp_path / "x.gguf")
  gguf_file.convert(tmp_path / "x.gguf", tmp_path)
  tokenizer = models.tokenizer(tmp_path)
  assert tokenizer.encode("<s>ab 12").ids == [0, 3, 6, 4, 5]
  assert tokenizer.decode([3, 6, 4, 5]) == "ab 12"


def test_another_architecture_or_tensor_is_refused(tmp_path):
  write(tmp_path / "x.gguf", architecture="mamba")
  with pytest.raises(ValueError, match="'mamba'"):
    gguf_file.convert(tmp_path / "x.gguf", tmp_path)
  write(tmp_path / "y.gguf", extra=("blk.0.attn_q.novel.weight",))
  with pytest.raises(ValueError, match=r"attn_q\.novel\.weight.*no place"):
    gguf_file.convert(tmp_path / "y.gguf", tmp_path)
