"""The library's measurements: each is one process of its own.

python scripts/bench_library.py w2 --precision bf16   # from bench_engine.py,
                                                      # for its environment
"""

import argparse

import bench_workload as workload
import jax
import numpy as np
import optax
from flax import nnx

import fedjax_peft as fp
from fedjax_peft.data import schedule


class Perceptron(nnx.Module):
  """The model of W1."""

  def __init__(self, shape: workload.W1, rngs: nnx.Rngs):
    self.hidden = nnx.Linear(shape.features, shape.hidden, rngs=rngs)
    self.output = nnx.Linear(shape.hidden, shape.classes, rngs=rngs)

  def __call__(self, image: jax.Array) -> jax.Array:
    """Logits [B, classes] of image [B, features]."""
    return self.output(nnx.relu(self.hidden(image)))


def main() -> None:
  """Takes one measurement and prints it as one line."""
  parser = argparse.ArgumentParser()
  parser.add_argument("what", choices=("w1", "w2", "packing", "memory"))
  parser.add_argument(
    "--path", default="auto", choices=("auto", "general", "lowrank")
  )
  parser.add_argument(
    "--precision", default="bf16", choices=("bf16", "float32")
  )
  parser.add_argument("--rule", choices=fp.rules.RULES, help="of w2")
  parser.add_argument("--clients", type=int, default=100)
  parser.add_argument("--seconds", type=float, default=0.0)
  parser.add_argument("--quick", action="store_true")
  options = parser.parse_args()
  measure = {"w1": w1, "w2": w2, "packing": packing, "memory": memory}
  workload.report(measure[options.what](options))


def w1(options) -> dict:
  """Many small clients, all weights trained."""
  shape = workload.w1(options.quick)
  model = fp.model(Perceptron(shape, nnx.Rngs(0)), fp.losses.classification)
  x, label = shape.inputs()
  data = _population({"image": x, "label": label})
  local = fp.local(optax.sgd(shape.rate), batch=shape.batch)
  lowrank = {"auto": None, "general": False, "lowrank": True}[options.path]
  algorithm = fp.fedavg(model, local, lowrank=lowrank)
  return _measure(algorithm, model, data, options.seconds)


def w2(options) -> dict:
  """LoRA on query and value of an encoder, and a head."""
  rule = None if options.rule is None else fp.rules.RULES[options.rule]()
  parts = w2_parts(options.quick, options.precision, rule)
  return _measure(*parts, options.seconds)


def w2_encoder(shape: workload.W2) -> nnx.Module:
  """The model of W2, without adapters."""
  config = fp.models.encoder.EncoderConfig(
    vocab=shape.vocab,
    width=shape.width,
    depth=shape.depth,
    heads=shape.heads,
    ffn=shape.ffn,
    pool="first",
    pooler=True,
    classes=shape.classes,
    keep="all",
    unroll=True,
  )
  return fp.models.encoder.Encoder(config, nnx.Rngs(0))


def w2_parts(quick: bool, precision: str = "bf16", rule=None) -> tuple:
  """The algorithm, the model and the data of W2."""
  shape = workload.w2(quick)
  module = fp.peft.lora(
    w2_encoder(shape),
    rank=shape.rank,
    residual=rule is not None and rule.residual,
    where=r".*/(query|value)",
    alpha=shape.scale * shape.rank,
  )
  module = fp.peft.tune(module, where=r"head/.*")
  model = fp.model(module, fp.losses.classification, precision=precision)
  local = fp.local(optax.sgd(shape.rate), batch=shape.batch)
  return fp.fedavg(model, local, rule=rule), model, w2_data(shape)


def w2_data(shape: workload.W2) -> fp.data.Population:
  """The data of W2."""
  tokens, label = shape.inputs()
  return _population({"tokens": tokens, "label": label})


def _population(leaves) -> fp.data.Population:
  """One client for each row of leaves [C, N, ...]."""
  clients, examples = leaves["label"].shape
  return fp.data.population(
    {k: v.reshape(-1, *v.shape[2:]) for k, v in leaves.items()},
    np.repeat(np.arange(clients), examples),
    heldout=0.0,
  )


def _measure(algorithm, model, data, seconds):
  """Measures rounds in which everybody takes part, with chosen settings."""
  path = "general"
  if algorithm.specialize is not None:
    algorithm, path = algorithm.specialize(data)
  settings = fp.choose(algorithm, model.base, data.examples, len(data))
  rounds = fp.run(
    algorithm,
    model,
    data,
    cohort=fp.sample.uniform(len(data)),
    rounds=10**9,
    settings=settings,
  )
  result = workload.measure(lambda: next(rounds), len(data), seconds=seconds)
  return {**result, "path": path, "settings": settings._asdict()}


def packing(options) -> dict:
  """How full the lanes are: 1,000 clients of log-normal sizes, 32 lanes.

  Five draws for each sigma. Sizes have a median of 50 examples, in batches of
  10; lane-ticks count from the first to the last tick of a round.
  """
  del options
  useful = [pack(1.0, seed).useful_fraction for seed in range(5)]
  bound = []
  for seed in range(5):
    bound.append(pack(1.5, seed).ratio_to_bound(steps(1.5, seed)))
  return {
    "useful_fraction": float(np.mean(useful)),
    "useful_fraction_worst": float(np.min(useful)),
    "ratio_to_bound": float(np.mean(bound)),
    "ratio_to_bound_worst": float(np.min(bound)),
  }


def steps(sigma: float, seed: int) -> np.ndarray:
  """Batches of 1,000 clients of log-normal sizes."""
  rng = np.random.default_rng(seed)
  sizes = np.ceil(rng.lognormal(np.log(50), sigma, 1000))
  return np.ceil(sizes / 10).astype(np.int64)


def pack(sigma: float, seed: int) -> schedule.Packing:
  """These clients on 32 lanes."""
  return schedule.pack(steps(sigma, seed), 32)


def memory(options) -> dict:
  """Most memory that rounds with so many clients of a tiny model take.

  A client has four examples of 16 numbers and trains 13,834 weights: were
  each client's message kept, 10,000 of them would take 528 MiB.
  """
  shape = workload.W1(
    clients=options.clients,
    examples=4,
    features=16,
    hidden=512,
    classes=10,
    batch=4,
  )
  model = fp.model(Perceptron(shape, nnx.Rngs(0)), fp.losses.classification)
  x, label = shape.inputs()
  data = _population({"image": x, "label": label})
  local = fp.local(optax.sgd(shape.rate), batch=shape.batch)
  algorithm = fp.fedavg(model, local, lowrank=False)
  start = workload.resident_mib()
  for _ in fp.run(
    algorithm,
    model,
    data,
    cohort=fp.sample.uniform(shape.clients),
    rounds=3,
  ):
    pass
  # The examples lie in the population and on every device.
  copies = 1 + len(jax.devices())
  leaves = data.examples.values()
  examples = copies * sum(v.nbytes for v in leaves) / 2**20
  return {
    "peak_mib": round(workload.peak_mib(), 1),
    "before_rounds_mib": round(start, 1),
    "data_mib": round(examples, 1),
  }


if __name__ == "__main__":
  main()
