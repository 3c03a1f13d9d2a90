"""The table of the audit: what tells most, what tells nothing."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHANCE = ("local_dp", "client_dp", "secure_wire")


@pytest.fixture
def clothes():
  """Prepares the images, which a machine without apt-get cannot."""
  command = pathlib.Path(sys.executable).parent / "fedjax-peft"
  done = subprocess.run(
    [command, "data", "prepare", "fashion_mnist"],
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  if done.returncode != 0:
    pytest.skip(f"no Fashion-MNIST here: {done.stderr.strip()[-300:]}")


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.usefixtures("clothes")
def test_the_table_is_ordered_as_the_boundaries_are():
  done = subprocess.run(
    [sys.executable, ROOT / "scripts" / "audit.py", "--quick", "--json"],
    capture_output=True,
    text=True,
    env=os.environ | {"XLA_FLAGS": ""},
    timeout=900,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-800:]
  rows = json.loads(done.stdout.splitlines()[-1])["boundaries"]
  decibels = {name: row["inversion"]["psnr"] for name, row in rows.items()}
  assert max(decibels, key=decibels.get) == "full_gradient"
  assert decibels["full_gradient"] > decibels["adapters"] + 5
  assert decibels["adapters"] > decibels["adapters_sign"]
  for name in (*CHANCE, "secure_sum"):
    assert rows[name]["inversion"]["better_than_guess"] == 0
  for name in CHANCE:
    # Intervals of 95 %, fixed seeds.
    members = rows[name]["membership"]["alignment"]
    assert members["low"] < 0.5 < members["high"]
    guess = rows[name]["property"]
    assert guess["low"] < guess["chance"] < guess["high"]
  full = rows["full_gradient"]
  assert full["membership"]["alignment"]["low"] > 0.6
  assert full["property"]["low"] > 0.9
  # A sum hides who said what, not what was said in all.
  total = rows["secure_sum"]
  for name, key in (("membership", "alignment"), ("property", None)):
    more, less = full[name], total[name]
    if key:
      more, less = more[key], less[key]
    assert more["value"] > less["value"]
  for row in rows.values():
    if row["epsilon_accounted"] is not None:
      assert row["epsilon_lower"] < row["epsilon_accounted"]
  assert full["epsilon_lower"] > 3
