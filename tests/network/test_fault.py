"""What goes wrong: how often, to whom, and put together."""

import numpy as np
import pytest
import scipy.stats

import toy
from fedjax_peft import data
from fedjax_peft.network import corruption, fault, phases, scenario

CLIENTS = np.arange(3000)
MAKE = {
  "clean": fault.compose,
  "corrupt": lambda: fault.corrupt(0.3, "zero"),
  "crash": lambda: fault.crash([2, 3]),
  "disconnect": lambda: fault.disconnect(0.3, 4.0),
  "drift_features": lambda: fault.drift_features(10, 1.0, fraction=0.4),
  "drift_labels": lambda: fault.drift_labels(10, 3, fraction=0.4),
  "dropout": lambda: fault.dropout(0.3),
  "duplicates": lambda: fault.duplicates(0.3),
  "late": lambda: fault.late(0.3, 5.0),
  "mislabel": lambda: fault.mislabel(0.3, 3),
  "outage": lambda: fault.outage(0.3),
  "stragglers": lambda: fault.stragglers(0.3, 10.0),
  "storm": lambda: fault.compose(*scenario.storm()),
}


def plain(ids=CLIENTS):
  ids = np.asarray(ids)
  return phases.timed(1.0 + ids % 3, 4.0 + ids % 5, 2.0, delay=0.5)


def hit(one, number=0, seed=0, ids=CLIENTS):
  return one.phases(plain(ids), np.asarray(ids), number, seed)


def rare(found, share):
  """The p-value of a count of so many among independent clients."""
  return scipy.stats.binomtest(
    int(found.sum()), found.size, float(share)
  ).pvalue


def same(a, b):
  return all(
    x.dtype == y.dtype and np.array_equal(x, y)
    for x, y in zip(a, b, strict=True)
  )


def test_every_fault_and_scenario_is_tested():
  assert MAKE.keys() >= fault.FAULTS.keys()
  assert set(scenario.SCENARIOS) == {
    "clean",
    "crash",
    "drift",
    "flaky",
    "noisy",
    "offline",
    "storm",
    "stragglers",
  }


# Laws of every fault.


@pytest.mark.parametrize("name", MAKE)
def test_what_happens_depends_on_nobody_else(name):
  one = MAKE[name]()
  ids = np.random.default_rng(0).permutation(CLIENTS)[:50]
  every, few = hit(one, 2, 7), hit(one, 2, 7, ids)
  assert same(every.rows(ids), few)
  traits = one.traits(CLIENTS, 2, 7)
  for key, bits in one.traits(ids, 2, 7).items():
    assert bits.dtype == np.int32
    np.testing.assert_array_equal(bits, traits[key][ids])


@pytest.mark.parametrize("name", MAKE)
def test_another_seed_is_another_story(name):
  one = MAKE[name]()
  assert same(hit(one, 2, 7), hit(one, 2, 7))
  different = not same(hit(one, 2, 7), hit(one, 2, 8)) or any(
    not np.array_equal(bits, one.traits(CLIENTS, 2, 8)[key])
    for key, bits in one.traits(CLIENTS, 2, 7).items()
  )
  assert different == (name not in ("clean", "crash", "mislabel"))


@pytest.mark.parametrize("name", MAKE)
def test_phases_keep_their_shapes_and_stay_possible(name):
  found = hit(MAKE[name](), 2)
  for x, y in zip(found, plain(), strict=True):
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
  assert (found.seconds >= 0).all()
  assert (found.copies >= 1).all()
  assert np.isin(found.lost, [0, 1, 2, 3]).all()


# Composition.


@pytest.mark.parametrize("number", [0, 5])
def test_composition_is_associative(number):
  a, b, c = fault.dropout(0.2), fault.disconnect(0.2), fault.dropout(0.3)
  d = fault.compose(fault.corrupt(0.2, "noise"), fault.crash(5))
  left = fault.compose(fault.compose(a, b), fault.compose(c, d))
  right = fault.compose(a, fault.compose(fault.compose(b, c), d))
  assert left.name == right.name
  assert same(hit(left, number), hit(right, number))
  assert left.pause(number, 0) == right.pause(number, 0)
  x, y = (f.traits(CLIENTS, number, 0) for f in (left, right))
  assert x.keys() == y.keys() == {corruption.TRAIT}
  np.testing.assert_array_equal(x["corrupt"], y["corrupt"])


@pytest.mark.parametrize("name", MAKE)
def test_clean_is_the_identity_of_composition(name):
  one, clean = MAKE[name](), fault.compose()
  for both in (fault.compose(clean, one), fault.compose(one, clean)):
    assert both.name == one.name
    assert same(hit(both, 2), hit(one, 2))
  assert same(hit(clean), plain())


def test_a_fault_more_changes_nothing_of_the_others():
  drops = fault.dropout(0.3)
  for other in (fault.late(0.5, 9.0), fault.stragglers(0.5, 3.0)):
    for both in (fault.compose(other, drops), fault.compose(drops, other)):
      np.testing.assert_array_equal(hit(both).lost, hit(drops).lost)
  noise, nan = fault.corrupt(0.3, "noise"), fault.corrupt(0.3, "nan")
  both = fault.compose(noise, nan).traits(CLIENTS, 0, 0)["corrupt"]
  bits = [f.traits(CLIENTS, 0, 0)["corrupt"] for f in (noise, nan)]
  np.testing.assert_array_equal(both, bits[0] | bits[1])
  assert rare(both == 3, 0.09) > 1e-3  # kinds are independent


def test_two_faults_of_a_kind_are_independent():
  twice = fault.compose(fault.dropout(0.3), fault.dropout(0.3))
  lost = hit(twice).lost > 0
  assert rare(lost, 1 - 0.7**2) > 1e-3
  assert rare(lost, 0.3) < 1e-3  # what the same draws would give


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.3, 1.0])
def test_links_last_for_k_steps_as_often_as_is_said(rate):
  online = fault.outage(rate).traits(CLIENTS, 3, 0)["online"]
  for k in (1, 2, 5, 20):
    share, lasts = (1 - rate) ** k, online >= k
    if share in (0, 1):
      assert (lasts == share).all()
    else:
      assert rare(lasts, share) > 1e-4
  if rate == 0.3:
    assert rare(online >= 2, 0.7) < 1e-9  # one step off


def test_an_outage_needs_work_that_goes_on_without_a_link():
  with pytest.raises(ValueError, match="needs clients that go on without: got"):
    fault.outage(0.1).wrap(toy.voices())
  gated = toy.voices()._replace(traits=("online",))
  assert fault.outage(0.1).wrap(gated) is gated


def test_two_wraps_of_a_kind_are_refused():
  with pytest.raises(ValueError, match="corrupt_nan"):
    fault.compose(fault.corrupt(0.1), fault.corrupt(0.2))


def test_data_pass_through_all_parts():
  def more(name, by):
    return fault.Fault(name, data=lambda list_, seed: [*list_, by])

  both = fault.compose(more("a", 1), more("b", 2))
  assert both.data([], 0) == [1, 2]


# Rates; p = 1e-3 each, and a wrong rate fails.


@pytest.mark.parametrize("number", [0, 4])
def test_dropouts_come_at_their_rate_in_any_phase_at_any_moment(number):
  found, before = hit(fault.dropout(0.3), number), plain()
  lost = found.lost > 0
  assert rare(lost, 0.3) > 1e-3
  assert rare(lost, 0.34) < 1e-3
  times = np.bincount(found.lost, minlength=4)[1:]
  assert scipy.stats.chisquare(times).pvalue > 1e-3
  names = ("down", "compute", "up")
  moment = np.concatenate(
    [
      (getattr(found, k) / getattr(before, k))[found.lost == i + 1]
      for i, k in enumerate(names)
    ]
  )
  assert scipy.stats.kstest(moment, "uniform").pvalue > 1e-3
  kept = found.rows(~lost)
  assert same(kept, before.rows(~lost))


@pytest.mark.parametrize(("phase", "code"), sorted(phases.PHASES.items()))
def test_dropouts_keep_to_a_phase(phase, code):
  found = hit(fault.dropout(0.3, phase))
  assert set(np.unique(found.lost)) == {0, code}
  any_phase = hit(fault.dropout(0.3))
  np.testing.assert_array_equal(found.lost > 0, any_phase.lost > 0)


def test_dropouts_of_two_rounds_are_independent():
  one, two = (hit(fault.dropout(0.3), i).lost > 0 for i in (3, 4))
  assert rare(one & two, 0.09) > 1e-3


def test_disconnections_last_as_long_as_they_should():
  one = fault.disconnect(0.3, 4.0)
  now, then = (hit(one, i) for i in (6, 7))
  away = now.lost > 0
  assert rare(away, 0.3) > 1e-3
  # It comes back with probability 1 / mean, and the rate is kept.
  assert rare(then.lost[away] > 0, 3 / 4) > 1e-3
  assert rare(then.lost[away] > 0, 2 / 3) < 1e-3  # spells of three rounds
  assert rare(then.lost[~away] > 0, 0.3 / 0.7 / 4) > 1e-3
  assert (now.seconds[away] == 0).all()
  assert set(np.unique(now.lost)) == {0, phases.DOWN}


def test_stragglers_are_the_same_clients_or_new_ones():
  always = fault.stragglers(0.2, 10.0)
  fresh = fault.stragglers(0.2, 10.0, always=False)

  def slow(one, number):
    ratio = hit(one, number).compute / plain().compute
    assert set(np.unique(ratio)) == {1.0, 10.0}
    return ratio == 10.0

  assert rare(slow(always, 0), 0.2) > 1e-3
  np.testing.assert_array_equal(slow(always, 0), slow(always, 9))
  assert rare(slow(fresh, 0) & slow(fresh, 9), 0.04) > 1e-3
  found = hit(always)
  np.testing.assert_array_equal(found.up, plain().up)


def test_copies_and_delays_come_at_their_rate():
  copies = hit(fault.duplicates(0.3)).copies
  assert set(np.unique(copies)) == {1, 2}
  assert rare(copies == 2, 0.3) > 1e-3
  assert rare(copies == 2, 0.34) < 1e-3
  more = hit(fault.late(0.3, 5.0)).seconds - plain().seconds
  assert set(np.unique(more)) == {0.0, 5.0}
  assert rare(more == 5.0, 0.3) > 1e-3
  assert rare(more == 5.0, 0.34) < 1e-3


@pytest.mark.parametrize("kind", sorted(corruption.BITS))
def test_corruptions_come_at_their_rate_and_anew_each_round(kind):
  one = fault.corrupt(0.3, kind)
  first, second = (one.traits(CLIENTS, i, 0)["corrupt"] for i in (0, 1))
  assert set(np.unique(first)) == {0, corruption.BITS[kind]}
  assert rare(first > 0, 0.3) > 1e-3
  assert rare(first > 0, 0.34) < 1e-3
  assert rare((first > 0) & (second > 0), 0.09) > 1e-3


def test_labels_are_wrong_at_their_rate_and_any_other_one_as_likely():
  rng = np.random.default_rng(0)
  label = rng.integers(0, 4, 5000).astype(np.int32)
  people = data.population(
    {"x": np.zeros((5000, 1), np.float32), "label": label},
    np.repeat(np.arange(50), 100),
    heldout=0.2,
  )
  one = fault.mislabel(0.3, 4)
  found = one.data(people, 0).examples["label"]
  away = (found.astype(np.int64) - label) % 4
  trained = away[people.train.rows]
  assert rare(trained > 0, 0.3) > 1e-3
  assert rare(trained > 0, 0.34) < 1e-3
  times = np.bincount(trained, minlength=4)[1:]
  assert scipy.stats.chisquare(times).pvalue > 1e-3
  assert not away[people.heldout.rows].any()
  again, other = (one.data(people, s).examples["label"] for s in (0, 1))
  np.testing.assert_array_equal(again, found)
  assert (other != found).any()
  with pytest.raises(ValueError, match="must be below classes=3, got 3"):
    fault.mislabel(0.3, 3).data(people, 0)
  plain = data.population({"x": np.eye(4)}, [0, 0, 1, 1])
  with pytest.raises(ValueError, match="changes an integer 'label'"):
    one.data(plain, 0)


def test_a_crash_loses_all_reports_and_takes_time():
  one, other = fault.crash(3, 5, restart=60.0), fault.crash([1, 4])
  down = [i for i in range(15) if one.pause(i, 0)]
  assert down == [3, 8, 13]
  for i in range(15):
    found = hit(one, i)
    assert found.arrived.any() == (i not in down)
    assert one.pause(i, 0) == (60.0 if i in down else 0.0)
    # Clients have done all their work before they learn of it.
    np.testing.assert_array_equal(found.spent, plain().spent)
  assert [i for i in range(9) if other.pause(i, 0)] == [1, 4]
  both = fault.compose(one, fault.crash(3, restart=5.0))
  assert both.pause(3, 0) == 65.0


# Scenarios.


@pytest.mark.parametrize("name", scenario.SCENARIOS)
def test_scenarios_are_faults_that_compose(name):
  options = {"classes": 3} if name == "drift" else {}
  faults = scenario.SCENARIOS[name](**options)
  both = fault.compose(*faults)
  assert both.parts == faults or len(faults) <= 1
  assert same(hit(both, 1), hit(fault.compose(*faults), 1))


@pytest.mark.parametrize("name", ["flaky", "offline", "stragglers"])
def test_in_a_storm_nobody_arrives_who_would_not_arrive_otherwise(name):
  storm = hit(fault.compose(*scenario.storm()), 1)
  part = hit(fault.compose(*scenario.SCENARIOS[name]()), 1)
  assert not (storm.arrived & ~part.arrived).any()
  assert storm.arrived.sum() < plain().arrived.sum()


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: fault.dropout(1.5), r"rate must be in \[0, 1\], got rate=1.5"),
    (lambda: fault.dropout(0.1, "uplod"), "did you mean 'upload'"),
    (lambda: fault.disconnect(1.0), r"rate must be in \[0, 1\), got rate=1.0"),
    (lambda: fault.disconnect(0.5, 1.0), "last at least 2 steps"),
    (lambda: fault.stragglers(0.1, 0.0), "factor must be a positive number"),
    (lambda: fault.late(0.1, -1.0), "seconds must be a positive number"),
    (lambda: fault.duplicates(-0.1), r"rate must be in \[0, 1\]"),
    (lambda: fault.crash(-1), "at must be an integer of at least 0"),
    (lambda: fault.crash(1, 0), "every must be an integer of at least 1"),
    (lambda: fault.crash(1, restart=-1.0), "restart must be seconds >= 0"),
    (lambda: fault.corrupt(0.1, "nans"), "did you mean 'nan'"),
    (lambda: fault.corrupt(0.1, flips=2.0), r"flips must be in \(0, 1\]"),
    (lambda: fault.drift_labels(0, 3), "rounds must be an integer of at least"),
    (lambda: fault.drift_labels(3, 1), "classes must be an integer of at lea"),
    (lambda: fault.drift_features(3, np.inf), "shift must be a finite number"),
  ],
)
def test_options_that_make_no_sense_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
