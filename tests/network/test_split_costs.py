"""Split steps in time, energy and bytes: by hand, batch by batch."""

import dataclasses
import itertools

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import toy
from fedjax_peft import demand, scene, schema, traffic
from fedjax_peft.data import ragged, schedule
from fedjax_peft.network import (
  clock,
  fault,
  ledger,
  multi,
  phases,
  profile,
  radio,
  selection,
  serving,
  timeline,
  together,
  trace,
  world,
)
from fedjax_peft.split import cost
from tolerance import tol

UP, DOWN, SERVER = 2e5, 8e5, 5e9
BATCH, MODEL, MESSAGE = 4, 3000, 2000
DATA = toy.people().with_traits(cut=np.arange(len(toy.SIZES)) % 3)
N = len(DATA)
WIRED = radio.radio(
  up=UP, down=DOWN, sharing="own", shadowing=0.0, fading="none"
)
MACHINES = profile.fleet(
  {"phone": 0.4, "gateway": 0.3, "industrial_pc": 0.3}, N, 0, spread=0.5
)
PARTS = (
  "compute_seconds",
  "stream_up_seconds",
  "wait_seconds",
  "stream_down_seconds",
)
STREAM = ledger.Streamed._fields


# A step on `rows` examples of a client that has `cut`: nothing is linear, so
# that no other batches have the same sums.
def crossing(rows, traits):
  cut = traits["cut"]
  return 700 * rows + 90 * rows * rows + cut, 500 * rows + 13 * cut


def products(rows, traits):
  return 1e9 * (rows + traits["cut"]), 3e9 * rows + 1e9


SPLIT = cost.Split(crossing, products, lambda traits: 1000 + traits["cut"])


def job(split=SPLIT, **how):
  made = toy.voices(batch=BATCH, **how)
  return made._replace(split=split, traits=("cut",))


def sizes(traits, number):
  size = np.ones(len(traits["cut"]), np.int64)
  return {"up_bytes": MESSAGE * size, "down_bytes": MODEL * size}


def place(work=None, **options) -> world.World:
  work = work or job()
  defaults = {
    "seed": 0,
    "examples": DATA.train.sizes,
    "seen": np.ones(N, bool),
    "fleet": MACHINES,
    "radio": WIRED,
    "distance": lambda seconds: np.full((N, 1), 100.0),
    "load": demand.load(work, toy.net(), DATA, sizes),
    "needs": np.ones(N),
    "server": serving.server(SERVER),
  }
  return world.World(**(defaults | options))


def turns(made, rounds=1):
  memory, found = made.init(), []
  for number in range(rounds):
    turn, memory = made.turn(memory, number, {})
    found.append(turn)
  return found


def played(where, when=None):
  """One round of all: (turn, its table in the order of clients)."""
  (turn,) = turns(timeline.plan(where, when or clock.synchronous(), N))
  order = np.argsort(turn.table["client"])
  return turn, {k: v[order] for k, v in turn.table.items()}


def steps_of(client, how):
  """Examples in each batch that the executor is given."""
  ids = np.array([client])
  rows = schedule.batches(DATA.train, ids, batch=BATCH, **how).rows
  return (rows >= 0).sum(1).tolist()


def by_hand(client, how, padded=False):
  """{column: value} of a client, from the words of `serving`."""
  traits = {"cut": client % 3}
  found = dict.fromkeys((*PARTS, *STREAM, "flops"), 0.0)
  for rows in steps_of(client, how):
    rows = BATCH if padded else rows
    (up, down), (own, server) = crossing(rows, traits), products(rows, traits)
    found["flops"] += own
    found["server_flops"] += server
    found["stream_up_bytes"] += up
    found["stream_down_bytes"] += down
    found["compute_seconds"] += own / MACHINES.flops[client]
    found["stream_up_seconds"] += 8 * up / UP
    found["wait_seconds"] += server / SERVER
    found["stream_down_seconds"] += 8 * down / DOWN
  found["down_seconds"], found["up_seconds"] = (
    8 * MODEL / DOWN,
    8 * MESSAGE / UP,
  )
  found["up_bytes"] = MESSAGE + found["stream_up_bytes"]
  found["down_bytes"] = MODEL + found["stream_down_bytes"]
  return found


HOWS = [
  {"epochs": 1},
  {"epochs": 3},
  {"epochs": 2, "drop_remainder": True},
  {"steps": 7},
  {"steps": 5, "drop_remainder": True},
]


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_time_and_energy_are_those_of_the_equation_batch_by_batch(how):
  _, table = played(place(job(**how)))
  above = {
    k: getattr(MACHINES, k) - MACHINES.idle
    for k in ("compute", "send", "receive")
  }
  near = {"rtol": tol(jnp.float64, 64)}  # 40 batches at most, and a few terms
  for c in range(N):
    wanted = by_hand(c, how)
    for name, value in wanted.items():
      np.testing.assert_allclose(table[name][c], value, err_msg=name, **near)
    send = wanted["up_seconds"] + wanted["stream_up_seconds"]
    receive = wanted["down_seconds"] + wanted["stream_down_seconds"]
    energy = {
      "compute_joules": above["compute"][c] * wanted["compute_seconds"],
      "send_joules": above["send"][c] * send,
      "receive_joules": above["receive"][c] * receive,
    }
    for name, value in energy.items():
      np.testing.assert_allclose(table[name][c], value, err_msg=name, **near)
  full = [by_hand(c, how, padded=True)["wait_seconds"] for c in range(N)]
  assert (np.array(full) > 1.001 * table["wait_seconds"]).any()


@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
@hypothesis.given(
  st.lists(st.integers(0, 13), min_size=1, max_size=6),
  st.one_of(st.tuples(st.integers(1, 3), st.none()), st.just((1, 6))),
  st.booleans(),
)
def test_batches_are_counted_as_they_are_cut(counts, passes, drop):
  epochs, steps = passes
  how = {"epochs": epochs, "steps": steps, "drop_remainder": drop}
  ids = np.arange(len(counts))
  people = ragged.Ragged.of([np.arange(n) for n in counts])
  cut = ids % 3
  found = traffic.stream(job(**how))(np.array(counts), None, {"cut": cut})
  mine = 1 + ids % 4  # where each client is told how many
  told = traffic.stream(job(**how))(np.array(counts), mine, {"cut": cut})
  for c in ids:
    for total, given in ((found, steps), (told, int(mine[c]))):
      again = how | {"steps": given}
      rows = schedule.batches(people, ids[c : c + 1], batch=BATCH, **again).rows
      each = [
        (*crossing(n, {"cut": c % 3}), *products(n, {"cut": c % 3}))
        for n in (rows >= 0).sum(1).tolist()
      ]
      wanted = np.sum(each, axis=0) if each else np.zeros(4)
      np.testing.assert_array_equal([x[c] for x in total], wanted)


def test_a_split_is_asked_once_for_each_kind_of_batch():
  asked = []

  def once(rows, traits):
    asked.append((rows, *traits.values()))
    return crossing(rows, traits)

  made = timeline.plan(
    place(job(SPLIT._replace(bytes=once))), clock.synchronous(), N
  )
  turns(made, 3)
  assert len(asked) == len(set(asked)) > 6


def test_side_by_side_the_slowest_decides_and_in_turn_the_sum():
  beside, one = played(place())
  after, two = played(place(), clock.in_turn())
  seconds = [sum(by_hand(c, {})[k] for k in two_way()) for c in range(N)]
  near = tol(jnp.float64, 8 * N)
  assert beside.record["round/seconds"] == pytest.approx(max(seconds), rel=near)
  assert after.record["round/seconds"] == pytest.approx(sum(seconds), rel=near)
  assert beside.record["device/busy_seconds"] == pytest.approx(
    sum(seconds), rel=near
  )
  order = after.table["client"]
  starts = np.cumsum([0.0, *np.array(seconds)[order]])[:-1]
  np.testing.assert_allclose(after.table["began_seconds"], starts, rtol=near)
  for name in set(one) - {"began_seconds"}:
    np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def two_way():
  """Columns whose sum is a client's time."""
  return ("down_seconds", *PARTS, "up_seconds")


def test_who_takes_turns_has_the_band_the_server_and_the_links_of_its_time():
  shared = {
    "radio": WIRED._replace(sharing="equal"),
    "server": serving.server(SERVER, shared=True),
  }
  _, alone = played(place())
  _, turns_ = played(place(**shared), clock.in_turn())
  _, beside = played(place(**shared))
  for name in two_way():
    np.testing.assert_array_equal(turns_[name], alone[name], err_msg=name)
    times = 1 if name in ("compute_seconds", "down_seconds") else N
    np.testing.assert_allclose(
      beside[name], times * alone[name], rtol=tol(jnp.float64, N)
    )
  # Links that get ten times faster once the first client is done.
  columns = ("compute_seconds", "wait_seconds")
  first = selection.Selection("by id", lambda rng, some, n, number: some.ids)
  until = sum(alone[name][0] for name in two_way())
  hours = recorded([0.0, 0.99 * until], [1.0, 10.0])
  _, later = played(place(radio=hours, select=first), clock.in_turn())
  for name in set(two_way()) - set(columns):
    wanted = alone[name] / np.where(np.arange(N) > 0, 10.0, 1.0)
    np.testing.assert_allclose(later[name], wanted, rtol=tol(jnp.float64, N))


def recorded(times, factors):
  """Links of all clients that change at given times."""
  client, factor = np.arange(N).repeat(len(times)), np.tile(factors, N)
  return trace.trace(client, np.tile(times, N), UP * factor, DOWN * factor)


def test_clients_of_a_round_divide_a_shared_server_and_only_who_needs_it():
  def some(rows, traits):
    own, server = products(rows, traits)
    return (own, server) if traits["cut"] else (own + server, 0.0)

  work = job(SPLIT._replace(flops=some))
  _, alone = played(place(work))
  _, shared = played(place(work, server=serving.server(SERVER, shared=True)))
  needy = np.count_nonzero(DATA.traits["cut"])
  assert 0 < needy < N
  np.testing.assert_allclose(
    shared["wait_seconds"], needy * alone["wait_seconds"], rtol=1e-15
  )
  assert (alone["wait_seconds"] > 0).sum() == needy


def test_what_is_expected_of_a_client_shares_the_server_with_nobody():
  where = place(server=serving.server(SERVER, shared=True))
  seconds = world.expected(where, world.start(where), np.arange(N), 0).seconds
  wanted = [sum(by_hand(c, {})[k] for k in two_way()) for c in range(N)]
  np.testing.assert_allclose(seconds, wanted, rtol=tol(jnp.float64, 64))


def test_a_model_is_broadcast_and_gradients_are_not():
  cell = WIRED._replace(sharing="equal", broadcast=True)
  _, alone = played(place())
  _, table = played(place(radio=cell))
  np.testing.assert_array_equal(table["down_seconds"], alone["down_seconds"])
  np.testing.assert_allclose(
    table["stream_down_seconds"], N * alone["stream_down_seconds"], rtol=1e-15
  )
  both = multi.unicast(multi.multi([cell, cell]))
  assert [one.broadcast for one in both.radios] == [False, False]


def test_one_answer_for_all_goes_down_once_and_each_receives_it():
  """Over a band that all share, as fast as the weakest can hear."""
  metres = np.linspace(50.0, 400.0, N)[:, None]
  cell = radio.radio(bandwidth=1e6, shadowing=0.0, fading="none")
  there = {"radio": cell, "distance": lambda seconds: metres}
  told = serving.server(SERVER, common=True)
  _, table = played(place(**there, server=told))
  station, noise = 10 ** (43 / 10 - 3), 10 ** (-174 / 10 - 3) * 1e6
  gains = 10 ** (-(128.1 + 37.6 * np.log10(metres[:, 0] / 1e3)) / 10)
  rate = 1e6 * np.log2(1 + station * gains.min() / noise)
  for c in range(N):
    size = by_hand(c, {})["stream_down_bytes"]
    seconds = table["stream_down_seconds"][c]
    assert seconds == pytest.approx(8 * size / rate, rel=1e-6)
    assert table["stream_down_bytes"][c] == size
    heard = seconds + table["down_seconds"][c]
    above = MACHINES.receive[c] - MACHINES.idle[c]
    assert table["receive_joules"][c] == pytest.approx(above * heard, rel=1e-12)
  # To each its own, each has a part of band and power: of the nearest too.
  _, apart = played(place(**there))
  own = 1e6 / N * np.log2(1 + station * gains / noise)
  ratio = apart["stream_down_seconds"] / table["stream_down_seconds"]
  np.testing.assert_allclose(ratio, rate / own, rtol=1e-6)
  assert ratio.min() > N / 4
  same = set(table) - {"stream_down_seconds", "receive_joules"}
  for name in same - {"grams", "began_seconds"}:
    np.testing.assert_array_equal(apart[name], table[name], err_msg=name)
  # Links that do not broadcast take a copy for each.
  silent = there | {"radio": cell._replace(broadcast=False)}
  _, copies = played(place(**silent, server=told))
  np.testing.assert_array_equal(
    copies["stream_down_seconds"], apart["stream_down_seconds"]
  )


FIRST = 1000.0 * (1 + np.arange(N))  # bytes that each sends once
LOSSES = fault.compose(
  fault.dropout(0.3, "compute"), fault.dropout(0.3, "upload")
)


@pytest.mark.parametrize("losses", [fault.compose(), LOSSES])
@pytest.mark.parametrize("when", ["synchronous", "in_turn", "buffered"])
def test_what_is_sent_once_is_paid_until_the_steps_of_a_round_are_done(
  when, losses
):
  clocks = {
    "synchronous": clock.synchronous(),
    "in_turn": clock.in_turn(),
    "buffered": OPEN,
  }
  where = place(before=FIRST, fault=losses)
  found = turns(timeline.plan(where, clocks[when], N), 6)
  plain = [by_hand(c, {})["stream_up_bytes"] for c in range(N)]
  flops = [by_hand(c, {})["flops"] for c in range(N)]
  done, total = set(), 0
  for turn in found:
    table, fresh = turn.table, set()
    for at, c in enumerate(table["client"].tolist()):
      size = plain[c] + (0 if c in done else FIRST[c])
      part = table["flops"][at] / flops[c]
      assert table["stream_up_bytes"][at] == pytest.approx(part * size, abs=0.6)
      seconds = part * 8 * size / UP
      assert table["stream_up_seconds"][at] == pytest.approx(seconds, rel=1e-9)
      if table["lost"][at] in (phases.ARRIVES, phases.UP):
        assert part == 1
        fresh |= {c}
    crossed = sum(FIRST[c] for c in fresh - done)
    assert turn.record["cut/first_up_bytes"] == crossed
    done, total = done | fresh, total + crossed
  assert total == sum(FIRST[c] for c in done) > 0
  rows = sum(turn.table["client"].size for turn in found)
  assert rows > len(done)  # so that somebody came again


def test_what_is_sent_once_is_no_part_of_a_step_that_must_fit_a_deadline():
  seen = []

  def count(ids, number, memory, each, links):
    seen.append((ids, each, links))
    return np.full(len(ids), 2)

  turns(timeline.plan(place(steps=count), clock.synchronous(), N), 2)
  where = place(steps=count, before=FIRST)
  turns(timeline.plan(where, clock.synchronous(), N), 2)
  for (ids, each, plain), (again, same, first), more in zip(
    seen[:2], seen[2:], (FIRST, 0 * FIRST), strict=True
  ):
    np.testing.assert_array_equal(ids, again)
    np.testing.assert_array_equal(each, same)
    wanted = plain + 8 * more[ids] / UP
    np.testing.assert_allclose(first, wanted, rtol=tol(jnp.float64))


def test_waiting_takes_time_and_no_energy_above_idling():
  _, fast = played(place(server=serving.server()))
  _, slow = played(place())
  assert (fast["wait_seconds"] == 0).all()
  assert (slow["wait_seconds"] > 0).all()
  for name in ("compute_joules", "send_joules", "receive_joules"):
    np.testing.assert_allclose(
      fast[name], slow[name], rtol=tol(jnp.float64, 8), err_msg=name
    )


def test_who_needs_no_answer_waits_for_what_the_server_needs_longer():
  for flops in (SERVER / 100, SERVER, 100 * SERVER):
    _, table = played(place(server=serving.server(flops, waits=False)))
    for c in range(N):
      each = by_hand(c, {})
      busy = each["compute_seconds"] + each["stream_up_seconds"]
      whole = max(busy, each["server_flops"] / flops)
      np.testing.assert_allclose(
        busy + table["wait_seconds"][c], whole, rtol=tol(jnp.float64, 64)
      )


def test_without_a_server_nothing_is_different():
  plain = job(None)
  unsplit = place(plain, server=None)
  free = place(plain, server=serving.server(SERVER, shared=True))
  for when in (clock.synchronous(), clock.in_turn(), OPEN):
    for one, two in zip(
      turns(timeline.plan(unsplit, when, N), 3),
      turns(timeline.plan(free, when, N), 3),
      strict=True,
    ):
      assert [*one.table] == [*ledger.Costs._fields[:-1]]
      assert set(two.table) - set(one.table) == set(STREAM)
      assert all((two.table[name] == 0).all() for name in STREAM)
      for name, column in one.table.items():
        np.testing.assert_array_equal(column, two.table[name], err_msg=name)
      assert {k: two.record[k] for k in one.record} == one.record
      more = {"stream_up_bytes", "stream_down_bytes", "wait_seconds"}
      added = {f"device/{name}" for name in more} | {"server/flops"}
      assert set(two.record) - set(one.record) == added


OPEN = clock.buffered(concurrency=4, buffer=2)


def test_open_clocks_charge_each_report_as_the_equation_and_go_on(tmp_path):
  where = place(server=serving.server(4 * SERVER, shared=True))
  made = timeline.plan(where, OPEN, N)
  memory, tables = made.init(), []
  for number in range(8):
    if number == 4:  # stopped, with clients at work in the midst of steps
      assert (memory["work/client"] >= 0).sum() > 1
      np.savez(tmp_path / "memory.npz", **memory)
      memory = dict(np.load(tmp_path / "memory.npz"))
    turn, memory = made.turn(memory, number, {})
    tables.append(turn.table)
    assert turn.record["server/flops"] == turn.table["server_flops"].sum()
  for one, two in zip(tables, turns(made, 8), strict=True):
    for name, column in one.items():
      np.testing.assert_array_equal(column, two.table[name])
  rows = itertools.chain(*(zip(*t.values(), strict=True) for t in tables))
  count = 0
  for row in rows:
    found = dict(zip(tables[0], row, strict=True))
    for name, value in by_hand(int(found["client"]), {}).items():
      assert found[name] == pytest.approx(value, rel=tol(jnp.float64, 64))
    count += 1
  assert count == 16


def test_updates_side_by_side_add_up_what_the_server_computed():
  when = clock.asynchronous(concurrency=4)
  single = timeline.plan(place(), when, N)
  joined = turns(together.together(single, 3), 4)
  done = sum(turn.record["clock/updates"] for turn in joined)
  apart = turns(single, done)
  assert done > 4
  for name in ("server/flops", "device/stream_up_bytes", "device/wait_seconds"):
    total = sum(turn.record[name] for turn in apart)
    assert sum(turn.record[name] for turn in joined) == pytest.approx(
      total, rel=tol(jnp.float64, 32)
    )
    assert total > 0


@pytest.mark.parametrize("when", [clock.synchronous(), clock.in_turn(), OPEN])
def test_what_slows_down_or_ends_the_steps_does_so_to_all_their_parts(when):
  storm = fault.compose(
    fault.stragglers(1.0, 10.0), fault.dropout(0.6, "compute")
  )
  _, whole = played(place())
  found = turns(timeline.plan(place(fault=storm), when, N), 5)
  table = {
    k: np.concatenate([t.table[k] for t in found]) for k in found[0].table
  }
  full = {k: v[table["client"]] for k, v in whole.items()}
  lost = table["lost"] > 0
  assert lost.any()
  part = table["flops"] / full["flops"]
  np.testing.assert_array_equal(part[~lost], 1)
  assert ((part > 0) & (part < 1))[lost].all()
  near = {"rtol": tol(jnp.float64, 64)}
  for name in PARTS:
    np.testing.assert_allclose(table[name], 10 * part * full[name], **near)
  np.testing.assert_allclose(
    table["server_flops"], part * full["server_flops"], **near
  )
  for way in ("up", "down"):
    crossed = table[f"stream_{way}_bytes"]
    wanted = part * full[f"stream_{way}_bytes"]
    np.testing.assert_allclose(crossed, wanted, rtol=0, atol=0.5 + 1e-6)
    rest = MODEL if way == "down" else np.where(lost, 0, MESSAGE)
    np.testing.assert_array_equal(table[f"{way}_bytes"], crossed + rest)


def test_in_turn_a_lost_client_takes_its_time_and_the_next_follows():
  faults = fault.compose(fault.dropout(0.5), fault.late(0.5, 3.0))
  (turn,) = turns(timeline.plan(place(fault=faults), clock.in_turn(), N))
  table, lost = turn.table, turn.table["lost"] > 0
  took = sum(table[name] for name in two_way())
  took = took + np.where(lost, 0.0, table["delay_seconds"])
  near = {"rtol": tol(jnp.float64, 64)}
  np.testing.assert_allclose(
    table["began_seconds"][1:], np.cumsum(took)[:-1], **near
  )
  assert turn.record["round/seconds"] == pytest.approx(took.sum(), rel=1e-14)
  np.testing.assert_array_equal(table["used"], ~lost)
  assert 0 < lost.sum() < N
  assert table["delay_seconds"].any()


def test_copies_of_a_message_cross_twice_and_activations_once():
  _, once = played(place())
  _, twice = played(place(fault=fault.duplicates(1.0)))
  np.testing.assert_array_equal(twice["up_bytes"] - once["up_bytes"], MESSAGE)
  for name in STREAM:
    np.testing.assert_array_equal(once[name], twice[name])


def test_totals_are_sums_over_clients_of_any_two_groups():
  where = place(prices=ledger.Prices(gigabyte=2.0))
  memory, ids = world.start(where), np.arange(N)
  what = world.happen(where, memory, ids, 0)
  costs = ledger.charge(
    ids,
    what.load,
    what.planned,
    what.happened,
    what.machines,
    where.prices,
    parts=what.parts,
  )
  whole, half = ledger.total(costs), ids < 4
  some, rest = (ledger.total(costs.rows(x)) for x in (half, ~half))
  for name, value in whole.items():
    assert value == pytest.approx(
      some[name] + rest[name], rel=tol(jnp.float64, N)
    )
  assert whole["server/flops"] == costs.table()["server_flops"].sum() > 0
  crossed = costs.up_bytes + costs.down_bytes
  np.testing.assert_allclose(costs.traffic_dollars, 2.0 * crossed / 1e9)


def test_steps_that_must_fit_a_deadline_take_all_of_their_parts():
  seen = []

  def count(ids, number, memory, each, links):
    seen.append((ids, each, links))
    return np.full(len(ids), 2)

  _, table = played(place(steps=count))
  ((ids, each, links),) = seen
  for c, one, link in zip(ids, each, links, strict=True):
    wanted = by_hand(c, {"steps": 1})
    assert one == pytest.approx(sum(wanted[k] for k in PARTS), rel=1e-14)
    two = by_hand(c, {"steps": 2})
    assert link == two["up_seconds"] + two["down_seconds"]
    assert table["wait_seconds"][c] == pytest.approx(
      two["wait_seconds"], rel=1e-14
    )


def test_a_dead_link_loses_a_client_before_it_spends_anything():
  dead = recorded([0.0], [0.0])
  for when in (clock.synchronous(), clock.in_turn()):
    turn, table = played(place(radio=dead), when)
    assert (table["lost"] > 0).all()
    for name in (*two_way(), *STREAM, "up_bytes", "down_bytes", "flops"):
      assert (table[name] == 0).all(), name
    assert turn.record["round/joules"] == turn.record["round/seconds"] == 0


def test_steps_in_two_places_without_a_server_are_refused_in_one_sentence():
  with pytest.raises(ValueError, match="two places need a server") as refused:
    played(place(server=None))
  assert "\n" not in str(refused.value)
  with pytest.raises(ValueError, match="flops must be a positive number"):
    serving.server(0.0)


def test_a_device_needs_the_memory_of_its_part():
  needs = demand.needs(job(), toy.net(), DATA)
  np.testing.assert_array_equal(needs, 1000 + DATA.traits["cut"])
  small = dataclasses.replace(MACHINES, memory=np.full(N, 1001))
  where = place(needs=needs, fleet=small)
  (turn,) = turns(timeline.plan(where, clock.synchronous(), 6))
  assert turn.record["device/excluded"] == (DATA.traits["cut"] == 2).sum() > 0


@pytest.mark.parametrize("kind", ["parallel", "shared"])
def test_the_server_is_what_a_config_says(kind):
  told = schema.Split(server=kind, server_flops=2e12)
  run = schema.Config(model=schema.Model(name="x"), data={}, split=told)
  for answer in ({"waits": False}, {"common": True}):
    found = scene.server_of(run, job(SPLIT._replace(**answer)))
    assert found == serving.Server(2e12, shared=kind == "shared", **answer)
  assert scene.server_of(run, job(None)) is None
