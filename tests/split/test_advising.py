"""Advice against limits, exhaustive trials and the simulated network."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest

from fedjax_peft.network import (
  clock,
  ledger,
  profile,
  radio,
  serving,
  timeline,
  world,
)
from fedjax_peft.split import adapting, advising, answer, cost, trial, verdict

N, STAGES = 12, ("a", "b", "head")
FLOPS, ADAPTER = 2e9, 60_000  # of a stage in a round; bytes of a report's part
VALUES = {1: 40_000, 2: 10_000, 3: 0}  # that cross in a round
KIB = 1024


def load(scheme, rank, ids, told):
  """What a deeper cut asks: more of the device, less of all others."""
  cut = np.asarray(told["cut"], np.int64)
  crossing = np.array([0, *VALUES.values()])[cut] * told["bits"] / 8
  device, report = FLOPS * cut, ADAPTER * rank * cut
  if scheme == "frozen":
    device, report = 0.0 * cut, 4 + 0 * cut
  back = crossing if scheme != "frozen" else 0 * crossing
  return ledger.Load(device, report, report, crossing, back, FLOPS * (3 - cut))


def offer(scheme, rank=1):
  cuts = {"federated": (3,), "splitfed": (1, 2, 3)}.get(scheme, (1, 2))

  def trained(cut):
    return 100 * rank * (3 - cut if scheme == "frozen" else 3)

  return trial.Offer(
    scheme,
    rank,
    STAGES,
    cuts,
    functools.partial(load, scheme, rank),
    lambda cut: KIB * 1000 * cut,
    trained,
  )


def everything(ranks=(1,)):
  return [offer(s, r) for r in ranks for s in advising.SCHEMES]


CELL = radio.radio(bandwidth=2e6, shadowing=6.0, fading="none")
FLEET = profile.fleet(
  {"phone": 0.5, "gateway": 0.3, "industrial_pc": 0.2}, N, 0, spread=0.5
)


def place(memory=None, **options) -> trial.Place:
  fleet = FLEET
  if memory is not None:
    room = np.broadcast_to(np.asarray(memory), N)
    fleet = dataclasses.replace(FLEET, memory=KIB * room)
  given = {
    "fleet": fleet,
    "radio": CELL,
    "metres": np.linspace(40.0, 450.0, N),
    "server": serving.server(1e12),
    "ids": np.arange(N),
    "cohort": N,
  }
  return trial.Place(**(given | options))


def advise(where=None, offers=None, **wanted):
  return advising.advise(
    everything() if offers is None else offers,
    place() if where is None else where,
    advising.target(**wanted),
  )


@functools.cache
def usual():
  return advise()


def row(found, scheme):
  (one,) = (row for row in found.rows if row.scheme == scheme)
  return one


# The best of all.


def objective(found, tried, wanted, most):
  """The sum of the module's docstring, in units of a federated round."""
  candidate = trial.Candidate(offer("federated"), (3,), (32,))
  unit = trial.scale(candidate, place(), place().cohorts())
  least = min(tried.candidate.offer.trained(c) for c in tried.candidate.cuts)
  return (
    wanted * tried.seconds / unit.seconds
    + (1 - wanted) * tried.joules / unit.joules
    + 10.0 * tried.error
    + 0.1 * math.log2(most / least)
  )


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0])
def test_nothing_that_was_tried_is_worth_more(weight):
  found = advise(weight=weight)
  costs = [objective(found, x, weight, 300) for _, x in found.trials]
  np.testing.assert_allclose([c for c, _ in found.trials], costs, rtol=1e-12)
  mine = objective(found, found.trial, weight, 300)
  assert mine <= min(costs) + 1e-9
  assert found.rows[0].cost == pytest.approx(mine, rel=1e-12)
  # One candidate for federated and splitfed, one a cut and bits of the others.
  assert len(costs) == 2 + 2 * 2 * len(advising.BITS)
  assert {x.candidate.offer.scheme for _, x in found.trials} == {
    *advising.SCHEMES
  }
  assert len(found.sentences) == 3
  assert max(costs) > 1.1 * mine


def test_the_unit_is_the_federated_round_that_nobody_adapted():
  """By hand: equal shares, full power, everybody at once."""
  found = trial.scale(
    trial.Candidate(offer("federated"), (3,), (32,)), place(), place().cohorts()
  )
  signal = radio.signal(CELL, place().metres, np.arange(N), 0, 0)
  sent, got = 8 * 3 * ADAPTER / signal.up, 8 * 3 * ADAPTER / signal.down
  busy = 3 * FLOPS / FLEET.flops
  assert found.seconds == pytest.approx((sent + got + busy).max(), rel=1e-9)
  watts = ("compute", busy), ("send", sent), ("receive", got)
  joules = sum((getattr(FLEET, k) - FLEET.idle) * s for k, s in watts)
  assert found.joules == pytest.approx(joules.sum(), rel=1e-9)


def test_advice_is_the_same_for_the_same():
  one, two = usual(), advise()
  assert one.rows == two.rows
  assert one.sentences == two.sentences
  for name, column in one.clients.items():
    np.testing.assert_array_equal(column, two.clients[name])


# Extremes.


def test_where_the_whole_model_does_not_fit_it_is_cut():
  found = advise(place(memory=[2500] * N), schemes_of("federated", "splitfed"))
  assert found.scheme == "splitfed"
  assert (found.clients["cut"] <= 2).all()
  assert found.sentences == (
    f"federated: {N} of {N} devices lack up to 0.512 MB",
  )
  mixed = place(memory=[2500] * 5 + [9000] * 7)
  found = advise(mixed, schemes_of("federated", "splitfed"))
  assert found.sentences == ("federated: 5 of 12 devices lack up to 0.512 MB",)
  assert row(found, "splitfed").fit == N
  some = advise(mixed, schemes_of("federated"), coverage=0.5)
  assert set(some.clients["client"]) == {*range(5, N)}


def schemes_of(*names):
  return [offer(name) for name in names]


def test_memory_that_may_be_taken_is_a_limit_of_cuts():
  found = advise(None, everything(), memory=1500 * KIB)
  assert found.clients["cut"].max() == 1
  assert row(found, "federated").reason == verdict.CUTS
  assert any("federated: no cut leaves" in s for s in found.sentences)


def test_with_hardly_a_link_what_sends_least_is_taken():
  thin = place(radio=CELL._replace(bandwidth=1e3))
  dear = {k: 200 * v for k, v in VALUES.items()}

  def costly(scheme, ids, told):
    base = load(scheme, 1, ids, told)
    more = np.array([0, *dear.values()])[told["cut"]] * told["bits"] / 8
    return base._replace(stream_up=more, stream_down=more)

  many = [
    x._replace(load=functools.partial(costly, x.scheme))
    for x in schemes_of("federated", "splitfed", "sequential")
  ]
  assert advise(thin, many).scheme == "federated"
  # Nothing but rounded values, one way.
  found = advise(thin, everything(), values_weight=0.0)
  assert found.scheme == "frozen"


def test_with_free_energy_and_an_endless_server_devices_keep_one_stage():
  endless = place(
    server=serving.server(),
    radio=CELL._replace(bandwidth=1e12),
    fleet=dataclasses.replace(FLEET, flops=np.full(N, 1e6)),
  )
  found = advise(
    endless, schemes_of("federated", "splitfed"), weight=1.0, error_weight=0.0
  )
  assert found.scheme == "splitfed"
  assert set(found.clients["cut"]) == {1}


def test_stages_that_must_stay_do():
  for least in (1, 2, 3):
    found = advise(least_cut=least)
    assert found.clients["cut"].min() >= least
    for _, tried in found.trials:
      assert min(tried.candidate.cuts) >= least
  assert found.scheme == "federated"


def test_rounding_is_within_its_budget():
  assert advising.target(error=0.002).bits == (4, 8, 16, 32)
  assert advising.target(error=0.0).bits == (32,)
  found = advise(error=1e-5)
  assert found.clients["bits"].min() >= 8
  assert found.clients["error"].max() <= 1e-5


def test_values_that_train_are_worth_what_the_user_says():
  ranks = everything(ranks=(1, 4))
  cheap = advise(None, ranks, values_weight=0.0)
  rich = advise(None, ranks, values_weight=10.0)
  assert cheap.rows[0].rank == 1
  assert rich.rows[0].rank == 4
  assert rich.scheme != "frozen"


# Deadlines, and what cannot be.


def test_a_deadline_rules_schemes_out_and_is_kept():
  free = usual()
  slow = max(free.rows, key=lambda row: row.seconds)
  fast = min(free.rows, key=lambda row: row.seconds)
  assert slow.scheme == "sequential"
  found = advise(deadline=1.5 * fast.seconds)
  assert found.rows[0].seconds <= 1.5 * fast.seconds * (1 + 1e-6)
  assert row(found, "sequential").reason == verdict.LATE
  assert any(s.startswith("sequential: a round takes") for s in found.sentences)


@pytest.mark.parametrize(
  ("options", "wanted", "sentence"),
  [
    ({"memory": [500] * N}, {}, r"use devices with 1.02 MB \(splitfed\)$"),
    ({"memory": [500] * 3 + [9000] * 9}, {}, "or a coverage of 0.75$"),
    ({}, {"deadline": 1e-3}, r"To change that, allow [0-9.]+ s for a round"),
    ({}, {"memory": 10.0}, "ask for fewer stages on the device, or allow"),
  ],
)
def test_where_nothing_is_possible_it_is_said_what_to_change(
  options, wanted, sentence
):
  with pytest.raises(ValueError, match=sentence) as refused:
    advise(place(**options), schemes_of("federated", "splitfed"), **wanted)
  assert "\n" not in str(refused.value)


def test_what_is_said_to_change_suffices():
  with pytest.raises(ValueError, match="allow") as refused:
    advise(deadline=1e-3, offers=schemes_of("federated", "splitfed"))
  text = str(refused.value).split("allow ")[1].split(" s")[0]
  found = advise(
    deadline=1.01 * float(text), offers=schemes_of("federated", "splitfed")
  )
  assert found.rows[0].seconds <= 1.01 * float(text) * (1 + 1e-9)


@pytest.mark.parametrize(
  ("options", "sentence"),
  [
    ({"weight": 2.0}, "weight must be in"),
    ({"weight": 0.0}, "give a deadline"),
    ({"coverage": 0.0}, "coverage must be a share"),
    ({"memory": -1.0}, "memory must be above 0"),
    ({"least_cut": 0}, "least_cut must be an integer of at least 1"),
    ({"values_weight": -0.1}, "values_weight must be at least 0"),
    ({"bits": (0, 8)}, "bits of a value are 1 to 32"),
    ({"bits": (2,), "error": 1e-9}, "no number of bits has so small an error"),
  ],
)
def test_targets_out_of_range_are_refused(options, sentence):
  with pytest.raises(ValueError, match=sentence):
    advising.target(**options)


def test_what_cannot_be_compared_is_refused():
  with pytest.raises(ValueError, match="add a federated one"):
    advise(None, schemes_of("splitfed"))
  with pytest.raises(ValueError, match="chosen in one cell"):
    advise(place(radio=radio.wired()))
  with pytest.raises(ValueError, match="at least one client, got none"):
    advise(place(ids=np.arange(0)))


# What is said is what a simulated network does.


def simulated(found, where):
  """The first round, by the keys that the advice says of a config."""
  keys, offer = answer.config(found), found.trial.candidate.offer
  before = found.trial.candidate.before
  given = dict(keys["network.allocate"])
  assert given.pop("by") == "joint"
  if "cuts" in given:
    memory = cost.Split(None, None, lambda traits: offer.memory(traits["cut"]))
    given |= {"split": memory, "stages": len(STAGES)}
    if "split.bits" not in keys:
      given["bits"] = ()

  def asked(ids, number, count, decided=None):
    own = {k: np.full(len(ids), v) for k, v in before.items()}
    return offer.load(ids, own | (decided or {}))

  made = world.World(
    seed=where.seed,
    examples=np.ones(N, np.int64),
    seen=np.ones(N, bool),
    fleet=where.fleet,
    radio=where.radio,
    distance=lambda seconds: where.metres[:, None],
    load=asked,
    needs=np.ones(N),
    server=where.server,
    adapt=adapting.joint(**given),
  )
  when = clock.CLOCKS[keys["network.clock"]["kind"]]()
  plan = timeline.plan(made, when, N)
  turn, _ = plan.turn(plan.init(), 0, {})
  return turn


def best_of(found, scheme):
  """The same advice, as if this scheme were the best."""
  some = [x for x in found.trials if x[1].candidate.offer.scheme == scheme]
  return found._replace(scheme=scheme, trial=min(some, key=lambda x: x[0])[1])


@pytest.mark.parametrize("scheme", advising.SCHEMES)
@pytest.mark.parametrize("shared", [False, True])
def test_a_simulated_round_takes_what_was_advised(scheme, shared):
  where = place(server=serving.server(3e10, shared=shared))
  found = best_of(advise(where, weight=0.7), scheme)
  turn = simulated(found, where)
  # Both descend by the same steps, from rates that are the same numbers.
  assert turn.record["round/seconds"] == pytest.approx(
    found.trial.seconds, rel=1e-6
  )
  assert turn.record["round/joules"] == pytest.approx(
    found.trial.joules, rel=1e-6
  )
  if scheme == "splitfed":
    order = np.argsort(turn.clients)
    for name in ("cut", "bits"):
      np.testing.assert_array_equal(
        turn.traits[name][order], found.clients[name]
      )


def test_cohorts_are_those_who_fit_each_once():
  where = place(memory=[500] * 2 + [9000] * 10, cohort=3, rounds=8)
  candidate = trial.Candidate(offer("splitfed"), (1, 2), (8,))
  found = where.cohorts(candidate)
  assert [x.size for x in found] == [3, 3, 3]
  everyone = [*itertools.chain.from_iterable(found)]
  assert len({*everyone}) == 9
  assert min(everyone) >= 2
  assert len(where._replace(rounds=2).cohorts()) == 2
  none = place(memory=[500] * N)
  assert not none.cohorts(candidate)
  with pytest.raises(ValueError, match="nobody has them"):
    trial.run(candidate, none, advising.choosing.goal(0.5, 0.0))
