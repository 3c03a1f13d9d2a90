"""Runs that are killed, interrupted or out of disk go on as if nothing was."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from fedjax_peft import record


def plain(run):
  """What must be equal in two runs: records, tables, names of checkpoints."""
  lines = [
    {k: v for k, v in line.items() if not k.startswith("wall/")}
    for line in record.read(run / "records.jsonl")
  ]
  tables = {p.name: p.read_bytes() for p in (run / "clients").iterdir()}
  steps = sorted(p.name for p in (run / "checkpoints").iterdir())
  return lines, tables, steps


def finish(child):
  out, err = child.communicate(timeout=300)
  return child.returncode, out, err


def until(child, path, size):
  """Waits for a file to grow, while the process lives."""
  while child.poll() is None:
    if path.exists() and path.stat().st_size >= size:
      return
    time.sleep(0.002)


@pytest.fixture(scope="session")
def reference(tmp_path_factory, tiny_text, start):
  """A run that nothing happened to, and its config."""
  root = tmp_path_factory.mktemp("reference")
  path = root / "tiny.toml"
  path.write_text(tiny_text)
  code, out, err = finish(start("train", path, "--out", root / "run"))
  assert code == 0, err
  assert "6/6" in out
  return path, plain(root / "run")


def test_the_command_makes_a_stream_of_every_core(reference):
  path, _ = reference
  about = json.loads((path.parent / "run" / "config.json").read_text())
  assert about["facts"]["drift"]["devices"] == 2


def test_a_killed_run_resumes_bit_for_bit(reference, tmp_path, start):
  path, expected = reference
  arguments = ["train", path, "--out", tmp_path]
  child = start(*arguments)
  until(child, tmp_path / "records.jsonl", 2500)
  child.send_signal(signal.SIGKILL)
  assert finish(child)[0] == -signal.SIGKILL
  code, _, err = finish(start(*arguments, "--resume"))
  assert code == 0, err
  assert plain(tmp_path) == expected


@pytest.mark.slow
def test_a_run_killed_again_and_again_resumes_bit_for_bit(
  reference, tmp_path, start
):
  path, expected = reference
  arguments = ["train", path, "--out", tmp_path, "--resume"]
  chance, kills = random.Random(0), 0
  for attempt in range(20):
    child = start(*arguments)
    size = 500 * attempt
    until(child, tmp_path / "records.jsonl", size)
    time.sleep(chance.uniform(0, 0.05))
    child.send_signal(signal.SIGKILL)
    code, _, err = finish(child)
    if code == 0:
      break
    assert code == -signal.SIGKILL, err
    kills += 1
  assert kills >= 5
  code, _, err = finish(start(*arguments))
  assert code == 0, err
  assert plain(tmp_path) == expected


@pytest.mark.slow
def test_an_interrupted_run_is_saved_and_resumes(reference, tmp_path, start):
  path, expected = reference
  arguments = ["train", path, "--out", tmp_path]
  child = start(*arguments)
  until(child, tmp_path / "records.jsonl", 1)
  child.send_signal(signal.SIGINT)
  code, out, err = finish(child)
  assert code == 130, err
  done = len(record.read(tmp_path / "records.jsonl"))
  assert f"stopped after round {done} of 6; continue with --resume" in out
  assert (tmp_path / "checkpoints" / str(done)).is_dir()
  assert "Traceback" not in err
  code, _, err = finish(start(*arguments, "--resume"))
  assert code == 0, err
  assert plain(tmp_path)[:2] == expected[:2]


def mounted(folder):
  """Makes a folder a disk of two mebibytes, where the system lets us."""
  command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
  try:
    return subprocess.run(command, capture_output=True).returncode == 0
  except FileNotFoundError:
    return False


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount")
def test_a_run_on_a_full_disk_says_so_and_loses_nothing(
  reference, tmp_path, start
):
  path, expected = reference
  if not mounted(tmp_path):
    pytest.skip("needs the right to mount")
  try:
    fill, run = tmp_path / "fill", tmp_path / "run"
    fill.write_bytes(bytes(shutil.disk_usage(tmp_path).free - 120_000))
    arguments = ["train", path, "--out", run]
    code, _, err = finish(start(*arguments))
    assert code == 2, err
    # Threads of the storage layer may add words of their own as they end.
    said = [x for x in err.splitlines() if x.startswith("fedjax-peft: ")]
    assert len(said) == 1, err
    assert "No space left" in said[0] or "the disk is full" in said[0]
    lost = len(expected[0]) - len(record.read(run / "records.jsonl"))
    assert lost > 0
    fill.unlink()
    code, _, err = finish(start(*arguments, "--resume"))
    assert code == 0, err
    assert plain(run) == expected
  finally:
    subprocess.run(["umount", str(tmp_path)], check=True)
