"""Profiles and fleets: drawn, written down and read again."""

import dataclasses

import numpy as np
import pytest
import scipy.stats

from fedjax_peft.network import profile

MIX = {"phone": 0.6, "gateway": 0.3, "cloud": 0.1}
N = 20_000
FIELDS = [field.name for field in dataclasses.fields(profile.Fleet)]


def same(a, b):
  assert [a.kinds[k] for k in a.kind] == [b.kinds[k] for k in b.kind]
  for name in FIELDS[2:]:
    x, y = getattr(a, name), getattr(b, name)
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def test_kinds_come_in_their_shares_and_no_others():
  found = profile.fleet(MIX, N, 0)
  counts = np.bincount(found.kind)
  # p > 1e-4 with this seed; a share moved by two points fails.
  shares = np.array(list(MIX.values()))
  assert scipy.stats.chisquare(counts, shares * N).pvalue > 1e-4
  wrong = shares + np.array([0.02, -0.02, 0])
  assert scipy.stats.chisquare(counts, wrong * N).pvalue < 1e-4


def test_without_spread_a_machine_is_that_of_its_profile():
  found = profile.fleet(MIX, 50, 1)
  same(
    found,
    profile.Fleet.of([profile.PROFILES[found.kinds[k]] for k in found.kind]),
  )


def test_the_speed_of_a_kind_is_log_normal_around_its_profile():
  found = profile.fleet({"phone": 1.0}, N, 0, spread=0.5)
  z = np.log(found.flops / profile.PROFILES["phone"].flops)
  assert scipy.stats.kstest(z / 0.5, "norm").pvalue > 1e-4
  assert scipy.stats.kstest(z / 0.55, "norm").pvalue < 1e-4


def test_a_machine_depends_on_the_seed_and_the_client_alone():
  large = profile.fleet(MIX, 300, 2, spread=0.3)
  same(profile.fleet(MIX, 40, 2, spread=0.3), large.take(np.arange(40)))
  assert np.any(profile.fleet(MIX, 300, 3).kind != large.kind)


def test_a_part_of_a_part_is_a_part():
  whole = profile.fleet(MIX, 60, 0, spread=0.3)
  ids, again = np.array([7, 3, 3, 59]), np.array([2, 0])
  same(whole.take(ids).take(again), whole.take(ids[again]))


def test_a_fleet_is_read_as_it_was_written(tmp_path):
  whole = profile.fleet(MIX, 200, 0, spread=0.7)
  profile.write_fleet(whole, tmp_path / "fleet.csv")
  same(profile.read_fleet(tmp_path / "fleet.csv"), whole)
  # Rows may come in any order.
  head, *rows = (tmp_path / "fleet.csv").read_text().splitlines()
  (tmp_path / "turned.csv").write_text("\n".join([head, *rows[::-1]]))
  same(profile.read_fleet(tmp_path / "turned.csv"), whole)


def test_figures_without_a_column_are_those_of_the_kind(tmp_path):
  path = tmp_path / "fleet.csv"
  path.write_text("kind,client,flops\nphone,1,5e9\ncloud,0,7e13\n")
  wanted = profile.Fleet.of(
    [
      profile.PROFILES["cloud"]._replace(flops=7e13),
      profile.PROFILES["phone"]._replace(flops=5e9),
    ]
  )
  same(profile.read_fleet(path), wanted)


@pytest.mark.parametrize(
  ("text", "match"),
  [
    ("client,flops\n0,1\n", "column 'kind' is missing, got client, flops"),
    ("client,kind,flop\n0,phone,1\n", "did you mean 'flops'"),
    ("client,kind\n0,fone\n", "did you mean 'phone'"),
    ("client,kind\n0,phone\n2,phone\n", "each once, got 2 rows"),
    ("client,kind\n0,phone\n0,phone\n", "each once, got 2 rows"),
    ("client,kind\n", "got 0 rows"),
    ("client,kind,flops\n0,phone,fast\n", "must be a CSV .*'fast'"),
    ("client,kind,flops\n0,phone,\n", "'flops' must hold a value in every row"),
    ("client,kind,flops\n0,phone,-1\n", "above zero .* -1.0 for client 0"),
    ("client,kind,idle\n0,phone,-1\n", "at least zero .* -1.0 for client 0"),
    ("client,kind,flops\n0,phone,inf\n", "finite, got inf"),
    ("client,kind,flops\n0,phone,nan\n", "'flops' must hold a value"),
  ],
)
def test_a_bad_file_is_refused_with_one_sentence(tmp_path, text, match):
  (tmp_path / "fleet.csv").write_text(text)
  with pytest.raises(ValueError, match=match) as error:
    profile.read_fleet(tmp_path / "fleet.csv")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("build", "match"),
  [
    (lambda: profile.fleet({"fone": 1.0}, 5, 0), "did you mean 'phone'"),
    (lambda: profile.fleet({"phone": 0.9}, 5, 0), "sum to one"),
    (lambda: profile.fleet({"phone": 2, "cloud": -1}, 5, 0), "sum to one"),
    (lambda: profile.fleet(MIX, 0, 0), "clients must be an integer"),
    (lambda: profile.fleet(MIX, 5, 0, spread=-1.0), "spread must be"),
    (lambda: profile.fleet(MIX, 5, 0).take([5]), r"in \[0, 5\)"),
    (lambda: profile.fleet(MIX, 5, 0).take([-1]), r"in \[0, 5\)"),
  ],
)
def test_a_bad_argument_is_refused(build, match):
  with pytest.raises(ValueError, match=match):
    build()


def test_profiles_are_known_by_their_names_and_ordered_by_strength():
  assert all(p.name == name for name, p in profile.PROFILES.items())
  speed = [profile.PROFILES[k].flops for k in ("phone_low", "phone", "cloud")]
  assert speed == sorted(speed)
  for p in profile.PROFILES.values():
    assert p.idle < p.receive <= p.send < p.compute
