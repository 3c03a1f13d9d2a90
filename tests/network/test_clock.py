"""Clocks: when rounds end and whose reports count, against plain simulations.

The simulations are written from the words of `clock` and `flight`: a list of
events in the order of time for closed rounds, a heap for open ones.
"""

import heapq
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from fedjax_peft.network import clock as clock_lib
from fedjax_peft.network import (
  fault,
  ledger,
  phases,
  profile,
  radio,
  selection,
  timeline,
  world,
)

PATIENCE = 2.0
HOPELESS = 4  # times the concurrency
PHONE = profile.PROFILES["phone"].flops

# Few values, so that many events are at the same time; the last never ends.
TIMES = strategies.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 4.0, math.inf])
COHORTS = strategies.lists(
  strategies.tuples(TIMES, strategies.booleans()), max_size=9
)
CLOSED = strategies.one_of(
  strategies.sampled_from([0.5, 1.7, 2.0, math.inf]).map(
    lambda s: clock_lib.synchronous(s)
  ),
  strategies.tuples(
    strategies.sampled_from([1.0, 1.7, math.inf]),
    strategies.sampled_from([0.0, 0.3, 1.0]),
  ).map(lambda x: clock_lib.deadline(x[0], over=x[1])),
)


def listened(clock, seconds, arrived, wanted):
  """A server that hears one event after another until its round is over."""
  used, now = set(), 0.0
  for moment, place in sorted(zip(seconds, range(len(seconds)), strict=True)):
    if moment > clock.seconds:
      return used, clock.seconds
    if moment == math.inf:
      break
    now = moment
    if arrived[place]:
      used.add(place)
      if clock.over and len(used) == wanted:
        break
  return used, now


@hypothesis.settings(deadline=None, max_examples=300, database=None)
@hypothesis.given(CLOSED, COHORTS, strategies.integers(1, 6))
def test_a_closed_round_is_that_of_a_server_that_listens(clock, cohort, wanted):
  seconds = np.array([s for s, _ in cohort], np.float64)
  arrived = np.array([a for _, a in cohort], bool) & np.isfinite(seconds)
  used, took = clock_lib.close(clock, seconds, arrived, wanted)
  who, wanted_took = listened(clock, seconds.tolist(), arrived, wanted)
  assert set(np.flatnonzero(used).tolist()) == who
  assert took == wanted_took


@hypothesis.settings(deadline=None, max_examples=100, database=None)
@hypothesis.given(COHORTS.filter(len), strategies.integers(1, 6))
def test_a_synchronous_round_lasts_as_long_as_its_slowest(cohort, wanted):
  seconds = np.array([s for s, _ in cohort])
  arrived = np.isfinite(seconds)
  used, took = clock_lib.close(
    clock_lib.synchronous(), seconds, arrived, wanted
  )
  np.testing.assert_array_equal(used, arrived)
  assert took == seconds[arrived].max(initial=0)


def test_of_reports_at_one_moment_the_earlier_places_are_used():
  clock = clock_lib.deadline(over=1.0)
  seconds, arrived = np.array([2.0, 1.0, 1.0, 1.0]), np.ones(4, bool)
  used, took = clock_lib.close(clock, seconds, arrived, 2)
  assert used.tolist() == [False, True, True, False]
  assert took == 1.0


def test_more_are_asked_by_the_share_and_never_fewer_than_wanted():
  for wanted in range(1, 200):
    assert clock_lib.synchronous().asked(wanted) == wanted
    for tenths in range(11):
      asked = clock_lib.deadline(over=tenths / 10).asked(wanted)
      assert asked == -(-wanted * (10 + tenths) // 10)


def place(work, lost=None, first=None, **options):
  """A world in which client c computes for work[c] seconds, and no more.

  Args:
    work: [N] seconds.
    lost: (ids, round) -> bool, whose report is lost halfway; None, nobody's.
    first: [N], the lower, the sooner a client is asked; None is any order.
    **options: of the world.
  """
  clients = len(work)

  def load(ids, number, steps):
    none = np.zeros(len(ids), np.int64)
    return ledger.Load(work[ids] * PHONE, none, none)

  def phased(round, ids, number, seed):
    at = np.where(lost(ids, number), phases.COMPUTE, 0)
    return phases.lose(round, at, 0.5)

  def choose(rng, some, size, number):
    return some.ids[np.argsort(first[some.ids], kind="stable")[:size]]

  if lost is not None:
    options["fault"] = fault.Fault("halfway", phased)
  if first is not None:
    options["select"] = selection.Selection("first", choose)
  defaults = {
    "seed": 0,
    "examples": np.ones(clients, np.int64),
    "seen": np.ones(clients, bool),
    "fleet": profile.fleet({"phone": 1.0}, clients, 0, spread=0.0),
    "radio": radio.radio(up=1e6, down=1e6, sharing="own", shadowing=0.0),
    "distance": lambda seconds: np.full((clients, 1), 100.0),
    "load": load,
    "needs": np.ones(clients),
    "patience": PATIENCE,
  }
  return world.World(**(defaults | options))


def turns(made, rounds):
  """The turns of a plan, and the memory after each."""
  memory, found = made.init(), []
  for number in range(rounds):
    turn, memory = made.turn(memory, number, {})
    found.append((turn, memory))
  return found


def simulated(clock, work, lost, first, rounds):
  """An open clock as a heap of events (time, client, version, is lost).

  Yields:
    (clients in the order of their reports, versions, seconds, lost).
  """
  heap, now = [], 0.0
  for number in range(rounds):
    begun, until = now, now + clock.seconds
    reports, gone = [], []
    while True:
      away = {e[1] for e in heap} | {e[1] for e in reports + gone}
      able = sorted(set(range(len(work))) - away, key=lambda c: first[c])
      for c in able[: clock.concurrency - len(heap)]:
        is_lost = bool(lost(np.array([c]), number)[0])
        took = work[c] / 2 + PATIENCE if is_lost else work[c]
        heapq.heappush(heap, (now + took, c, number, is_lost))
      if not heap or heap[0][0] > until:
        now = until if math.isfinite(until) else now
        break
      moment, full = heap[0][0], []
      now = max(now, moment)
      while heap and heap[0][0] == moment:
        event = heapq.heappop(heap)
        if event[3]:
          gone.append(event)
        elif clock.buffer and len(reports) == clock.buffer:
          full.append(event)
        else:
          reports.append(event)
      for event in full:
        heapq.heappush(heap, event)
      enough = clock.buffer and len(reports) == clock.buffer
      if enough or (clock.buffer and len(gone) >= HOPELESS * clock.concurrency):
        break
    yield (
      [e[1] for e in reports],
      [e[2] for e in reports],
      now - begun,
      sorted(e[1] for e in gone),
    )


OPEN = [
  clock_lib.asynchronous(concurrency=1),
  clock_lib.asynchronous(concurrency=5),
  clock_lib.buffered(concurrency=6, buffer=3),
  clock_lib.buffered(concurrency=5, buffer=5),
  clock_lib.buffered(concurrency=12, buffer=4),
  clock_lib.periodic(concurrency=6, seconds=3.0),
  clock_lib.periodic(concurrency=3, seconds=0.5),
]


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.7])
@pytest.mark.parametrize("clock", OPEN, ids=lambda c: c.name)
def test_an_open_clock_is_a_heap_of_events(clock, rate):
  stale = 0
  for seed in range(6):
    rng = np.random.default_rng(seed)
    work = rng.integers(0, 5, 12).astype(np.float64)
    first = rng.permutation(12)
    coins = rng.random((40, 12)) < rate

    def lost(ids, number, coins=coins):
      return coins[number, ids]

    made = timeline.plan(place(work, lost, first), clock, 1)
    found = turns(made, 30)
    wanted = simulated(clock, work, lost, first, 30)
    for number, ((turn, _), (who, versions, took, gone)) in enumerate(
      zip(found, wanted, strict=True)
    ):
      assert turn.clients.tolist() == who
      assert (number - turn.traits["staleness"]).tolist() == versions
      assert turn.record["round/seconds"] == took
      table = turn.table
      assert sorted(table["client"][table["lost"] > 0].tolist()) == gone
      stale = max(stale, turn.record["clock/stale_max"])
  assert stale > 0 or clock.concurrency == clock.buffer


@pytest.mark.parametrize("clock", OPEN, ids=lambda c: c.name)
def test_a_server_that_is_down_ends_its_round_and_goes_on(clock):
  # Whoever starts in round 3 is lost: no such round may wait for reports.
  made = timeline.plan(
    place(np.ones(12), fault=fault.crash(3, restart=30.0)), clock, 1
  )
  found = turns(made, 9)
  assert found[3][0].record["round/seconds"] >= 30.0
  assert sum(t.clients.size for t, _ in found[4:]) > 0
  lost = [t.record["device/lost"] for t, _ in found]
  assert sum(lost[3:]) > 0
  assert max(lost) <= HOPELESS * clock.concurrency + clock.concurrency


@pytest.mark.parametrize(
  "clock",
  [clock_lib.synchronous(), clock_lib.deadline(5.0, over=0.5), *OPEN[:3]],
  ids=lambda c: c.name,
)
def test_where_every_link_is_dead_nobody_reports_and_time_goes_on(clock):
  dead = radio.radio(up=1e6, down=1e6, p_gb=1.0, p_bg=0.0)
  made = timeline.plan(place(np.ones(12), radio=dead), clock, 4)
  found = turns(made, 3)
  for turn, _ in found:
    assert turn.clients.size == 0
    assert turn.record["round/bytes"] == turn.record["round/joules"] == 0
    assert turn.record["device/lost"] == turn.record["device/asked"] > 0
  if clock.is_open:
    assert found[-1][1]["now"] > 0


def test_nobody_chosen_lets_time_pass_until_somebody_can_be():
  # All have an empty battery but for a sip: they charge while nobody works.
  low = place(
    np.ones(6),
    recharge=54e3 / 600,
    select=selection.charged(0.5),
    patience=60.0,
  )
  for clock in (
    clock_lib.synchronous(),
    clock_lib.buffered(concurrency=3, buffer=2),
  ):
    made = timeline.plan(low, clock, 3)
    memory = made.init() | {"battery": np.full(6, 1.0)}
    heard, number = 0, 0
    while not heard and number < 20:
      turn, memory = made.turn(memory, number, {})
      heard, number = turn.clients.size, number + 1
    assert heard
    assert memory["now"] >= 0.5 * 600 - 1


@pytest.mark.parametrize("clock", OPEN[5:], ids=lambda c: c.name)
def test_no_client_starts_after_its_period_is_over(clock):
  # At first nobody is there: a period does not wait longer than it lasts.
  late = world.availability.Availability(
    "late", lambda seed, ids, time: np.full(np.shape(ids), time >= 100.0)
  )
  made = timeline.plan(place(np.ones(12), available=late), clock, 1)
  memory = made.init()
  for number in range(300):
    turn, memory = made.turn(memory, number, {})
    assert turn.record["round/seconds"] == clock.seconds
    began = memory["work/began"][memory["work/client"] >= 0]
    assert (began <= memory["now"]).all()
    assert turn.clients.size == 0 or memory["now"] >= 100.0


@pytest.mark.parametrize(
  "clock", [clock_lib.synchronous(), *OPEN[1:]], ids=lambda c: c.name
)
def test_the_same_seed_gives_the_same_events(clock):
  def told(seed):
    storm = fault.compose(fault.dropout(0.3), fault.stragglers(0.3, 4.0))
    where = place(
      np.arange(1.0, 13.0), fault=storm, seed=seed, radio=radio.cell()
    )
    found = turns(timeline.plan(where, clock, 5), 8)
    return [
      (t.clients.tolist(), t.record["round/seconds"], t.record["round/joules"])
      for t, _ in found
    ]

  assert told(3) == told(3)
  assert told(3) != told(4)
