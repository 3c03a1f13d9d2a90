"""The configs that we ship, on models that run in seconds."""

import pathlib

import pytest

from fedjax_peft import __main__, config, record

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.toml"))

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_is_valid_and_says_how_it_is_run(path):
  config.load(path)
  assert f"fedjax-peft train configs/{path.name}" in path.read_text()


@pytest.mark.data
def test_the_quickstart_runs_on_a_tiny_model(tmp_path, capsys):
  tiny = {
    "model.name": "encoder",
    "model.options": "{vocab = 30522, width = 16, ffn = 16, heads = 2}",
    "rounds": 2,
    "evaluate.every": 2,
    "cohort.size": 4,
    "data.clients": 40,
  }
  words = [x for k, v in tiny.items() for x in ("--set", f"{k}={v}")]
  out = tmp_path / "run"
  command = ["train", str(ROOT / "configs" / "quickstart.toml"), *words]
  assert __main__.main([*command, "--out", str(out)]) == 0
  first, last = record.read(out / "records.jsonl")
  assert first["cloud/up_bytes"] == 4 * first["up_bytes_client"]
  for key in ("eval/accuracy", "unseen/accuracy_worst10", "test/accuracy"):
    assert 0 <= last[key] <= 1
  assert str(out) in capsys.readouterr().out
