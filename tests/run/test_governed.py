"""A governed run: attacked, killed and resumed, and checked afterwards."""

import inspect
import json
import re
import shutil
import signal
import stat
import time

import pytest

from fedjax_peft import __main__, export, record, schema
from fedjax_peft.governance import gate, history, log, signing, version

# One client in ten says a million times what it found, to a plain mean.
GOVERNED = """
[governance]
sign = true
gate = {metric = "loss", tolerance = 0.5}
holdout = 0.5
limit = 6
[attack]
method = "scale"
factor = 1e6
fraction = 0.1
"""
CHANGES = (
  "uplink=[{link='weigh'}]",
  "server.optimizer=sgd",
  "server.learning_rate=1.0",
  "client.learning_rate=0.05",
)


def plain(run):
  """What must be equal in two runs: records, tables, the last checkpoint."""
  lines = [
    {k: v for k, v in line.items() if not k.startswith("wall/")}
    for line in record.read(run / "records.jsonl")
  ]
  tables = {p.name: p.read_bytes() for p in (run / "clients").iterdir()}
  return lines, tables, sorted(p.name for p in (run / "checkpoints").iterdir())


def told(run):
  """The history that a log tells; all of it must be whole."""
  path = run / "governance.jsonl"
  assert log.verify(path) is None
  found, broken = history.follow(log.read(path))
  assert broken is None
  return found


def command(path, out, *more):
  changes = [x for change in CHANGES for x in ("--set", change)]
  return ["train", path, "--out", out, *changes, *more]


def finish(child, code=0):
  _, err = child.communicate(timeout=300)
  assert child.returncode == code, err


@pytest.fixture(scope="session")
def governed(tmp_path_factory, tiny_text, start):
  """The directory of an attacked run, its config beside it; do not change."""
  root = tmp_path_factory.mktemp("governed")
  (root / "tiny.toml").write_text(tiny_text + GOVERNED)
  finish(start(*command(root / "tiny.toml", root / "run")))
  return root


@pytest.fixture
def copied(governed, tmp_path):
  """A copy of its run directory, to be changed."""
  shutil.copytree(governed / "run", tmp_path / "copy")
  return tmp_path / "copy"


def verify(capsys, *arguments):
  """Exit code and words of `fedjax-peft verify`."""
  code = __main__.main(["verify", *map(str, arguments)])
  out = capsys.readouterr()
  return code, out.out + out.err


def test_poisoned_rounds_are_taken_back_and_told(governed):
  lines = record.read(governed / "run" / "records.jsonl")
  found = told(governed / "run")
  rejected = {x["round"] for x in lines if x["gate/rejected"]}
  assert 0 < len(rejected) < len(lines) == 6
  assert found.rejected == rejected
  for line in lines:
    number = line["round"]
    assert found.at[number].number == line["gate/version"]
    same = found.at[number] == found.at[number - 1]
    assert same == (number in rejected)
  assert lines[-1]["eval/loss"] < lines[0]["start/gate/loss"] + 0.5
  key = governed / "run" / "governance.key"
  assert stat.S_IMODE(key.stat().st_mode) == 0o600


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit_and_its_log_says_so(
  governed, tmp_path, start
):
  arguments = command(governed / "tiny.toml", tmp_path / "run")
  records = tmp_path / "run" / "records.jsonl"
  child = start(*arguments)
  while child.poll() is None and len(record.read(records)) < 3:
    time.sleep(0.002)
  child.send_signal(signal.SIGKILL)
  child.communicate(timeout=300)
  assert child.returncode == -signal.SIGKILL
  finish(start(*arguments, "--resume"))
  assert plain(tmp_path / "run") == plain(governed / "run")
  mine, whole = told(tmp_path / "run"), told(governed / "run")
  assert mine.identity != whole.identity
  assert mine.at == whole.at
  kinds = [e["kind"] for e in log.read(tmp_path / "run" / "governance.jsonl")]
  assert (kinds[0], kinds[-1]) == ("start", "stop")
  assert kinds.count("resume") == 1


def test_a_run_that_is_whole_is_said_to_be(governed, capsys):
  code, text = verify(capsys, governed / "run")
  found = told(governed / "run")
  assert code == 0
  assert f"round 6, version {found.at[6].number}" in text
  assert found.identity in text
  code, _ = verify(capsys, governed / "run", "--identity", found.identity)
  assert code == 0
  code, text = verify(capsys, governed / "run", "--identity", "00" * 32)
  assert code == 2
  assert "line 1 of" in text


def test_a_checkpoint_of_another_state_is_found(copied, capsys):
  saved = copied / "checkpoints"
  found = told(copied)
  assert found.at[4] != found.at[6]
  shutil.rmtree(saved / "6")
  code, text = verify(capsys, copied)
  assert (code, "round 4, version" in text) == (0, True)
  shutil.copytree(saved / "4", saved / "6")
  code, text = verify(capsys, copied)
  assert code == 2
  assert f"must hold version {found.at[6].number}" in text
  (saved / "6").rename(saved / "7")
  code, text = verify(capsys, copied)
  assert code == 2
  assert "which ends with round 6" in text


def test_what_was_changed_in_a_run_directory_is_found(copied, capsys):
  path = copied / "governance.jsonl"
  data = path.read_bytes()
  path.write_bytes(data.replace(b'"rejected":true', b'"rejected":null', 1))
  code, text = verify(capsys, copied)
  assert code == 2
  assert "is broken: it was edited" in text
  path.write_bytes(data)
  about = json.loads((copied / "config.json").read_text())
  about["config"]["attack"] = {}
  (copied / "config.json").write_text(json.dumps(about))
  code, text = verify(capsys, copied)
  assert code == 2
  assert "must be the config of the audit log" in text
  path.unlink()
  code, text = verify(capsys, copied)
  assert code == 2
  assert "a run with governance has an audit log" in text


@pytest.mark.usefixtures("standard_promotion")
def test_a_run_does_not_go_on_without_its_log_or_with_another_key(
  governed, copied, capsys
):
  shutil.rmtree(copied / "checkpoints" / "6")
  arguments = command(governed / "tiny.toml", copied, "--resume")
  key, path = copied / "governance.key", copied / "governance.jsonl"
  key.unlink()
  for change, words in (
    (lambda: None, "with the same key, but there is no"),
    (lambda: signing.key_of(key), "line 1 is broken: it is not signed by"),
    (path.unlink, "line 1 is broken: it is missing: the head is line"),
    (log.head_of(path).unlink, "got 4 rounds without"),
  ):
    change()
    assert __main__.main([str(x) for x in arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.usefixtures("standard_promotion")
def test_what_a_governed_run_has_learned_can_be_exported(copied):
  found = export.read(copied)
  last = record.read(copied / "records.jsonl")[-1]
  assert found.round == last["round"] == 6
  assert found.parts.holdout.size > 0


def test_help_teaches_every_option_of_a_gate():
  (text,) = (k.doc for k in schema.fields() if k.name == "governance.gate")
  own = set(inspect.signature(gate.gate).parameters) - {"measure", "limit"}
  assert own <= set(re.findall(r"\w+", text))


def test_a_version_can_be_checked_alone(governed):
  entries = log.read(governed / "run" / "governance.jsonl")
  parent = None
  for entry in entries:
    if "signed" in entry:
      signed = version.from_dict(entry["signed"])
      parent = version.check(signed, entries[0]["identity"], parent)
  assert parent == told(governed / "run").at[6]
