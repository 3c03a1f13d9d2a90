"""What the documents say is run."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _blocks(name: str, language: str) -> list[str]:
  text = (ROOT / name).read_text()
  return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.data
def test_the_readme_example_runs_on_a_tiny_model(capsys, standard_promotion):
  (code,) = _blocks("README.md", "python")
  assert len(code.strip().splitlines()) <= 15
  for old, new in (
    ('"minilm", classes=6', '"encoder", classes=6, vocab=30522'),
    ("uniform(64)", "uniform(2)"),
    ("rounds=30", "rounds=1"),
    ("seed=0)", "seed=0, clients=50, heldout=2)"),
  ):
    assert old in code
    code = code.replace(old, new)
  exec(compile(code, "README.md", "exec"), {})
  assert re.search(r"1/1  loss .*\n0\.\d+", capsys.readouterr().out)


def test_the_readme_is_short_and_names_what_exists():
  text = (ROOT / "README.md").read_text()
  assert len(text.splitlines()) <= 120
  for path in re.findall(
    r"\]\(([^)#]+)\)|`((?:configs|scripts)/[\w./]+)`", text
  ):
    name = path[0] or path[1]
    assert (ROOT / name).exists(), name


def test_the_architecture_names_every_module():
  text = (ROOT / "BUILD.md").read_text()
  package = ROOT / "fedjax_peft"
  names = [p.stem for p in package.glob("*.py") if p.stem != "__init__"]
  names += [
    f"{p.name}/" for p in package.iterdir() if (p / "__init__.py").exists()
  ]
  missing = [n for n in names if f"`{n}`" not in text]
  assert not missing


@pytest.mark.slow
@pytest.mark.data
def test_the_commands_of_the_build_document_run(tmp_path):
  # The virtual environment may lie elsewhere: the one that runs this test.
  here = f"{pathlib.Path(sys.executable).parent}/"
  environment = os.environ | {"XLA_FLAGS": ""}
  for block in _blocks("BUILD.md", "sh"):
    command = block.replace(".venv/bin/", here)
    command = command.replace("runs/dry", str(tmp_path / "dry"))
    done = subprocess.run(
      command,
      shell=True,
      cwd=ROOT,
      env=environment,
      capture_output=True,
      text=True,
      timeout=900,
      check=False,
    )
    assert done.returncode == 0, (block, done.stdout[-800:], done.stderr[-800:])
