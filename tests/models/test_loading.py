"""Model directories, names and hub ids: what loads, and what is refused."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from flax import nnx
from huggingface_hub import constants
from safetensors import numpy as safetensors_numpy

from fedjax_peft import models

REFERENCE = pathlib.Path(__file__).parent / "reference"
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(params=["bert", "llama", "vit"])
def directory(request, tmp_path):
  """A copy of a small checkpoint."""
  return pathlib.Path(
    shutil.copytree(REFERENCE / request.param, tmp_path / request.param)
  )


@pytest.fixture
def llama(tmp_path):
  return pathlib.Path(shutil.copytree(REFERENCE / "llama", tmp_path / "llama"))


@pytest.fixture
def bert(tmp_path):
  return pathlib.Path(shutil.copytree(REFERENCE / "bert", tmp_path / "bert"))


@pytest.fixture
def vit(tmp_path):
  return pathlib.Path(shutil.copytree(REFERENCE / "vit", tmp_path / "vit"))


def edit(directory, change):
  """Rewrites the weights of a directory."""
  tensors = safetensors_numpy.load_file(directory / FILE)
  tensors = change(tensors) or tensors
  safetensors_numpy.save_file(tensors, directory / FILE)
  return tensors


def configure(directory, **settings):
  path = directory / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def weights(model):
  return jax.tree.leaves(nnx.state(model))


def same(a, b):
  pairs = zip(weights(a), weights(b), strict=True)
  return all(bool((x == y).all()) for x, y in pairs)


def test_shards_load_as_one_file_does(directory):
  whole = models.load(directory)
  tensors = safetensors_numpy.load_file(directory / FILE)
  shards = {"a.safetensors": {}, "b.safetensors": {}}
  for i, (name, tensor) in enumerate(tensors.items()):
    shards["ab"[i % 2] + ".safetensors"][name] = tensor
  for name, shard in shards.items():
    safetensors_numpy.save_file(shard, directory / name)
  (directory / FILE).unlink()
  index = {name: file for file in shards for name in shards[file]}
  (directory / INDEX).write_text(json.dumps({"weight_map": index}))
  assert same(models.load(directory), whole)
  (directory / "b.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"lacks 1 of 2 .*b\.safetensors"):
    models.load(directory)
  (directory / INDEX).write_text("{}")
  with pytest.raises(ValueError, match="JSON with a weight_map"):
    models.load(directory)


def test_low_precision_weights_become_float32(directory):
  kinds = [np.float16, ml_dtypes.bfloat16]
  for kind in kinds:
    edit(directory, lambda x: {k: v.astype(kind) for k, v in x.items()})
  leaves = weights(models.load(directory))
  assert all(leaf.dtype == jnp.float32 for leaf in leaves)
  exact = weights(models.load(REFERENCE / directory.name))
  for a, b in zip(leaves, exact, strict=True):
    np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-6)


def test_names_may_carry_the_prefix_of_the_whole_model(bert):
  plain = models.load(bert)
  edit(bert, lambda x: {f"bert.{k}": v for k, v in x.items()})
  assert same(models.load(bert), plain)


def test_pretraining_heads_are_left_aside(bert):
  plain = models.load(bert)

  def change(tensors):
    tensors["cls.predictions.bias"] = np.zeros(40, np.float32)
    tensors["embeddings.position_ids"] = np.arange(32)

  edit(bert, change)
  assert same(models.load(bert), plain)


def test_a_missing_tensor_is_listed(directory):
  lost = sorted(safetensors_numpy.load_file(directory / FILE))[0]

  def change(tensors):
    del tensors[lost]

  edit(directory, change)
  name = lost.removeprefix("model.")
  message = rf"missing \['{re.escape(name)}'\], extra \[\]"
  with pytest.raises(ValueError, match=message):
    models.load(directory)


def test_an_extra_tensor_is_listed(directory):
  extra = {"layers.9.novel.weight": np.zeros(3, np.float32)}
  edit(directory, lambda x: x | extra)
  message = r"missing \[\], extra \['layers.9.novel.weight'\]"
  with pytest.raises(ValueError, match=message):
    models.load(directory)


def test_a_tensor_of_another_shape_is_named(directory):
  configure(directory, intermediate_size=20)
  with pytest.raises(ValueError, match=r"must have shape .*20.* came"):
    models.load(directory)


@pytest.mark.parametrize("keep", [0, 5, 100, 20_000, -1])
def test_a_truncated_file_is_named(directory, keep):
  path = directory / FILE
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(ValueError, match="truncated or damaged") as error:
    models.load(directory)
  assert str(path) in str(error.value)


def test_an_output_matrix_stored_twice_is_read_once(tmp_path):
  qwen = pathlib.Path(shutil.copytree(REFERENCE / "qwen2", tmp_path / "q"))
  plain = models.load(qwen)

  def change(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

  edit(qwen, change)
  assert same(models.load(qwen), plain)


def test_missing_files_are_named(directory):
  (directory / FILE).unlink()
  with pytest.raises(FileNotFoundError, match=f"must hold {FILE}"):
    models.load(directory)
  (directory / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"config\.json is not there"):
    models.load(directory)
  with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is not there"):
    models.tokenizer(directory)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"model_type": "mamba"}, "'mamba'"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type='yarn'"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"mlp_bias": True}, "mlp_bias=True"),
    ({"hidden_act": "relu6"}, "hidden_act='relu6'"),
  ],
)
def test_an_architecture_that_is_not_ours_is_refused(llama, settings, message):
  configure(llama, **settings)
  with pytest.raises(ValueError, match=message):
    models.load(llama)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"qkv_bias": False}, "qkv_bias=False"),
    ({"use_swiglu_ffn": True}, "use_swiglu_ffn=True"),
    ({"hidden_act": "silu"}, "hidden_act='silu'"),
    ({"patch_size": 6}, "patch must divide image_size"),
  ],
)
def test_a_vision_model_that_is_not_ours_is_refused(vit, settings, message):
  configure(vit, **settings)
  with pytest.raises(ValueError, match=message):
    models.load(vit)


def test_a_text_longer_than_a_sliding_window_is_refused(tmp_path):
  for kind, settings in (
    ("gemma2", {}),
    ("mistral", {}),
    ("qwen2", {"use_sliding_window": True}),
  ):
    path = shutil.copytree(REFERENCE / kind, tmp_path / kind)
    configure(pathlib.Path(path), sliding_window=5, **settings)
    model = models.load(path)
    fits, longer = jnp.ones((1, 5), jnp.int32), jnp.ones((1, 6), jnp.int32)
    assert nnx.eval_shape(lambda m, x: m(x), model, fits).shape == (1, 5, 40)
    with pytest.raises(ValueError, match=r"window of 5 .*\(1, 6\)"):
      nnx.eval_shape(lambda m, x: m(x), model, longer)


def test_without_a_preprocessor_pixels_are_normalized_as_was_usual(vit):
  assert models.load(vit).config.mean == (0.4, 0.5, 0.6)
  (vit / "preprocessor_config.json").unlink()
  assert models.load(vit).config.std == (0.5, 0.5, 0.5)
  configure(vit, model_type="deit")
  with pytest.raises(ValueError, match="missing .*distillation_token"):
    models.load(vit)


def test_lists_of_a_configuration_file_become_part_of_the_model(vit):
  model = models.load(vit, mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])
  assert model.config.std == (1.0, 1.0, 1.0)
  assert models.load("cnn", hidden=[5]).config.hidden == (5,)
  hash(nnx.graphdef(model))  # jit asks for it


def test_a_damaged_config_is_refused(llama):
  settings = json.loads((llama / "config.json").read_text())
  del settings["hidden_size"]
  (llama / "config.json").write_text(json.dumps(settings))
  with pytest.raises(ValueError, match=r"lacks 'hidden_size'"):
    models.load(llama)
  (llama / "config.json").write_text("{")
  with pytest.raises(ValueError, match="must be JSON"):
    models.load(llama)
  (llama / "config.json").write_text("[]")
  with pytest.raises(ValueError, match="model_type"):
    models.load(llama)


def test_rotary_settings_of_newer_configs_are_read(llama):
  plain = models.load(llama)
  settings = json.loads((llama / "config.json").read_text())
  theta = settings.pop("rope_theta")
  settings["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
  (llama / "config.json").write_text(json.dumps(settings))
  assert models.load(llama).config == plain.config
  assert plain.config.theta == 100.0


def test_a_field_that_does_not_exist_lists_near_names(bert):
  with pytest.raises(ValueError, match=r"'dept'.*'depth'"):
    models.load("encoder", dept=3)
  with pytest.raises(ValueError, match=r"'pol'.*'pool'"):
    models.load(bert, pol="mean")


def test_a_directory_takes_overrides_and_a_new_head(bert):
  model = models.load(bert, classes=5, seed=1, pool="mean", pooler=False)
  assert model.pooler is None
  assert model.head.kernel[...].shape == (16, 5)
  again = models.load(bert, classes=5, seed=1, pool="mean", pooler=False)
  assert same(model, again)


def test_the_weights_are_copied_out_of_the_file(llama):
  model = models.load(llama)
  plain = [np.array(leaf) for leaf in weights(model)]
  edit(llama, lambda x: {k: 0 * v for k, v in x.items()})
  for a, b in zip(weights(model), plain, strict=True):
    np.testing.assert_array_equal(a, b)


def test_an_unprepared_model_says_what_to_run(monkeypatch, tmp_path):
  monkeypatch.setenv("FEDJAX_PEFT_HOME", str(tmp_path))
  for read in (models.load, models.tokenizer):
    with pytest.raises(
      FileNotFoundError, match="run: fedjax-peft models prepare minilm"
    ):
      read("minilm")
  with pytest.raises(ValueError, match="'minilm', 'smollm2'"):
    models.prepare("minilmm")


def test_a_name_that_is_nothing_is_refused(tmp_path):
  for name in ("minilmm", tmp_path / "nowhere", "../a/b"):
    with pytest.raises(FileNotFoundError, match="neither a directory nor"):
      models.load(name)
  with pytest.raises(ValueError, match="no tokenizer of its own"):
    models.tokenizer("decoder")


def test_every_random_model_has_the_name_it_is_listed_under():
  assert models.names()[:3] == ("minilm", "smollm2", "dinov2_small")
  assert {"encoder", "decoder", "vit", "cnn"} <= set(models.names())
  small = models.load("decoder", width=16, heads=2, groups=1, vocab=30)
  assert small.config.width == 16
  exact = nnx.eval_shape(lambda: models.load("minilm-random"))
  count = sum(leaf.size for leaf in weights(exact))
  # 22,713,216 tensor values of the file, less the pooler's 384 x 385.
  assert count == 22_713_216 - 384 * 385
  exact = nnx.eval_shape(lambda: models.load("smollm2-random"))
  assert sum(leaf.size for leaf in weights(exact)) == 134_515_008
  exact = nnx.eval_shape(
    lambda: models.load("dinov2_small-random", image_size=518)
  )
  # The tensor values of the file.
  assert sum(leaf.size for leaf in weights(exact)) == 22_056_192


def test_a_tokenizer_neither_truncates_nor_pads(tmp_path):
  kind = tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, "[UNK]")
  tokenizer = tokenizers.Tokenizer(kind)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.enable_truncation(2)
  tokenizer.enable_padding(length=2)
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  loaded = models.tokenizer(tmp_path)
  assert loaded.encode("a b a").ids == [0, 1, 0]
  assert loaded.encode("a").ids == [0]
  (tmp_path / "tokenizer.json").write_text('{"version"')
  with pytest.raises(ValueError, match="truncated or damaged"):
    models.tokenizer(tmp_path)


def test_a_hub_id_loads_from_the_cache_of_the_hub_client(monkeypatch, tmp_path):
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  place = tmp_path / "models--someone--small"
  shutil.copytree(REFERENCE / "llama", place / "snapshots" / ("0" * 40))
  (place / "refs").mkdir()
  (place / "refs" / "main").write_text("0" * 40)
  assert same(models.load("someone/small"), models.load(REFERENCE / "llama"))
  with pytest.raises(FileNotFoundError, match="could not be downloaded"):
    models.load("someone/other")


def test_a_hub_that_does_not_answer_is_one_sentence():
  code = "from fedjax_peft import models; models.load('someone/other')"
  environment = os.environ | {
    "HF_ENDPOINT": "http://127.0.0.1:9",  # nothing listens there
    "HF_HUB_OFFLINE": "0",
  }
  done = subprocess.run(
    [sys.executable, "-c", code],
    env=environment,
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 1
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith("FileNotFoundError: model 'someone/other' is not in")
