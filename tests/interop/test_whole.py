"""Whole models with adapters folded in."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import interop_cases as cases
from fedjax_peft import interop, models, peft

KINDS = (
  "bert",
  "deit",
  "dinov2",
  "dinov2_with_registers",
  "gemma",
  "gemma2",
  "llama",
  "mistral",
  "qwen2",
  "qwen3",
  "vit",
)
SMALL = {"width": 16, "heads": 2, "ffn": 24}


def some(kind, **options):
  return models.load(cases.MODELS / kind, **options)


def trained(module):
  """LoRA with a change in every entry, and the params that say so."""
  module = peft.lora(module, 2, where="layers/(attention|ffn)/.*")
  keys = jax.random.split(jax.random.key(0), 99)
  params = {
    name: 0.3 * jax.random.normal(key, x.shape)
    for key, (name, x) in zip(keys, sorted(peft.split(module).params.items()))
  }
  return module, params


def plain(module, params):
  """{path: array} of the merged module."""
  parts = peft.split(module)
  merged = peft.merged(peft.merge(parts.graph, params, *parts[2:]))
  return peft.split(merged).params


def shape(module):
  """The config, but for what has no word, or several."""
  config = dataclasses.asdict(module.config) | {"window": None}
  if "head_width" in config:
    config["head_width"] = module.config.per_head
  return config


def norms(path):
  return path.endswith("scale")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_base", [True, False])
def test_a_merged_model_loads_with_the_same_bits(
  kind, with_base, tol, tmp_path
):
  module, params = trained(models.load(cases.MODELS / kind))
  base = cases.MODELS / kind if with_base else None
  path = interop.export_merged(module, params, tmp_path, base=base)
  again = models.load(path)
  assert shape(again) == shape(module)
  came, wanted = peft.split(again).params, plain(module, params)
  assert came.keys() == wanted.keys()
  for name, value in wanted.items():
    if kind.startswith("gemma") and norms(name):  # stored less one
      np.testing.assert_allclose(came[name], value, tol(np.float32))
    else:
      np.testing.assert_array_equal(came[name], value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_nobody_trained_is_written_as_it_was(kind, tmp_path):
  source = cases.MODELS / kind
  interop.export_merged(models.load(source), None, tmp_path, base=source)
  stored = safetensors.numpy.load_file(source / "model.safetensors")
  came = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  plain = {name.removeprefix(f"{kind}."): x for name, x in stored.items()}
  assert (
    came.keys() == (stored if "model.norm.weight" in came else plain).keys()
  )
  for name, tensor in stored.items():
    name = name if name in came else name.removeprefix(f"{kind}.")
    if kind.startswith("gemma") and "norm" in name:
      np.testing.assert_allclose(came[name], tensor, 1e-6, 1e-6)
    else:
      np.testing.assert_array_equal(came[name], tensor)


def test_a_head_is_stored_as_their_classifier(tmp_path):
  source = cases.MODELS / "bert"
  module = peft.head(models.load(source, classes=3))
  interop.export_merged(module, None, tmp_path, base=source)
  came = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  np.testing.assert_array_equal(came["classifier.weight"].T, module.head.kernel)
  assert "bert.encoder.layer.0.attention.self.query.weight" in came
  told = json.loads((tmp_path / "config.json").read_text())
  assert told["architectures"] == ["BertForSequenceClassification"]
  assert told["id2label"] == {str(i): f"LABEL_{i}" for i in range(3)}
  again = models.load(tmp_path, classes=3, seed=7)
  assert again.config == module.config
  np.testing.assert_array_equal(again.head.kernel, module.head.kernel)
  other = models.load(tmp_path, classes=4, seed=7)  # of another size: new
  fresh = models.load(source, classes=4, seed=7)
  np.testing.assert_array_equal(other.head.kernel, fresh.head.kernel)


def test_a_pooler_that_was_not_loaded_is_kept(tmp_path):
  source = cases.MODELS / "bert"
  module = models.load(source, pooler=False, pool="mean")
  interop.export_merged(module, None, tmp_path, base=source)
  came, first = (models.load(path) for path in (tmp_path, source))
  np.testing.assert_array_equal(came.pooler.kernel, first.pooler.kernel)


def test_a_tokenizer_is_copied(tmp_path):
  source = tmp_path / "source"
  module = models.load("encoder", **SMALL, pooler=True, pool="first")
  interop.export_merged(module, None, source)
  (source / "tokenizer.json").write_text("{}")
  interop.export_merged(module, None, tmp_path / "out", base=source)
  assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_images_of_another_size_keep_their_positions(tmp_path):
  source = cases.MODELS / "vit"
  module = models.load(source, image_size=42)
  interop.export_merged(module, None, tmp_path, base=source)
  again = models.load(tmp_path)
  assert again.config == module.config
  np.testing.assert_array_equal(
    again.embeddings.position, module.embeddings.position
  )


CANNOT = {
  "Bottleneck.*cannot be folded": lambda: peft.bottleneck(some("bert"), 2),
  "'Prompt'} cannot be folded": lambda: peft.prompt(some("bert"), 2),
  "Prefix.*export prompts and prefixes": lambda: peft.prefix(some("llama"), 2),
  r"\['head_width'\] differ": lambda: models.load(
    "encoder", **SMALL, head_width=5
  ),
  r"\['query_scale'\] differ": lambda: some("llama", query_scale=0.3),
}


@pytest.mark.parametrize("words", CANNOT)
def test_what_no_plain_model_has_is_refused(words, tmp_path):
  with pytest.raises(ValueError, match=words):
    interop.export_merged(CANNOT[words](), None, tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_another_base_is_refused(tmp_path):
  module = models.load(cases.MODELS / "llama")
  for kind in ("qwen2", "bert"):
    with pytest.raises(ValueError, match="the model that it was made of"):
      interop.export_merged(module, None, tmp_path, base=cases.MODELS / kind)
