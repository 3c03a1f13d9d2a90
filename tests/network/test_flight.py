"""Open clocks: who starts from which model, and what becomes of reports."""

import functools

import jax
import numpy as np
import optax
import pytest

import fedjax_peft as fp
import toy
from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import notes, plan
from fedjax_peft.network import clock as clock_lib
from fedjax_peft.network import (
  fault,
  ledger,
  profile,
  radio,
  timeline,
  together,
  world,
)

WIRED = radio.radio(up=1e6, down=1e6, sharing="own", shadowing=0.0)
HOW = fp.local(optax.sgd(0.1), batch=4)


def place(clients, seed=0, spread=0.0, instant=False, sizes=None, **options):
  """A world of equal links; `instant` makes all rounds as long as another."""

  def load(ids, number, steps):
    work = np.zeros(len(ids)) if instant else 1e9 * np.ones(len(ids))
    size = np.full(len(ids), 0 if instant else 1000, np.int64)
    return ledger.Load(work, size, size)

  return world.World(
    seed=seed,
    examples=np.ones(clients, np.int64) if sizes is None else sizes,
    seen=np.ones(clients, bool),
    fleet=profile.fleet({"phone": 1.0}, clients, seed, spread=spread),
    radio=WIRED,
    distance=lambda seconds: np.full((clients, 1), 100.0),
    load=load,
    needs=np.ones(clients),
    **options,
  )


def turns(made: plan.Plan, rounds: int) -> list[plan.Turn]:
  memory, found = made.init(), []
  for number in range(rounds):
    turn, memory = made.turn(memory, number, {})
    found.append(turn)
  return found


CLOCKS = [
  clock_lib.buffered(concurrency=6, buffer=3),
  clock_lib.buffered(concurrency=5, buffer=5),
  clock_lib.asynchronous(concurrency=6),
  clock_lib.periodic(concurrency=6, seconds=0.05),
]


@pytest.mark.parametrize("clock", CLOCKS, ids=lambda c: c.name)
def test_the_pool_holds_the_model_that_each_client_started_from(clock):
  faults = fault.compose(fault.dropout(0.2), fault.stragglers(0.3, 10.0))
  made = timeline.plan(place(20, spread=1.0, fault=faults), clock, 3)
  pool = np.full(made.pool, -1)
  stale = set()
  for number, turn in enumerate(turns(made, 60)):
    if turn.keep[0] >= 0:
      pool[turn.keep[0]] = number
    versions = np.concatenate([[number], pool])[turn.version]
    wanted = number - turn.traits["staleness"]
    np.testing.assert_array_equal(versions, wanted)
    stale |= set(turn.traits["staleness"].tolist())
  assert max(stale) > 0


@pytest.mark.parametrize("clock", CLOCKS, ids=lambda c: c.name)
def test_nobody_is_at_work_twice(clock):
  made = timeline.plan(place(9, spread=1.0), clock, 3)
  memory = made.init()
  for number in range(40):
    turn, memory = made.turn(memory, number, {})
    working = memory["work/client"][memory["work/client"] >= 0]
    assert np.unique(working).size == working.size
    assert np.unique(turn.clients).size == turn.clients.size


def test_a_turn_does_not_change_the_memory_that_it_is_given():
  made = timeline.plan(place(9, spread=1.0), CLOCKS[0], 3)
  memory = made.init()
  for number in range(5):
    before = {k: np.array(v) for k, v in memory.items()}
    first, after = made.turn(memory, number, {})
    again, _ = made.turn(before, number, {})
    assert {k: v.tobytes() for k, v in memory.items()} == {
      k: v.tobytes() for k, v in before.items()
    }
    np.testing.assert_array_equal(first.clients, again.clients)
    memory = after


def history(algorithm, made, rounds, data, settings=None, seed=0):
  """The params before each round and after the last, and the last state."""
  ran = list(
    fp.run(
      algorithm,
      toy.net(),
      data,
      cohort=made,
      rounds=rounds,
      seed=seed,
      settings=settings or toy.lanes(),
    )
  )
  return [jax.device_get(state.params) for state, _ in ran], ran[-1]


def test_fedbuff_with_a_buffer_of_the_cohort_and_no_delay_is_fedavg():
  data = toy.people()
  clock = clock_lib.buffered(concurrency=5, buffer=5)
  made = timeline.plan(place(len(data), instant=True), clock, 5)
  fedbuff = fp.algorithms.fedbuff(toy.net(), HOW)
  fedavg = fp.fedavg(toy.net(), HOW, lowrank=False)
  found, _ = history(fedbuff, made, 4, data)
  wanted, _ = history(fedavg, fp.sample.uniform(5), 4, data)
  for one, other in zip(found, wanted, strict=True):
    for name in one:
      np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-6)


@functools.cache
def late():
  """Turns of which some reports are stale."""
  data = toy.people()
  clock = clock_lib.buffered(concurrency=6, buffer=3)
  where = place(len(data), spread=1.5)
  return timeline.plan(where, clock, 3)


def weight(staleness, power=0.5):
  return (1 + staleness) ** -power


def test_fedbuff_applies_the_discounted_mean_of_what_each_found():
  data, made, rate = toy.people(), late(), 0.1
  found, _ = history(fp.algorithms.fedbuff(toy.net(), HOW), made, 6, data)
  models = [jax.device_get(toy.net().params), *found]
  for number, turn in enumerate(turns(made, 6)):
    total = {k: np.zeros_like(v, np.float64) for k, v in models[0].items()}
    for client, d in zip(turn.clients, turn.traits["staleness"], strict=True):
      start = models[number - d]
      end = toy.train(start, data, int(client), HOW, rate, round=number)
      for k in total:
        total[k] += weight(d) * data.train.sizes[client] * (start[k] - end[k])
    count = data.train.sizes[turn.clients].sum()
    for k, v in total.items():
      wanted = models[number][k] - v / count
      np.testing.assert_allclose(models[number + 1][k], wanted, atol=2e-6)
  assert any(t.traits["staleness"].any() for t in turns(made, 6))


def test_fedasync_mixes_the_clients_model_into_that_of_now():
  data, rate = toy.people(), 0.1
  clock = clock_lib.asynchronous(concurrency=4)
  made = timeline.plan(place(len(data), spread=1.5), clock, 1)
  algorithm = fp.algorithms.fedasync(toy.net(), HOW, rate=0.6, power=0.5)
  found, _ = history(algorithm, made, 8, data)
  models = [jax.device_get(toy.net().params), *found]
  for number, turn in enumerate(turns(made, 8)):
    (client,), (d,) = turn.clients, turn.traits["staleness"]
    end = toy.train(
      models[number - d], data, int(client), HOW, rate, round=number
    )
    a = 0.6 * weight(d)
    for k in end:
      wanted = (1 - a) * models[number][k] + a * end[k]
      np.testing.assert_allclose(models[number + 1][k], wanted, atol=2e-6)


def test_the_lanes_do_not_change_what_happens():
  data, made = toy.people(), late()
  algorithm = fp.algorithms.fedbuff(toy.net(), HOW)
  few, (_, one) = history(algorithm, made, 3, data, toy.lanes(width=1))
  many, (_, two) = history(algorithm, made, 3, data, toy.lanes(width=4))
  for name in few[-1]:
    np.testing.assert_allclose(few[-1][name], many[-1][name], atol=1e-6)
  same = {k: v for k, v in one.items() if k.startswith(("spent", "clock"))}
  assert same == {k: two[k] for k in same}


def test_what_clients_tell_is_remembered_and_counted():
  data = toy.people()
  plain = fp.fedavg(toy.net(), HOW, lowrank=False)
  told = algorithm_lib.extended(plain, notes=[notes.loss(), notes.sketch(8)])
  ran = fp.run(
    told,
    toy.net(),
    data,
    cohort=fp.sample.uniform(4),
    rounds=1,
    settings=toy.lanes(),
  )
  state, record = next(iter(ran))
  heard = np.isfinite(np.asarray(state.clients.told["loss"]))
  assert heard.sum() == 4
  sizes = data.train.sizes[heard]
  losses = np.asarray(state.clients.told["loss"])[heard]
  mean = (losses * sizes).sum() / sizes.sum()
  assert mean == pytest.approx(record["train/loss"], rel=1e-5)
  plainly = plain.bytes(4)["cloud/up_bytes"]
  assert record["up_bytes_client"] == plainly + 4 + 8 * 4


@pytest.mark.parametrize("name", ["fedasync", "fedbuff"])
def test_updates_in_one_round_are_those_of_one_round_each(name):
  data = toy.people()
  whole = fp.local(optax.sgd(0.1), batch=16)  # no order, so no round in it
  clock = clock_lib.asynchronous(concurrency=6)
  single = timeline.plan(place(len(data), spread=1.5), clock, 1)
  few = together.together(single, 4)
  algorithm = getattr(fp.algorithms, name)(toy.net(), whole)
  wide, _ = history(algorithm, few, 5, data)
  counts = [t.record["clock/updates"] for t in turns(few, 5)]
  assert max(counts) > 1
  narrow, (_, last) = history(algorithm, single, sum(counts), data)
  for models, number in zip(wide, np.cumsum(counts), strict=True):
    for k in models:
      np.testing.assert_allclose(models[k], narrow[number - 1][k], atol=2e-6)
  joined = turns(few, 5)[-1].record
  assert joined["spent/joules"] == pytest.approx(last["spent/joules"])
  assert joined["spent/seconds"] == pytest.approx(last["spent/seconds"])


def test_masks_cancel_in_each_of_the_updates_of_a_round():
  data = toy.people()
  whole = fp.local(optax.sgd(0.1), batch=16)
  clock = clock_lib.buffered(concurrency=9, buffer=2)
  few = together.together(
    timeline.plan(place(len(data), spread=0.5), clock, 2), 3
  )
  bits = (fp.clip(10.0), fp.weigh(max_weight=16), fp.fixed_point(bits=32))
  plain = fp.algorithms.fedbuff(toy.net(), whole, uplink=fp.chain(*bits))
  masked = fp.algorithms.fedbuff(
    toy.net(), whole, uplink=fp.chain(*bits, fp.mask())
  )
  one, _ = history(plain, few, 3, data)
  two, _ = history(masked, few, 3, data)
  for k in one[-1]:
    np.testing.assert_array_equal(one[-1][k], two[-1][k])
