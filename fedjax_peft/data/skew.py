"""Skew: how much the clients of a population differ, on a few lines."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  from fedjax_peft.data.clients import Population
  from fedjax_peft.data.ragged import Ragged


def gini(sizes: np.ndarray) -> float:
  """Gini coefficient of sizes [N] >= 0: 0 = all equal, 1 = one has all.

  Example:
    >>> gini(np.array([1, 1, 1, 1])), gini(np.array([0, 0, 0, 4]))
    (0.0, 0.75)
  """
  sizes = np.sort(np.asarray(sizes, float))
  total = sizes.sum()
  if total == 0:
    return 0.0
  n = len(sizes)
  ranks = 2 * np.arange(1, n + 1) - n - 1
  return float((ranks * sizes).sum() / (n * total))


def histogram(ragged: "Ragged", label: np.ndarray, classes: int) -> np.ndarray:
  """Rows of each client and class, int64 [N, classes]."""
  cell = ragged.owner * classes + label[ragged.rows]
  counts = np.bincount(cell, minlength=len(ragged) * classes)
  return counts.reshape(len(ragged), classes)


def distance(counts: np.ndarray) -> float:
  """Mean total-variation distance of the clients' label mixtures to all's.

  Args:
    counts: rows of each client and class [N, classes]; clients without rows
      do not count.

  Returns:
    In [0, 1): 0 = every client has the mixture of the whole.
  """
  counts = counts[counts.sum(1) > 0]
  mixtures = counts / counts.sum(1, keepdims=True)
  whole = counts.sum(0) / counts.sum()
  return float(0.5 * np.abs(mixtures - whole).sum(1).mean())


def effective_classes(counts: np.ndarray) -> float:
  """Mean over clients of exp(entropy of the label mixture), in [1, classes]."""
  counts = counts[counts.sum(1) > 0]
  mixtures = counts / counts.sum(1, keepdims=True)
  logs = np.log(mixtures, out=np.zeros_like(mixtures), where=mixtures > 0)
  return float(np.exp(-(mixtures * logs).sum(1)).mean())


def card(data: "Population") -> str:
  """The skew card of a population: sizes, labels, skew, fingerprint."""
  seen = int(data.seen.sum())
  leaves = ", ".join(
    f"{key} {leaf.dtype} {list(leaf.shape)}" for key, leaf in data.spec.items()
  )
  lines = [
    f"{data.name}: {len(data):,} clients ({seen:,} seen, "
    f"{len(data) - seen:,} unseen)",
    f"  example    {leaves}",
    f"  train      {_sizes(data.train.sizes)}",
    f"  held out   {_sizes(data.heldout.sizes)}",
    f"  test       {len(data.test):,} central examples",
  ]
  label = data.examples.get("label")
  if data.classes and label is not None and label.ndim == 1:
    counts = histogram(data.train, label, len(data.classes))
    shares = counts.sum(0) / max(counts.sum(), 1)
    order = np.argsort(-shares)[:12] if len(shares) > 12 else range(len(shares))
    text = ", ".join(f"{data.classes[i]} {shares[i]:.3f}" for i in order)
    lines += [
      f"  labels     {text}{', ...' if len(shares) > 12 else ''}",
      f"  skew       {distance(counts):.3f} mean total variation, "
      f"{effective_classes(counts):.2f} effective classes of "
      f"{len(data.classes)} per client",
    ]
  lines.append(f"  contents   sha256 {data.fingerprint[:16]}")
  return "\n".join(lines)


def _sizes(sizes: np.ndarray) -> str:
  """One line on the distribution of sizes."""
  low, tenth, median, ninetieth, high = np.quantile(
    sizes, [0, 0.1, 0.5, 0.9, 1], method="nearest"
  )
  return (
    f"{sizes.sum():,} examples; per client min {low:,}, p10 {tenth:,}, median "
    f"{median:,}, p90 {ninetieth:,}, max {high:,}; Gini {gini(sizes):.2f}"
  )
