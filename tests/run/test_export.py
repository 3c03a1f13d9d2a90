"""The command export: what a run has learned, for other libraries."""

import fcntl
import json
import re
import shutil
import tomllib

import jax
import numpy as np
import pytest
import safetensors.numpy

from fedjax_peft import (
  __main__,
  build,
  checkpoint,
  config,
  interop,
  models,
  peft,
  record,
)
from fedjax_peft import export as export_lib
from fedjax_peft.rules import ranking

pytestmark = pytest.mark.usefixtures("standard_promotion")

OPTIONS = {"vocab": 40, "width": 16, "ffn": 16, "heads": 2, "classes": 3}
PERSONAL = """
placement = {"head/.*" = "device"}
[aggregate]
rule = {method = "fedit"}
ranks = {1 = 0.5, 2 = 0.5}
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_text):
  """A run of two rounds with personal heads and ranks; do not change."""
  root = tmp_path_factory.mktemp("trained")
  path = root / "tiny.toml"
  personal, _, aggregate = PERSONAL.partition("[aggregate]")
  path.write_text(
    tiny_text.replace("rounds = 6", f"rounds = 2{personal}")
    + f"[aggregate]{aggregate}"
  )
  with jax.numpy_dtype_promotion("standard"):
    command = ["train", str(path), "--out", str(root / "run"), "--traceback"]
    assert __main__.main(command) == 0
  return root / "run"


@pytest.fixture(scope="session")
def learned(trained):
  """(parts, newest checkpoint) of that run."""
  recorded = json.loads((trained / "config.json").read_text())["config"]
  parts = build.build(config.parse(recorded))
  saves = checkpoint.Checkpoints(trained / "checkpoints")
  saved = saves.latest(parts.state._replace(clients=()), parts.state.clients)
  saves.close()
  return parts, saved


def export(capsys, *arguments):
  """Runs the command in this process; returns exit code, stdout and stderr."""
  code = __main__.main(["export", *map(str, arguments)])
  out = capsys.readouterr()
  return code, out.out, out.err


def refused(capsys, *arguments):
  """Runs a command that must be refused in one sentence, and returns that."""
  code, _, err = export(capsys, *arguments)
  assert code == 2
  assert err.count("\n") == 1
  return err


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1, 5, 11])
def test_a_client_gets_its_head_and_its_rank_of_the_adapter(
  trained, learned, capsys, tmp_path, place
):
  parts, saved = learned
  code, out, _ = export(capsys, trained, "--client", place, "--out", tmp_path)
  assert code == 0
  assert f"adapter: {tmp_path}" in out
  assert parts.data.names[place] in out
  rank = int(parts.data.traits["rank"][place])
  told = json.loads((tmp_path / "adapter_config.json").read_text())
  assert (told["r"], told["lora_alpha"]) == (rank, 2 * rank)
  assert told["task_type"] == "FEATURE_EXTRACTION"  # they do not pool so
  came = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
  name = "encoder.layer.1.attention.self.query.lora_A.weight"
  a = saved.state.params["layers/attention/query/lora_a"][1, :, :rank]
  np.testing.assert_array_equal(came[f"base_model.model.{name}"].T, a)
  head = safetensors.numpy.load_file(tmp_path / "head.safetensors")
  for part, x in (("kernel", "weight"), ("bias", "bias")):
    mine = saved.clients.local[f"head/{part}"][place]
    np.testing.assert_array_equal(head[f"classifier.{x}"].T, mine)


PRUNED = (
  'model.peft=[{method="lora", rank=4}, {method="tune", where="head/.*"}]',
  'aggregate.rule={method="hetlora", strength=1.0, prune=true}',
  "aggregate.ranks={2=0.5, 4=0.5}",
  'uplink=[{link="count"}]',
  "server.optimizer=sgd",
)


def test_a_client_gets_no_rank_that_it_gave_up(tiny):
  parts = build.build(config.load(tiny, PRUNED))
  state = parts.algorithm.init(clients=12, cohort=5)
  kept = np.arange(12, dtype=np.int32) % 4 + 1
  local = {**state.clients.local, ranking.RANK: kept}
  clients = state.clients._replace(local=local)
  saved = checkpoint.Saved(1, state, clients, {})
  ranks = [
    export_lib._of_client(parts, saved, place)["layers/attention/query/lora_a"]
    for place in range(12)
  ]
  wanted = np.minimum(kept, parts.data.traits["rank"])
  np.testing.assert_array_equal([a.shape[-1] for a in ranks], wanted)
  assert (wanted < parts.data.traits["rank"]).any()


def test_an_adapter_that_is_mixed_by_example_is_no_one_adapter(tiny):
  parts = build.build(
    config.load(
      tiny,
      [
        'model.peft=[{method="stack", ranks={shared=2, personal=2}}]',
        'algorithm={name="feddpa", weight=0.5, by_example=0.5}',
      ],
    )
  )
  state = parts.algorithm.init(clients=12, cohort=5)
  saved = checkpoint.Saved(1, state, state.clients, {})
  with pytest.raises(ValueError, match="leave algorithm.by_example out"):
    export_lib._of_client(parts, saved, 1)


def test_clients_of_both_ranks_were_looked_at(learned):
  ranks = learned[0].data.traits["rank"]
  assert {int(ranks[place]) for place in (0, 1, 5, 11)} == {1, 2}


def test_a_client_may_be_called_by_its_name(trained, learned, capsys):
  name = learned[0].data.names[4]
  code, out, _ = export(capsys, trained, "--client", name)
  assert code == 0
  assert f"adapter: {trained / 'adapter-client-4'}" in out
  again = interop.import_adapter(
    trained / "adapter-client-4", models.load("encoder", **OPTIONS)
  )
  assert again.head.kernel.shape == (16, 3)


def test_a_merged_model_of_a_client_loads(
  trained, learned, capsys, tmp_path, tol
):
  code, _, _ = export(
    capsys, trained, "--client", 3, "--merged", "--out", tmp_path
  )
  assert code == 0
  model = models.load(tmp_path, classes=3, pooler=False, pool="mean")
  base = models.load("encoder", **OPTIONS)
  change = (
    model.layers.attention.query.kernel - base.layers.attention.query.kernel
  )
  parts, saved = learned
  rank = int(parts.data.traits["rank"][3])
  a, b = (saved.state.params[f"layers/attention/query/lora_{x}"] for x in "ab")
  wanted = 2 * a[:, :, :rank] @ b[:, :rank]
  kernel = np.abs(base.layers.attention.query.kernel).max()
  np.testing.assert_allclose(change, wanted, 0, tol(np.float32, 2) * kernel)


def test_what_lives_on_clients_needs_a_client(trained, capsys):
  err = refused(capsys, trained)
  assert "'head/bias', 'head/kernel'" in err
  assert "choose one with --client" in err


def test_an_unknown_client_is_refused(trained, capsys):
  assert "below 12 or a name, got '12'" in refused(
    capsys, trained, "--client", 12
  )
  err = refused(capsys, trained, "--client", "cliant 3")
  assert "did you mean 'client 3'" in err


def test_a_directory_without_a_run_is_refused(capsys, tmp_path):
  assert "holds config.json and checkpoints/" in refused(capsys, tmp_path)


def test_a_run_without_a_checkpoint_is_refused(trained, capsys, tmp_path):
  shutil.copytree(trained, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  assert "has no checkpoint yet" in refused(capsys, tmp_path / "run")
  (tmp_path / "run" / "config.json").write_text("{}")
  assert "must be the config" in refused(capsys, tmp_path / "run")


def begun(root, tiny_text, *peft):
  """A run that has saved the state that it begins with."""
  tree = tomllib.loads(tiny_text)
  tree["model"]["peft"] = list(peft)
  run = config.parse(tree)
  parts = build.build(run)
  most = parts.cohort.most
  state = parts.algorithm.init(clients=len(parts.data), cohort=most)
  saves = checkpoint.Checkpoints(root / "checkpoints")
  saves.save(1, state._replace(clients=()), state.clients)
  saves.close()
  record.write_json(root / "config.json", {"config": run.to_dict()})
  return root


def test_a_global_adapter_is_written_into_the_run(tmp_path, tiny_text, capsys):
  run = begun(tmp_path, tiny_text, {"method": "dora", "rank": 2})
  code, out, _ = export(capsys, run)
  assert code == 0
  assert "global" in out
  base = models.load("encoder", **OPTIONS)
  again = interop.import_adapter(run / "adapter", base)
  wanted = peft.split(peft.dora(base, 2)).params
  came = peft.split(again).params
  for name, value in wanted.items():
    np.testing.assert_array_equal(came[name], value)


@pytest.mark.parametrize(
  ("method", "words", "merges"),
  [
    ("vera", "has vera; write a merged model instead .*--merged", True),
    ("bottleneck", "has bottleneck; it cannot be merged either", False),
    ("head", "the module has none; write a merged model", True),
  ],
)
def test_a_method_that_the_layout_cannot_hold_says_what_to_write(
  tmp_path, tiny_text, capsys, method, words, merges
):
  run = begun(tmp_path, tiny_text, {"method": method})
  assert re.search(words, refused(capsys, run), re.IGNORECASE)
  code, _, err = export(capsys, run, "--merged")
  assert (code == 0) == merges
  assert merges or "must be plain" in err


def test_a_checkpoint_of_another_config_is_refused(tmp_path, tiny_text, capsys):
  run = begun(tmp_path, tiny_text, {"method": "lora", "rank": 2})
  path = run / "config.json"
  about = json.loads(path.read_text())
  about["config"]["model"]["peft"][0]["rank"] = 3
  path.write_text(json.dumps(about))
  assert "checkpoint of another config" in refused(capsys, run)


def test_a_run_that_is_being_written_is_left_alone(tmp_path, tiny_text, capsys):
  run = begun(tmp_path, tiny_text, {"method": "lora", "rank": 2})
  with open(run / ".lock", "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    assert "belongs to one process" in refused(capsys, run)
