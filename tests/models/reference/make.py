"""Makes the reference values of tests/models with PyTorch and transformers.

Run once, by hand, in an environment of its own; see README.md here. The tests
only read what it wrote.

  python make.py tiny [KIND ...]
  python make.py pictures [KIND ...]
  python make.py minilm DIRECTORY     # holds config.json, model.safetensors
  python make.py smollm2 FILE.gguf
  python make.py dinov2_small FILE.onnx
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SIZES = {
  "vocab_size": 40,
  "hidden_size": 16,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "intermediate_size": 24,
  "max_position_embeddings": 32,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "pad_token_id": None}
TINY = {
  "bert": transformers.BertConfig(**SIZES),
  "llama": transformers.LlamaConfig(**GROUPED, rope_theta=100.0),
  "qwen2": transformers.Qwen2Config(**GROUPED, tie_word_embeddings=True),
  "qwen3": transformers.Qwen3Config(**GROUPED, head_dim=6),
  "gemma": transformers.GemmaConfig(
    **(GROUPED | {"num_key_value_heads": 1, "pad_token_id": 0}), head_dim=6
  ),
  "gemma2": transformers.Gemma2Config(
    **(GROUPED | {"pad_token_id": 0}),
    head_dim=6,
    query_pre_attn_scalar=5,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
    sliding_window=12,
    attn_implementation="eager",
  ),
  "mistral": transformers.MistralConfig(
    **GROUPED, head_dim=6, sliding_window=12
  ),
}
CLASSES = {
  "bert": transformers.BertModel,
  "llama": transformers.LlamaForCausalLM,
  "qwen2": transformers.Qwen2ForCausalLM,
  "qwen3": transformers.Qwen3ForCausalLM,
  "gemma": transformers.GemmaForCausalLM,
  "gemma2": transformers.Gemma2ForCausalLM,
  "mistral": transformers.MistralForCausalLM,
}
PICTURE = {
  "hidden_size": 16,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "image_size": 28,
  "patch_size": 7,
}
PICTURES = {
  "vit": (
    transformers.ViTConfig(**PICTURE, intermediate_size=24),
    transformers.ViTModel,
  ),
  "deit": (
    transformers.DeiTConfig(**PICTURE, intermediate_size=24),
    transformers.DeiTModel,
  ),
  "dinov2": (
    transformers.Dinov2Config(**PICTURE, mlp_ratio=2),
    transformers.Dinov2Model,
  ),
  "dinov2_with_registers": (
    transformers.Dinov2WithRegistersConfig(
      **PICTURE, mlp_ratio=2, num_register_tokens=3
    ),
    transformers.Dinov2WithRegistersModel,
  ),
}
# Of pixels in [0, 1]; written to preprocessor_config.json.
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
SENTENCES = [
  "The congress shall have power to lay and collect taxes.",
  "He eats food.",
  "Someone is having a meal in a small restaurant by the sea.",
  "The bearing is hot.",
]
PROMPT = "The capital of France is Paris. The capital of Italy is"


def randomize(model):
  """Gives every parameter random values."""
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      base = 1.0 if "norm" in name.lower() and "weight" in name else 0.0
      parameter.copy_(base + 0.3 * torch.randn(parameter.shape))
  return model.eval()


def tiny(*kinds):
  """One small checkpoint a family, every parameter random, and its outputs."""
  for kind in kinds or TINY:
    torch.manual_seed(0)
    model = randomize(CLASSES[kind](TINY[kind]))
    tokens = torch.randint(1, 40, (3, 9))
    length = torch.tensor([9, 4, 7])
    mask = (torch.arange(9)[None] < length[:, None]).long()
    with torch.no_grad():
      out = model(input_ids=tokens, attention_mask=mask)
    values = out.pooler_output if kind == "bert" else out.logits
    model.save_pretrained(HERE / kind)
    (HERE / kind / "generation_config.json").unlink(missing_ok=True)
    np.savez(
      HERE / kind / "expected.npz",
      tokens=tokens.numpy().astype(np.int32),
      length=length.numpy().astype(np.int32),
      values=values.numpy(),
    )


def pictures(*kinds):
  """Small vision transformers; at 28 pixels and at sizes to interpolate to."""
  for kind in kinds or PICTURES:
    torch.manual_seed(0)
    config, make = PICTURES[kind]
    model = randomize(make(config))
    image = torch.randint(0, 256, (2, 42, 42, 3), dtype=torch.uint8)
    record = {"image": image.numpy()}
    for size in (28, 42, 21):
      x = image[:, :size, :size] / 255
      x = (x - torch.tensor(MEAN)) / torch.tensor(STD)
      options = {"pixel_values": x.permute(0, 3, 1, 2)}
      if not kind.startswith("dinov2"):  # these interpolate by themselves
        options["interpolate_pos_encoding"] = True
      with torch.no_grad():
        out = model(**options)
      record[f"hidden{size}"] = out.last_hidden_state.numpy()
    if kind == "vit":
      record["pooler21"] = out.pooler_output.numpy()
    model.save_pretrained(HERE / kind)
    (HERE / kind / "preprocessor_config.json").write_text(
      json.dumps({"image_mean": MEAN, "image_std": STD}) + "\n"
    )
    np.savez(HERE / kind / "expected.npz", **record)


def dinov2_small(path):
  """The backbone's output in onnxruntime for two drawn images."""
  import onnx.utils
  import onnxruntime

  row, column, channel = np.mgrid[0:28, 0:28, 0:3]
  first = 128 + 100 * np.sin(row / 5 + channel) * np.cos(column / 3)
  second = (row * 9 + column * (channel + 1) * 3) % 256
  image = np.stack([first, second]).astype(np.uint8)
  record, out = {"image": image}, "/backbone/layernorm/Add_1_output_0"
  with tempfile.TemporaryDirectory() as directory:
    part = f"{directory}/backbone.onnx"
    onnx.utils.extract_model(path, part, ["input_image"], [out])
    model = onnx.load(part)
    for axis in (2, 3):  # 224 in the file, but all that follows is computed
      model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "size"
    session = onnxruntime.InferenceSession(model.SerializeToString())
  for times in (2, 4, 8):
    x = image.repeat(times, 1).repeat(times, 2)
    x = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    feed = {"input_image": x.transpose(0, 3, 1, 2).astype(np.float32)}
    (hidden,) = session.run([out], feed)
    # Some tokens and every third value keep the file small.
    record[f"hidden{times * 28}"] = hidden[:, :: times * 2, ::3]
  np.savez(HERE / "dinov2_small.npz", **record)


def minilm(directory):
  """Masked means over the last layer, as sentence-transformers pools."""
  model = transformers.BertModel.from_pretrained(directory).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
  with torch.no_grad():
    hidden = model(**batch).last_hidden_state
  weight = batch["attention_mask"][..., None].float()
  np.savez(
    HERE / "minilm.npz",
    sentences=np.array(SENTENCES),
    tokens=batch["input_ids"].numpy().astype(np.int32),
    length=batch["attention_mask"].sum(1).numpy().astype(np.int32),
    embedding=((hidden * weight).sum(1) / weight.sum(1)).numpy(),
  )


def smollm2(path):
  """Logits of one prompt through transformers' own GGUF reader."""
  directory, file = pathlib.Path(path).parent, pathlib.Path(path).name
  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, gguf_file=file, dtype=torch.float32
  ).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    directory, gguf_file=file
  )
  tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
  with torch.no_grad():
    logits = model(tokens).logits[0]
  some = torch.arange(0, logits.shape[-1], 997)
  top = logits.topk(5)
  record = {
    "prompt": PROMPT,
    "tokens": tokens[0].tolist(),
    "top5": top.indices.tolist(),
    "top5_logits": top.values.tolist(),
    "some": some.tolist(),
    "some_logits": logits[:, some].tolist(),
  }
  (HERE / "smollm2.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
  recipes = (tiny, pictures, minilm, smollm2, dinov2_small)
  {recipe.__name__: recipe for recipe in recipes}[sys.argv[1]](*sys.argv[2:])
