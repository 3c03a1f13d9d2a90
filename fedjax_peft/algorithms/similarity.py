"""Similarity: which clients' adapters say the same, and groups of them.

(A G, G^-1 B) is the same adapter for every invertible G. So adapters are
compared by what G does not change: their products A B, or the space that the
columns of A (or the rows of B) span. All of it is float64 on the host.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from fedjax_peft import data as data_lib
from fedjax_peft import objective, rules, validate, vectorize, work
from fedjax_peft import settings as settings_lib
from fedjax_peft.network import clustering, structure

By = Literal["product", "a", "b"]


def alike(
  adapters: Mapping[str, Any],
  pairs: Sequence[rules.Pair],
  by: By = "product",
) -> np.ndarray:
  """How alike clients' adapters are.

  Guarantees:
    unchanged, up to rounding, where a client's factors become (A G, G^-1 B);
    symmetric, 1 on the diagonal (where an adapter is not zero).

  Args:
    adapters: {path: [C, ...]}, factors that C clients hold: A [C, stack, K, R]
      and B [C, stack, R, F]. No product [K, F] is formed.
    pairs: the adapters, from `rules.pairs_of(module)`.
    by: "product": the cosine of two clients' A B, all layers as one vector.
      "a": the mean squared cosine of the principal angles between the spaces
      that the columns of A span, and over the layers; "b": of the rows of B.
      Of spaces of different size the larger counts.

  Returns:
    float64 [C, C]; in [-1, 1] for products, in [0, 1] for spaces. 0 where an
    adapter is zero.

  Raises:
    ValueError: if a factor is missing, or there is no adapter.

  Example:
    >>> pair = rules.Pair("up", 1.0)
    >>> a = np.array([[[1.0], [0.0]], [[2.0], [0.0]], [[0.0], [1.0]]])
    >>> clients = {"up/lora_a": a, "up/lora_b": np.ones((3, 1, 2))}
    >>> alike(clients, [pair]).round(3).tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
  """
  validate.one_of(["product", "a", "b"], by=by)
  if not pairs:
    raise ValueError(
      "alike compares low-rank adapters and got none; put them in with "
      "peft.lora(module, rank=8, where=...)"
    )
  factors = []
  for pair in pairs:
    for name in (pair.a, pair.b):
      if name not in adapters:
        raise ValueError(
          f"adapters must hold both factors of every pair: got no {name!r}"
          f"{validate.near(name, adapters)}"
        )
    a, b = (np.asarray(adapters[n], np.float64) for n in (pair.a, pair.b))
    factors.append((pair.scale, _flat(a), _flat(b)))
  if by == "product":
    return _unit(sum(s * s * _inner(a, b) for s, a, b in factors))
  spaces = [a if by == "a" else np.swapaxes(b, -1, -2) for _, a, b in factors]
  return np.mean([_overlap(x) for x in spaces], axis=0)


def groups(similarities: Any, count: int | None = None) -> np.ndarray:
  """Groups those that are alike: average linkage on 1 - similarity.

  Args:
    similarities: float [N, N], symmetric, such as `alike` returns.
    count: groups, at most N; None takes the number in 2..N-1 whose mean
      silhouette is largest, for N of at least 3.

  Returns:
    int32 [N], the group of each, numbered by who comes first.

  Raises:
    ValueError: if the matrix is no similarity, or there are too few clients.

  Example:
    >>> groups([[1, 0.9, 0], [0.9, 1, 0.1], [0, 0.1, 1]], 2)
    array([0, 0, 1], dtype=int32)
  """
  given = np.asarray(similarities, np.float64)
  n = len(given)
  if given.shape != (n, n) or not np.allclose(given, given.T, atol=1e-6):
    raise ValueError(
      "similarities must be a symmetric matrix of finite numbers: got shape "
      f"{list(given.shape)}; write similarity.alike(adapters, pairs)"
    )
  far = 1 - (given + given.T) / 2
  np.fill_diagonal(far, 0)
  if count is not None:
    return clustering.agglomerate(far, clusters=count)
  if n < 3:
    raise ValueError(
      f"how many groups there are can be told for 3 clients or more: got {n}; "
      "write count=1"
    )
  steps = clustering.merges(far)
  cuts = [clustering.cut(steps, k) for k in range(2, n)]
  return max(cuts, key=lambda labels: structure.silhouette(far, labels))


def find_nodes(
  model: objective.Model,
  local: work.Local,
  data: data_lib.Population,
  *,
  count: int | None = None,
  by: By = "product",
  settings: settings_lib.Settings | None = None,
  seed: int = 0,
) -> np.ndarray:
  """The edge of every client, by what each makes of the model alone.

  Every client with examples trains once from the initial model; the adapters
  that come out are compared and grouped. So HiLoRA finds its clusters (2026,
  https://arxiv.org/abs/2603.02785).

  Args:
    model: with low-rank adapters; those of `stack` count by name. Clients start
      from the same A, so that the space of A says little at first.
    local: how clients train.
    data: the population, N clients.
    count: see `groups`.
    by: see `alike`.
    settings: see `for_each_client`.
    seed: of the clients' keys.

  Returns:
    int32 [N]. Clients without examples are dealt out in turn.
  """
  job = work.train(model, local)
  ids = np.flatnonzero(data.train.sizes > 0)
  message, _ = vectorize.for_each_client(
    job, data, ids, base=model.base, settings=settings, seed=seed
  )
  held = {k: np.asarray(job.params[k])[None] - v for k, v in message.items()}
  found = groups(alike(held, rules.pairs_of(model.origin), by), count)
  nodes = np.arange(len(data), dtype=np.int32) % (found.max() + 1)
  nodes[ids] = found
  return nodes


def _flat(x):
  """[C, stack, ...] -> [C, L, ...], L layers."""
  return x.reshape(len(x), -1, *x.shape[-2:])


def _inner(a, b):
  """Inner products [C, C] of A B, from Gram matrices of the factors."""
  left = np.einsum("clkr,dlks->cdlrs", a, a, optimize=True)
  right = np.einsum("clrf,dlsf->cdlrs", b, b, optimize=True)
  return np.einsum("cdlrs,cdlrs->cd", left, right, optimize=True)


def _unit(inner):
  """Cosines from inner products."""
  length = np.sqrt(np.maximum(np.diag(inner), 0))
  scale = np.outer(length, length)
  return np.where(scale > 0, inner / np.where(scale > 0, scale, 1), 0)


def _overlap(x):
  """Mean squared cosines [C, C] of the angles between column spaces."""
  u, s, _ = np.linalg.svd(x, full_matrices=False)  # [C, L, K, R]
  real = s > 1e-6 * np.max(s, axis=-1, keepdims=True)  # float32 factors
  u = u * real[..., None, :]
  across = np.einsum("clkr,dlks->cdlrs", u, u, optimize=True)
  rank = real.sum(-1)  # [C, L]
  larger = np.maximum(np.maximum(rank[:, None], rank[None]), 1)
  return np.mean(np.sum(across**2, (-2, -1)) / larger, axis=-1)
