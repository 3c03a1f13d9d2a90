"""The command export, of runs whose model is cut."""

import zlib

import jax
import numpy as np
import pytest
import safetensors.numpy

import toy
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

pytestmark = pytest.mark.usefixtures("standard_promotion")

# The server's optimizer and the links see each leaf alone, so that a run learns
# the same, cut or not.
SHARED = (
  "model.options={vocab=40, width=16, ffn=16, heads=2}",
  'model.peft=[{method="ia3"}, {method="tune", where="(.*/)?head/.*"}]',
  'uplink=[{link="weigh"}]',
)
CUTS = 'split.cuts={1=0.3, "layers/0"=0.3, whole=0.4}'
RUNS = {
  "undivided": (),
  "cut": ('split.ends={device=1, edge="layers/0", server=3, home="head"}',),
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_text):
  """{name: directory of a run}, of one model that is cut or not."""
  root = tmp_path_factory.mktemp("cut")
  path = root / "tiny.toml"
  path.write_text(tiny_text)
  with jax.numpy_dtype_promotion("standard"):
    return {
      name: saved(path, root / str(number), played, *SHARED, *overrides)[0]
      for number, (name, overrides) in enumerate(RUNS.items())
    }


def saved(path, root, learned, *overrides):
  """A run that has saved what it learned: (directory, parts, params)."""
  run = config.load(path, list(overrides))
  parts = build.build(run)
  state = learned(run, parts)._replace(plan=parts.cohort.init())
  saves = checkpoint.Checkpoints(root / "checkpoints")
  saves.save(1, state._replace(clients=()), state.clients)
  saves.close()
  record.write_json(root / "config.json", {"config": run.to_dict()})
  return root, parts, state.params


def played(run, parts):
  """A state after two rounds."""
  player = toy.Player(
    parts.algorithm,
    parts.data,
    parts.model.base,
    build.settings(run, parts),
    parts.cohort.most,
  )
  return player.play((0, 3, 5, 6, 10), (1, 3, 4, 7, 11))[0]


def noisy(run, parts):
  """A state of noise."""
  state = parts.algorithm.init(clients=len(parts.data), cohort=5)
  (node,) = state.nodes
  params = dict(node.params)
  for name, x in params.items():
    if np.issubdtype(x.dtype, np.floating):
      rng = np.random.default_rng(zlib.crc32(name.encode()))
      params[name] = x + rng.normal(size=x.shape).astype(x.dtype)
  return state._replace(nodes=(node._replace(params=params),))


def written(run, out, *options):
  """{file: its content} that the command writes of a run."""
  assert __main__.main(["export", str(run), "--out", str(out), *options]) == 0
  return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--merged",), ("--client", "3")])
def test_a_cut_run_is_written_as_the_same_run_undivided(
  trained, tmp_path, options, tol
):
  """Up to what compilers round otherwise; nothing changes on its wires."""
  for name, run in trained.items():
    written(run, tmp_path / name, *options)
  files = sorted(path.name for path in (tmp_path / "undivided").iterdir())
  assert files == sorted(path.name for path in (tmp_path / "cut").iterdir())
  for name in files:
    one, two = (tmp_path / run / name for run in RUNS)
    if not name.endswith(".safetensors"):
      assert one.read_bytes() == two.read_bytes()
      continue
    wanted, came = map(safetensors.numpy.load_file, (one, two))
    assert wanted.keys() == came.keys()
    for key, value in wanted.items():
      # Ten steps, each of sums of 16 values in some 20 products.
      limit = tol(np.float32, 16 * 20) * max(np.abs(value).max(), 1)
      np.testing.assert_allclose(came[key], value, rtol=0, atol=limit)


def test_what_was_written_has_learned_something(trained, tmp_path):
  written(trained["cut"], tmp_path)
  base = models.load("encoder", vocab=40, width=16, ffn=16, heads=2, classes=3)
  again = interop.import_adapter(tmp_path, base)
  gain = again.layers.attention.key.ia3_gain[...]
  assert (np.abs(gain - 1).max(axis=1) > 0).all()  # in both blocks
  assert np.abs(again.head.kernel - base.head.kernel).max() > 0


@pytest.mark.parametrize("options", [(), ("--merged",)])
def test_of_a_model_whose_cut_moves_the_same_files_are_written(
  tiny, tmp_path, options
):
  files = []
  for name, overrides in {"whole": (), "moving": (CUTS,)}.items():
    root, *_ = saved(tiny, tmp_path / name, noisy, *SHARED, *overrides)
    files.append(written(root, tmp_path / f"{name} files", *options))
  assert files[0] == files[1]
  assert any(name.endswith("model.safetensors") for name in files[0])


ENDS = 'split.ends={device="layers/0"}'
SERVER = 'model.peft=[{method="lora", rank=2, where="server/.*/query"}]'


def test_a_first_part_that_is_only_remembered_is_written_too(tiny, tmp_path):
  root, parts, params = saved(
    tiny, tmp_path / "run", noisy, ENDS, SERVER, "split.cache=float32"
  )
  assert type(parts.model.origin.device).__name__ == "Recall"
  written(root, tmp_path / "adapter")
  path = tmp_path / "adapter" / "adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  name = "base_model.model.encoder.layer.{}.attention.self.query.lora_A.weight"
  assert not tensors[name.format(0)].any()  # nothing is added there
  learned = params["server/layers/attention/query/lora_a"][0]
  np.testing.assert_array_equal(tensors[name.format(1)].T, learned)
  written(root, tmp_path / "merged", "--merged")
  model = models.load(
    tmp_path / "merged", classes=3, pooler=False, pool="mean"
  ).layers.attention
  base = models.load(
    "encoder", vocab=40, width=16, ffn=16, heads=2, classes=3
  ).layers.attention
  for part in ("query", "key"):
    one, two = (getattr(x, part).kernel[...] for x in (model, base))
    np.testing.assert_array_equal(one[0], two[0])
    assert np.array_equal(one[1], two[1]) == (part == "key")


def test_of_a_device_with_a_loss_of_its_own_the_head_is_left_out(
  tiny, tmp_path
):
  put = 'model.peft=[{method="lora"}, {method="tune", where="device_head/.*"}]'
  root, parts, params = saved(
    tiny, tmp_path / "run", noisy, ENDS, put, "split.scheme=local_loss"
  )
  assert "device_head/kernel" in params
  found = export_lib.read(root)
  assert found.params.keys() < parts.model.params.keys()
  assert not any("device_head" in name for name in found.params)
  written(root, tmp_path / "adapter")
  path = tmp_path / "adapter" / "adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  name = "base_model.model.encoder.layer.{}.attention.self.value.lora_B.weight"
  for layer, part in enumerate(("device", "server")):
    learned = params[f"{part}/layers/attention/value/lora_b"][0]
    np.testing.assert_array_equal(tensors[name.format(layer)].T, learned)


def test_parts_with_ranks_of_their_own_are_merged_or_refused(
  tiny, tmp_path, capsys
):
  put = (
    'model.peft=[{method="lora", rank=1, where="device/.*/query"},'
    ' {method="lora", rank=3, where="server/.*/query"}]'
  )
  root, parts, _ = saved(tiny, tmp_path / "run", noisy, ENDS, put)
  assert __main__.main(["export", str(root)]) == 2
  err = capsys.readouterr().err
  assert "'attention/query/lora_a' is [16, 1]" in err
  assert "--merged" in err
  assert err.count("\n") == 1
  assert len(peft.split(parts.model.origin).params) == 4
  written(root, tmp_path / "merged", "--merged")
