"""Partition: who owns which rows, when the data do not say.

Every function returns an exact cover: each row has exactly one client, each
client has `min_size` rows or more, and the same seed gives the same rows.

`dirichlet`: Yurochkin et al., Bayesian nonparametric federated learning of
neural networks, 2019, https://arxiv.org/abs/1905.12022
`shards`: McMahan et al., Communication-efficient learning of deep networks
from decentralized data, 2017, https://arxiv.org/abs/1602.05629
"""

from typing import Any

import numpy as np

from fedjax_peft.data import check, skew
from fedjax_peft.data.ragged import Ragged


def iid(count: int, clients: int, *, seed: int = 0) -> Ragged:
  """Deals shuffled rows evenly: sizes differ by at most one.

  Args:
    count: number of rows M.
    clients: N <= M.
    seed: of the shuffle.

  Example:
    >>> iid(7, 3).sizes
    array([3, 2, 2])
  """
  _check(count, clients, 1)
  rng = np.random.default_rng(seed)
  owner = np.arange(count) % clients
  return Ragged.grouped(owner, clients, rng.permutation(count))


def quantity(
  count: int,
  clients: int,
  *,
  sigma: float = 1.0,
  min_size: int = 1,
  seed: int = 0,
) -> Ragged:
  """Deals shuffled rows so that client sizes are log-normal.

  Args:
    count: number of rows M.
    clients: N <= M / min_size.
    sigma: standard deviation of the log of what a client has beyond
      `min_size`; 0 makes sizes differ by at most one.
    min_size: rows that every client has at least.
    seed: of the sizes and the shuffle.

  Example:
    >>> quantity(100, 4, sigma=1.0, min_size=5).sizes
    array([23, 19, 35, 23])
  """
  _check(count, clients, min_size)
  if not 0 <= sigma < np.inf:
    raise ValueError(f"sigma must be finite and >= 0: {sigma=}")
  rng = np.random.default_rng(seed)
  logs = sigma * rng.standard_normal(clients)
  sizes = min_size + _seats(logs, count - clients * min_size, rng)
  owner = np.repeat(np.arange(clients), sizes)
  return Ragged.grouped(owner, clients, rng.permutation(count))


def dirichlet(
  labels: Any,
  clients: int,
  *,
  alpha: float,
  min_size: int = 1,
  seed: int = 0,
) -> Ragged:
  """Splits every class over the clients in Dirichlet(alpha) proportions.

  Both the label mixtures and the sizes of the clients differ, the more the
  smaller alpha. Counts are within one of the drawn proportions; then clients
  below `min_size` get rows of the largest clients, of their own most likely
  class while there are such.

  Args:
    labels: class of each row, integers or strings [M].
    clients: N <= M / min_size.
    alpha: concentration, > 0: 0.1 leaves a client one or two classes, 100
      makes all alike.
    min_size: rows that every client has at least.
    seed: of all draws.

  Example:
    >>> dirichlet(np.arange(100) % 5, 4, alpha=0.3, min_size=5).sizes
    array([17, 21, 35, 27])
  """
  _, labels = np.unique(np.asarray(labels), return_inverse=True)
  _check(len(labels), clients, min_size)
  if not 0 < alpha < np.inf:
    raise ValueError(f"alpha must be finite and > 0: {alpha=}")
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(labels))
  order = order[np.argsort(labels[order], kind="stable")]
  owner = np.empty(len(labels), np.int64)
  best, wanted = np.full(clients, -np.inf), np.zeros(clients, np.int64)
  for cls, rows in enumerate(np.split(order, np.cumsum(np.bincount(labels)))):
    if len(rows) == 0:
      continue
    logs = _log_gamma(alpha, clients, rng)
    owner[rows] = np.repeat(np.arange(clients), _seats(logs, len(rows), rng))
    wanted = np.where(logs > best, cls, wanted)
    best = np.maximum(logs, best)
  _top_up(owner, labels, wanted, min_size, rng)
  return Ragged.grouped(owner, clients)


def shards(
  labels: Any, clients: int, *, per_client: int = 2, seed: int = 0
) -> Ragged:
  """Sorts rows by label, cuts equal shards, and deals some to each client.

  Args:
    labels: class of each row, integers or strings [M].
    clients: N <= M / per_client.
    per_client: shards of each client; a client has at most about that many
      classes when classes are larger than shards.
    seed: of the order within a class and of the deal.

  Example:
    >>> labels = np.repeat([0, 1, 2, 3], 5)
    >>> [sorted(set(labels[rows].tolist())) for rows in shards(labels, 2)]
    [[1, 2], [0, 3]]
  """
  labels = np.asarray(labels)
  _check(len(labels), clients, per_client)
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(labels))
  order = order[np.argsort(labels[order], kind="stable")]
  pieces = clients * per_client
  piece = np.arange(len(labels)) * pieces // len(labels)
  owner = rng.permutation(pieces)[piece] % clients
  return Ragged.grouped(owner, clients, order)


def by_feature(values: Any) -> Ragged:
  """One client per distinct value, in the order of `np.unique(values)`.

  Args:
    values: natural key of each row, integers or strings [M].

  Example:
    >>> list(by_feature(["b", "a", "b"]))
    [array([1], dtype=int32), array([0, 2], dtype=int32)]
  """
  keys, owner = np.unique(np.asarray(values), return_inverse=True)
  return Ragged.grouped(owner, len(keys))


def by_name(
  name: str,
  labels: Any,
  clients: int,
  *,
  alpha: float = 0.3,
  min_size: int = 1,
  per_client: int = 2,
  sigma: float = 1.0,
  seed: int = 0,
) -> Ragged:
  """A partition chosen by a word, as in a config file.

  Args:
    name: "dirichlet", "iid", "quantity" or "shards".
    labels: class of each row [M]; only their number counts where the partition
      does not look at labels.
    clients: N.
    alpha: of "dirichlet".
    min_size: of "dirichlet" and "quantity".
    per_client: of "shards".
    sigma: of "quantity".
    seed: of all draws.
  """
  check.choice("partition", name, ("dirichlet", "iid", "quantity", "shards"))
  if name == "dirichlet":
    return dirichlet(labels, clients, alpha=alpha, min_size=min_size, seed=seed)
  if name == "shards":
    return shards(labels, clients, per_client=per_client, seed=seed)
  if name == "quantity":
    return quantity(
      len(labels), clients, sigma=sigma, min_size=min_size, seed=seed
    )
  return iid(len(labels), clients, seed=seed)


def mirror(
  train: Ragged,
  labels: Any,
  test_labels: Any,
  *,
  size: int,
  seed: int = 0,
) -> Ragged:
  """Deals each client test rows in its own training label mixture.

  The test rows of a class are a shuffled deck, dealt to the clients in turn
  and from the top again when it ends. So no two clients share a row of a
  class while the deck lasts, no row is dealt twice before every other one of
  its class was dealt once, and no client has a row twice.

  Args:
    train: training rows of the N clients, indices into `labels`.
    labels: classes of all rows, integers [M].
    test_labels: classes of the test rows, integers [K].
    size: test rows per client. A client has fewer only where its classes have
      fewer test rows than it would need.
    seed: of the decks and the order of the clients.

  Returns:
    Indices into `test_labels`.

  Example:
    >>> train = Ragged.of([[0, 1], [2, 3]])
    >>> test = mirror(train, [0, 0, 0, 1], [0, 1, 1, 0, 0], size=2)
    >>> [sorted(rows.tolist()) for rows in test]
    [[0, 3], [1, 4]]
  """
  labels, test_labels = np.asarray(labels), np.asarray(test_labels)
  classes = int(max(labels.max(), test_labels.max())) + 1
  decks = np.bincount(test_labels, minlength=classes)
  rng = np.random.default_rng(seed)
  mixture = skew.histogram(train, labels, classes) * (decks > 0)
  mixture = mixture / np.maximum(mixture.sum(1, keepdims=True), 1)
  counts = np.minimum(_rounded(size * mixture), decks)
  owners, rows = [], []
  for cls in np.flatnonzero(decks):
    deck = rng.permutation(np.flatnonzero(test_labels == cls))
    turn = rng.permutation(len(train))
    owners.append(np.repeat(turn, counts[turn, cls]))
    rows.append(deck[np.arange(len(owners[-1])) % len(deck)])
  return Ragged.grouped(
    np.concatenate(owners), len(train), np.concatenate(rows)
  )


def _check(count: int, clients: int, min_size: int):
  """There are enough rows for the clients."""
  if clients < 1 or min_size < 0 or clients * min_size > count:
    raise ValueError(
      f"{clients=} with {min_size=} rows each need {clients * min_size} rows: "
      f"{count} came; use clients in [1, {count // max(min_size, 1)}]"
    )


def _log_gamma(alpha: float, size: int, rng: np.random.Generator) -> np.ndarray:
  """Logs of Gamma(alpha, 1) draws, which themselves underflow at small alpha.

  Gamma(alpha) = Gamma(alpha + 1) * U**(1 / alpha), Marsaglia and Tsang, 2000.
  """
  exponential = rng.standard_exponential(size)
  return np.log(rng.standard_gamma(alpha + 1, size)) - exponential / alpha


def _seats(
  logs: np.ndarray, total: int, rng: np.random.Generator
) -> np.ndarray:
  """Integers [N] with the given sum, within one of softmax(logs) * total.

  Systematic rounding in a random order, so that no client is favoured when
  there are more clients than rows.
  """
  order = rng.permutation(len(logs))
  weights = np.exp(logs[order] - logs.max())
  edges = np.rint(np.cumsum(weights) / weights.sum() * total).astype(np.int64)
  edges[-1] = total
  counts = np.empty(len(logs), np.int64)
  counts[order] = np.diff(edges, prepend=0)
  return counts


def _rounded(targets: np.ndarray) -> np.ndarray:
  """Integers [N, K] within one of the targets that keep each row's sum."""
  floors = np.floor(targets + 1e-9).astype(np.int64)
  missing = np.rint(targets.sum(1)).astype(np.int64) - floors.sum(1)
  rank = np.argsort(np.argsort(floors - targets, 1, "stable"), 1, "stable")
  return floors + (rank < missing[:, None])


def _top_up(
  owner: np.ndarray,
  labels: np.ndarray,
  wanted: np.ndarray,
  min_size: int,
  rng: np.random.Generator,
):
  """Moves rows of the largest clients to those below `min_size`, in place."""
  sizes = np.bincount(owner, minlength=len(wanted))
  takers = np.repeat(np.arange(len(sizes)), np.maximum(min_size - sizes, 0))
  if len(takers) == 0:
    return
  low, high = min_size, int(sizes.max())
  while low < high:  # the highest level down to which giving is enough
    level = (low + high + 1) // 2
    enough = np.maximum(sizes - level, 0).sum() >= len(takers)
    low, high = (level, high) if enough else (low, level - 1)
  give = np.maximum(sizes - low, 0)
  givers = np.flatnonzero(give)
  give[givers[: give.sum() - len(takers)]] -= 1
  shuffled = np.lexsort((rng.random(len(owner)), owner))
  place = np.arange(len(owner)) - (np.cumsum(sizes) - sizes)[owner[shuffled]]
  pool = shuffled[place < give[owner[shuffled]]]
  _, fit, taker = np.intersect1d(
    _numbered(labels[pool]),
    _numbered(wanted[takers]),
    assume_unique=True,
    return_indices=True,
  )
  owner[pool[fit]] = takers[taker]
  owner[np.delete(pool, fit)] = np.delete(takers, taker)


def _numbered(values: np.ndarray) -> np.ndarray:
  """A different integer for each occurrence of a value: value * K + rank."""
  order = np.argsort(values, kind="stable")
  ranked = values[order]
  rank = np.empty(len(values), np.int64)
  rank[order] = np.arange(len(values)) - np.searchsorted(ranked, ranked)
  return values * len(values) + rank
