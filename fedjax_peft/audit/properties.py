"""Properties: what a message says about a client's data as a whole.

An attacker makes clients of its own, with a known property (which class most
of their examples are of), watches what the boundary shows of them, and fits a
linear probe, which has a closed form.

Melis et al., Exploiting Unintended Feature Leakage in Collaborative Learning,
2018, https://arxiv.org/abs/1805.04049
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_peft import validate

PyTree = Any


class Probe(NamedTuple):
  """A linear classifier of messages; made by `fit`.

  Attributes:
    centre: [D], mean of what it was fitted to.
    weights: [D, K].
    offset: [K].
  """

  centre: np.ndarray
  weights: np.ndarray
  offset: np.ndarray

  def scores(self, x: np.ndarray) -> np.ndarray:
    """[M, D] to [M, K]."""
    return (x - self.centre) @ self.weights + self.offset

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """[M, D] to classes [M]."""
    return np.argmax(self.scores(x), axis=1)


def fit(
  x: np.ndarray, label: np.ndarray, classes: int, penalty: float
) -> Probe:
  """Ridge regression on one column of +-1 a class.

  By the Gram matrix of the messages, of which there are fewer than values.

  Args:
    x: float [M, D].
    label: int [M] in 0..classes - 1.
    classes: K.
    penalty: of the squared weights, > 0, in units of x squared.

  Raises:
    ValueError: if `penalty` is not positive.
  """
  validate.positive(penalty=penalty)
  x = np.asarray(x, np.float64)
  target = np.where(np.arange(classes) == np.asarray(label)[:, None], 1.0, -1.0)
  centre, offset = x.mean(0), target.mean(0)
  away = x - centre
  gram = away @ away.T + penalty * np.eye(len(x))
  dual = np.linalg.solve(gram, target - offset)
  return Probe(centre, away.T @ dual, offset)


def features(observed: PyTree, rows: bool = False) -> np.ndarray:
  """Messages [M, ...] as vectors [M, D] of mean square 1 / D.

  Args:
    observed: what was seen.
    rows: whether it has a row an example, [M, n, ...]: their mean counts.
  """
  leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(observed)]
  if rows:
    leaves = [x.mean(1) for x in leaves]
  flat = np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)
  scale = np.sqrt(np.square(flat).sum(1).mean())
  return flat / scale if scale else flat


def hits(
  x: np.ndarray, label: np.ndarray, classes: int, fitted: int
) -> tuple[int, int]:
  """How many labels a probe guesses.

  Args:
    x: [M, D], see `features`.
    label: int [M].
    classes: K.
    fitted: how many rows, the first ones, the probe is fitted to; the penalty
      is the one of several that does best on the last quarter of them.

  Returns:
    (hits, total) over the rest.
  """
  held = fitted - fitted // 4

  def right(penalty, fit_to, test):
    probe = fit(x[:fit_to], label[:fit_to], classes, penalty)
    return int(np.sum(probe(x[test]) == label[test]))

  tried = [10.0**i for i in range(-4, 2)]
  best = max(tried, key=lambda p: right(p, held, slice(held, fitted)))
  return right(best, fitted, slice(fitted, None)), len(x) - fitted
