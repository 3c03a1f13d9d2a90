"""Makes the reference values of tests/models with PyTorch and transformers.

Run once, by hand, in an environment of its own; see README.md here. The tests
only read what it wrote.

  python make.py tiny
  python make.py minilm DIRECTORY     # holds config.json, model.safetensors
  python make.py smollm2 FILE.gguf
"""

import json
import pathlib
import sys

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
}
CLASSES = {
  "bert": transformers.BertModel,
  "llama": transformers.LlamaForCausalLM,
  "qwen2": transformers.Qwen2ForCausalLM,
  "qwen3": transformers.Qwen3ForCausalLM,
  "gemma": transformers.GemmaForCausalLM,
}
SENTENCES = [
  "The congress shall have power to lay and collect taxes.",
  "He eats food.",
  "Someone is having a meal in a small restaurant by the sea.",
  "The bearing is hot.",
]
PROMPT = "The capital of France is Paris. The capital of Italy is"


def tiny():
  """One small checkpoint a family, every parameter random, and its outputs."""
  for kind, config in TINY.items():
    torch.manual_seed(0)
    model = CLASSES[kind](config).eval()
    with torch.no_grad():
      for name, parameter in model.named_parameters():
        base = 1.0 if "norm" in name.lower() and "weight" in name else 0.0
        parameter.copy_(base + 0.3 * torch.randn(parameter.shape))
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
  {"tiny": tiny, "minilm": minilm, "smollm2": smollm2}[sys.argv[1]](
    *sys.argv[2:]
  )
