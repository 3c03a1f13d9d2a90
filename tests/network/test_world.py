"""The world: who can be asked, what happens to them, and where models meet."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

import fedjax_peft as fp
import toy
from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import scene
from fedjax_peft.network import (
  availability,
  clock,
  fault,
  ledger,
  phases,
  positions,
  profile,
  radio,
  scenario,
  selection,
  station,
  timeline,
  world,
)

HOW = fp.local(optax.sgd(0.1), batch=4)
RATE, CLASSES = 0.1, 3
DATA = toy.people()
N = len(DATA)
WIRED = radio.radio(up=1e6, down=1e6, sharing="own", shadowing=0.0)
PHONE = profile.PROFILES["phone"]
NEAR = 4e-6  # a few steps of training, in two orders of summation


def place(clients=N, **options) -> world.World:
  """A world of phones that compute for a second and send for one."""

  def load(ids, number, steps):
    count = np.ones(len(ids)) if steps is None else steps
    size = np.full(len(ids), 125_000, np.int64)
    return ledger.Load(count * PHONE.flops, size, size)

  defaults = {
    "seed": 0,
    "examples": np.arange(1, clients + 1),
    "seen": np.ones(clients, bool),
    "fleet": profile.fleet({"phone": 1.0}, clients, 0, spread=0.0),
    "radio": WIRED,
    "distance": lambda seconds: np.full((clients, 1), 100.0),
    "load": load,
    "needs": np.ones(clients),
  }
  return world.World(**(defaults | options))


def everybody(where, wanted=N, when=None):
  return timeline.plan(where, when or clock.synchronous(), wanted)


def turns(made, rounds, told=None):
  """[(turn, memory after it)]."""
  memory, found = made.init(), []
  for number in range(rounds):
    turn, memory = made.turn(memory, number, told or {})
    found.append((turn, memory))
  return found


# Who can be asked.


def test_a_machine_that_is_too_small_is_never_asked_and_counted():
  needs = np.where(np.arange(N) % 4 == 1, PHONE.memory + 1, PHONE.memory)
  unfit = np.flatnonzero(needs > PHONE.memory)
  made = everybody(place(needs=needs), N - unfit.size)
  for turn, _ in turns(made, 3):
    assert sorted(turn.clients) == sorted(set(range(N)) - set(unfit))
    assert turn.record["device/excluded"] == unfit.size


def test_too_few_machines_are_refused_with_the_clients_that_do_not_fit():
  needs = np.where(np.arange(N) >= 7, 3e9, 1.0)
  wanted = r"9 clients .* 7 can: of 10, 3 .* clients \[7, 8, 9\]: 3,000,000,000"
  with pytest.raises(ValueError, match=wanted) as refused:
    everybody(place(needs=needs), 9)
  assert "\n" not in str(refused.value)


def test_a_battery_falls_by_what_is_spent_and_an_empty_one_is_not_asked():
  fleet = profile.fleet({"phone": 1.0}, N, 0, spread=0.0)
  full = np.where(np.arange(N) < 4, 11.0, np.inf)
  fleet = dataclasses.replace(fleet, battery=full)
  each = PHONE.receive + PHONE.compute + PHONE.send - 3 * PHONE.idle  # 6 J
  made = everybody(place(fleet=fleet))
  (first, one), (second, two), (third, _) = turns(made, 3)
  np.testing.assert_allclose(first.table["receive_joules"].sum(), 0.8 * N)
  np.testing.assert_allclose(one["battery"], full - each)
  assert (two["battery"] == np.where(np.isfinite(full), 0.0, np.inf)).all()
  assert first.clients.size == second.clients.size == N
  assert sorted(third.clients) == list(range(4, N))


def test_a_battery_is_charged_up_to_what_it_holds():
  fleet = dataclasses.replace(
    profile.fleet({"phone": 1.0}, N, 0, spread=0.0), battery=np.full(N, 20.0)
  )
  made = everybody(place(fleet=fleet, recharge=1.0), 3)
  before = np.full(N, 20.0)
  for turn, memory in turns(made, 5):
    spent = np.zeros(N)
    spent[turn.clients] = 6.0
    wanted = np.minimum(before - spent + turn.record["round/seconds"], 20.0)
    np.testing.assert_allclose(memory["battery"], wanted)
    before = memory["battery"]


def test_only_those_who_can_be_reached_are_asked():
  half = availability.Availability(
    "half", lambda seed, ids, time: (np.asarray(ids) + time // 3) % 2 == 0
  )
  now = 0.0
  for turn, memory in turns(everybody(place(available=half)), 6):
    wanted = [c for c in range(N) if (c + now // 3) % 2 == 0]
    assert sorted(turn.clients) == wanted
    now = float(memory["now"])


def late(until):
  return availability.Availability(
    "late", lambda seed, ids, time: np.full(np.shape(ids), time >= until)
  )


def test_the_server_waits_until_somebody_is_there_and_time_passes():
  (turn, memory), (after, _) = turns(everybody(place(available=late(500.0))), 2)
  assert 500.0 <= turn.record["round/seconds"] - 3.0 <= 500.0 + 2 * 60.0
  assert turn.table["began_seconds"].min() >= 500.0
  assert memory["now"] == turn.record["round/seconds"]
  assert after.record["round/seconds"] == pytest.approx(3.0)


def test_whoever_never_comes_is_given_up_in_one_sentence():
  with pytest.raises(ValueError, match="nobody can be asked in round 0") as no:
    turns(everybody(place(available=late(1e9), patience=3600.0)), 1)
  assert "\n" not in str(no.value)


def test_an_empty_battery_is_waited_for_while_it_charges():
  made = everybody(place(recharge=0.5))
  memory = made.init() | {"battery": np.zeros(N)}
  turn, _ = made.turn(memory, 0, {})
  assert turn.clients.size == N
  assert turn.record["round/seconds"] > 3.0


# What happens to them.


def test_what_happens_to_a_client_does_not_depend_on_the_order_of_asking():
  moving = positions.grid(2, 400.0)
  points = positions.disc(np.arange(40), 0, radius=400.0)
  distance = positions.distances(points, moving)
  where = place(
    40,
    radio=radio.cell(),
    distance=lambda seconds: distance,
    home=station.home(station.stations(), 2),
    fault=fault.compose(*scenario.storm()),
  )
  memory = world.start(where)
  ids = np.arange(3, 37)
  order = np.random.default_rng(0).permutation(ids.size)
  for number in range(4):
    one = world.happen(where, memory, ids, number)
    two = world.happen(where, memory, ids[order], number)
    for kind in ("planned", "happened"):
      for a, b in zip(getattr(one, kind), getattr(two, kind), strict=True):
        np.testing.assert_array_equal(a[order], b)
    assert len(np.unique(one.happened.lost)) > 1


def test_what_is_expected_is_what_happens_where_nothing_goes_wrong():
  storm = fault.compose(*scenario.storm())
  where = place(fault=storm)
  memory, ids = world.start(where), np.arange(N)
  found = world.expected(where, memory, ids, 3)
  np.testing.assert_array_equal(found.seconds, np.full(N, 3.0))
  assert (found.lost == phases.ARRIVES).all()
  assert (world.happen(where, memory, ids, 3).happened.lost > 0).any()


def test_nothing_takes_no_time_on_a_link_that_is_off():
  def load(ids, number, steps):
    none = np.zeros(len(ids), np.int64)
    return ledger.Load(np.ones(len(ids)), none, none)

  dead = radio.radio(p_gb=1.0, p_bg=0.0)
  (turn, _), *_ = turns(everybody(place(load=load, radio=dead)), 1)
  assert turn.record["device/lost"] == N


def counted(given):
  """A world whose clients take given numbers of steps, [N]."""
  return place(steps=lambda ids, number, memory, each, links: given[ids])


def test_steps_of_each_client_are_taken_and_paid_for():
  given = 1 + np.arange(N) % 3
  made = everybody(counted(given))
  (turn, _), *_ = turns(made, 1)
  np.testing.assert_array_equal(turn.steps, given[turn.clients])
  order = turn.table["client"]
  np.testing.assert_array_equal(turn.table["flops"], given[order] * PHONE.flops)
  state, _ = played(fp.fedavg(toy.net(), HOW, lowrank=False), made, 1)[0]
  total = {k: np.zeros(v.shape) for k, v in state.items()}
  for c in range(N):
    how = fp.local(optax.sgd(RATE), batch=4, steps=int(given[c]))
    end = toy.train(toy.net().params, DATA, c, how, RATE)
    for k in total:
      total[k] += DATA.train.sizes[c] * np.asarray(end[k], np.float64)
  near(state, {k: v / DATA.train.sizes.sum() for k, v in total.items()})


def test_adaptive_steps_fall_with_the_loss_that_was_heard():
  counts = scene.adaptive(first=8)
  made = timeline.plan(
    place(steps=counts.steps), clock.synchronous(), N, hears=counts.hears
  )
  assert made.hears == {"loss"}
  memory, taken = made.init(), []
  for number, loss in enumerate((np.nan, 2.0, 1.0, 0.5, 0.01)):
    turn, memory = made.turn(memory, number, {"loss": np.full(N, loss)})
    taken += np.unique(turn.steps).tolist()
  assert taken == [8, 8, 6, 4, 1]  # ceil(sqrt(now / first) 8)


# Where models meet.


def near(found, wanted):
  assert set(found) == set(wanted)
  for k, v in wanted.items():
    np.testing.assert_allclose(found[k], v, rtol=NEAR, atol=NEAR)


def played(algorithm, made, rounds, data=DATA, width=2, **options):
  """[(params, record)] of a run."""
  ran = fp.run(
    algorithm,
    toy.net(),
    data,
    cohort=made,
    rounds=rounds,
    settings=toy.lanes(width=width),
    **options,
  )
  return [(jax.device_get(state.params), record) for state, record in ran]


def went(start, clients, number):
  """(where the mean of clients' models is, examples behind it), in float64."""
  sizes = DATA.train.sizes[list(clients)]
  ends = [
    toy.train(start, DATA, int(c), HOW, RATE, round=number) for c in clients
  ]
  return {
    k: np.tensordot(sizes / sizes.sum(), np.stack([e[k] for e in ends]), 1)
    for k in start
  }, int(sizes.sum())


def edges(outages=None):
  """Even clients are near edge 0, odd ones near edge 1."""
  far = np.where(np.arange(N)[:, None] % 2 == np.arange(2), 50.0, 200.0)
  stand = station.stations(outages=outages)
  return place(
    distance=lambda seconds: far,
    home=station.home(stand, 2),
    prices=ledger.FREE,
  )


@functools.cache
def tree(period):
  return fp.algorithms.hierarchical(toy.net(), HOW, edges=2, period=period)


def test_when_an_edge_dies_its_clients_move_and_nothing_is_lost():
  made = everybody(edges({1: [1, 2]}))
  asked = [turn for turn, _ in turns(made, 2)]
  np.testing.assert_array_equal(asked[0].nodes, asked[0].clients % 2)
  assert (asked[1].nodes == 0).all()
  (_, one), (params, two) = played(tree(2), made, 2)
  start = {k: np.asarray(v) for k, v in toy.net().params.items()}
  even, odd = range(0, N, 2), range(1, N, 2)
  zero, some = went(start, even, 0)
  dead, others = went(start, odd, 0)
  zero32 = {k: v.astype(np.float32) for k, v in zero.items()}
  zero, more = went(zero32, range(N), 1)
  wanted = {
    k: ((some + more) * zero[k] + others * dead[k]) / (some + more + others)
    for k in start
  }
  near(params, wanted)
  heard = one["train/examples"] + two["train/examples"]
  assert some + more + others == heard == 2 * DATA.train.sizes.sum()
  assert two["cloud/synced"] == 1


def test_a_mean_of_edges_means_is_the_mean_of_all():
  made = everybody(edges(), 6)
  high = played(tree(1), made, 2)
  flat = played(
    fp.fedavg(toy.net(), HOW, lowrank=False), everybody(place(), 6), 2
  )
  for (a, one), (b, two) in zip(high, flat, strict=True):
    near(a, b)
    assert one["train/examples"] == two["train/examples"]
  only = fp.algorithms.hierarchical(toy.net(), HOW, edges=1, period=1)
  one_edge = played(only, everybody(place(), 6), 2)
  for (a, _), (b, _) in zip(one_edge, flat, strict=True):
    near(a, b)


def test_no_edge_alive_is_refused_in_one_sentence():
  with pytest.raises(ValueError, match="no edge alive in round 3"):
    turns(everybody(edges({0: [3, 4], 1: [3, 9]})), 4)


def test_clients_that_walk_are_handed_over_to_the_nearest_edge():
  def distance(seconds):
    left = 20.0 * np.arange(N) - 30.0 * seconds  # of a line between two edges
    return np.stack([1e3 - left, 1e3 + left], 1)

  where = place(distance=distance, home=station.home(station.stations(), 2))
  moved, now = 0, 0.0
  before = None
  for turn, memory in turns(everybody(where), 5):
    wanted = np.argmin(distance(now), axis=1)
    np.testing.assert_array_equal(memory["nodes"], wanted)
    np.testing.assert_array_equal(turn.nodes, wanted[turn.clients])
    moved += 0 if before is None else int((before != wanted).sum())
    before, now = wanted, float(memory["now"])
  assert moved > 0


def test_a_selection_that_reads_losses_hears_those_that_clients_tell():
  made = everybody(place(select=selection.power_of_choice(d=N)), 4)
  assert made.hears == {"loss"}
  asked = []
  ran = fp.run(
    fp.fedavg(toy.net(), HOW, lowrank=False),
    toy.net(),
    DATA,
    cohort=made,
    rounds=6,
    settings=toy.lanes(),
    costs=lambda number, table: asked.append(table["client"]),
  )
  told = [np.array(state.clients.told["loss"]) for state, _ in ran]
  for heard, who in zip(told, asked[1:], strict=False):
    rank = np.where(np.isfinite(heard), heard, np.inf)
    here = np.isin(np.arange(N), who)
    assert rank[here].min() >= rank[~here].max()
  assert np.isfinite(told[-1]).all()


# Whatever goes wrong.


def faults(name):
  make = scenario.SCENARIOS[name]
  return fault.compose(*(make(classes=CLASSES) if name == "drift" else make()))


def stormy(name, rounds=7, width=2):
  """[(params, record)] of a toy federation to which a scenario happens."""
  broken = faults(name)
  data = broken.data(DATA, 0)
  plain = fp.fedavg(toy.net(), HOW, lowrank=False)
  job = broken.wrap(plain.work)
  made = plain if job is plain.work else algorithm_lib.extended(plain, job=job)
  where = place(fault=broken, radio=radio.cell())
  return played(made, everybody(where), rounds, data, width)


@functools.cache
def once(name):
  return stormy(name)


@pytest.mark.parametrize("name", scenario.SCENARIOS)
def test_every_scenario_ends_with_a_record_that_holds(name):
  found = once(name)
  planned = turns(everybody(place(fault=faults(name), radio=radio.cell())), 7)
  assert len(found) == 7
  for (params, record), (turn, _) in zip(found, planned, strict=True):
    for key, value in record.items():
      assert np.isfinite(value), key
    assert all(np.isfinite(v).all() for v in params.values())
    assert 0 <= record["train/loss"] < 10
    sizes = DATA.train.sizes[turn.clients]
    broken = name in ("noisy", "storm")  # nan messages count nothing
    assert record["device/used"] == turn.clients.size <= N
    assert record["train/clients"] <= turn.clients.size
    assert record["train/examples"] <= sizes.sum()
    assert broken or record["train/examples"] == sizes.sum()
    again = {k: record[k] for k in turn.record}
    assert again == {k: float(v) for k, v in turn.record.items()}


@pytest.mark.parametrize("name", ["flaky", "offline", "crash"])
def test_weights_of_those_who_report_are_those_of_a_whole(name):
  found = once(name)
  planned = turns(everybody(place(fault=faults(name), radio=radio.cell())), 7)
  models = [{k: np.asarray(v) for k, v in toy.net().params.items()}]
  models += [params for params, _ in found]
  sizes = [turn.clients.size for turn, _ in planned]
  some = int(np.argmin([s or N for s in sizes]))  # most are lost in it
  wanted, _ = went(models[some], planned[some][0].clients, some)
  near(models[some + 1], wanted)
  if name == "crash":  # the server is down in round 5: the model stays
    assert sizes[5] == 0
    assert toy.same_bits(models[5], models[6])
  else:
    assert sizes[some] < N


@pytest.mark.slow
def test_a_storm_is_the_same_again_on_any_number_of_lanes():
  first, again, wide = (
    once("storm"),
    stormy("storm"),
    stormy("storm", width=4),
  )
  for (a, one), (b, two), (c, three) in zip(first, again, wide, strict=True):
    assert toy.same_bits(a, b)
    own = {k: v for k, v in one.items() if not k.startswith("wall/")}
    assert own == {k: two[k] for k in own}
    near(a, c)
    kept = [k for k in own if k.startswith(("device", "round", "spent"))]
    assert {k: one[k] for k in kept} == {k: three[k] for k in kept}
