"""Adapters that the other library wrote, and the models they are for."""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from fedjax_peft import interop, models

HERE = pathlib.Path(__file__).parent / "interop" / "reference"
MODELS = HERE.parent.parent / "models" / "reference"
NAMES = tuple(
  sorted(
    path.name
    for path in HERE.iterdir()
    if (path / "adapter_config.json").is_file()
  )
)


def read(name):
  """The config of a stored adapter."""
  return json.loads((HERE / name / "adapter_config.json").read_text())


def tensors(directory):
  """The tensors of an adapter, stored or written."""
  return safetensors.numpy.load_file(directory / "adapter_model.safetensors")


@functools.cache
def model(name):
  """The model that an adapter is for, with a head if it has one."""
  head = any("classifier" in key for key in tensors(HERE / name))
  options = {"classes": 3} if head else {}
  kind = name.partition("_")[0]
  if kind == "dinov2":
    options["pool"] = "both"
  return models.load(MODELS / kind, **options)


@functools.cache
def imported(name):
  """The model with the adapter."""
  return interop.import_adapter(HERE / name, model(name))


def outputs(name, module):
  """(what a module computes for the stored inputs, what it should)."""
  with np.load(HERE / name / "expected.npz") as file:
    values = file["values"]
  is_prompt = read(name)["peft_type"] == "PROMPT_TUNING"
  return compare(name.partition("_")[0], module, values, is_prompt)


def compare(kind, module, values, is_prompt=False):
  """(a module's outputs for the inputs of a reference, `values` as they are).

  Outputs at padding are left out of both.
  """
  with np.load(MODELS / kind / "expected.npz") as file:
    known = dict(file)
  if "image" in known:
    image = known["image"][:, :28, :28]
    return np.asarray(_call(module, jnp.asarray(image))), values
  tokens, length = (jnp.asarray(known[k]) for k in ("tokens", "length"))
  valid = np.arange(tokens.shape[1]) < known["length"][:, None]
  if kind == "bert" and is_prompt:
    # The library pools the prompt; what it computes for the words is the same.
    came = _hidden(module, tokens, jnp.asarray(valid))
  else:
    came = _call(module, tokens, length)
  came = np.asarray(came)
  return (came[valid], values[valid]) if came.ndim == 3 else (came, values)


@nnx.jit
def _call(module, *inputs):
  return module(*inputs)


@nnx.jit
def _hidden(module, *inputs):
  return module.hidden(*inputs)
