"""Workloads: what is measured, the same for the library and its peers.

Needs numpy only, since each peer runs in an environment of its own.
"""

import json
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class W1(NamedTuple):
  """Many small clients: a perceptron, all of whose weights are trained.

  Attributes:
    clients: in a round.
    examples: of each client.
    features: of an example, standard normal.
    hidden: width of the hidden layer, ReLU.
    classes: of the labels.
    batch: examples in a batch; one epoch.
    rate: learning rate of plain SGD.
  """

  clients: int = 1000
  examples: int = 20
  features: int = 784
  hidden: int = 128
  classes: int = 62
  batch: int = 10
  rate: float = 0.1

  def inputs(self) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [C, N, features] and labels int32 [C, N]."""
    rng = np.random.default_rng(0)
    shape = (self.clients, self.examples)
    x = rng.standard_normal((*shape, self.features), dtype=np.float32)
    return x, rng.integers(0, self.classes, shape).astype(np.int32)


class W2(NamedTuple):
  """LoRA on a transformer encoder of the shape of all-MiniLM-L6-v2.

  Attributes:
    clients: in a round.
    examples: of each client.
    tokens: of an example, no padding.
    vocab: token ids.
    width: of the residual stream.
    depth: blocks.
    heads: of the attention.
    ffn: width of a block's hidden layer, GELU.
    classes: of the trained head, on the first token after a pooler.
    rank: of the adapters of query and value.
    scale: of the adapters.
    batch: examples in a batch; one epoch.
    rate: learning rate of plain SGD.
  """

  clients: int = 32
  examples: int = 8
  tokens: int = 32
  vocab: int = 30522
  width: int = 384
  depth: int = 6
  heads: int = 12
  ffn: int = 1536
  classes: int = 4
  rank: int = 8
  scale: float = 2.0
  batch: int = 4
  rate: float = 0.1

  @property
  def gflop(self) -> float:
    """Work of one client: 10.98 GFLOP at full size.

    Frozen products forward and towards their inputs, and adapters forward and
    backward; attention scores, norms and activations are not counted.
    """
    frozen = 4 * self.width**2 + 2 * self.width * self.ffn
    adapters = 4 * self.width * self.rank
    tokens = self.examples * self.tokens
    return tokens * self.depth * (4 * frozen + 6 * adapters) / 1e9

  def inputs(self) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [C, N, T] and labels int32 [C, N]."""
    rng = np.random.default_rng(0)
    shape = (self.clients, self.examples)
    tokens = rng.integers(0, self.vocab, (*shape, self.tokens))
    label = rng.integers(0, self.classes, shape)
    return tokens.astype(np.int32), label.astype(np.int32)


def w1(quick: bool = False) -> W1:
  """The first workload; small when all that matters is that it runs."""
  return W1(clients=16, features=64, hidden=64) if quick else W1()


def w2(quick: bool = False) -> W2:
  """The second workload; small when all that matters is that it runs."""
  if not quick:
    return W2()
  return W2(8, 8, 8, vocab=128, width=32, depth=2, heads=2, ffn=64)


def measure(
  one_round: Callable[[], object], clients: int, *, seconds: float
) -> dict:
  """Measures rounds in steady state; the first round is reported apart.

  Args:
    one_round: runs a round and waits for its result.
    clients: in a round.
    seconds: measure for so long, and at least five rounds.

  Returns:
    clients_per_second (median), with min, max and the number n of rounds;
    first_seconds, with compilation; cpu_seconds of a round (median, all
    threads), which other processes on the machine hardly change; peak_mib.
  """
  begun = time.perf_counter()
  one_round()
  first = time.perf_counter() - begun
  one_round()  # allocators and caches settle
  wall, cpu = [], []
  while len(wall) < 5 or sum(wall) < seconds:
    clock, own = time.perf_counter(), time.process_time()
    one_round()
    wall.append(time.perf_counter() - clock)
    cpu.append(time.process_time() - own)
  return {
    **spread(clients / np.array(wall), "clients_per_second"),
    "first_seconds": round(first, 3),
    "cpu_seconds": round(float(np.median(cpu)), 4),
    "peak_mib": round(peak_mib(), 1),
  }


def spread(values: np.ndarray, name: str) -> dict:
  """Median under `name`, min, max and n."""
  return {
    name: round(float(np.median(values)), 3),
    "min": round(float(np.min(values)), 3),
    "max": round(float(np.max(values)), 3),
    "n": int(np.size(values)),
  }


def peak_mib() -> float:
  """Most memory this process has held at once, MiB (VmHWM)."""
  return _status("VmHWM")


def resident_mib() -> float:
  """Memory this process holds now, MiB (VmRSS)."""
  return _status("VmRSS")


def _status(field):
  """A field of /proc/self/status, in MiB."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(field):
      return int(line.split()[1]) / 1024
  raise ValueError(f"/proc/self/status must have {field}; run this on Linux")


def report(result: dict) -> None:
  """Prints a result as one line, for the process that asked for it."""
  print(json.dumps(result), flush=True)
