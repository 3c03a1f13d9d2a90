"""Compiles a federated round for many devices, and says what is exchanged.

python tests/aot/compile_round.py v5e:16x16 mask
"""

import json
import re
import sys

import jax
import numpy as np
import optax

import deviceless
import fedjax_peft as fp
from fedjax_peft import executor, launch

TOKENS, EXAMPLES, LANES = 16, 4, 4


def uplink(name: str) -> fp.Link:
  """What a client's message crosses."""
  last = {
    "fixed_point": lambda: (fp.fixed_point(),),
    "mask": lambda: (fp.fixed_point(), fp.mask()),
    "int8": lambda: (fp.int8(),),
  }[name]()
  return fp.chain(fp.clip(1.0), fp.weigh(max_weight=64), *last)


def lowered(devices: list, name: str):
  """A round of LoRA on a small encoder, 4 clients on each device."""
  clients, rng = LANES * len(devices), np.random.default_rng(0)
  rows = EXAMPLES * clients
  data = fp.data.population(
    {
      "tokens": rng.integers(0, 50, (rows, TOKENS)).astype(np.int32),
      "length": np.full(rows, TOKENS, np.int32),
      "label": rng.integers(0, 4, rows).astype(np.int32),
    },
    np.repeat(np.arange(clients), EXAMPLES),
    heldout=0.0,
  )
  module = fp.models.load(
    "encoder",
    vocab=512,
    width=128,
    depth=2,
    heads=4,
    ffn=256,
    positions=TOKENS,
    types=0,
    classes=4,
  )
  where = r".*/(query|value|up|down|output)"
  model = fp.model(
    fp.peft.lora(module, rank=8, where=where),
    fp.losses.classification,
    precision="bf16",
  )
  algorithm = fp.fedavg(
    model,
    fp.local(optax.sgd(0.1), batch=EXAMPLES),
    uplink=uplink(name),
    lowrank=False,
  )
  cohort = launch.seat(
    data.train,
    np.arange(clients, dtype=np.int32),
    algorithm.work,
    fp.Settings("shard_map", len(devices), 1, LANES, LANES),
    examples=dict(data.examples),
  )
  state = jax.eval_shape(
    lambda: algorithm.init(clients=clients, cohort=clients)
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  mesh = deviceless.mesh(devices, "clients")
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def step(state, base, cohort, key):
    return algorithm.round(
      state,
      base,
      cohort,
      key,
      shape=(1, LANES),
      spread=executor.over(mesh),
    )

  specs = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    (state, model.base, cohort, key),
  )
  step = jax.jit(step, donate_argnums=0, out_shardings=whole)
  values = sum(x.size for x in jax.tree.leaves(model.params))
  return step.lower(*specs), values, specs[0]


def exchanged(text: str) -> dict[str, int]:
  """{dtype: values} that collectives of a program move between devices."""
  kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
  found: dict[str, int] = {}
  for line in re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", text):
    for dtype, shape in re.findall(r"\b([a-z]+\d+)\[([\d,]*)\]", line):
      size = int(np.prod([int(n) for n in shape.split(",") if n], initial=1))
      found[dtype] = found.get(dtype, 0) + size
  return found


def main(target: str, name: str) -> None:
  """Prints the facts as one line of JSON."""
  program, values, state = lowered(deviceless.devices(target, 8), name)
  compiled = program.compile()
  memory, text = compiled.memory_analysis(), compiled.as_text()
  facts = {
    "values": values,
    "exchanged": exchanged(text),
    "kernels": deviceless.pallas(program.as_text()),
    "alias": memory.alias_size_in_bytes,
    "temp": memory.temp_size_in_bytes,
    "state": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
  }
  print(json.dumps(facts))


if __name__ == "__main__":
  main(*sys.argv[1:])
