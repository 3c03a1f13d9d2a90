"""What we write, read by PyTorch, transformers and PEFT themselves.

They have an environment of their own; `make interop-env` builds it.
"""

import json
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interop_cases as cases
from fedjax_peft import interop, models, peft

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = pathlib.Path(os.environ.get("INTEROP", ROOT / ".venv-interop"))
PYTHON = ENVIRONMENT / "bin" / "python"

HEAD = "head/.*"
ADAPTERS = {
  "bert lora": lambda m: peft.tune(peft.lora(m, 3, alpha=5), HEAD),
  "bert dora": lambda m: peft.dora(m, 2, ".*/(output|down)", scaling="sqrt"),
  "bert ia3": lambda m: peft.ia3(peft.ia3(m), ".*/down", side="input"),
  "bert prompt": lambda m: peft.prompt(m, 3),
  "llama ranks": lambda m: peft.lora(
    peft.lora(m, 3, ".*/(up|gate)"), 2, ".*/down", alpha=7
  ),
  "llama prompt": lambda m: peft.prompt(m, 3),
  "llama norm": lambda m: peft.tune(peft.ia3(m), "(layers/.*_)?norm/.*"),
  "qwen2 prefix": lambda m: peft.prefix(m, 3),
  "qwen3 rslora": lambda m: peft.lora(m, 3, scaling="sqrt"),
  # As long as fits into its window with the 9 words of a text.
  "mistral prefix": lambda m: peft.prefix(m, 3),
  "gemma norm": lambda m: peft.tune(peft.lora(m, 2), "norm/.*"),
  "gemma2 dora": lambda m: peft.dora(m, 2, ".*/(output|gate)"),
  "vit lora": lambda m: peft.tune(peft.lora(m, 2, ".*/(key|up)"), HEAD),
  "deit ia3": lambda m: peft.ia3(m, ".*/down", side="input"),
  "dinov2 dora": lambda m: peft.tune(peft.dora(m, 2), HEAD),
  "dinov2_with_registers lora": lambda m: peft.lora(m, 2, ".*/(output|down)"),
}
# Whole models, with the config of their base and with one of ours.
TEXTS = ("bert", "llama", "qwen2", "qwen3", "gemma", "gemma2")
PICTURES = ("vit", "deit", "dinov2", "dinov2_with_registers")
WHOLE = [
  f"{kind} {config}"
  for kind in (*TEXTS, *PICTURES)
  for config in ("kept", "written")
]
CLASSES = {
  "bert": ("BertModel", "BertForSequenceClassification"),
  "vit": ("", "ViTForImageClassification"),
  "deit": ("", "DeiTForImageClassification"),
  "dinov2": ("", "Dinov2ForImageClassification"),
  "dinov2_with_registers": ("", "Dinov2WithRegistersForImageClassification"),
}


def base_of(name):
  """(model, class of transformers) of a case."""
  kind, _, what = name.rpartition(" ")
  without = what == "prompt" or name == "bert dora"
  has_head = kind in ("bert", *PICTURES) and not without
  options = {"classes": 3} if has_head else {}
  if kind.startswith("dinov2"):
    options["pool"] = "both"
  text = f"{kind.capitalize()}ForCausalLM"
  names = CLASSES.get(kind, (text, text))
  return models.load(cases.MODELS / kind, **options), names[has_head]


def moved(module):
  """The module with a change in every leaf that trains."""
  parts = peft.split(module)
  keys = jax.random.split(jax.random.key(0), len(parts.params))
  params = {
    name: value + 0.3 * jax.random.normal(key, value.shape)
    for key, (name, value) in zip(keys, sorted(parts.params.items()))
  }
  return peft.merge(parts.graph, params, *parts[2:])


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
  """{case: (our module, what the library computes)}."""
  if not PYTHON.is_file():
    pytest.skip(
      f"PyTorch and PEFT are not installed in {ENVIRONMENT}; run: "
      "make interop-env"
    )
  root, modules = tmp_path_factory.mktemp("library"), {}
  for name in (*ADAPTERS, *WHOLE):
    kind, _, what = name.rpartition(" ")
    base, made = base_of(name)
    where = root / name.replace(" ", "-")
    if name in ADAPTERS:
      modules[name] = moved(ADAPTERS[name](base))
      interop.export_adapter(modules[name], None, where, base=kind)
    else:
      modules[name] = moved(peft.lora(base, 2))
      source = cases.MODELS / kind if what == "kept" else None
      interop.export_merged(modules[name], None, where, base=source)
    options = {"num_labels": 3} if getattr(base.config, "classes", 0) else {}
    case = {"kind": kind, "class": made, "options": options}
    (where / "case.json").write_text(json.dumps(case))
  command = [PYTHON, cases.HERE / "check.py", root]
  quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
  # Outside of this repository, whose kernels/ would hide a package of theirs.
  done = subprocess.run(
    command, cwd=root, env=os.environ | quiet, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-4000:]
  found = {}
  for name, module in modules.items():
    with np.load(root / name.replace(" ", "-") / "values.npz") as file:
      found[name] = module, file["values"]
  return found


@pytest.mark.parametrize("name", [*ADAPTERS, *WHOLE])
def test_the_library_computes_what_we_compute(answers, name, tol):
  module, values = answers[name]
  kind, _, what = name.rpartition(" ")
  came, expected = cases.compare(kind, module, values, what == "prompt")
  error = np.abs(came - expected).max() / np.abs(expected).max()
  # 3 layers of 4 products each, at most 36 terms, and patches of 147.
  assert error <= tol(jnp.float32, 3 * 4 * 36 + 147)
