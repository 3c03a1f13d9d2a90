"""Makes the reference adapters of tests/interop with PyTorch and PEFT.

Run once, by hand, in an environment of its own and outside of this repository;
see README.md here. The tests only read what it wrote.

  python PATH/make.py [NAME ...]
"""

import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers

import peft

HERE = pathlib.Path(__file__).resolve().parent
MODELS = HERE.parent.parent / "models" / "reference"
CAUSAL, TEXT, CLASSES = "CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_CLS"
LABELS = {"num_labels": 3}


def lora(task, rank, alpha, targets, **more):
  """The config of a LoRA."""
  return peft.LoraConfig(
    task_type=task, r=rank, lora_alpha=alpha, target_modules=targets, **more
  )


# Name -> (model, class, its options, config of the adapter).
CASES = {
  "bert_lora": (
    "bert",
    transformers.BertForSequenceClassification,
    LABELS,
    lora(CLASSES, 3, 5, ["query", "value"]),
  ),
  "bert_rslora": (
    "bert",
    transformers.BertModel,
    {},
    lora(TEXT, 3, 5, r".*\.(key|intermediate\.dense)", use_rslora=True),
  ),
  "bert_dora": (
    "bert",
    transformers.BertModel,
    {},
    lora(TEXT, 2, 4, ["query", "output.dense"], use_dora=True),
  ),
  "bert_ia3": (
    "bert",
    transformers.BertForSequenceClassification,
    LABELS,
    peft.IA3Config(task_type=CLASSES),
  ),
  "bert_prompt": (
    "bert",
    transformers.BertModel,
    {},
    peft.PromptTuningConfig(task_type=TEXT, num_virtual_tokens=3),
  ),
  "llama_lora": (
    "llama",
    transformers.LlamaForCausalLM,
    {},
    lora(
      CAUSAL,
      2,
      4,
      "all-linear",
      rank_pattern={"self_attn.q_proj": 3},
      alpha_pattern={"mlp.down_proj": 7},
      modules_to_save=["model.norm"],
    ),
  ),
  "llama_prompt": (
    "llama",
    transformers.LlamaForCausalLM,
    {},
    peft.PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=3),
  ),
  "qwen3_prefix": (
    "qwen3",
    transformers.Qwen3ForCausalLM,
    {},
    peft.PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=3),
  ),
  "qwen2_dora": (
    "qwen2",
    transformers.Qwen2ForCausalLM,
    {},
    lora(CAUSAL, 2, 3, ["q_proj", "o_proj"], use_dora=True, use_rslora=True),
  ),
  "gemma2_ia3": (
    "gemma2",
    transformers.Gemma2ForCausalLM,
    {},
    peft.IA3Config(
      task_type=CAUSAL,
      target_modules=["k_proj", "v_proj", "down_proj"],
      feedforward_modules=["down_proj"],
    ),
  ),
  "vit_lora": (
    "vit",
    transformers.ViTForImageClassification,
    LABELS,
    lora(None, 2, 6, ["q_proj", "fc2"], modules_to_save=["classifier"]),
  ),
  "dinov2_ia3": (
    "dinov2",
    transformers.Dinov2ForImageClassification,
    LABELS,
    peft.IA3Config(
      target_modules=["v_proj", "fc2"],
      feedforward_modules=["fc2"],
      modules_to_save=["classifier"],
    ),
  ),
}


def randomize(model):
  """Gives every adapter and head random values."""
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.requires_grad:
        noise = 0.3 * torch.randn(parameter.shape)
        if "magnitude" in name:
          parameter.mul_(1 + noise)
        else:
          parameter.copy_(
            noise + (1.0 if "ia3" in name or "norm" in name else 0)
          )
  return model.eval()


def outputs(kind, config, model):
  """What the library computes for the inputs of the model's own reference."""
  with np.load(MODELS / kind / "expected.npz") as file:
    known = dict(file)
  if "image" in known:
    processor = transformers.AutoConfig.from_pretrained(MODELS / kind)
    image = known["image"][:, :28, :28]
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    assert processor.image_size == 28
    x = (torch.tensor(image) / 255 - mean) / std
    out = model(pixel_values=x.permute(0, 3, 1, 2))
    return {"image": image, "values": out.logits.numpy()}
  tokens, length = known["tokens"], known["length"]
  mask = torch.tensor(np.arange(tokens.shape[1]) < length[:, None]).long()
  out = model(input_ids=torch.tensor(tokens).long(), attention_mask=mask)
  if hasattr(out, "logits"):
    values = out.logits
    if config.peft_type == "PROMPT_TUNING":
      values = values[:, config.num_virtual_tokens :]
  elif config.is_prompt_learning:
    values = out.last_hidden_state[:, config.num_virtual_tokens :]
  else:
    values = out.pooler_output
  return {"tokens": tokens, "length": length, "values": values.numpy()}


def main(*names):
  """Writes the directories."""
  for name in names or CASES:
    torch.manual_seed(0)
    kind, make, options, config = CASES[name]
    base = make.from_pretrained(MODELS / kind, **options)
    model = randomize(peft.get_peft_model(base, config))
    with torch.no_grad():
      values = outputs(kind, config, model)
    for each in model.peft_config.values():
      each.base_model_name_or_path = kind
    shutil.rmtree(HERE / name, ignore_errors=True)
    model.save_pretrained(HERE / name, save_embedding_layers=False)
    (HERE / name / "README.md").unlink(missing_ok=True)
    np.savez_compressed(HERE / name / "expected.npz", **values)


if __name__ == "__main__":
  main(*sys.argv[1:])
