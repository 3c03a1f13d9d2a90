"""Selection: whom the server asks, of those who could take part.

A selection returns as many different clients as it is asked for, or all that
qualify where there are fewer; that may be nobody. It remembers nothing: all
that it knows of a client is in `Candidates`, so a resumed run selects as the
whole run would have.

  selection = selection.power_of_choice(d=30)
  ids = selection.choose(rng, candidates, 10, round)

| selection | prefers | source |
| --- | --- | --- |
| `uniform` | nobody | McMahan et al., 2017 |
| `poisson` | nobody, every client by itself | Abadi et al., 2016 |
| `by_loss` | high losses, in proportion | Goetz et al., 1909.12641 |
| `power_of_choice` | the highest of a few losses | Cho et al., 2010.01243 |
| `resource` | useful and fast clients | Lai et al., Oort, 2010.06081 |
| `deadline_aware` | who makes it in time | Nishio, Yonetani, 1804.08333 |
| `fair` | who has waited longest | proportional fair scheduling |
| `charged` | full batteries | |
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedjax_peft import validate

_TINY = 1e-9  # seconds that are as good as none


class Candidates(NamedTuple):
  """Clients that could take part now, and what the server knows; axis A.

  Attributes:
    ids: int32 [A], all different.
    examples: int64 [A], how many each trains on.
    seconds: float64 [A], expected for a round's work, links included.
    loss: float64 [A], last mean training loss that the server heard;
      nan = never.
    last: int64 [A], round in which it last took part; -1 = never.
    battery: float64 [A], fraction left, in [0, 1].
  """

  ids: np.ndarray
  examples: np.ndarray
  seconds: np.ndarray
  loss: np.ndarray
  last: np.ndarray
  battery: np.ndarray

  def rows(self, index: np.ndarray) -> "Candidates":
    """Some of them, by place or mask."""
    return Candidates(*(x[index] for x in self))


def _at_most(available: int, size: int) -> int:
  """Most clients of a selection that keeps to the size."""
  return min(available, size)


class Selection(NamedTuple):
  """Whom the server asks.

  Attributes:
    name: for records and messages.
    choose: (rng, candidates, size, round) -> int32 ids, all different, at
      most `size`; `rng` is a numpy Generator of (seed, round).
    reads: names of the fields of `Candidates` that it looks at, beside ids.
    most: (available, size) -> the most clients that it can return.
  """

  name: str
  choose: Callable[[np.random.Generator, Candidates, int, int], np.ndarray]
  reads: frozenset[str] = frozenset()
  most: Callable[[int, int], int] = _at_most


def uniform() -> Selection:
  """All clients alike, without replacement."""

  def choose(rng, candidates, size, round):
    size = min(size, candidates.ids.size)
    return rng.choice(candidates.ids, size, replace=False)

  return Selection("uniform", choose)


def poisson(rate: float) -> Selection:
  """Every client by itself, with the same probability.

  What privacy accountants call Poisson sampling. The number of clients is
  random, may be zero, and has nothing to do with the size asked for.

  Args:
    rate: probability, 0 < rate <= 1.

  Raises:
    ValueError: if `rate` is no such probability.
  """
  if not 0 < rate <= 1:
    raise ValueError(f"rate must be a probability above 0, got rate={rate}")

  def choose(rng, candidates, size, round):
    return candidates.ids[rng.random(candidates.ids.size) < rate]

  def most(available, size):
    # Ten standard deviations: beyond that a draw is no longer Poisson's.
    spread = 10 * math.sqrt(available * rate * (1 - rate)) + 1
    return min(available, math.ceil(available * rate + spread))

  return Selection(f"poisson({rate})", choose, most=most)


def by_loss(power: float = 1.0) -> Selection:
  """With probability in proportion to the last loss, one after another.

  Clients that were never heard count as the mean of the others.

  Args:
    power: > 0, losses are taken to it; more than 1 is greedier.

  Raises:
    ValueError: if `power` is not positive.
  """
  validate.positive(power=power)

  def choose(rng, candidates, size, round):
    known = np.isfinite(candidates.loss)
    mean = candidates.loss[known].mean() if known.any() else 1.0
    loss = np.where(known, candidates.loss, mean)
    return _race(rng, candidates.ids, np.maximum(loss, 0.0) ** power, size)

  return Selection(f"by_loss({power})", choose, frozenset({"loss"}))


def power_of_choice(d: int) -> Selection:
  """Of `d` clients drawn uniformly, those with the highest losses.

  Clients that were never heard come first; ties are broken at random.

  Args:
    d: how many are compared, >= 1; the size asked for, where that is more.

  Raises:
    ValueError: if `d` is below 1.
  """
  validate.at_least(1, d=d)

  def choose(rng, candidates, size, round):
    some = candidates.rows(rng.permutation(candidates.ids.size)[: max(d, size)])
    loss = np.where(np.isnan(some.loss), np.inf, some.loss)
    return some.ids[np.argsort(-loss, kind="stable")[:size]]

  return Selection(f"power_of_choice({d})", choose, frozenset({"loss"}))


def deadline_aware(deadline: float, *, serial: bool = False) -> Selection:
  """The clients that are expected to make the deadline.

  Args:
    deadline: seconds, > 0. Clients that need more are never chosen, so that
      it may be nobody.
    serial: False, clients work at the same time: those with the most examples
      are taken. True, they share one link and follow each other: as many as
      fit into the deadline together, the shortest first (the greedy choice of
      FedCS, which is then optimal).

  Raises:
    ValueError: if `deadline` is not positive.
  """
  validate.positive(deadline=deadline)

  def choose(rng, candidates, size, round):
    some = candidates.rows(rng.permutation(candidates.ids.size))
    if serial:
      some = some.rows(np.argsort(some.seconds, kind="stable"))
      return some.ids[np.cumsum(some.seconds) <= deadline][:size]
    some = some.rows(some.seconds <= deadline)
    return some.ids[np.argsort(-some.examples, kind="stable")[:size]]

  reads = frozenset({"seconds"} if serial else {"seconds", "examples"})
  return Selection(f"deadline_aware({deadline})", choose, reads)


def fair(alpha: float = 0.0) -> Selection:
  """Who has waited longest, per second of its work to some power.

  With `alpha` 0 the clients take turns: where all N are always there, nobody
  waits for more than N / size rounds, rounded up. With 1 a client's turns come
  in proportion to its speed (proportional fair), if N is well above the size.
  Ties are broken at random.

  Args:
    alpha: >= 0, how much speed counts.

  Raises:
    ValueError: if `alpha` is negative.
  """
  if not 0 <= alpha < math.inf:
    raise ValueError(f"alpha must be a number of at least 0, got alpha={alpha}")

  def choose(rng, candidates, size, round):
    some = candidates.rows(rng.permutation(candidates.ids.size))
    rank = (round - some.last) / np.maximum(some.seconds, _TINY) ** alpha
    return some.ids[np.argsort(-rank, kind="stable")[:size]]

  reads = frozenset({"last", "seconds"} if alpha else {"last"})
  return Selection(f"fair({alpha})", choose, reads)


def charged(
  fraction: float = 0.3, *, then: str | Selection = "uniform", **options
) -> Selection:
  """Clients whose battery holds enough, chosen among by another selection.

  Args:
    fraction: in [0, 1], what must be left; below it nobody is asked.
    then: a Selection or the name of one.
    **options: of the selection that is named.

  Raises:
    ValueError: if an argument is out of range or no selection has the name.
  """
  _fraction(fraction=fraction)
  if isinstance(then, str):
    validate.one_of(SELECTIONS, then=then)
    inner = SELECTIONS[then](**options)
  elif options:
    raise ValueError(
      f"options go with the name of a selection, got {sorted(options)} beside "
      f"then={then.name}; give them to it"
    )
  else:
    inner = then

  def choose(rng, candidates, size, round):
    some = candidates.rows(candidates.battery >= fraction)
    return inner.choose(rng, some, size, round)

  reads = inner.reads | {"battery"}
  name = f"charged({fraction}, {inner.name})"
  return Selection(name, choose, reads, inner.most)


def resource(
  *,
  deadline: float | None = None,
  alpha: float = 2.0,
  explore: float = 0.9,
  decay: float = 0.98,
  floor: float = 0.2,
  pool: float = 0.95,
  clip: float = 0.95,
) -> Selection:
  """Useful and fast clients first (Oort, Lai et al., 2021, Algorithm 1).

  The utility of a client is examples * loss, cut at a quantile of all, plus
  sqrt(0.1 log R / L), times (T / t)^alpha where it takes t > T seconds; R is
  the round and L the one in which it last took part, counted from one. Oort
  takes the root of the mean squared loss of its examples; the server knows
  their mean. A share of the places, explore * decay^round but at least
  `floor`, goes to clients that were never heard, the faster the likelier; the
  others go to those whose utility is at least `pool` times that of the last
  place, in proportion to it. Where one kind is short the other fills up.

  Args:
    deadline: T in seconds, > 0; None leaves speed out. See `pace`.
    alpha: how much lateness costs, >= 0.
    explore: first share of places to explore, in [0, 1].
    decay: of that share, per round, in [0, 1].
    floor: least share of places to explore, in [0, 1].
    pool: in [0, 1]; lower takes more clients into account.
    clip: quantile at which utilities are cut, in [0, 1].

  Raises:
    ValueError: if an argument is out of range.
  """
  if deadline is not None:
    validate.positive(deadline=deadline)
  if not 0 <= alpha < math.inf:
    raise ValueError(f"alpha must be a number of at least 0, got alpha={alpha}")
  _fraction(explore=explore, decay=decay, floor=floor, pool=pool, clip=clip)

  def choose(rng, candidates, size, round):
    heard = ~np.isnan(candidates.loss) & (candidates.last >= 0)
    old, new = candidates.rows(heard), candidates.rows(~heard)
    size = min(size, candidates.ids.size)
    share = max(explore * decay**round, floor)
    fresh = min(math.ceil(share * size), new.ids.size)
    fresh = max(fresh, size - old.ids.size)
    worth = utility(old, round, deadline=deadline, alpha=alpha, clip=clip)
    known = size - fresh
    if known:
      last = np.sort(worth)[-known]
      top = worth >= pool * last
      known_ids = _race(rng, old.ids[top], worth[top], known)
    else:
      known_ids = old.ids[:0]
    speed = 1 / np.maximum(new.seconds, _TINY)
    return np.concatenate([known_ids, _race(rng, new.ids, speed, fresh)])

  reads = frozenset({"examples", "loss", "last", "seconds"})
  return Selection("resource", choose, reads)


def utility(
  candidates: Candidates,
  round: int,
  *,
  deadline: float | None = None,
  alpha: float = 2.0,
  clip: float = 1.0,
) -> np.ndarray:
  """What `resource` thinks of clients that were heard before.

  Args:
    candidates: with finite losses and `last` >= 0.
    round: now, >= 0.
    deadline: T in seconds; None leaves speed out.
    alpha: how much lateness costs.
    clip: quantile at which examples * loss is cut.

  Returns:
    float64 [A], >= 0.
  """
  worth = candidates.examples * np.maximum(candidates.loss, 0.0)
  if worth.size:
    worth = np.minimum(worth, np.quantile(worth, clip))
  worth = worth + np.sqrt(0.1 * math.log(round + 1) / (candidates.last + 1))
  if deadline is not None:
    late = np.maximum(candidates.seconds / deadline, 1.0)
    worth = worth / late**alpha
  return worth


def pace(
  deadline: float, gains: np.ndarray, *, window: int = 20, step: float = 10.0
) -> float:
  """Oort's pacer: a longer deadline once the fast clients are used up.

  Args:
    deadline: T in seconds.
    gains: [rounds], the summed utilities of each round's clients so far.
    window: rounds that are compared with as many before them.
    step: seconds that are added.

  Returns:
    `deadline`, or `step` more where the last window's gain is below that of
    the window before; asked after each full window.
  """
  gains = np.asarray(gains, np.float64)
  if gains.size < 2 * window or gains.size % window:
    return deadline
  before, after = gains[-2 * window : -window], gains[-window:]
  return deadline + step if before.sum() > after.sum() else deadline


def _race(rng, ids, weights, size):
  """Draws without replacement, each next one in proportion to its weight.

  Exponential clocks of these rates, the first that ring (Efraimidis and
  Spirakis, 2006). Clients of weight 0 come last, in random order.
  """
  order = rng.permutation(ids.size)
  with np.errstate(divide="ignore", invalid="ignore"):
    rings = rng.exponential(size=ids.size) / weights[order]
  return ids[order[np.argsort(rings, kind="stable")[:size]]]


def _fraction(**values: float) -> None:
  """Raises ValueError unless every value is in [0, 1]."""
  for name, value in values.items():
    if not 0 <= value <= 1:
      raise ValueError(f"{name} must be in [0, 1], got {name}={value}")


SELECTIONS: dict[str, Callable[..., Selection]] = {
  "by_loss": by_loss,
  "charged": charged,
  "deadline_aware": deadline_aware,
  "fair": fair,
  "poisson": poisson,
  "power_of_choice": power_of_choice,
  "resource": resource,
  "uniform": uniform,
}
