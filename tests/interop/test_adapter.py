"""Adapters of the Hugging Face PEFT library, in and out.

reference/README.md says how the stored ones were made.
"""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import interop_cases as cases
from fedjax_peft import interop, losses, models, objective, peft
from fedjax_peft.interop import naming, settings

# Keys of a prefix turn with the positions of the words, and come back rounded.
TURNED = "qwen3_prefix"


def error(came, expected):
  """The largest error relative to the largest value."""
  return np.abs(came - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", cases.NAMES)
def test_an_adapter_of_the_library_gives_the_outputs_of_the_library(name, tol):
  came, expected = cases.outputs(name, cases.imported(name))
  # 3 layers of 4 products each, at most 36 terms, and patches of 147.
  limit = tol(jnp.float32, 3 * 4 * 36 + 147)
  assert error(came, expected) <= limit
  plain, _ = cases.outputs(name, cases.model(name))
  assert error(plain, expected) > 100 * limit


@pytest.mark.parametrize("name", cases.NAMES)
def test_what_was_imported_is_written_with_the_same_bits(name, tol, tmp_path):
  interop.export_adapter(cases.imported(name), None, tmp_path, base="x")
  came, stored = cases.tensors(tmp_path), cases.tensors(cases.HERE / name)
  assert came.keys() == stored.keys()
  for key, tensor in stored.items():
    assert came[key].dtype == tensor.dtype
    if name == TURNED:
      assert error(came[key], tensor) <= tol(np.float32)
    else:
      np.testing.assert_array_equal(came[key], tensor)


def meaning(told, name):
  """What a config says of every module that it may mean."""
  names = naming.of(cases.model(name))
  found = {}
  for path in names.table:
    for module in naming.theirs(names, path):
      rank = settings.pattern(told.get("rank_pattern"), module, told.get("r"))
      alpha = settings.pattern(
        told.get("alpha_pattern"), module, told.get("lora_alpha")
      )
      wanted = told.get("target_modules")
      target = settings.is_target(wanted, module) or (
        wanted == "all-linear" and "proj" in module
      )
      scale = alpha and alpha / rank ** (0.5 if told["use_rslora"] else 1)
      found[module] = (
        target and (rank, scale),
        settings.is_target(told.get("feedforward_modules"), module),
        settings.is_target(told.get("modules_to_save"), module),
      )
  same = ("peft_type", "task_type", "use_dora", "num_virtual_tokens")
  more = ("token_dim", "num_attention_heads", "num_layers")
  return found, [told.get(key) for key in (*same, *more)]


@pytest.mark.parametrize("name", cases.NAMES)
def test_what_was_imported_is_written_with_the_same_meaning(name, tmp_path):
  interop.export_adapter(cases.imported(name), None, tmp_path, base="x")
  came = json.loads((tmp_path / settings.FILE).read_text())
  assert came["base_model_name_or_path"] == "x"
  assert meaning(came, name) == meaning(cases.read(name), name)


@functools.cache
def some(kind, **options):
  """A small model; nobody changes it."""
  return models.load(cases.MODELS / kind, **options)


# Models, what is put on them, and what comes back bit for bit.
OWN = {
  "lora": (some("bert"), lambda m: peft.lora(m, 3, alpha=1.1)),
  "rslora": (some("bert"), lambda m: peft.lora(m, 3, scaling="sqrt")),
  "head": (
    some("bert", classes=3),
    lambda m: peft.tune(
      peft.dora(m, 2, ".*/(output|down)"),
      "(head|pooler|layers/ffn_norm|embeddings/norm)/.*",
    ),
  ),
  "prompt": (some("bert"), lambda m: peft.prompt(m, 4)),
  "mean": (
    some("bert", classes=3, pool="mean", pooler=False),
    lambda m: peft.tune(peft.prompt(m, 4), "head/.*"),
  ),
  "ia3": (
    some("bert"),
    lambda m: peft.ia3(peft.ia3(m), ".*/down", side="input"),
  ),
  "ranks": (
    some("llama"),
    lambda m: peft.lora(peft.lora(m, 3, ".*/(up|gate)"), 2, ".*/down", alpha=7),
  ),
  "words": (
    some("llama"),
    lambda m: peft.tune(peft.ia3(m), "(head|norm)/.*"),
  ),
  "vit": (
    some("vit", classes=3),
    lambda m: peft.dora(m, 2, ".*/(key|output)"),
  ),
  "dinov2": (some("dinov2"), lambda m: peft.lora(m, 2, ".*/up")),
}


def randomized(module):
  """Every trained leaf with other values, none of them round."""
  parts = peft.split(module)
  keys = jax.random.split(jax.random.key(0), len(parts.params))
  return {
    name: 1 + 0.3 * jax.random.normal(key, x.shape)
    for key, (name, x) in zip(keys, sorted(parts.params.items()), strict=True)
  }


@pytest.mark.parametrize(
  ("name", "release"),
  [(name, 5) for name in OWN] + [("vit", 4), ("dinov2", 4)],
)
def test_what_was_exported_comes_back_with_the_same_bits(
  name, release, tmp_path
):
  plain, put = OWN[name]
  module = put(plain)
  params = randomized(module)
  interop.export_adapter(module, params, tmp_path, base=".", release=release)
  again = interop.import_adapter(tmp_path, plain)
  came = peft.split(again).params
  assert {k for k in came.keys() ^ params.keys() if "head/" not in k} == set()
  for key, value in params.items():
    np.testing.assert_array_equal(came[key], value)
  if getattr(plain, "head", None) is not None:  # kept though it is frozen
    head = params.get("head/kernel", plain.head.kernel[...])
    np.testing.assert_array_equal(again.head.kernel, head)
  assert scales(again) == scales(module)


def scales(module):
  """{path: factor} of the layers that have one."""
  found = peft.adapter.find(module, (peft.LoRA, peft.DoRA))
  return {peft.adapter.join(p): node.scale for p, (node, _) in found.items()}


@pytest.mark.parametrize(
  ("kind", "pool", "theirs"),
  [
    ("bert", "first", True),
    ("bert", "mean", False),
    ("vit", "first", True),
    ("vit", "both", False),
    ("dinov2", "both", True),
    ("dinov2", "first", False),
  ],
)
def test_a_head_on_another_pooling_has_a_file_of_its_own(
  kind, pool, theirs, tmp_path
):
  module = peft.lora(some(kind, classes=3, pool=pool), 2)
  for write in (interop.export_adapter, interop.export_merged):
    where = tmp_path / write.__name__
    where.mkdir()
    (where / "head.safetensors").touch()  # of an export before
    write(module, None, where, base=cases.MODELS / kind)
    assert (where / "head.safetensors").is_file() != theirs
    (name,) = where.glob("*model.safetensors")
    held = safetensors.numpy.load_file(name)
    assert any("classifier" in key for key in held) == theirs


def test_a_prefix_comes_back_within_rounding(tol, tmp_path):
  module = peft.prefix(some("llama"), 4)
  params = randomized(module)
  interop.export_adapter(module, params, tmp_path, base=".")
  again = peft.split(interop.import_adapter(tmp_path, some("llama"))).params
  for key, value in params.items():
    exact = key.endswith("_value")
    largest = float(jnp.abs(value).max())
    limit = 0 if exact else tol(jnp.float32) * largest
    assert float(jnp.abs(again[key] - value).max()) <= limit


def test_parts_of_a_model_are_written_as_the_module_is(tmp_path):
  module = peft.lora(some("bert", classes=3), 2)
  params = randomized(module)
  model = objective.model(module, losses.classification)
  for i, parts in enumerate([module, model, peft.split(module)]):
    interop.export_adapter(parts, params, tmp_path / str(i), base=".")
  first = (tmp_path / "0" / "adapter_model.safetensors").read_bytes()
  for i in (1, 2):
    other = tmp_path / str(i) / "adapter_model.safetensors"
    assert other.read_bytes() == first


def test_factors_of_a_smaller_rank_say_their_rank(tol, tmp_path):
  module = peft.lora(some("bert"), 4, alpha=8)
  params = randomized(module)
  interop.export_adapter(
    module, interop.arrays.cut(params, 3), tmp_path, base="."
  )
  told = json.loads((tmp_path / settings.FILE).read_text())
  assert (told["r"], told["lora_alpha"]) == (3, 6)
  kept = {
    k: (x.at[..., 3:] if k.endswith("lora_a") else x.at[..., 3:, :]).set(0)
    for k, x in params.items()
  }
  parts = peft.split(module)
  wanted = peft.merge(parts.graph, kept, *parts[2:])
  again = interop.import_adapter(tmp_path, some("bert"))
  (came, _), (wanted, _) = (
    cases.outputs("bert_dora", each) for each in (again, wanted)
  )
  assert error(came, wanted) <= tol(jnp.float32, 3 * 4 * 24)


@pytest.mark.parametrize("kind", ["bert", "llama", "gemma2", "vit", "dinov2"])
@pytest.mark.parametrize("release", naming.RELEASES)
def test_targets_mean_the_layers_that_are_wanted_and_no_others(kind, release):
  module = models.load(cases.MODELS / kind)
  names = naming.of(module, release=release)
  modules = [p for p in names.table if p not in ("pooler", "head")]
  for seed in range(20):
    size = 1 + seed % 4
    wanted = np.random.default_rng(seed).choice(modules, size, replace=False)
    meant = naming.targets(names, wanted)
    for path in names.table:
      for name in naming.theirs(names, path):
        assert settings.is_target(meant, name) == (path in wanted)


@pytest.fixture
def copied(tmp_path):
  """Copies a stored adapter, changed; returns where it is."""

  def copy(name, change_tensors=None, **told):
    shutil.copytree(cases.HERE / name, tmp_path / name)
    if change_tensors:
      tensors = change_tensors(cases.tensors(tmp_path / name))
      safetensors.numpy.save_file(
        tensors, tmp_path / name / "adapter_model.safetensors"
      )
    file = tmp_path / name / settings.FILE
    file.write_text(json.dumps(cases.read(name) | told))
    return tmp_path / name

  return copy


LOST = "bert.encoder.layer.1.attention.self.query.lora_A.weight"


def without(tensors):
  return {k: x for k, x in tensors.items() if not k.endswith(LOST)}


def with_more(tensors):
  return tensors | {"base_model.model.bert.x.lora_A.weight": np.ones((3, 2))}


def renamed(tensors):
  """What ends like a factor is none."""
  return tensors | {
    f"{k}_scale": x for k, x in tensors.items() if k.endswith(LOST)
  }


def narrower(tensors):
  return {
    k: x[:, :-1].copy() if k.endswith("lora_A.weight") else x
    for k, x in tensors.items()
  }


def lower(tensors):
  return {
    k: x[:-1].copy() if k.endswith("lora_A.weight") else x
    for k, x in tensors.items()
  }


def uneven(tensors):
  return {
    k: x[:-1].copy() if k.endswith(LOST) else x for k, x in tensors.items()
  }


@pytest.mark.parametrize(
  ("change", "told", "words"),
  [
    (without, {}, rf"missing \['{LOST}'\], extra \[\]"),
    (with_more, {}, r"missing \[\], extra \['base_model.model.bert.x.lora_A"),
    (renamed, {}, r"extra \['.*query.lora_A.weight_scale'"),
    (narrower, {}, r"lora_a' in .* must have shape \(3, 16, 3\)"),
    (lower, {}, "rank of 'layers/attention/query' .* 3: 2 came"),
    (uneven, {}, "layers of a stack must be alike"),
    (
      None,
      {"target_modules": ["query", "value", "key"]},
      "missing .*key.lora_A",
    ),
    (None, {"peft_type": "LOHA"}, "peft_type of LORA, IA3"),
    (None, {"bias": "all"}, "bias='all' in .* is not supported"),
    (None, {"layers_to_transform": [0]}, "layers_to_transform="),
    (None, {"a_new_key": 1}, "a_new_key=1 in .* is not supported"),
    (None, {"init_lora_weights": "pissa"}, "changes its base too"),
    (None, {"rank_pattern": {"0.attention.self.query": 5}}, "must have one r"),
  ],
)
def test_an_adapter_that_does_not_fit_is_refused_in_a_sentence(
  copied, change, told, words
):
  where = copied("bert_lora", change, **told)
  with pytest.raises(ValueError, match=words):
    interop.import_adapter(where, cases.model("bert_lora"))


def test_a_module_without_the_head_of_an_adapter_is_refused():
  where = cases.HERE / "bert_lora"
  with pytest.raises(ValueError, match="load the model with classes=3"):
    interop.import_adapter(where, models.load(cases.MODELS / "bert"))


def test_a_module_with_an_adapter_of_its_own_is_refused():
  where = cases.HERE / "bert_lora"
  module = peft.norms(cases.model("bert_lora"))
  with pytest.raises(ValueError, match="trains already; load it anew"):
    interop.import_adapter(where, module)


def test_a_layer_that_was_saved_whole_is_no_target(copied):
  """The library leaves it out, though the end of its name is in the list."""
  where = copied("bert_lora", target_modules=["query", "value", "classifier"])
  module = interop.import_adapter(where, cases.model("bert_lora"))
  assert type(module.head).__name__ == "Linear"


def test_files_that_are_missing_or_damaged_are_refused(copied):
  model = cases.model("bert_lora")
  where = copied("bert_lora")
  weights = where / "adapter_model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-4])
  with pytest.raises(ValueError, match="truncated or damaged"):
    interop.import_adapter(where, model)
  weights.unlink()
  with pytest.raises(FileNotFoundError, match="safe_serialization=True"):
    interop.import_adapter(where, model)
  (where / settings.FILE).write_text("{")
  with pytest.raises(ValueError, match="must be JSON"):
    interop.import_adapter(where, model)
  (where / settings.FILE).unlink()
  with pytest.raises(FileNotFoundError, match="needs adapter_config.json"):
    interop.import_adapter(where, model)


CANNOT = {
  "has vera; write a merged": lambda: peft.vera(some("bert"), 4),
  "has Sparse": lambda: peft.sparse(some("bert")),
  "has Core": lambda: peft.core(some("bert"), 2),
  "has Ravan": lambda: peft.ravan(some("bert"), 2),
  "has Bottleneck; it cannot be merged either": lambda: peft.bottleneck(
    some("bert"), 2
  ),
  "has DeepPrompt": lambda: peft.deep_prompt(some("bert"), 2),
  "module has none": lambda: some("bert"),
  r"\['dora', 'lora'\]": lambda: peft.dora(
    peft.lora(some("bert"), 2, ".*/key"), 2, ".*/value"
  ),
  r"\['ia3', 'lora'\]": lambda: peft.ia3(peft.lora(some("bert"), 2)),
  "read the first place": lambda: peft.prompt(some("bert", classes=2), 2),
  "to later positions": lambda: peft.prefix(some("bert"), 2),
  "none for images": lambda: peft.prompt(some("vit"), 2),
  "scales the prompt of a Gemma": lambda: peft.prompt(some("gemma"), 2),
  "no adapter beside them": lambda: peft.bitfit(peft.lora(some("bert"), 2)),
  "'embeddings/position' is none": lambda: peft.tune(
    peft.lora(some("vit"), 2), "embeddings/position"
  ),
  "place for the residual": lambda: with_residual(),
  "an Encoder, a Decoder or a ViT": lambda: peft.lora(
    models.load("cnn"), 2, "dense/1"
  ),
}


def with_residual():
  module = peft.lora(some("bert"), 2, residual=True)
  parts = peft.split(module)
  params = {k: jnp.ones_like(x) for k, x in parts.params.items()}
  return peft.merge(parts.graph, params, *parts[2:])


@pytest.mark.parametrize("words", CANNOT)
def test_what_the_layout_cannot_hold_is_refused(words, tmp_path):
  module = CANNOT[words]()
  words = re.compile(words, re.IGNORECASE)
  with pytest.raises(ValueError, match=words):
    interop.export_adapter(module, None, tmp_path / "new", base=".")
  assert not (tmp_path / "new").exists()


def test_params_of_another_module_are_refused(tmp_path):
  module = peft.lora(some("bert"), 2)
  params = peft.split(module).params
  with pytest.raises(ValueError, match="'layers/x' is not"):
    interop.export_adapter(module, {"layers/x": 0}, tmp_path, base=".")
  wide = {k: jnp.zeros((*x.shape[:-1], 99)) for k, x in params.items()}
  with pytest.raises(ValueError, match="must have the shapes"):
    interop.export_adapter(module, wide, tmp_path, base=".")
