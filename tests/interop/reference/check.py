"""What PyTorch and PEFT compute with directories that this library wrote.

Run by tests/interop/test_library.py in the environment of `make interop-env`:

  python check.py DIRECTORY

Each subdirectory of DIRECTORY is an adapter or a whole model, with case.json:
kind (of tests/models/reference), class (of transformers), options. The outputs
go to values.npz beside it. A tensor that has no place, or a place that has no
tensor, is an error.
"""

import json
import pathlib
import sys
import warnings

import numpy as np
import torch
import transformers
from make import MODELS, outputs

import peft


def load(directory, case):
  """(model, config of its adapter or of itself)."""
  make = getattr(transformers, case["class"])
  if not (directory / "adapter_config.json").is_file():
    model, report = make.from_pretrained(directory, output_loading_info=True)
    # What stands for masked patches in pretraining is not used here.
    missing = {
      name for name in report["missing_keys"] if "mask_token" not in name
    }
    assert not missing, report
    assert not report["mismatched_keys"], report
    model.config.peft_type, model.config.is_prompt_learning = None, False
    return model.eval(), model.config
  base = make.from_pretrained(MODELS / case["kind"], **case["options"])
  with warnings.catch_warnings():
    warnings.filterwarnings("error", message=".*adapter keys.*")
    model = peft.PeftModel.from_pretrained(base, directory)
  return model.eval(), model.peft_config["default"]


def main(root):
  """Writes values.npz into each subdirectory."""
  for path in sorted(pathlib.Path(root).glob("*/case.json")):
    case = json.loads(path.read_text())
    model, config = load(path.parent, case)
    with torch.no_grad():
      values = outputs(case["kind"], config, model)["values"]
    np.savez(path.parent / "values.npz", values=values)


if __name__ == "__main__":
  main(sys.argv[1])
