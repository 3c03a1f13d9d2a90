"""Rounds whose bandwidth, power, cuts and bits are decided as they begin."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_peft as fp
import split_worlds
import toy
from fedjax_peft import demand, launch, split, traffic
from fedjax_peft.network import (
  adaptation,
  channel,
  clock,
  draw,
  fault,
  ledger,
  multi,
  profile,
  radio,
  selection,
  serving,
  timeline,
  trace,
  world,
)
from fedjax_peft.split import adapting, cost
from tolerance import tol

STAGES, BATCH = 3, 4
BITS, CUTS = adapting.BITS, (1, 2, 3)
DATA = toy.people().with_traits(
  cut=np.arange(len(toy.SIZES)) % 3 + 1, bits=np.full(len(toy.SIZES), 32)
)
N = len(DATA)
EVERYBODY = np.arange(N)
MACHINES = profile.fleet(
  {"phone": 0.5, "gateway": 0.3, "industrial_pc": 0.2}, N, 0, spread=0.5
)
VALUES = {1: 9000, 2: 2000, 3: 0}  # that cross after so many stages
# Outages and fading, but no packet is lost, which nobody can know before.
CELL = radio.radio(bandwidth=2e5, shadowing=6.0, p_gb=0.1, p_bg=0.5)
SERVER = serving.server(2e10)
OPEN = clock.buffered(concurrency=4, buffer=2)
CLOCKS = [clock.synchronous(), clock.in_turn(), OPEN]
NEAR = tol(jnp.float64, 64)  # steps of all kinds in a round, and a few terms


# What a step asks: a deeper cut sends less, and the device computes more.
def crossing(rows, traits):
  size = int(rows * VALUES[traits["cut"]] * traits["bits"] // 8)
  return size + 4 * rows * (size > 0), size


def products(rows, traits):
  return 2e9 * rows * traits["cut"], 2e9 * rows * (STAGES - traits["cut"])


SPLIT = cost.Split(crossing, products, lambda traits: 1000 * traits["cut"])


def sizes(traits, number):
  cut = np.asarray(traits["cut"], np.int64)
  return {"up_bytes": 500 * cut, "down_bytes": 700 * cut}


def metres(seconds):
  return 50.0 + 450.0 * draw.uniform(3, "place", 0, EVERYBODY)[:, None]


def place(adapt=None, **options) -> world.World:
  work = toy.voices(batch=BATCH, steps=4)
  work = work._replace(split=SPLIT, traits=("cut", "bits"))
  defaults = {
    "seed": 0,
    "examples": DATA.train.sizes,
    "seen": np.ones(N, bool),
    "fleet": MACHINES,
    "radio": CELL,
    "distance": metres,
    "load": demand.load(work, toy.net(), DATA, sizes),
    "needs": np.ones(N),
    "server": SERVER,
    "adapt": adapt,
  }
  return world.World(**(defaults | options))


def joint(**options):
  return adapting.joint(SPLIT, STAGES, **options)


def cut(**options):
  return adapting.cut(SPLIT, STAGES, **options)


def always(**decided):
  """An adaptation that decides the same, whatever it knows."""
  said = adaptation.Adapted(**decided)
  return adaptation.Adaptation("always", lambda known: said)


def turns(where, rounds=3, when=CLOCKS[0]):
  made = timeline.plan(where, when, N)
  memory, found = made.init(), []
  for number in range(rounds):
    turn, memory = made.turn(memory, number, {})
    found.append(turn)
  return found


def happened(where, number=0, ids=EVERYBODY):
  return world.happen(where, world.start(where), ids, number)


def spent(what, ids=EVERYBODY) -> ledger.Costs:
  return ledger.charge(
    ids,
    what.load,
    what.planned,
    what.happened,
    what.machines,
    parts=what.parts,
  )


def took(what):
  """(seconds of each, joules of each), of those whose report arrives."""
  here = what.happened.arrived
  return what.happened.seconds[here], spent(what).joules[here]


def rounding(what):
  """The mean of Delta^2 / 4 of the values that were sent, by hand."""
  bits, deep = what.traits["bits"].astype(float), what.traits["cut"] == STAGES
  error = np.where(deep | (bits == 32), 0, (1 / (2**bits - 1)) ** 2 / 4)
  return error[what.happened.arrived].mean()


def worth(what, plain, weight=0.5, error_weight=10.0):
  """The objective of a round, from what was simulated; 1 if nothing changed."""
  (seconds, joules), (before, paid) = took(what), took(plain)
  value = weight * seconds.max() / before.max()
  value += (1 - weight) * joules.sum() / paid.sum()
  return value + (error_weight * rounding(what) if what.traits else 0)


# Nothing is decided.


@pytest.mark.parametrize("when", CLOCKS, ids=lambda when: when.name)
def test_equal_is_the_round_without_adaptation_bit_for_bit(when):
  pairs = (turns(place(adapt), 4, when) for adapt in (None, adapting.equal()))
  for one, two in zip(*pairs, strict=True):
    assert one.record == two.record
    assert one.traits.keys() == two.traits.keys()
    np.testing.assert_array_equal(one.clients, two.clients)
    for name, column in one.table.items():
      np.testing.assert_array_equal(column, two.table[name], err_msg=name)


def test_equal_shares_and_the_usual_power_are_what_is_when_none_are_given():
  plain = happened(place())
  on = plain.happened.arrived
  assert 0 < on.sum() < N
  usual = np.full(N, float(channel.watts(CELL.power)))
  told = happened(place(always(band=on / on.sum(), watts=usual)))
  for one, two in zip(spent(plain), spent(told), strict=True):
    if one is not None and not isinstance(one, ledger.Streamed):
      np.testing.assert_allclose(one, two, rtol=NEAR)
  wrong = happened(place(always(band=on / on.sum(), watts=usual / 2)))
  assert took(wrong)[0].max() > 1.01 * took(plain)[0].max()


# Bandwidth.


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_with_shares_of_equal_finish_all_are_done_together_and_none_later(
  seed, shared
):
  options = {"seed": seed, "server": serving.server(2e10, shared=shared)}
  for number in range(3):
    even = took(happened(place(**options), number))[0]
    what = happened(place(adapting.bandwidth(), **options), number)
    seconds = took(what)[0]
    # The finish is a root that is found to 1e-14 of its own logarithm.
    assert np.ptp(seconds) < 1e-6 * seconds.max()
    assert seconds.max() <= (1 + 1e-9) * even.max()
    assert np.ptp(even) > 0.1 * even.max()
    assert what.band.sum() == pytest.approx(1, rel=NEAR)
    np.testing.assert_array_equal(what.band > 0, what.happened.arrived)


def test_no_other_shares_are_sooner():
  best = took(happened(place(adapting.bandwidth())))[0].max()
  on = happened(place()).happened.arrived
  rng, sooner = np.random.default_rng(0), 0
  found = happened(place(adapting.bandwidth())).band
  for _ in range(60):
    band = np.zeros(N)
    band[on] = rng.dirichlet(np.ones(on.sum()))
    mixed = 0.9 * found + 0.1 * band
    for shares in (band, mixed):
      late = took(happened(place(always(band=shares))))[0].max()
      sooner += late < (1 - 1e-9) * best
  assert not sooner


def test_every_cell_has_a_band_of_its_own():
  def home(distance, number, nodes):
    return (EVERYBODY % 2).astype(np.int32)

  def both(seconds):
    return np.hstack([metres(0.0), metres(0.0)])

  options = {"home": home, "distance": both}
  options["server"] = serving.server(2e10, shared=True)
  for adapt in (adapting.bandwidth(), joint()):
    what = happened(place(adapt, **options))
    for cell in (EVERYBODY % 2 == 0, EVERYBODY % 2 == 1):
      assert what.band[cell].sum() == pytest.approx(1, rel=NEAR)
      here = what.happened.arrived & cell
      assert here.sum() > 1
      seconds = what.happened.seconds[here]
      assert np.ptp(seconds) < 1e-6 * seconds.max()
    # What both cells have of the server is all of it, at most.
    flops, waits = what.load.server, what.parts.server
    here = what.happened.arrived & (flops > 0)
    assert (flops[here] / waits[here]).sum() <= 2e10 * (1 + 1e-9)


# Cuts, bits and powers.


@pytest.mark.parametrize("weight", [0.2, 0.9])
def test_a_joint_round_is_worth_more_than_an_equal_one(weight):
  for seed, shared in itertools.product(range(3), (False, True)):
    options = {"seed": seed, "server": serving.server(2e10, shared=shared)}
    plain = happened(place(**options))
    chosen = cut(weight=weight)
    even = worth(happened(place(chosen, **options)), plain, weight)
    what = happened(place(joint(weight=weight), **options))
    assert worth(what, plain, weight) <= even * (1 + 1e-9)
    assert worth(plain, plain, weight) == pytest.approx(1, rel=NEAR)
    assert worth(what, plain, weight) < 0.9
    # Who has more power than it takes is done with all others.
    assert np.ptp(took(what)[0]) < 1e-6 * took(what)[0].max()


def told(cuts, bits):
  return {"cut": cuts.astype(np.int32), "bits": bits.astype(np.int32)}


def test_no_allocation_that_is_drawn_is_worth_more_than_the_joint_one():
  """Cuts, bits, shares and powers at random, and near the one that is found."""
  plain, rng = happened(place()), np.random.default_rng(1)
  found = happened(place(joint()))
  best, usual = worth(found, plain), float(channel.watts(CELL.power))
  on = plain.happened.arrived
  share = found.machines.send - MACHINES.idle
  watts = usual * share / (MACHINES.send - MACHINES.idle)
  for draws in range(150):
    moved = rng.random(N) < (1.0 if draws % 3 == 0 else 0.15)
    cuts = np.where(moved, rng.integers(1, 4, N), found.traits["cut"])
    bits = np.where(moved, rng.choice(BITS, N), found.traits["bits"])
    band = np.where(on, found.band * np.exp(rng.normal(0, 0.2, N)), 0)
    power = np.minimum(watts * np.exp(rng.normal(0, 0.2, N)), usual)
    other = always(traits=told(cuts, bits), band=band / band.sum(), watts=power)
    assert worth(happened(place(other)), plain) > (1 - 1e-9) * best


@functools.cache
def grid(client, powers, deadline):
  """The least objective of a client that is alone, by trying everything."""
  ids = np.array([client])
  plain = happened(place(), ids=ids)
  usual, found = float(channel.watts(CELL.power)), []
  for c, b, part in itertools.product(CUTS, BITS, powers):
    traits = told(np.array([c]), np.array([b]))
    other = always(traits=traits, watts=np.array([usual * part]))
    what = happened(place(other), ids=ids)
    late = what.happened.seconds[0] > deadline
    found.append(np.inf if late else lone(what, plain))
  return min(found)


def lone(what, plain):
  """The objective of one client."""
  one = what.happened.seconds[0] / plain.happened.seconds[0]
  two = spent(what, np.arange(1)).joules / spent(plain, np.arange(1)).joules
  return 0.5 * one + 0.5 * two[0] + 10.0 * rounding(what)


@pytest.mark.parametrize("policy", ["cut", "joint", "deadline"])
def test_who_is_alone_chooses_the_best_of_all(policy):
  powers, deadline = (1.0,), np.inf
  if policy != "cut":
    powers = tuple(np.geomspace(1e-3, 1.0, 8))
  for client in np.flatnonzero(happened(place()).happened.arrived)[::5]:
    ids = np.array([client])
    plain = happened(place(), ids=ids)
    if policy == "deadline":
      soonest = joint(weight=1.0, error_weight=0.0)
      found = [happened(place(x), ids=ids) for x in (soonest, joint())]
      deadline = np.mean([what.happened.seconds[0] for what in found])
    adapt = cut() if policy == "cut" else joint(deadline=deadline)
    what = happened(place(adapt), ids=ids)
    assert what.happened.seconds[0] <= deadline * (1 + 1e-9)
    found, best = lone(what, plain), grid(client, powers, deadline)
    assert found <= (1 + 1e-9) * best
    if policy == "cut":
      assert found == pytest.approx(best, rel=NEAR)
    else:  # nobody who chooses power takes all of it, or none
      assert found < (1 - 1e-6) * grid(client, (1.0,), deadline)


def test_a_deadline_is_made_with_less_energy_than_the_soonest_finish():
  soon = took(happened(place(joint(weight=1.0, error_weight=0.0))))
  late = 3 * soon[0].max()
  what = happened(place(joint(weight=0.0, error_weight=0.0, deadline=late)))
  seconds, joules = took(what)
  assert seconds.max() <= late * (1 + 1e-9)
  assert joules.sum() < 0.9 * soon[1].sum()
  missed = happened(place(joint(weight=0.0, deadline=soon[0].max() / 9)))
  assert took(missed)[0].max() <= soon[0].max() * (1 + 1e-6)


def test_sending_draws_in_proportion_to_the_power_that_was_chosen():
  what = happened(place(joint()))
  plain, costs = happened(place()), spent(happened(place(joint())))
  usual = float(channel.watts(CELL.power))
  parts = np.array([0.25] * N)
  half = happened(place(always(watts=usual * parts)))
  above = MACHINES.send - MACHINES.idle
  sent = spent(half)
  seconds = sent.up_seconds + sent.stream.stream_up_seconds
  np.testing.assert_allclose(
    sent.send_joules, above * parts * seconds, rtol=NEAR
  )
  assert (sent.up_seconds >= spent(plain).up_seconds).all()
  # What was chosen is at most the radio's power, and less for some.
  drawn = (what.machines.send - MACHINES.idle) / above
  assert (drawn <= 1 + 1e-9).all()
  assert (drawn[what.happened.arrived] < 0.9).any()
  for name in ("compute", "receive", "idle", "flops"):
    np.testing.assert_array_equal(
      getattr(what.machines, name), getattr(MACHINES, name)
    )
  assert costs.send_joules.sum() < spent(plain).send_joules.sum()


def test_cuts_fit_the_memory_and_are_deep_enough():
  room = np.array([1000, 2000, 3000])[EVERYBODY % 3]
  small = dataclasses.replace(MACHINES, memory=room)
  far = place(radio=CELL._replace(bandwidth=1e4), fleet=small)
  for adapt in (joint(), cut(), joint(weight=1.0)):
    what = happened(far._replace(adapt=adapt))
    here = what.happened.arrived
    assert (1000 * what.traits["cut"] <= room)[here].all()
    assert len(set(what.traits["cut"][here])) > 1
    assert adapt.needs == 1000
  deep = joint(least_cut=2, cuts=(1, 2, 3))
  assert deep.needs == 2000
  assert (happened(place(deep)).traits["cut"] >= 2).all()
  some = happened(place(joint(cuts=(3, 1), bits=(8, 4))))
  assert set(some.traits["cut"]) <= {1, 3}
  assert set(some.traits["bits"]) <= {4, 8}


def test_more_weight_on_the_error_means_more_bits():
  mean = []
  for weight in (0.0, 10.0, 1e4):
    what = happened(place(joint(error_weight=weight, cuts=(1,))))
    mean.append(what.traits["bits"][what.happened.arrived].mean())
  assert mean[0] == 2 < mean[1] < mean[2]


def test_without_a_cut_that_moves_bandwidth_and_power_are_chosen():
  plain = happened(place())
  what = happened(place(adapting.joint()))
  assert not what.traits
  np.testing.assert_array_equal(what.load.up, plain.load.up)
  assert worth(what, plain) < 0.9
  assert adapting.joint().needs is None


def test_a_shared_server_is_divided_as_was_decided():
  server = serving.server(2e10, shared=True)
  what = happened(place(joint(cuts=(1, 2)), server=server))
  here = what.happened.arrived
  speed = what.load.server[here] / what.parts.server[here]
  assert speed.sum() == pytest.approx(2e10, rel=1e-9)
  assert np.ptp(speed) > 0.1 * speed.max()
  endless = serving.server(shared=True)
  free = happened(place(joint(cuts=(1, 2)), server=endless))
  assert (free.parts.server == 0).all()


def test_devices_that_do_not_wait_are_done_together_and_no_later():
  server = serving.server(2e11, waits=False)
  even = took(happened(place(server=server)))[0]
  seconds = took(happened(place(adapting.bandwidth(), server=server)))[0]
  assert seconds.max() <= even.max() * (1 + 1e-9)
  assert np.ptp(seconds) < 1e-6 * seconds.max()


# Rounds of a real net.


@functools.cache
def images():
  people = split_worlds.PEOPLE
  rng = np.random.default_rng(0)
  image = rng.uniform(size=(len(people.examples["label"]), 6, 6))
  owner = np.repeat(np.arange(len(toy.SIZES)), toy.SIZES)
  made = fp.data.population(
    {"image": image.astype(np.float32), "label": people.examples["label"]},
    owner,
  )
  return made.with_traits(cut=np.full(N, 3), bits=np.full(N, 32))


@functools.cache
def net():
  """(work, load) of a small net whose cut and bits move."""
  module = split.movable(split_worlds.zoo("cnn"), bits=True)
  model = split_worlds.model(module)
  local = fp.local(optax.sgd(0.1), batch=BATCH, steps=40)
  made = fp.fedavg(model, local, placement={"crossing/.*": "frozen"})
  made = split.hybrid(made, model, images().examples)
  count = traffic.sizes(made, N)
  return made.work, demand.load(made.work, model, images(), count)


def of_net(adapt, **options):
  _, load = net()
  slow = dataclasses.replace(MACHINES, flops=np.full(N, 2e6))
  quiet = CELL._replace(fading="none", shadowing=0.0, p_gb=0.0)
  defaults = {"load": load, "fleet": slow, "radio": quiet}
  return place(adapt, **(defaults | options))


def test_the_cut_of_a_net_follows_the_channel_and_is_the_best():
  work, _ = net()
  adapt = adapting.cut(work.split, 3, weight=1.0, bits=(8,))
  cuts, client = [], np.array([5])
  for far in (10.0, 100.0, 1000.0, 4000.0):
    where = {"distance": lambda seconds, far=far: np.full((N, 1), far)}
    what = happened(of_net(adapt, **where), ids=client)
    seconds = []
    for c in CUTS:
      fixed = always(traits=told(np.array([c]), np.array([8])))
      other = happened(of_net(fixed, **where), ids=client)
      seconds.append(other.happened.seconds[0])
    assert what.traits["cut"][0] == CUTS[int(np.argmin(seconds))]
    cuts.append(int(what.traits["cut"][0]))
  up = [work.split.bytes(BATCH, {"cut": c, "bits": 8})[0] for c in CUTS]
  assert up == sorted(up, reverse=True)
  assert cuts == sorted(cuts)  # the weaker the channel, the less is sent
  assert cuts[0] < cuts[-1]


def test_bits_of_a_net_are_counted_on_the_wire_that_has_them():
  work, _ = net()
  for c, bits in itertools.product((1, 2), BITS):
    up, down = work.split.bytes(BATCH, {"cut": c, "bits": bits})
    shape = (BATCH, *{1: (2, 2, 4), 2: (7,)}[c])
    wire = 4 * int(np.prod(shape))
    if bits < 32:
      tokens = int(np.prod(shape[:-1]))
      wire = -(-int(np.prod(shape)) * bits // 8) + 8 * tokens
    assert down == wire
    assert up == wire + 4 * BATCH  # and the labels
  assert work.split.bytes(BATCH, {"cut": 3, "bits": 8}) == (0, 0)


@functools.cache
def player():
  """Rounds of a net of three stages whose cut and bits move."""
  model = split_worlds.model(split.movable(split_worlds.net(), bits=True))
  frozen = {"crossing/.*": "frozen"}
  local = fp.local(optax.sgd(0.1), batch=BATCH)
  made = fp.fedavg(model, local, lowrank=False, placement=frozen)
  made = split.hybrid(made, model, DATA.examples)
  return toy.Player(made, DATA, model.base), model


def trained(bits=None):
  """(turn, model after it) of a round in which clients have so many bits."""
  here, model = player()
  made = here.algorithm
  load = demand.load(made.work, model, DATA, traffic.sizes(made, N))
  adapt = None
  if bits is not None:
    adapt = adapting.joint(made.work.split, STAGES, cuts=(1, 2), bits=bits)
  (turn,) = turns(place(adapt, load=load, server=serving.server(1e5)), 1)
  seated = launch.seat(
    DATA.train,
    turn,
    made.work,
    here.settings,
    examples=here.examples,
    traits=DATA.traits,
  )
  state, _ = here.step.run(here.start(), here.base, seated, jax.random.key(0))
  return turn, state.params


def test_the_program_rounds_to_the_bits_that_the_round_says():
  """Clients have 32 bits unless it says otherwise, which change nothing."""
  _, plain = trained()
  _, exact = trained((32,))
  turn, rough = trained((1, 2))
  assert set(turn.traits["bits"]) <= {1, 2}
  near = tol(jnp.float32, 64)
  for name, leaf in plain.items():
    np.testing.assert_allclose(exact[name], leaf, rtol=near, atol=near)
  far = [np.abs(rough[k] - v).max() for k, v in plain.items() if v.ndim > 1]
  assert max(far) > 1000 * near
  assert player()[0].step.programs() == 1


# Clocks, records and what goes on.


@pytest.mark.parametrize("when", CLOCKS, ids=lambda when: when.name)
def test_the_turn_tells_what_was_decided_and_the_ledger_charges_for_it(when):
  lost = fault.compose(fault.dropout(0.2))
  load = place().load
  for turn in turns(place(joint(), fault=lost), 4, when):
    cuts, bits = turn.traits["cut"], turn.traits["bits"]
    assert cuts.dtype == bits.dtype == np.int32
    assert cuts.shape == turn.clients.shape
    mean = {
      k: float(v.mean()) if v.size else 0.0 for k, v in turn.traits.items()
    }
    assert turn.record["allocate/cut"] == mean["cut"]
    assert turn.record["allocate/bits"] == mean["bits"]
    used = np.flatnonzero(turn.table["used"])
    order = used[np.argsort(turn.table["client"][used])]
    by_id = np.argsort(turn.clients)
    asked = load(turn.clients[by_id], 0, None, told(cuts[by_id], bits[by_id]))
    for name in ("stream_up", "stream_down"):
      found = turn.table[f"{name}_bytes"][order]
      np.testing.assert_array_equal(found, np.rint(getattr(asked, name)))
    np.testing.assert_allclose(turn.table["flops"][order], asked.flops)
  closed = not when.is_open
  assert ("allocate/band_max" in turn.record) == closed
  if closed:
    assert 0 < turn.record["allocate/band_max"] <= 1 + NEAR


@pytest.mark.parametrize("when", CLOCKS, ids=lambda when: when.name)
def test_a_plan_that_is_stopped_goes_on_as_if_it_had_not_been(when, tmp_path):
  made = timeline.plan(place(joint()), when, N)
  whole, memory, tables = turns(place(joint()), 6, when), made.init(), []
  for number in range(6):
    if number == 3:
      np.savez(tmp_path / "memory.npz", **memory)
      memory = dict(np.load(tmp_path / "memory.npz"))
      made = timeline.plan(place(joint()), when, N)
    turn, memory = made.turn(memory, number, {})
    tables.append(turn)
  for one, two in zip(tables, whole, strict=True):
    assert one.record == two.record
    for name, column in (one.table | one.traits).items():
      np.testing.assert_array_equal(column, (two.table | two.traits)[name])


def test_the_same_seed_makes_the_same_plan_and_another_one_another():
  one, two, other = (turns(place(joint(), seed=s)) for s in (0, 0, 1))
  for a, b, c in zip(one, two, other, strict=True):
    assert a.record == b.record != c.record
    for name, values in (a.table | a.traits).items():
      np.testing.assert_array_equal(values, (b.table | b.traits)[name])


def test_under_an_open_clock_a_start_does_not_depend_on_who_else_starts():
  free = place(joint(), radio=multi.divided(CELL, 4), server=SERVER)
  whole = happened(free)
  for client in (2, 5, 8):
    one = happened(free, ids=np.array([client]))
    assert one.band is None
    for name, values in whole.traits.items():
      assert values[client] == one.traits[name][0]
    assert one.machines.send[0] == whole.machines.send[client]


def test_who_has_no_link_has_no_part_of_anything():
  for adapt in (adapting.bandwidth(), joint(), cut()):
    dead = happened(place(adapt, radio=CELL._replace(p_gb=1.0, p_bg=0.0)))
    assert (dead.happened.lost > 0).all()
    assert dead.band is None or not dead.band.any()
    assert spent(dead).joules.sum() == 0
    assert set(dead.traits) == set(adapt.traits)


def test_what_is_expected_of_clients_counts_with_what_they_will_be_told():
  plain, where = place(), place(joint(weight=1.0))
  before = world.expected(plain, world.start(plain), EVERYBODY, 0).seconds
  after = world.expected(where, world.start(where), EVERYBODY, 0).seconds
  assert (after <= before * (1 + 1e-9)).all()
  assert (after < 0.9 * before).any()
  turns(place(joint(), select=selection.resource(deadline=5.0)), 2)


def test_steps_are_counted_before_cuts_are_chosen():
  def count(ids, number, memory, seconds, links):
    return 1 + ids % 3

  what = happened(place(joint(), steps=count))
  np.testing.assert_array_equal(what.steps, 1 + EVERYBODY % 3)
  wanted = place().load(EVERYBODY, 0, what.steps, what.traits)
  for name in ("flops", "server", "stream_up"):
    np.testing.assert_array_equal(
      getattr(what.load, name), getattr(wanted, name)
    )


# What is refused.


@pytest.mark.parametrize(
  "links",
  [
    multi.multi([CELL, CELL]),
    trace.trace([*range(N)], [0.0] * N, [1e6] * N, [1e6] * N),
    radio.wired(),
  ],
  ids=["several", "recorded", "constant"],
)
def test_links_without_one_band_are_refused_in_one_sentence(links):
  for adapt in (adapting.bandwidth(), joint()):
    with pytest.raises(ValueError, match="chosen in one cell") as refused:
      happened(place(adapt, radio=links))
    assert "\n" not in str(refused.value)


def test_shares_that_are_more_than_the_band_are_refused():
  for band in (np.full(N, 0.2), np.full(N, np.nan), np.eye(N)[0] - 0.01):
    with pytest.raises(ValueError, match="at least 0 and sum to one"):
      happened(place(always(band=band)))
  with pytest.raises(ValueError, match="sharing='own'"):
    happened(
      place(always(band=np.eye(N)[0]), radio=CELL._replace(sharing="own"))
    )
  with pytest.raises(ValueError, match="on one radio: got a Multi"):
    multi.links(multi.multi([CELL]), [1.0], [0], 0, 0, 0.0, watts=np.ones(1))


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"weight": 1.5}, r"weight must be in \[0, 1\]"),
    ({"weight": 0.0}, "give a deadline"),
    ({"deadline": -1.0}, "above 0 seconds"),
    ({"error_weight": -1.0}, "at least 0"),
    ({"bits": (0, 8)}, "1 to 32"),
    ({"cuts": (4,)}, "1 to 3 stages"),
    ({"cuts": (1,), "least_cut": 2}, "no cut is left"),
  ],
)
def test_options_out_of_range_are_refused(options, match):
  with pytest.raises(ValueError, match=match):
    joint(**options)
  with pytest.raises(ValueError, match=r"split\.movable"):
    adapting.joint(least_cut=2)
