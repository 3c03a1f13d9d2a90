"""The command line: a run, its directory, and every way to get it wrong."""

import fcntl
import inspect
import json
import re
import shutil
import typing

import jax
import pyarrow.parquet
import pytest

from fedjax_peft import (
  __main__,
  build,
  checkpoint,
  compose,
  membership,
  record,
  scene,
  schema,
)
from fedjax_peft.network import (
  availability,
  clock,
  fault,
  ledger,
  profile,
  radio,
  scenario,
  selection,
  station,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")


def fedjax_peft(capsys, *arguments):
  """Runs a command in this process; returns exit code, stdout and stderr."""
  code = __main__.main([str(x) for x in arguments])
  out = capsys.readouterr()
  return code, out.out, out.err


def refused(capsys, *arguments):
  """Runs a command that must be refused in one sentence, and returns that."""
  code, _, err = fedjax_peft(capsys, *arguments)
  assert code == 2
  assert err.startswith("fedjax-peft: error: ")
  assert err.count("\n") == 1
  return err


def plain(path):
  """The records without what depends on the machine."""
  return [
    {k: v for k, v in line.items() if not k.startswith("wall/")}
    for line in record.read(path)
  ]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_text):
  """The directory of a finished run, its config beside it; do not change."""
  root = tmp_path_factory.mktemp("finished")
  path = root / "tiny.toml"
  path.write_text(tiny_text)
  command = ["train", str(path), "--out", str(root / "run"), "--traceback"]
  with jax.numpy_dtype_promotion("standard"):
    assert __main__.main(command) == 0
  return root


@pytest.fixture
def copied(finished, tmp_path):
  """A copy of the finished run, to be changed; config and run directory."""
  shutil.copytree(finished, tmp_path / "copy")
  return tmp_path / "copy" / "tiny.toml", tmp_path / "copy" / "run"


def test_a_run_leaves_records_tables_checkpoints_and_its_config(finished):
  run = finished / "run"
  lines = record.read(run / "records.jsonl")
  assert [line["round"] for line in lines] == list(range(1, 7))
  assert "eval/accuracy_worst10" in lines[2]
  assert "eval/accuracy" not in lines[3]
  keys = list(lines[0])
  wall = [k.startswith("wall/") for k in keys]
  assert wall == sorted(wall)
  assert len({line["state/digest"] for line in lines}) == 6
  tables = sorted((run / "clients").iterdir())
  assert [t.name for t in tables] == [
    "round-000003.parquet",
    "round-000006.parquet",
  ]
  table = pyarrow.parquet.read_table(tables[1])
  assert table.num_rows == 12
  about = json.loads((run / "config.json").read_text())
  assert about["settings"]["width"] == 2
  assert about["facts"]["drift"]["versions"]["jax"]
  saves = checkpoint.Checkpoints(run / "checkpoints")
  assert saves.steps() == [4, 6]
  saves.close()


def test_a_run_ends_with_a_table_and_its_directory(copied, capsys):
  path, run = copied
  code, out, _ = fedjax_peft(capsys, "train", path, "--out", run, "--resume")
  assert code == 0
  assert "held-out accuracy" in out
  assert f"run directory: {run}" in out


def test_a_resumed_run_repeats_the_rounds_that_were_lost(copied, capsys):
  path, run = copied
  before = plain(run / "records.jsonl")
  tables = {p.name: p.read_bytes() for p in (run / "clients").iterdir()}
  shutil.rmtree(run / "checkpoints" / "6")
  with open(run / "records.jsonl", "a") as file:
    file.write('{"round": 7, "trai')
  code, out, _ = fedjax_peft(capsys, "train", path, "--out", run, "--resume")
  assert code == 0
  assert "4/6 " not in out
  assert plain(run / "records.jsonl") == before
  assert tables == {p.name: p.read_bytes() for p in (run / "clients").iterdir()}


def test_resuming_without_a_checkpoint_starts_afresh(copied, capsys):
  path, run = copied
  before = plain(run / "records.jsonl")
  shutil.rmtree(run / "checkpoints")
  code, out, _ = fedjax_peft(capsys, "train", path, "--out", run, "--resume")
  assert code == 0
  assert "1/6 " in out
  assert plain(run / "records.jsonl") == before


def test_a_directory_with_a_run_is_not_overwritten(copied, capsys):
  path, run = copied
  before = (run / "records.jsonl").read_bytes()
  err = refused(capsys, "train", path, "--out", run)
  assert "a run of 6 records; add --resume" in err
  assert (run / "records.jsonl").read_bytes() == before


def test_another_config_is_not_resumed(copied, capsys):
  path, run = copied
  change = ["--set", "client.learning_rate=0.2", "--allow-drift"]
  err = refused(capsys, "train", path, "--out", run, "--resume", *change)
  assert "client.learning_rate is 0.05 in the run and 0.2 now" in err


def test_other_execution_settings_need_leave(copied, capsys):
  path, run = copied
  arguments = ["train", path, "--out", run, "--resume"]
  arguments += ["--set", "execution.width=1"]
  err = refused(capsys, *arguments)
  assert "execution.width is 2 in the run and 1 now; add --allow-drift" in err
  assert fedjax_peft(capsys, *arguments, "--allow-drift")[0] == 0


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    (lambda x: x["facts"].update(data="0" * 64), "resumed on the data it was"),
    (
      lambda x: x["facts"]["drift"]["versions"].update(jax="0.1"),
      "versions.jax is '0.1' in the run and .* add --allow-drift",
    ),
  ],
)
def test_other_data_and_versions_are_not_resumed(
  copied, capsys, change, sentence
):
  path, run = copied
  shutil.rmtree(run / "checkpoints" / "6")
  about = json.loads((run / "config.json").read_text())
  change(about)
  record.write_json(run / "config.json", about)
  arguments = ["train", path, "--out", run, "--resume"]
  assert re.search(sentence, refused(capsys, *arguments))
  drift = "allow-drift" in sentence
  code, _, _ = fedjax_peft(capsys, *arguments, "--allow-drift")
  assert code == (0 if drift else 2)


def test_a_checkpoint_that_is_not_of_its_record_is_refused(copied, capsys):
  path, run = copied
  shutil.rmtree(run / "checkpoints" / "6")
  text = (run / "records.jsonl").read_text()
  digest = record.read(run / "records.jsonl")[3]["state/digest"]
  (run / "records.jsonl").write_text(text.replace(digest, digest[::-1]))
  err = refused(capsys, "train", path, "--out", run, "--resume")
  assert "checkpoint of round 4 must hold the state that its record" in err


def test_lost_records_are_not_resumed(copied, capsys):
  path, run = copied
  shutil.rmtree(run / "checkpoints" / "6")
  (run / "records.jsonl").write_text("")
  err = refused(capsys, "train", path, "--out", run, "--resume")
  assert "that its checkpoint counts, got 0" in err


def test_a_directory_belongs_to_one_process(copied, capsys):
  path, run = copied
  shutil.rmtree(run / "checkpoints" / "6")
  with open(run / ".lock", "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    err = refused(capsys, "train", path, "--out", run, "--resume")
  assert "another one is writing" in err


def test_a_dry_run_says_what_would_run_and_writes_nothing(tiny, capsys):
  code, out, _ = fedjax_peft(capsys, "train", tiny, "--dry-run")
  assert code == 0
  for part in (
    "12 clients (11 seen, 1 unseen)",
    "307 values",
    "layers/attention/query/lora_a",
    "after fixed_point",
    "frozen weights",
  ):
    assert part in out
  assert not (tiny.parent / "run").exists()


@pytest.mark.parametrize(
  ("assignment", "sentence"),
  [
    ("server.lerning_rate=1", "did you mean 'learning_rate'"),
    ("rounds=many", "rounds must be int >= 1, got 'many'"),
    ("cohort.size=12", "at most the 11 clients to train on, got 12"),
    ("model.name=minilmm", "'minilmm'"),
    ('model.peft=[{method="lora", where=".*/qery"}]', r"qery.*query"),
    ('model.peft=[{method="lorra"}]', "did you mean 'lora'"),
    ('aggregate.rule={method="flexlor"}', "did you mean 'flexlora'"),
    ("aggregate.rule={rank=3}", "must say its method"),
    ('aggregate.rule={method="ffa", rank=3}', r"ffa\(\)"),
    ("aggregate.ranks={4=0.5}", "sum to one"),
    ('algorithm={name="scafold"}', "did you mean 'scaffold'"),
    ('algorithm={name="ditto"}', "strength"),
    ('aggregate.reduce={method="krumm"}', "did you mean 'krum'"),
    ('attack={method="flip"}', "sign_flip"),
    ("model.options={widht=3}", "widht"),
    ("data.name=sotuu", "'sotuu'"),
    ("data.client=3", "'client'.*'clients'"),
    ('uplink=[{link="clipp"}]', "did you mean 'clip'"),
    ('uplink=[{link="clip", norm=1.0}]', r"clip\(clip_norm\)"),
    ('uplink=[{link="int8"}, {link="weigh"}]', "'weigh'.*'int8'"),
    ('uplink=[{link="fixed_point"}]', "fixed_point"),
  ],
)
def test_what_cannot_run_is_refused_in_one_sentence(
  tiny, capsys, assignment, sentence
):
  err = refused(capsys, "train", tiny, "--set", assignment)
  assert re.search(sentence, err), err
  assert not (tiny.parent / "run" / "config.json").exists()


def test_a_missing_config_is_refused(tiny, capsys):
  err = refused(capsys, "train", tiny.with_name("tinny.toml"))
  assert "did you mean" in err


def test_the_traceback_is_there_for_who_wants_it(tiny):
  with pytest.raises(ValueError, match=r"cohort\.size"):
    __main__.main(
      ["train", str(tiny), "--set", "cohort.size=99", "--traceback"]
    )


def test_help_teaches_every_key_and_every_option_of_links(capsys):
  with pytest.raises(SystemExit) as done:
    __main__.main(["train", "--help"])
  assert done.value.code == 0
  out = capsys.readouterr().out
  for key in schema.fields():
    assert f"  {key.name}  {key.expected()}" in out
  for name, factory in (compose.LINKS | build.PEFT).items():
    own = [p for p in inspect.signature(factory).parameters if p != "module"]
    assert f"{name}({', '.join(own)})" in out


def is_sayable(hint) -> bool:
  """Whether a config can hold values of a type."""
  if hint in (int, float, bool, str, type(None)):
    return True
  inner = [x for x in typing.get_args(hint) if x is not Ellipsis]
  if typing.get_origin(hint) is typing.Literal:
    return True
  return bool(inner) and all(map(is_sayable, inner))


# What a config says in words of its own: a rate of SGD, a kind of graph.
RENAMED = {("pfedme", "inner"): "inner_rate", ("gossip", "mixing"): "graph"}
PATHS = ("path", "then")  # a file, and a table of the same kind


# From the data or the model, keys of their own, and options of fedavg.
KNOWN = ("clients", "cohort", "classes", "known", "placement", "options")


def options_of(name: str, factory) -> list[str]:
  """What a table of a config can say of a function, in order."""
  hints = typing.get_type_hints(factory)
  own = [
    RENAMED.get((name, p), p)
    for p in inspect.signature(factory).parameters
    if p not in KNOWN
  ]
  return [
    p for p in own if p not in hints or p in PATHS or is_sayable(hints[p])
  ]


@pytest.mark.parametrize(
  ("key", "table"),
  [
    # The options of fedavg are keys of their own.
    (
      "algorithm",
      {k: v for k, v in compose.ALGORITHMS.items() if k != "fedavg"},
    ),
    ("aggregate.reduce", compose.REDUCTIONS),
    ("attack", compose.ATTACKS),
    ("cohort.group", membership.GROUPINGS),
    ("network.available", availability.AVAILABILITIES),
    ("network.clock", clock.CLOCKS),
    ("network.faults", fault.FAULTS),
    ("network.scenario", scenario.SCENARIOS),
    ("network.select", selection.SELECTIONS),
    ("network.steps", scene.STEPS),
  ],
)
def test_help_teaches_every_option_of_a_method(key, table):
  text = doc_of(key)
  for name, factory in table.items():
    assert f"{name}({', '.join(options_of(name, factory))})" in text


def doc_of(key: str) -> str:
  """What help says of a key."""
  (text,) = (k.doc for k in schema.fields() if k.name == key)
  return text


@pytest.mark.parametrize(
  ("key", "names"),
  [
    ("network.backhaul", inspect.signature(radio.wire).parameters),
    ("network.fleet", profile.PROFILES),
    ("network.prices", ledger.Prices._fields),
    ("network.radio", radio.RADIOS),
    ("network.stations", inspect.signature(station.stations).parameters),
  ],
)
def test_help_teaches_every_name_of_a_network(key, names):
  words = re.findall(r"\w+", doc_of(key))
  assert set(names) <= set(words)


def test_help_shows_examples(capsys):
  with pytest.raises(SystemExit):
    __main__.main(["--help"])
  assert "fedjax-peft train configs/" in capsys.readouterr().out
  assert __main__.main([]) == 2


@pytest.mark.parametrize(
  ("arguments", "part"),
  [
    (["data", "prepare", "sotuu"], "did you mean 'sotu'"),
    (["models", "prepare", "minilmm"], "did you mean 'minilm'"),
  ],
)
def test_unknown_names_to_prepare_name_the_near_ones(capsys, arguments, part):
  assert part in refused(capsys, *arguments)


def test_models_are_listed(capsys):
  code, out, _ = fedjax_peft(capsys, "models", "list")
  assert code == 0
  assert "minilm" in out


@pytest.mark.parametrize("told", ["0", "two"])
def test_a_wrong_number_of_streams_is_refused(tiny, told, monkeypatch):
  monkeypatch.setenv("FEDJAX_PEFT_STREAMS", told)
  run = schema.Config(model=schema.Model(name="a"), data={"name": "b"})
  with pytest.raises(ValueError, match=f"number >= 1, got '{told}'"):
    __main__._streams(run, resume=False)


def test_who_stops_reading_ends_a_command_without_a_word(start):
  child = start("methods")
  child.stdout.close()
  assert child.wait(timeout=120) == 141
  assert child.stderr.read() == ""
  child.stderr.close()
