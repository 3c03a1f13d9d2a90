"""The ledger: what is charged, by hand, and on the arrays that cross."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_peft as fp
import toy
from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import link as link_lib
from fedjax_peft import notes, one_step, peft, traffic
from fedjax_peft.network import (
  clock,
  fault,
  ledger,
  phases,
  profile,
  radio,
  timeline,
  world,
)
from tolerance import tol

HOW = fp.local(optax.sgd(0.1), batch=4)
PRICES = ledger.Prices(gigabyte=3.0, backhaul=0.5, request=0.01)
RANKS = (1, 2, 4, 2, 4, 1, 2, 4, 4, 1)
KINDS = {"phone": 0.4, "gateway": 0.3, "industrial_pc": 0.3}
CUT = (phases.DOWN, phases.COMPUTE, phases.UP)


def machines(clients, seed=0):
  return profile.fleet(KINDS, clients, seed, spread=0.5)


def draws(clients, seed):
  """A load, and a round of which a third is lost, at random."""
  rng = np.random.default_rng(seed)
  load = ledger.Load(
    rng.uniform(0, 1e12, clients),
    rng.integers(0, 10**7, clients),
    rng.integers(0, 10**7, clients),
  )
  planned = phases.timed(*rng.uniform(0, 100, (3, clients)))
  lost = rng.integers(1, 4, clients) * (rng.random(clients) < 0.33)
  happened = phases.lose(planned, lost, rng.random(clients))
  copies = rng.integers(1, 3, clients)
  return load, planned, happened._replace(copies=copies)


def charged(clients=50, seed=0, **options):
  load, planned, happened = draws(clients, seed)
  fleet = machines(clients, seed)
  ids = np.arange(clients)
  return ledger.charge(ids, load, planned, happened, fleet, PRICES, **options)


@pytest.mark.parametrize("seed", range(5))
def test_totals_are_the_sums_of_their_parts_over_rows_and_kinds(seed):
  costs = charged(seed=seed, used=np.arange(50) % 3 == 0)
  whole, table = ledger.total(costs), costs.table()
  near = pytest.approx
  for kind in ("joules", "dollars"):
    parts = [k for k in table if k.endswith(f"_{kind}")]
    assert len(parts) == 3
    rows = sum(table[k].sum() for k in parts)
    assert whole[f"device/{kind}"] == near(rows, rel=tol(jnp.float64, 150))
    sums = sum(whole[f"device/{k}"] for k in parts)
    assert whole[f"device/{kind}"] == near(sums, rel=tol(jnp.float64, 150))
  half = np.arange(50) < 20
  some, rest = (ledger.total(costs.rows(x)) for x in (half, ~half))
  assert set(some) == set(whole)
  for name, value in whole.items():
    assert value == near(some[name] + rest[name], rel=tol(jnp.float64, 50))
    assert value > 0


def test_a_client_is_charged_as_by_hand():
  one = profile.Profile(
    "one",
    flops=2e9,
    memory=1,
    battery=np.inf,
    idle=1.0,
    compute=6.0,
    send=3.0,
    receive=2.5,
    price_hour=0.72,
    carbon=360.0,
  )
  fleet = profile.fleet({"one": 1.0}, 1, 0, spread=0.0, profiles={"one": one})
  load = ledger.Load(np.array([8e9]), np.array([4000]), np.array([10000]))
  times = phases.timed([5.0], [4.0], [2.0], delay=[7.0])
  costs = ledger.charge(
    np.array([9]), load, times, times, fleet, PRICES, began=100.0
  )
  wanted = {
    "client": 9,
    "used": True,
    "lost": 0,
    "began_seconds": 100.0,
    "down_seconds": 5.0,
    "compute_seconds": 4.0,
    "up_seconds": 2.0,
    "delay_seconds": 7.0,
    "down_bytes": 10000,
    "up_bytes": 4000,
    "flops": 8e9,
    "receive_joules": (2.5 - 1) * 5,
    "compute_joules": (6 - 1) * 4,
    "send_joules": (3 - 1) * 2,
    "compute_dollars": 0.72 * 4 / 3600,
    "traffic_dollars": 3 * 14000 / 1e9,
    "request_dollars": 0.01,
    "grams": 360 * (7.5 + 20 + 4) / 3.6e6,
  }
  found = costs.table()
  assert set(found) == set(wanted)
  for name, value in wanted.items():
    assert found[name].tolist() == [pytest.approx(value, rel=1e-14)], name
  assert costs.seconds.tolist() == [11.0]  # waiting is nobody's work
  assert costs.joules.tolist() == [31.5]


@pytest.mark.parametrize("where", CUT)
@pytest.mark.parametrize("moment", [0.0, 0.25, 1.0])
def test_of_the_phase_of_a_loss_a_part_is_charged_and_of_later_ones_none(
  where, moment
):
  load, planned, _ = draws(20, 1)
  lost = phases.lose(planned, where, moment)
  fleet, ids = machines(20), np.arange(20)
  whole = ledger.charge(ids, load, planned, planned, fleet, PRICES).table()
  cut = ledger.charge(ids, load, planned, lost, fleet, PRICES).table()
  columns = {
    phases.DOWN: ("down_seconds", "receive_joules"),
    phases.COMPUTE: ("compute_seconds", "compute_joules", "compute_dollars"),
    phases.UP: ("up_seconds", "send_joules"),
  }
  counts = {
    phases.DOWN: "down_bytes",
    phases.COMPUTE: "flops",
    phases.UP: "up_bytes",
  }
  for phase in CUT:
    part = 1.0 if phase < where else moment if phase == where else 0.0
    for name in columns[phase]:
      np.testing.assert_allclose(cut[name], part * whole[name], rtol=1e-12)
    name, away = counts[phase], 0.5 if counts[phase] != "flops" else 0.0
    np.testing.assert_allclose(
      cut[name], part * whole[name], rtol=1e-12, atol=away
    )
  np.testing.assert_allclose(cut["request_dollars"], 0.01)


def test_copies_that_arrive_cross_the_link_and_those_of_a_lost_one_do_not():
  load, planned, _ = draws(4, 2)
  lost = phases.lose(planned, [0, 0, phases.UP, phases.COMPUTE], 0.5)
  twice = lost._replace(copies=np.array([1, 2, 2, 2]))
  up = ledger.charge(np.arange(4), load, planned, twice, machines(4)).up_bytes
  wanted = [load.up[0], 2 * load.up[1], np.rint(load.up[2] / 2), 0]
  assert up.tolist() == wanted


def tiny(clients, load, **options) -> world.World:
  """A world of phones on equal wires."""
  defaults = {
    "seed": 0,
    "examples": np.ones(clients, np.int64),
    "seen": np.ones(clients, bool),
    "fleet": profile.fleet({"phone": 1.0}, clients, 0, spread=0.0),
    "radio": radio.radio(up=1e6, down=1e6, sharing="own", shadowing=0.0),
    "distance": lambda seconds: np.full((clients, 1), 100.0),
    "load": load,
    "needs": np.ones(clients),
    "prices": PRICES,
  }
  return world.World(**(defaults | options))


def constant(flops=3e10, up=125_000, down=250_000):
  """One second of a phone's work, one of upload and two of download."""

  def load(ids, number, steps):
    ones = np.ones(len(ids), np.int64)
    return ledger.Load(flops * ones, up * ones, down * ones)

  return load


def turns(made, rounds):
  memory, found = made.init(), []
  for number in range(rounds):
    turn, memory = made.turn(memory, number, {})
    found.append(turn)
  return found


@pytest.mark.parametrize("always", [True, False])
def test_a_straggler_that_is_lost_is_charged_for_what_it_computed(always):
  # Ten times slower, and lost a share m into it: m of the FLOPs, 10 m seconds.
  storm = fault.compose(
    fault.stragglers(1.0, 10.0, always=always), fault.dropout(1.0, "compute")
  )
  plain = fault.dropout(1.0, "compute")
  slow, usual = (
    turns(
      timeline.plan(tiny(30, constant(), fault=f), clock.synchronous(), 30), 1
    )[0].table
    for f in (storm, plain)
  )
  order = np.argsort(slow["client"]), np.argsort(usual["client"])
  np.testing.assert_allclose(
    slow["flops"][order[0]], usual["flops"][order[1]], rtol=1e-12
  )
  np.testing.assert_allclose(
    slow["compute_seconds"][order[0]],
    10 * usual["compute_seconds"][order[1]],
    rtol=1e-12,
  )
  assert 0 < np.min(usual["flops"]) < np.max(usual["flops"]) < 3e10


CLOCKS = [
  clock.synchronous(),
  clock.deadline(4.2, over=0.5),
  clock.buffered(concurrency=6, buffer=3),
]


@pytest.mark.parametrize("when", CLOCKS, ids=lambda c: c.name)
def test_running_totals_are_the_sums_of_the_rounds(when):
  storm = fault.compose(fault.dropout(0.3), fault.crash(2, restart=9.0))
  wire = radio.wire(1e9, latency=0.25)
  hops = [world.Hop("cloud", 2, 4, 1000, 3000, wire)]
  where = tiny(20, constant(), fault=storm, hops=hops)
  spent = dict.fromkeys(ledger.SPENT, 0.0)
  for number, turn in enumerate(turns(timeline.plan(where, when, 4), 7)):
    record = turn.record
    due = number % 2 == 1
    assert record["cloud/seconds"] == due * hops[0].seconds()
    crossed = due * 4 * (1000 + 3000)
    own = turn.table["up_bytes"].sum() + turn.table["down_bytes"].sum()
    assert record["round/bytes"] == own + crossed
    paid = record["device/dollars"] + 0.5 * crossed / 1e9
    assert record["round/dollars"] == pytest.approx(paid, rel=1e-14)
    for name in spent:
      spent[name] += record[f"round/{name}"]
      assert record[f"spent/{name}"] == pytest.approx(spent[name], rel=1e-14)
  assert all(spent.values())


def test_clients_work_side_by_side_and_hops_follow_them():
  # 2 s down, (1 + c) s of work, 1 s up: the slowest decides, not the sum.
  def load(ids, number, steps):
    ones = np.ones(len(ids), np.int64)
    return ledger.Load(3e10 * (1.0 + ids), 125_000 * ones, 250_000 * ones)

  wire = radio.wire(8e6, latency=0.5)  # 1,000 bytes in a millisecond
  hops = [
    world.Hop("edge", 1, 4, 1000, 1000, wire),
    world.Hop("cloud", 3, 2, 2000, 1000, wire),
  ]
  made = timeline.plan(tiny(8, load, hops=hops), clock.synchronous(), 8)
  for number, turn in enumerate(turns(made, 6)):
    slowest = 2 + 8 + 1
    above = 1.002 + (1.003 if number % 3 == 2 else 0)
    assert turn.record["round/seconds"] == pytest.approx(slowest + above)
    busy = sum(2 + (1 + c) + 1 for c in range(8))
    assert turn.record["device/busy_seconds"] == pytest.approx(busy)


def test_a_crash_costs_all_that_was_sent_and_the_time_until_it_is_over():
  where = tiny(4, constant(), fault=fault.crash(1, restart=30.0))
  first, second = turns(timeline.plan(where, clock.synchronous(), 4), 2)
  for name in ("bytes", "joules", "dollars", "grams"):
    assert second.record[f"round/{name}"] == first.record[f"round/{name}"]
  assert second.clients.size == 0
  assert second.record["round/seconds"] == first.record["round/seconds"] + 30


@functools.cache
def model(rank=4) -> fp.Model:
  net = peft.lora(toy.Net(nnx.Rngs(0)), rank, "up|head", seed=1)
  return fp.model(net, fp.losses.classification, precision="float32")


def encoded(up: fp.Link, message, senders=4) -> int:
  """Bytes of the device buffers of a message that has crossed a link."""
  spec = fp.Spec(jax.eval_shape(lambda: message), senders=senders)
  mine, shared = up.init(spec)
  wire, _, _ = up.send(message, mine, shared, link_lib.alone())
  buffers = [x.addressable_data(0) for x in jax.tree.leaves(wire)]
  return sum(x.nbytes for x in buffers)


def cut(params, rank):
  """The columns and rows that a client of this rank has."""
  return {
    k: jnp.asarray(v[:, :rank] if k.endswith("lora_a") else v[:rank])
    for k, v in params.items()
  }


LINKS = {
  "plain": lambda: fp.weigh(max_weight=16),
  "int8": lambda: fp.chain(fp.weigh(max_weight=16), fp.int8()),
  "int4": lambda: fp.chain(fp.weigh(max_weight=16), fp.int4()),
  "masked": lambda: fp.chain(
    fp.clip(1.0), fp.weigh(max_weight=16), fp.fixed_point(32), fp.mask(2)
  ),
  "top_k": lambda: fp.chain(fp.weigh(max_weight=16), fp.top_k(0.3)),
}


def ledger_of(algorithm, data, most=4):
  """The table of one round in which all are asked, by client."""
  sizes = traffic.sizes(algorithm, most)

  def load(ids, number, steps):
    named = {k: data.traits[k][ids] for k in algorithm.work.traits}
    each = sizes(named | {"client": ids}, number)
    ones = np.ones(len(ids))
    return ledger.Load(3e10 * ones, each["up_bytes"], each["down_bytes"])

  made = timeline.plan(tiny(len(data), load), clock.synchronous(), len(data))
  turn = turns(made, 1)[0]
  order = np.argsort(turn.table["client"])
  return {k: v[order] for k, v in turn.table.items()}


@pytest.mark.parametrize("name", LINKS)
def test_bytes_are_those_of_the_buffers_that_cross_a_link(name):
  up, data = LINKS[name](), toy.people()
  algorithm = fp.fedavg(toy.net(), HOW, uplink=up, lowrank=False)
  table = ledger_of(algorithm, data)
  params = {k: jnp.asarray(v) for k, v in toy.net().params.items()}
  assert (table["up_bytes"] == encoded(up, params)).all()
  held = sum(x.addressable_data(0).nbytes for x in params.values())
  assert (table["down_bytes"] == held).all()


@pytest.mark.parametrize("rule", ["hetlora", "flexlora"])
def test_bytes_are_those_of_each_clients_rank(rule):
  data = toy.people().with_traits(rank=RANKS)
  algorithm = fp.fedavg(
    model(), HOW, rule=getattr(fp.rules, rule)(), ranks=True
  )
  table = ledger_of(algorithm, data)
  params = algorithm.work.params
  up = algorithm.tiers[0].link
  for client, rank in enumerate(RANKS):
    mine = cut(params, rank)
    assert table["up_bytes"][client] == encoded(up, mine), client
    held = sum(x.addressable_data(0).nbytes for x in mine.values())
    assert table["down_bytes"][client] == held
  assert np.unique(table["up_bytes"]).size == 3


def test_notes_are_counted_as_what_they_hold():
  told = [notes.loss(), notes.sketch(16)]
  plain = fp.fedavg(toy.net(), HOW, lowrank=False)
  data = toy.people()
  more = ledger_of(algorithm_lib.extended(plain, notes=told), data)["up_bytes"]
  less = ledger_of(plain, data)["up_bytes"]
  message = {k: jnp.asarray(v) for k, v in toy.net().params.items()}
  stats = {"loss": (jnp.float32(2.0), jnp.float32(1.0))}
  held = sum(note.make(message, stats).nbytes for note in told)
  assert (more - less == held).all()


class Stack(nnx.Module):
  """Layers of equal weights [L, 5, 5], one after another in a scan or not."""

  def __init__(self, rngs, depth, scanned):
    init = jax.random.normal(rngs.params(), (depth, 5, 5)) / 3
    self.layers = nnx.Param(init)
    self.head = nnx.Linear(5, 3, use_bias=False, rngs=rngs)
    self.scanned = scanned

  def __call__(self, x):
    def layer(x, w):
      return jnp.tanh(x @ w), None

    layers = self.layers[...]
    if self.scanned:
      x, _ = jax.lax.scan(layer, x, layers)
    else:
      for w in layers:
        x, _ = layer(x, w)
    return self.head(x)


@pytest.mark.parametrize("depth", [1, 6])
def test_flops_of_a_scan_over_layers_are_those_of_its_layers(depth):
  found = []
  for scanned in (True, False):
    net = fp.model(
      Stack(nnx.Rngs(0), depth, scanned),
      fp.losses.classification,
      precision="float32",
    )
    job = fp.fedavg(net, HOW, lowrank=False).work
    found.append(one_step.flops_of(job, net.base, toy.people().examples))
  forward, head = 2 * 4 * 5 * 5, 2 * 4 * 5 * 3
  # Forward once, backward twice. Unrolled, the first passes nothing on.
  assert found == [3 * depth * forward + 3 * head - x for x in (0, forward)]
