"""W1 and W2 as a plain PyTorch loop, with transformers and peft for W2."""

import argparse
import contextlib

import bench_workload as workload
import torch


def main() -> None:
  """Measures one workload and prints it as one line."""
  parser = argparse.ArgumentParser()
  parser.add_argument("workload", choices=("w1", "w2"))
  parser.add_argument("--autocast", action="store_true", help="bfloat16")
  parser.add_argument("--seconds", type=float, default=0.0)
  parser.add_argument("--quick", action="store_true")
  options = parser.parse_args()
  torch.manual_seed(0)
  if options.workload == "w1":
    shape = workload.w1(options.quick)
    model = torch.nn.Sequential(
      torch.nn.Linear(shape.features, shape.hidden),
      torch.nn.ReLU(),
      torch.nn.Linear(shape.hidden, shape.classes),
    )
  else:
    shape = workload.w2(options.quick)
    model = encoder(shape)
  x, y = (torch.from_numpy(t) for t in shape.inputs())
  y = y.long()
  precision = contextlib.nullcontext()
  if options.autocast:
    precision = torch.autocast("cpu", torch.bfloat16)
  trained = [p for p in model.parameters() if p.requires_grad]

  def one_round():
    start = [p.detach().clone() for p in trained]
    total = [torch.zeros_like(p) for p in start]
    for client in range(shape.clients):
      with torch.no_grad():
        for p, s in zip(trained, start, strict=True):
          p.copy_(s)
      optimizer = torch.optim.SGD(trained, lr=shape.rate)
      order = torch.randperm(shape.examples)
      for rows in order.split(shape.batch):
        optimizer.zero_grad()
        with precision:
          logits = model(x[client, rows])
        loss = torch.nn.functional.cross_entropy(
          logits.float(), y[client, rows]
        )
        loss.backward()
        optimizer.step()
      with torch.no_grad():
        for t, p, s in zip(total, trained, start, strict=True):
          t.add_(p - s)
    with torch.no_grad():
      for p, s, t in zip(trained, start, total, strict=True):
        p.copy_(s + t / shape.clients)

  result = workload.measure(one_round, shape.clients, seconds=options.seconds)
  workload.report({**result, "threads": torch.get_num_threads()})


def encoder(shape: workload.W2) -> torch.nn.Module:
  """BERT of the workload's shape with adapters, and a trained head."""
  import transformers

  import peft

  config = transformers.BertConfig(
    vocab_size=shape.vocab,
    hidden_size=shape.width,
    num_hidden_layers=shape.depth,
    num_attention_heads=shape.heads,
    intermediate_size=shape.ffn,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
  )
  adapters = peft.LoraConfig(
    r=shape.rank,
    lora_alpha=shape.scale * shape.rank,
    target_modules=["query", "value"],
  )

  class Classifier(torch.nn.Module):
    """The encoder's pooled first token through a linear head."""

    def __init__(self):
      super().__init__()
      self.body = peft.get_peft_model(transformers.BertModel(config), adapters)
      self.head = torch.nn.Linear(shape.width, shape.classes)

    def forward(self, tokens):
      return self.head(self.body(input_ids=tokens).pooler_output)

  return Classifier()


if __name__ == "__main__":
  main()
