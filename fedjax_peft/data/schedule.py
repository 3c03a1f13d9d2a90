"""Schedules: which client runs where and when, and on which examples.

Lanes work side by side; each works through several clients, one after another.
A tick is one batch of every lane. The schedule of a cohort is cut into
segments such that a bounded number of clients finish in each. Everything here
is made on the host, from integers only, and is the same for the same cohort.
"""

import heapq
from typing import NamedTuple

import numpy as np

from fedjax_peft.data import hashing, ragged


class Schedule(NamedTuple):
  """Where every batch of a cohort goes.

  Axes: D devices, S segments, G blocks of lanes, T ticks, K lanes of a block,
  B examples of a batch, W rows of a segment's buffer.

  Attributes:
    rows: int32 [D, S, G, T, K, B], rows of the examples, -1 = padding.
    slot: int32 [D, S, G, T, K], place of the client among its device's
      clients, -1 = idle.
    first: bool [D, S, G, T, K], the client's first batch.
    out: int32 [D, S, G, T, K], row of the segment's buffer that the client's
      message goes to after this tick; the segment's width where it goes on.
    slots: int32 [D, S, W], whose message each row of the buffer holds,
      -1 = nobody's.
    ticks: int32 [D, S, G], how many ticks each block runs; None = all.
  """

  rows: np.ndarray
  slot: np.ndarray
  first: np.ndarray
  out: np.ndarray
  slots: np.ndarray
  ticks: np.ndarray | None


class Batches(NamedTuple):
  """The batches of a cohort, client after client.

  Attributes:
    rows: int32 [sum of steps, B], rows of the examples, -1 = padding.
    steps: int64 [C], batches of each client; 0 = takes no part.
  """

  rows: np.ndarray
  steps: np.ndarray

  def strided(self, stride: int) -> "Batches":
    """The same batches, `stride` of them laid side by side in one.

    A client's last one is padded with batches that hold no example.
    """
    if stride == 1:
      return self
    few = -(-self.steps // stride)
    batch = self.rows.shape[1]
    rows = np.full((int(few.sum()) * stride, batch), -1, np.int32)
    begin = (np.cumsum(few) - few) * stride  # first row of each client
    rows[np.repeat(begin, self.steps) + _ranges(self.steps)] = self.rows
    return Batches(rows.reshape(-1, stride * batch), few)


class Packing(NamedTuple):
  """Clients on lanes.

  Attributes:
    lane: int [C], lane of each client.
    start: int [C], tick at which it starts.
    load: int [L], ticks of each lane.
  """

  lane: np.ndarray
  start: np.ndarray
  load: np.ndarray

  @property
  def useful_fraction(self) -> float:
    """Lane-ticks that do work, among all until the last lane is done."""
    return float(self.load.sum() / max(self.load.max() * self.load.size, 1))

  def ratio_to_bound(self, steps: np.ndarray) -> float:
    """max(longest client, total / lanes) over the ticks needed; 1 is best."""
    bound = max(steps.max(), -(-steps.sum() // self.load.size))
    return float(bound / self.load.max())


def pack(steps: np.ndarray, lanes: int) -> Packing:
  """Packs clients onto lanes, the longest first on the least loaded lane.

  Args:
    steps: int [C], batches of each client.
    lanes: number of lanes.

  Returns:
    The packing. Ties go to the earlier client and the lower lane, so it is a
    function of its arguments; one lane keeps the clients' order (Graham, Bounds
    on multiprocessing timing anomalies, 1969: at most 4/3 of the optimum).
  """
  steps = np.asarray(steps, np.int64)
  lane, start = np.zeros(steps.size, np.int64), np.zeros(steps.size, np.int64)
  heap = [(0, i) for i in range(lanes)]
  load = np.zeros(lanes, np.int64)
  order = np.argsort(-steps, kind="stable") if lanes > 1 else range(steps.size)
  for c in order:
    at, i = heap[0]
    lane[c], start[c] = i, at
    load[i] = at + steps[c]
    heapq.heapreplace(heap, (int(load[i]), i))
  return Packing(lane, start, load)


def bucket(n: int) -> int:
  """Rounds a size up to 1, 2, 3, 4, 6, 8, 12, 16, ...: few compiled shapes."""
  size = 1
  while size < n:
    size = size * 3 // 2 if size & (size - 1) == 0 and size > 1 else _up(size)
  return size


def _up(size: int) -> int:
  """The power of two above a size."""
  return 1 << size.bit_length()


def batches(
  rows: ragged.Ragged,
  ids: np.ndarray,
  *,
  batch: int,
  epochs: int | None = 1,
  steps: int | np.ndarray | None = None,
  shuffle: bool = True,
  drop_remainder: bool = False,
  seed: tuple[int, int] = (0, 0),
) -> Batches:
  """Cuts every client's examples into batches.

  The order of a client's examples depends on (seed, client, epoch) alone.

  Args:
    rows: rows of all clients.
    ids: int [C], the clients wanted, -1 = nobody.
    batch: examples in a batch.
    epochs: passes over a client's examples; ignored when `steps` is given.
    steps: batches of every client, or int [C] of each, reshuffled after each
      full pass.
    shuffle: random order, a new one for each pass.
    drop_remainder: leave out a last batch that is not full (a client smaller
      than one batch keeps its only one).
    seed: (seed of the run, round).

  Returns:
    The batches of all clients.
  """
  sizes = np.where(ids >= 0, rows.sizes[np.maximum(ids, 0)], 0)
  full, rest = np.divmod(sizes, batch)
  one = full + ((rest > 0) & ~(drop_remainder & (full > 0)))
  if steps is None:
    passes = np.where(sizes > 0, epochs or 1, 0)
    total = passes * one
  else:
    total = np.where(sizes > 0, steps, 0)
    passes = -(-total // np.maximum(one, 1))
  copies = np.repeat(np.arange(len(ids)), passes)  # [P] client of each pass
  epoch = _ranges(passes)  # [P]
  n = sizes[copies]
  where = np.repeat(np.arange(copies.size), n)  # [M] pass of each example
  place = _ranges(n)  # [M]
  begin = rows.indptr[np.maximum(ids, 0)][copies]
  if shuffle:
    draw = hashing.mix(
      seed[0], seed[1], ids[copies][where], epoch[where], place
    )
    order = np.lexsort((draw, where))
  else:
    order = np.arange(where.size)
  value = rows.rows[begin[where] + place][order]
  # Every pass is padded to whole batches, then the passes are laid in a row.
  width = (one * batch)[copies]  # [P]
  at = np.cumsum(width) - width
  flat = np.full(int(width.sum()), -1, np.int32)
  keep = place < width[where]
  flat[(at[where] + place)[keep]] = value[keep]
  every = flat.reshape(-1, batch)
  mine = passes * one
  return Batches(every[_ranges(mine) < np.repeat(total, mine)], total)


def _ranges(sizes: np.ndarray) -> np.ndarray:
  """Concatenates 0 .. n-1 for every n."""
  ends = np.cumsum(sizes)
  total = int(ends[-1]) if sizes.size else 0
  return np.arange(total) - np.repeat(ends - sizes, sizes)


def build(
  work: Batches,
  *,
  devices: int,
  blocks: int,
  width: int,
  segment: int,
  segments: int | None = None,
) -> tuple[Schedule, list[np.ndarray]]:
  """Lays the clients' batches out on devices, blocks and lanes.

  Args:
    work: the batches of the cohort's clients.
    devices: D.
    blocks: G, blocks of lanes on a device.
    width: K, lanes in a block.
    segment: W, at most so many clients finish in a segment on a device.
    segments: pad to this number of segments (None: as many as needed).

  Returns:
    The schedule, and for every device the places in the cohort of its
    clients, in the order of their slots.

  Raises:
    ValueError: if `segment` is smaller than the lanes of a device, since all
      of them may finish at the same tick.
  """
  lanes = blocks * width
  if segment < lanes:
    raise ValueError(
      f"a segment must have room for all lanes of a device: {segment=} "
      f"lanes={lanes}; use segment={lanes} or more"
    )
  steps, batch = work.steps, work.rows.shape[1]
  packing = pack(steps, devices * lanes)
  begin = np.cumsum(steps) - steps  # first batch of each client in work.rows
  ends = packing.start + steps
  members, plans = [], []
  for d in range(devices):
    own = np.flatnonzero((steps > 0) & (packing.lane // lanes == d))
    own = own[np.argsort(ends[own], kind="stable")]
    members.append(own)
    plans.append(np.asarray(_cut(ends[own], segment), np.int64))
  longest = max(int(np.diff(plan).max(initial=1)) for plan in plans)
  S = segments or bucket(max(1, *(plan.size - 1 for plan in plans)))
  shape = (devices, S, blocks, bucket(longest), width)
  rows = np.full((*shape, batch), -1, np.int32)
  slot = np.full(shape, -1, np.int32)
  first = np.zeros(shape, bool)
  out = np.full(shape, segment, np.int32)
  slots = np.full((devices, S, segment), -1, np.int32)
  ticks = np.zeros((devices, S, blocks), np.int32)
  for d, (plan, own) in enumerate(zip(plans, members, strict=True)):
    place = np.repeat(np.arange(own.size), steps[own])  # [M] slot per batch
    c, step = own[place], _ranges(steps[own])
    t = packing.start[c] + step
    s = np.searchsorted(plan, t, side="right") - 1
    g, k = np.divmod(packing.lane[c] % lanes, width)
    at: tuple = (np.full_like(t, d), s, g, t - plan[s], k)
    rows[at] = work.rows[begin[c] + step]
    slot[at] = place
    first[at] = step == 0
    np.maximum.at(ticks[d], (s, g), (t - plan[s] + 1).astype(np.int32))
    done = np.searchsorted(plan, ends[own], side="left") - 1  # [own] segment
    rank = np.arange(own.size) - np.searchsorted(done, done, side="left")
    slots[d, done, rank] = np.arange(own.size)
    final = step == steps[c] - 1
    out[tuple(x[final] for x in at)] = rank[place[final]]
  return Schedule(rows, slot, first, out, slots, ticks), members


def _cut(ends: np.ndarray, segment: int) -> list[int]:
  """Tick boundaries such that at most `segment` of the ends fall in each.

  No segment is more than about twice as long as the mean, since all are padded
  to the longest; so some may end where no client does.
  """
  plan, begin = [0], 0
  most = -(-2 * int(ends[-1]) * segment // ends.size) if ends.size else 0
  while begin < ends.size:
    stop = min(begin + segment, ends.size)
    if stop < ends.size:
      # All that end at one tick must fall in one segment.
      while ends[stop - 1] == ends[stop]:
        stop -= 1
    while ends[stop - 1] - plan[-1] > most:
      plan.append(plan[-1] + most)
    begin = int(np.searchsorted(ends, plan[-1], side="right"))
    if begin < stop:
      plan.append(int(ends[stop - 1]))
      begin = stop
  return plan
