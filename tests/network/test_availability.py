"""Who can be reached when: closed forms, and files by brute force."""

import hypothesis
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from hypothesis import strategies as st

from fedjax_peft.network import availability

CLIENTS = np.arange(4000)
HOUR = 3600.0
MAKE = {
  "always": availability.always,
  "diurnal": availability.diurnal,
  "window": lambda: availability.diurnal(hours=8.0, low=0.0),
  "markov": availability.markov,
  "every": lambda: availability.every(
    availability.markov(), availability.diurnal()
  ),
}


def rare(found, share):
  """The p-value of a count of so many among independent clients."""
  return scipy.stats.binomtest(
    int(found.sum()), found.size, float(share)
  ).pvalue


@pytest.mark.parametrize("name", MAKE)
def test_nobody_depends_on_who_else_is_asked_or_in_what_order(name):
  where = MAKE[name]()
  ids, times = CLIENTS[:50], np.array([0.0, 601.0, 7e5])
  grid = where.at(3, ids, times[:, None])
  assert grid.dtype == bool
  assert grid.shape == (3, 50)
  mixed = np.random.default_rng(0).permutation(50)
  for t, row in zip(times, grid, strict=True):
    np.testing.assert_array_equal(where.at(3, ids[mixed], t), row[mixed])
    np.testing.assert_array_equal(where.at(3, ids[:7], t), row[:7])
  assert where.at(3, 5, 601.0) == grid[1, 5]


@pytest.mark.parametrize("hour", [2.0, 5.0, 14.0, 23.5])
def test_a_day_follows_the_cosine(hour):
  # 4,000 clients in one time zone, p = 1e-3.
  where = availability.diurnal(low=0.2, high=0.8, peak=2.0, zones=[0])
  wanted = 0.2 + 0.6 * (1 + np.cos(2 * np.pi * (hour - 2) / 24)) / 2
  for day in (0, 3):
    found = where.at(0, CLIENTS, (24 * day + hour) * HOUR)
    assert rare(found, wanted) > 1e-3
    assert rare(found, wanted + (0.05 if wanted < 0.5 else -0.05)) < 1e-3


def test_time_zones_spread_the_night_over_the_day():
  # At any moment the window of 6 hours is open in 7 of 24 whole zones.
  where = availability.diurnal(low=0.0, high=1.0, peak=2.0, hours=6.0)
  for time in (0.0, 5 * HOUR, 100 * HOUR):
    found = where.at(1, CLIENTS, time)
    assert rare(found, 7 / 24) > 1e-3
    assert rare(found, 6 / 24) < 1e-3


def test_a_client_keeps_its_hours_every_day():
  where = availability.diurnal(low=0.0, high=1.0, hours=6.0)
  day = np.arange(24)[:, None] * HOUR
  first = where.at(0, CLIENTS[:100], day)
  np.testing.assert_array_equal(
    where.at(0, CLIENTS[:100], day + 96 * HOUR), first
  )
  np.testing.assert_array_equal(first.sum(0), 7)


def test_a_draw_is_held():
  where = availability.diurnal(low=0.5, high=0.5, hold=100.0)
  first = where.at(0, CLIENTS, 200.0)
  np.testing.assert_array_equal(where.at(0, CLIENTS, 299.0), first)
  assert rare(where.at(0, CLIENTS, 300.0)[first], 0.5) > 1e-3


@pytest.mark.parametrize("lag", [60.0, 600.0, 3600.0])
def test_spells_are_those_of_the_process_in_continuous_time(lag):
  # The oracle is the exponential of the generator; p = 1e-3.
  on, off = 2000.0, 1000.0
  where = availability.markov(on=on, off=off)
  generator = np.array([[-1 / off, 1 / off], [1 / on, -1 / on]])
  chance = scipy.linalg.expm(generator * lag)
  before, after = (where.at(0, CLIENTS, 6000.0 + t) for t in (0.0, lag))
  assert rare(before, on / (on + off)) > 1e-3
  assert rare(after[before], chance[1, 1]) > 1e-3
  assert rare(after[~before], chance[0, 1]) > 1e-3
  slower = scipy.linalg.expm(generator * lag / 3)
  assert rare(after[~before], slower[0, 1]) < 1e-3  # a wrong rate fails


SPELLS = st.lists(
  st.tuples(st.integers(0, 5), st.integers(0, 20), st.integers(1, 9)),
  min_size=1,
  max_size=12,
)


@pytest.fixture
def write(tmp_path):
  def write(text):
    path = tmp_path / "here.csv"
    path.write_text(text)
    return path

  return write


@hypothesis.settings(
  deadline=None,
  max_examples=60,
  derandomize=True,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(SPELLS, st.one_of(st.none(), st.integers(1, 40)))
def test_a_file_is_followed_line_by_line(write, spells, period):
  lines = [f"{c},{s},{s + n}" for c, s, n in spells]
  path = write("\n".join(["client,start,end", *lines, ""]))
  where = availability.trace(path, period=period)
  ids, times = np.arange(7), np.arange(0, 61) / 2
  found = where.at(0, ids, times[:, None])
  now = times % period if period else times
  wanted = np.zeros_like(found)
  for c, s, n in spells:
    wanted[:, c] |= (s <= now) & (now < s + n)
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("client,start\n1,2\n", "column 'end' is missing"),
    ("client,start,end\n", "at least one row"),
    ("client,start,end\n1,5,5\n", "0 <= start < end, got client=1 start=5.0"),
    ("client,start,end\n-1,0,5\n", "got client=-1"),
    ("client,start,end\nx,0,5\n", "must be a CSV with the columns"),
  ],
)
def test_files_that_are_no_trace_are_refused(write, text, message):
  with pytest.raises(ValueError, match=message):
    availability.trace(write(text))


def test_every_is_the_intersection():
  parts = availability.markov(), availability.diurnal()
  found = availability.every(*parts).at(0, CLIENTS, 5e4)
  one, other = (p.at(0, CLIENTS, 5e4) for p in parts)
  np.testing.assert_array_equal(found, one & other)
  assert 0 < found.sum() < one.sum()
  assert availability.every().at(0, CLIENTS, 0.0).all()


def test_waiting_ends_at_the_first_look_at_which_enough_are_there(write):
  where = availability.trace(
    write("client,start,end\n0,100,200\n1,150,300\n2,190,1000\n")
  )
  ids = np.arange(3)
  for count, wanted in ((1, 120.0), (2, 180.0)):
    found = availability.wait(where, 0, ids, 0.0, count=count)
    assert found == wanted
    assert where.at(0, ids, found).sum() >= count
  assert availability.wait(where, 0, ids, 195.0, count=3) == 0
  assert availability.wait(where, 0, ids, 250.0, count=2, step=7.0) == 0
  with pytest.raises(ValueError, match="3 of 3 clients must be there within"):
    availability.wait(where, 0, ids, 250.0, count=3)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: availability.diurnal(low=0.9, high=0.1), "low <= high"),
    (lambda: availability.diurnal(peak=24.0), r"an hour in \[0, 24\)"),
    (lambda: availability.diurnal(hours=0.0), r"hours must be in \(0, 24\]"),
    (lambda: availability.diurnal(zones=[]), "zones must be one or more"),
    (lambda: availability.diurnal(hold=0.0), "hold must be a positive number"),
    (lambda: availability.markov(on=-1.0), "on must be a positive number"),
  ],
)
def test_options_that_make_no_sense_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
