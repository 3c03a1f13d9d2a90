"""Scenes: simulated networks as configs say them, from build to resume."""

import dataclasses
import functools
import re
import shutil

import numpy as np
import pyarrow.parquet
import pytest

from fedjax_peft import (
  __main__,
  build,
  config,
  console,
  demand,
  record,
  scene,
  tree,
)
from fedjax_peft.network import clock, ledger, profile, radio, selection

pytestmark = pytest.mark.usefixtures("standard_promotion")

SMALL = 'model.peft=[{method="tune", where="head/.*"}]'
SLOW = "bandwidth=2e4"  # a cell in which a tiny model takes a while
SYNCHRONOUS = 'network.clock={kind="synchronous"}'
BUFFERED = 'network.clock={kind="buffered", concurrency=6, buffer=3}'

WAYS, SHOWN = ("up", "down"), ("seconds", "dollars")
RECORDS = "records.jsonl"

# Every clock, radio, availability and selection is in one of them.
SCENES = {
  "synchronous": (
    SYNCHRONOUS,
    'network.radio={kind="wired", up=1e5}',
    "network.prices={gigabyte=1.0, request=0.01}",
    "network.fleet={phone=0.5, gateway=0.5}",
    "network.spread=0.3",
    'network.select={method="poisson", rate=0.5}',
  ),
  "deadline": (
    'network.clock={kind="deadline", seconds=20.0, over=0.4}',
    f'network.radio={{kind="cell", {SLOW}}}',
    'network.available={kind="diurnal", low=0.4}',
    'network.select={method="by_loss", power=2.0}',
    'network.faults=[{fault="dropout", rate=0.3}, '
    '{fault="late", rate=0.2, seconds=5.0}]',
  ),
  "buffered": (
    BUFFERED,
    'algorithm={name="fedbuff"}',
    f'network.radio={{kind="wifi", {SLOW}}}',
    'network.available={kind="markov", on=600.0, off=60.0}',
    'network.select={method="resource", deadline=5.0}',
    'network.scenario={name="stragglers", fraction=0.5}',
  ),
  "asynchronous": (
    'network.clock={kind="asynchronous", concurrency=4}',
    'algorithm={name="fedasync"}',
    "server.optimizer=sgd",
    "server.learning_rate=1.0",
    'network.radio={kind="satellite"}',
    'network.select={method="charged", then={method="fair", alpha=1.0}}',
    "network.recharge=1.0",
  ),
  "periodic": (
    'network.clock={kind="periodic", concurrency=3, seconds=20.0}',
    'algorithm={name="fedbuff", kind="hinge"}',
    'network.radio={kind="radio", bandwidth=2e3, fading="rician"}',
    'network.select={method="power_of_choice", d=6}',
    'network.scenario={name="storm"}',
  ),
  "edges": (
    'network.clock={kind="in_turn"}',
    'algorithm={name="hierarchical", edges=3, period=2}',
    "network.stations={speed=2.0, hysteresis=10.0, outages={1=[1, 2]}}",
    "network.backhaul={rate=1e6, latency=0.5}",
    "network.prices={backhaul=1.0}",
    'network.steps={method="adaptive", first=3}',
  ),
  "faults": (
    'network.clock={kind="synchronous", timeout=1000.0}',
    'algorithm={name="hierarchical", edges=2}',
    "network.stations={capacity=7}",
    'network.select={method="deadline_aware", deadline=1000.0}',
    'network.steps={method="within", deadline=50.0, most=3}',
    'network.faults=[{fault="corrupt", rate=0.3, kind="noise"}, '
    '{fault="mislabel", rate=0.2}, {fault="drift_labels", rounds=2}, '
    '{fault="crash", at=1, restart=30.0}]',
  ),
}


ROUNDS = {"buffered": 6, "deadline": 6}  # those that are resumed as well


def rounds_of(name):
  return f"rounds={ROUNDS.get(name, 3)}"


@pytest.fixture(scope="session")
def play(tmp_path_factory, tiny_text):
  """Runs a config with overrides, once; returns the run's directory."""

  @functools.cache
  def run(*overrides):
    root = tmp_path_factory.mktemp("scene")
    path = root / "tiny.toml"
    path.write_text(tiny_text)
    assert __main__.main(arguments(path, root / "run", *overrides)) == 0
    return root / "run"

  return run


def arguments(path, out, *overrides):
  command = ["train", str(path), "--out", str(out), "--traceback"]
  return command + [part for x in (SMALL, *overrides) for part in ("--set", x)]


def built(tiny, *overrides):
  return build.build(config.load(tiny, [SMALL, *overrides]))


def plain(run):
  """What must be equal in two runs: records, and every file of the ledger."""
  lines = [
    {k: v for k, v in line.items() if not k.startswith("wall/")}
    for line in record.read(run / RECORDS)
  ]
  return lines, {p.name: p.read_bytes() for p in (run / "ledger").iterdir()}


def test_the_scenes_use_every_clock_and_every_radio():
  said = " ".join(x for scene in SCENES.values() for x in scene)
  names = [*clock.CLOCKS, *radio.RADIOS, *selection.SELECTIONS, *scene.STEPS]
  missing = [n for n in names if n != "uniform" and f'"{n}"' not in said]
  assert not missing


@pytest.mark.parametrize("name", SCENES)
def test_a_scene_runs_and_what_it_spends_is_the_sum_of_its_ledger(play, name):
  run = play(rounds_of(name), *SCENES[name])
  lines = record.read(run / RECORDS)
  assert [x["round"] for x in lines] == list(range(1, ROUNDS.get(name, 3) + 1))
  spent = dict.fromkeys(ledger.SPENT, 0.0)
  for line in lines:
    part = run / "ledger" / f"round-{line['round']:06d}.parquet"
    table = {}
    if part.exists():
      table = pyarrow.parquet.read_table(part).to_pydict()
    for key in ("down_bytes", "up_bytes", "flops", "grams"):
      total = sum(table.get(key, ()))
      assert line[f"device/{key}"] == pytest.approx(total, rel=1e-12)
    for kind, parts in (
      ("joules", ("receive", "compute", "send")),
      ("dollars", ("compute", "traffic", "request")),
    ):
      total = sum(sum(table.get(f"{x}_{kind}", ())) for x in parts)
      assert line[f"device/{kind}"] == pytest.approx(total, rel=1e-12)
    assert line["device/asked"] == len(table.get("client", ()))
    assert line["device/used"] == sum(table.get("used", ()))
    assert line["train/clients"] <= line["device/used"]
    for key in ledger.SPENT:
      spent[key] += line[f"round/{key}"]
      assert line[f"spent/{key}"] == pytest.approx(spent[key], rel=1e-12)
  assert lines[-1]["spent/seconds"] > 0
  assert lines[-1]["spent/joules"] > 0


def test_bytes_are_summed_up_once_and_costs_are_shown(play, capsys):
  lines = record.read(play("rounds=3", *SCENES["synchronous"]) / RECORDS)
  console.say(console.summary(lines))
  out = capsys.readouterr().out
  for way in WAYS:
    total = console.decimal(sum(x[f"cloud/{way}_bytes"] for x in lines))
    assert re.search(rf"bytes {way}, .* {total}\n", out)
  last = lines[-1]
  seconds, dollars = (console.short(last[f"spent/{x}"]) for x in SHOWN)
  assert re.search(rf"simulated seconds +{seconds}\n", out)
  assert re.search(rf"dollars +{dollars}\n", out)
  assert f"{seconds} s simulated" in console.line(last)
  assert "simulated" not in console.line({"train/loss": 1.0})


def test_the_edges_of_a_hierarchy_pay_for_their_wires(play):
  lines = record.read(play("rounds=3", *SCENES["edges"]) / RECORDS)
  for line, due in zip(lines, (False, True, False), strict=True):
    assert (line["cloud/seconds"] > 0.5) == due
    assert (line["cloud/dollars"] > 0) == due
    places = [f"{x}/{way}_bytes" for x in ("device", "cloud") for way in WAYS]
    assert line["round/bytes"] == sum(line[k] for k in places)


def test_neighbours_send_to_each_other(tiny):
  parts = built(
    tiny,
    SYNCHRONOUS,
    'network.radio={kind="wired"}',
    'network.also=[{kind="wifi"}]',
    'network.access={use="switch"}',
    'algorithm={name="gossip", graph="ring"}',
    "server.optimizer=sgd",
    "server.learning_rate=1.0",
    'uplink=[{link="weigh"}]',
  )
  turn, _ = parts.cohort.turn(parts.cohort.init(), 0, {})
  ids = turn.table["client"]
  apart = (ids[:, None] - ids[None]) % 12
  neighbours = np.isin(apart, (1, 11)).sum(1)
  assert 0 < neighbours.sum() < 2 * ids.size
  one = tree.nbytes(parts.model.params)
  for way in WAYS:
    np.testing.assert_array_equal(turn.table[f"{way}_bytes"], one * neighbours)


def test_an_edge_that_is_out_hears_nobody(tiny):
  parts = built(tiny, *SCENES["edges"])
  memory, told = parts.cohort.init(), {"loss": np.ones(12)}
  heard = []
  for number in range(3):
    _, memory = parts.cohort.turn(memory, number, told)
    heard.append(set(memory["nodes"].tolist()))
  assert 1 not in heard[1]
  assert heard[0] | heard[2] == {0, 1, 2}


def test_machines_are_read_from_a_file(tiny, tmp_path):
  fleet = profile.fleet({"phone": 0.5, "cloud": 0.5}, 12, seed=3, spread=0.2)
  path = tmp_path / "fleet.csv"
  profile.write_fleet(fleet, path)
  overrides = (SYNCHRONOUS, 'network.radio={kind="wired"}')
  seconds = []
  for x in (f"network.fleet_file={path}", "network.fleet={phone=1.0}"):
    parts = built(tiny, *overrides, x)
    turn, _ = parts.cohort.turn(parts.cohort.init(), 0, {})
    seconds.append(turn.table)
  mine, others = seconds
  np.testing.assert_array_equal(mine["client"], others["client"])
  phone = profile.PROFILES["phone"].flops
  np.testing.assert_allclose(
    mine["compute_seconds"] * fleet.flops[mine["client"]],
    others["compute_seconds"] * phone,
    rtol=1e-12,
  )
  profile.write_fleet(fleet.take(np.arange(7)), path)
  with pytest.raises(ValueError, match="a row for each client: got 7 for 12"):
    built(tiny, *overrides, f"network.fleet_file={path}")


def test_who_comes_when_a_file_says_so(tiny, tmp_path):
  path = tmp_path / "spells.csv"
  rows = [f"{c},0,1e9" for c in (0, 2, 3, 5, 7)]
  path.write_text("client,start,end\n" + "\n".join(rows) + "\n")
  parts = built(
    tiny,
    SYNCHRONOUS,
    f'network.available={{kind="trace", path="{path}"}}',
  )
  turn, _ = parts.cohort.turn(parts.cohort.init(), 0, {})
  assert set(turn.table["client"].tolist()) <= {0, 2, 3, 5, 7}


LORA = 'model.peft=[{method="lora", rank=4}, {method="tune", where="head/.*"}]'
RANKS = (
  LORA,
  'aggregate.rule={method="hetlora"}',
  "aggregate.ranks={1=0.4, 2=0.3, 4=0.3}",
  'uplink=[{link="count"}]',
  "server.optimizer=sgd",
)


def test_clients_whose_memory_is_small_get_the_rank_that_fits(tiny, tmp_path):
  parts = built(tiny, *RANKS, SYNCHRONOUS)
  ranks = parts.data.traits["rank"]
  need = demand.needs(parts.algorithm.work, parts.model, parts.data)
  most = {r: need[ranks == r].max() for r in (1, 2, 4)}
  assert most[1] < most[2] < most[4]
  # Machines that have the room for rank 1, for rank 2 and for all.
  fits = np.array([1, 2, 4])[np.arange(12) % 3]
  room = np.array([most[r] for r in fits], np.int64) + 1
  fleet = profile.fleet({"phone": 1.0}, 12, seed=0)
  path = tmp_path / "fleet.csv"
  profile.write_fleet(dataclasses.replace(fleet, memory=room), path)
  more = (*RANKS, SYNCHRONOUS, f"network.fleet_file={path}", "cohort.size=3")
  less = built(tiny, *more, "network.unfit=rank")
  found = less.data.traits["rank"]
  np.testing.assert_array_equal(found, np.minimum(ranks, fits))
  assert (ranks > fits).any()
  for some, out in ((less, 0), (built(tiny, *more), ranks > fits)):
    turn, _ = some.cohort.turn(some.cohort.init(), 0, {})
    excluded = np.sum(some.data.seen & out)
    assert turn.record["device/excluded"] == excluded


@pytest.mark.parametrize("kind", ["bytes", "seconds"])
def test_a_run_ends_with_the_round_that_spends_its_budget(
  play, tiny, tmp_path, capsys, kind
):
  free = play("rounds=3", *SCENES["synchronous"])
  spent = [x[f"spent/{kind}"] for x in record.read(free / RECORDS)]
  limit = (spent[0] + spent[1]) / 2
  run = tmp_path / "run"
  command = arguments(
    tiny, run, "rounds=3", *SCENES["synchronous"], f"budget.{kind}={limit!r}"
  )
  assert __main__.main(command) == 0
  out = capsys.readouterr().out
  assert f"after round 2: the budget of {kind} has run out" in out
  lines = record.read(run / RECORDS)
  assert len(lines) == 2
  assert lines[-1]["stopped"] in out
  assert "eval/accuracy" in lines[-1]
  assert "stopped" not in lines[0]
  before = (run / RECORDS).read_bytes()
  assert __main__.main([*command, "--resume"]) == 0
  assert (run / RECORDS).read_bytes() == before
  assert f"the budget of {kind} has run out" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["buffered", "deadline"])
def test_a_simulated_run_that_is_stopped_resumes_bit_for_bit(
  play, tmp_path, name
):
  overrides = (rounds_of(name), *SCENES[name])
  whole = play(*overrides)
  copy = tmp_path / "copy"
  shutil.copytree(whole.parent, copy)
  run = copy / "run"
  shutil.rmtree(run / "checkpoints" / "6")
  command = [*arguments(copy / "tiny.toml", run, *overrides), "--resume"]
  assert __main__.main(command) == 0
  assert plain(run) == plain(whole)
  before, after = (record.read(x / RECORDS) for x in (whole, run))
  again = [
    x["wall/seconds"] != y["wall/seconds"]
    for x, y in zip(before, after, strict=True)
  ]
  assert again == [False] * 4 + [True] * 2  # what came after the checkpoint


@pytest.mark.parametrize(
  ("overrides", "sentence"),
  [
    ('network.clock={kind="sync"}', "did you mean 'synchronous'"),
    ("network.clock={seconds=3}", "must say its kind"),
    ('network.clock={kind="deadline", second=3}', "did you mean 'seconds'"),
    (
      'network.clock={kind="buffered", concurrency=4}',
      "'buffer' of .* missing",
    ),
    (
      'network.clock={kind="buffered", concurrency=4, buffer=5}',
      "cannot hold more than who is at work",
    ),
    (
      'network.clock={kind="asynchronous", concurrency=12}',
      "12 clients are to work at a time, but 11 can",
    ),
    ('network.access={use="split"}', "name others, network.also"),
    ('network.radio={kind="wify"}', "did you mean 'wifi'"),
    ('network.radio={kind="cell", bandwith=1}', "did you mean 'bandwidth'"),
    ("network.fleet={fone=1.0}", "did you mean 'phone'"),
    ("network.fleet={phone=0.5}", "shares of the clients that sum to one"),
    ("network.fleet_file=nowhere.csv", "nowhere.csv"),
    ('network.available={kind="daily"}', "always, diurnal, markov, trace"),
    ('network.available={kind="markov", on=-600}', "network.available: .*on"),
    ('network.select={method="by_los"}', "did you mean 'by_loss'"),
    (
      'network.select={method="charged", then={method="by_loss", pow=2}}',
      r"network.select.then: unknown option 'pow' of by_loss\(power\)",
    ),
    ('network.scenario={name="strom"}', "did you mean 'storm'"),
    ('network.faults=[{fault="dropout"}]', "faults.0: option 'rate' of"),
    ('network.faults=[{fault="dropout", rate=2.0}]', "faults.0: .*rate"),
    ('network.steps={method="fixed"}', "one of adaptive, within"),
    ('network.steps={method="adaptive", first=0}', "first must be an integer"),
    (
      'network.steps={method="within", deadline=-1.0, most=2}',
      "network.steps: deadline must be a positive number",
    ),
    ("network.stations={spacin=3.0}", "did you mean 'spacing'"),
    ("network.stations={speed=-3.0}", "network.stations: speed must be"),
    ("network.backhaul={rat=3.0}", "did you mean 'rate'"),
    ("network.prices={gigabit=3.0}", "did you mean 'gigabyte'"),
    ("network.prices={gigabyte=-3.0}", "network.prices.gigabyte must be"),
    ("network.unfit=rank", "list them, aggregate.ranks="),
    ("budget.joules=3.0", "budget.joules needs a simulated network"),
    ('cohort.group={by="update"}', 'algorithm={name="clustered", clusters=3}'),
    ('algorithm={name="clustered", clusters=2}', 'cohort.group={by="update"}'),
  ],
)
def test_what_no_network_has_is_refused_in_one_sentence(
  tiny, overrides, sentence
):
  with pytest.raises((ValueError, OSError)) as refused:
    built(tiny, overrides)
  message = str(refused.value)
  assert re.search(sentence, message), message
  assert "\n" not in message


@pytest.mark.parametrize(
  ("overrides", "sentence"),
  [
    (
      ("network.fleet={phone=1.0}", "network.fleet_file=x.csv"),
      "answer one question",
    ),
    ((SYNCHRONOUS, "cohort.sampler=poisson"), "said by network.select"),
    (
      (
        BUFFERED,
        'algorithm={name="gossip"}',
        'uplink=[{link="weigh"}]',
        "server.optimizer=sgd",
        "server.learning_rate=1.0",
      ),
      "use a synchronous or deadline clock",
    ),
    (
      (SYNCHRONOUS, 'algorithm={name="centralized"}'),
      "crosses no network",
    ),
    (
      (
        *SCENES["edges"][:2],
        "network.stations={outages={7=[0, 1]}}",
      ),
      r"an edge in 0\.\.2",
    ),
    (
      (*SCENES["edges"][:2], 'cohort.group={by="device"}'),
      "both stations and a grouping",
    ),
    (
      ('algorithm={name="clustered", clusters=2}', 'cohort.group={by="loss"}'),
      'write algorithm={name="ifca"',
    ),
    (
      (
        'algorithm={name="clustered", clusters=2}',
        'cohort.group={by="planted"}',
      ),
      "write data.groups=3",
    ),
  ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(
  tiny, overrides, sentence
):
  with pytest.raises(ValueError, match=sentence) as refused:
    built(tiny, *overrides)
  assert "\n" not in str(refused.value)
