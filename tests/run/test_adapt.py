"""Configs whose server decides cuts, bits, powers and bandwidth every round."""

import dataclasses
import functools
import shutil

import numpy as np
import pytest

from fedjax_peft import __main__, build, config, record
from fedjax_peft.network import profile

pytestmark = pytest.mark.usefixtures("standard_promotion")

RECORDS = "records.jsonl"
# No packet is lost, so that what is planned is what is trained.
NETWORK = (
  "rounds=4",
  "model.options={vocab=40, width=16, ffn=16, heads=2, depth=1}",
  'model.peft=[{method="tune", where="head/.*"}]',
  'uplink=[{link="weigh"}]',
  "client.steps=2",
  'network.radio={kind="radio", bandwidth=1e5}',
  "network.fleet={phone=0.5, phone_low=0.5}",
  "split.cuts={embeddings=0.5, whole=0.5}",
  "split.server_flops=1e8",
  "evaluate.every=4",
  "evaluate.clients=1",
)
MOVING = (*NETWORK, "split.bits=true")


def by(name, *options):
  said = ", ".join([f'by="{name}"', *options])
  return f"network.allocate={{{said}}}"


@pytest.fixture(scope="session")
def play(tmp_path_factory, tiny_text):
  """Runs a config with overrides, once; returns the run's directory."""

  @functools.cache
  def run(*overrides):
    root = tmp_path_factory.mktemp("adapt")
    path = root / "tiny.toml"
    path.write_text(tiny_text)
    assert __main__.main(arguments(path, root / "run", *overrides)) == 0
    return root / "run"

  return run


def arguments(path, out, *overrides):
  command = ["train", str(path), "--out", str(out), "--traceback"]
  return command + [part for x in overrides for part in ("--set", x)]


def built(tiny, *overrides):
  return build.build(config.load(tiny, list(overrides)))


def planned(parts, rounds):
  memory, found = parts.cohort.init(), []
  for number in range(rounds):
    turn, memory = parts.cohort.turn(memory, number, {})
    found.append(turn)
  return found


def plain(run):
  """Records and the ledger's files, without what depends on the machine."""
  lines = [
    {k: v for k, v in line.items() if not k.startswith("wall/")}
    for line in record.read(run / RECORDS)
  ]
  return lines, {p.name: p.read_bytes() for p in (run / "ledger").iterdir()}


JOINT = (*MOVING, by("joint", "weight=0.7", "cuts=[1, 2]"))


def test_what_is_planned_is_what_crosses_and_is_recorded(play):
  lines = record.read(play(*JOINT) / RECORDS)
  crossed = [line["cut/up_bytes"] for line in lines]
  for line in lines:
    for way in ("up", "down"):
      assert line[f"cut/{way}_bytes"] == line[f"device/stream_{way}_bytes"]
    assert 1 <= line["allocate/cut"] <= 2
    assert 2 <= line["allocate/bits"] <= 32
    assert 1 / 5 <= line["allocate/band_max"] <= 1 + 1e-9
  assert min(crossed) > 0
  assert {line["wall/programs"] for line in lines} == {1}


def test_a_run_that_is_stopped_resumes_bit_for_bit(play, tmp_path):
  whole = play(*JOINT)
  copy = tmp_path / "copy"
  shutil.copytree(whole.parent, copy)
  run = copy / "run"
  shutil.rmtree(run / "checkpoints" / "4")
  command = [*arguments(copy / "tiny.toml", run, *JOINT), "--resume"]
  assert __main__.main(command) == 0
  assert plain(run) == plain(whole)


def test_clients_are_asked_if_the_least_of_their_cuts_fits(tiny, tmp_path):
  """Where all begin with the whole model, but the machines hold a part."""
  whole = (*MOVING, "split.cuts={whole=1.0}")
  parts = built(tiny, *whole, by("cut"))
  split, names = parts.algorithm.work.split, parts.model.origin.stages()
  needs = [split.memory({"cut": c + 1}) for c in range(len(names))]
  assert needs == sorted(set(needs))
  fleet = profile.fleet({"phone": 1.0}, 12, seed=0)
  room = np.full(12, (needs[0] + needs[1]) // 2)
  path = tmp_path / "fleet.csv"
  profile.write_fleet(dataclasses.replace(fleet, memory=room), path)
  small = (f"network.fleet_file={path}", "network.fleet={}")
  (turn,) = planned(built(tiny, *whole, by("cut"), *small), 1)
  assert turn.record["device/excluded"] == 0
  assert set(turn.traits["cut"]) == {1}


@pytest.mark.parametrize("name", ["equal", "bandwidth", "joint"])
def test_what_needs_no_cut_that_moves_works_without_one(tiny, name):
  parts = built(
    tiny,
    *NETWORK[1:2],
    'model.peft=[{method="tune", where="server/head/.*"}]',
    'split.ends={device="embeddings"}',
    by(name),
  )
  (turn,) = planned(parts, 1)
  assert "cut" not in turn.traits
  assert ("allocate/band_max" in turn.record) == (name != "equal")


def test_bits_move_only_if_the_split_says_so(tiny):
  deep = ('least_cut="layers/0"', 'cuts=["embeddings", "layers/0", "whole"]')
  (turn,) = planned(built(tiny, *NETWORK, by("joint", *deep)), 1)
  assert set(turn.traits) == {"cut"}
  assert (turn.traits["cut"] >= 2).all()


@pytest.mark.parametrize(
  ("overrides", "sentence"),
  [
    ((by("joined"),), "did you mean 'joint'"),
    (("network.allocate={weight=0.5}",), "must say its by"),
    ((by("cut"),), "without split.cuts"),
    ((by("joint", "cuts=[1]"),), "without split.cuts"),
    ((*NETWORK, by("joint", "bits=[4]")), "split.bits=true"),
    ((*NETWORK, by("joint", "wait=0.5")), "did you mean 'weight'"),
    ((*NETWORK, by("joint", "weight=2.0")), "weight must be in"),
    ((*NETWORK, by("joint", 'cuts=["tail"]')), "must name stages"),
    ((*MOVING, by("bandwidth")), "chooses bits"),
    (MOVING, "network.allocate, which says nothing"),
    (
      ("split.bits=true", 'split.ends={device="embeddings"}', by("joint")),
      "cuts that move",
    ),
    (
      (*MOVING, by("joint"), 'split.up=[{link="int8"}]'),
      "leave up and down out",
    ),
    ((by("joint"), 'network.radio={kind="wired"}'), "chosen in one cell"),
    ((by("equal"), 'network.also=[{kind="wifi"}]'), "chosen in one cell"),
    (
      (
        by("bandwidth"),
        'network.clock={kind="buffered", concurrency=4, buffer=2}',
      ),
      "begin at different times",
    ),
    (
      (
        by("joint"),
        'algorithm={name="gossip"}',
        'uplink=[{link="weigh"}]',
        "server.optimizer=sgd",
        "server.learning_rate=1.0",
      ),
      "gossip has no server that decides",
    ),
  ],
)
def test_what_cannot_be_decided_is_refused_in_one_sentence(
  tiny, overrides, sentence
):
  with pytest.raises(ValueError, match=sentence) as refused:
    built(tiny, *overrides)
  assert "\n" not in str(refused.value)
