"""Reading an adapter directory into a module.

The tensors say which layers have an adapter, the config how it is meant. That
both agree, and that every layer of a stack is there, is checked by name.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from fedjax_peft import peft
from fedjax_peft.interop import layout, naming, rotation, settings, writing
from fedjax_peft.models import family
from fedjax_peft.peft import adapter, contraction

_FACTORS = ("lora_A.weight", "lora_B.weight")
_SIZES = "lora_magnitude_vector"
_PROMPT = "prompt_embeddings"
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
_TENSOR = re.compile(
  r"(?P<module>.+?)\.(?P<part>lora_[AB]\.weight|lora_magnitude_vector"
  r"|ia3_l|weight|bias)(?:(?<=vector)\.weight)?"
)


class _File(NamedTuple):
  """An adapter as it was read.

  Attributes:
    where: its directory.
    settings: its config.
    names: of the module that it is for.
    tensors: {(our path, part): {layer: tensor}}.
    soft: a prompt or prefix, or None.
    extra: names of tensors that have no place.
  """

  where: pathlib.Path
  settings: settings.Settings
  names: naming.Names
  tensors: dict[tuple[str, str], dict[int, np.ndarray]]
  soft: np.ndarray | None
  extra: list[str]


def import_adapter(
  directory: str | pathlib.Path, module: nnx.Module
) -> nnx.Module:
  """Puts an adapter that the Hugging Face PEFT library wrote on a module.

  Args:
    directory: `adapter_config.json` and `adapter_model.safetensors`, of LoRA
      (rsLoRA, DoRA), IA3, prompt tuning or prefix tuning; names of modules as
      in transformers 4 or 5.
    module: the Encoder, Decoder or ViT that it belongs to, without adapters;
      with a head of as many classes if the adapter has one. Untouched.

  Returns:
    A clone with the adapter; what it saved whole trains as it is.

  Raises:
    FileNotFoundError: if a file is not there.
    ValueError: if a file is damaged; if the config asks for what we do not
      implement; if tensors are missing, left over or of another shape (lists
      them); if the library computes something else with such an adapter.

  Example:
    >>> import tempfile
    >>> from fedjax_peft import interop, models
    >>> model = models.load("decoder")
    >>> with tempfile.TemporaryDirectory() as there:
    ...   tuned = peft.dora(model, rank=2)
    ...   path = interop.export_adapter(tuned, None, there, base="decoder")
    ...   again = import_adapter(path, model)
    >>> sorted(peft.split(again).params) == sorted(peft.split(tuned).params)
    True
  """
  file = _read(pathlib.Path(directory), module)
  kind = file.settings["peft_type"]
  _check_names(file, module)
  if kind == "LORA":
    module, values = _factors(file, module)
  elif kind == "IA3":
    module, values = _gains(file, module)
  else:
    module, values = _soft(file, module)
  saved = _saved(file)
  if saved:
    paths = "|".join(map(re.escape, sorted(saved)))
    module = peft.tune(module, where=f"({paths})/[^/]+")
    values |= _whole(file, module)
  return _filled(file, module, values)


def _read(where, module):
  """Config and tensors, sorted by our paths."""
  told = settings.read(where)
  path = where / writing.WEIGHTS
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} is not there; save the adapter with safe_serialization=True"
    )
  stored = _tensors(path)
  if (where / writing.HEAD).is_file():
    stored |= _tensors(where / writing.HEAD)
  files = [
    _sorted(where, told, naming.of(module, release=release), stored)
    for release in naming.RELEASES
  ]
  return min(files, key=lambda file: len(file.extra))


def _tensors(path):
  """What a file holds."""
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path} is truncated or damaged: {error}") from error


def _sorted(where, told, names, stored):
  """Tensors under our paths, as far as a table knows them."""
  known = naming.ours(names)
  prefix = family.find(names.kind).prefix
  file = _File(where, told, names, {}, stored.get(_PROMPT), [])
  for name, tensor in stored.items():
    plain = name.removeprefix("base_model.").removeprefix("model.")
    plain = plain.removeprefix(prefix).replace(".modules_to_save", "")
    match = _TENSOR.fullmatch(plain)
    place = known.get(match["module"]) if match else None
    if match and place:
      here = file.tensors.setdefault((place[0], match["part"]), {})
      here[place[1]] = np.asarray(tensor, np.float32)
    elif name != _PROMPT:
      file.extra.append(name)
  return file


def _parts(kind, told):
  """Parts that each layer with an adapter must have."""
  if kind == "LORA":
    return (*_FACTORS, _SIZES) if told.get("use_dora") else _FACTORS
  return ("ia3_l",) if kind == "IA3" else ()


def _check_names(file, module):
  """Raises, with a list, unless the file holds what it must and no more."""
  kind, names = file.settings["peft_type"], file.names
  parts, held = _parts(kind, file.settings), _held(module)
  whole = _saved(file)
  if "head" in whole - held.keys():
    classes = len(file.tensors["head", "weight"][0])
    raise ValueError(
      f"the adapter in {file.where} has a head: load the model with "
      f"classes={classes}"
    )
  wanted = {
    (path, part): range(len(naming.plain(names, path)))
    for path in _adapted(file, module)
    for part in parts
  }
  for path in whole & held.keys():
    for leaf in held[path]:
      layers = range(len(naming.plain(names, path)))
      wanted[path, family.LEAVES[leaf]] = layers
  lacking = [] if parts or file.soft is not None else [_PROMPT]
  if parts and not any(part == parts[0] for _, part in wanted):
    lacking = [f"{parts[0]} of any layer"]
  missing = lacking + [
    f"{naming.theirs(names, path)[layer]}.{part}"
    for (path, part), layers in wanted.items()
    for layer in layers
    if layer not in file.tensors.get((path, part), {})
  ]
  extra = file.extra + [
    f"{naming.theirs(names, path)[layer]}.{part}"
    for (path, part), found in file.tensors.items()
    if (path, part) not in wanted
    for layer in found
  ]
  if missing or extra:
    raise ValueError(
      f"the tensors in {file.where} are not those of its config and of this "
      f"{type(module).__name__}: missing {sorted(missing)}, "
      f"extra {sorted(extra)}"
    )


def _adapted(file, module):
  """Our paths of the layers that have an adapter, or should have one."""
  told, names = file.settings, file.names
  found = {
    path for path, part in file.tensors if "lora" in part or "ia3" in part
  }
  linear = set(_linear(module))
  for path in linear & names.table.keys():
    for name in naming.theirs(names, path):
      meant = settings.is_target(told.get("target_modules"), name)
      if meant and not settings.is_target(told.get("exclude_modules"), name):
        found.add(path)
  return found & linear - _saved(file)


def _saved(file):
  """Our paths of the modules that were saved whole."""
  return {path for path, part in file.tensors if part in ("weight", "bias")}


def _linear(module):
  """Paths of the layers that an adapter can stand beside."""
  return map(adapter.join, adapter.find(module, contraction.LAYERS))


def _held(module):
  """{path of a module: names of its own parameters}."""
  found: dict[str, list[str]] = {}
  for path in adapter.find(module, nnx.Param):
    owner, _, leaf = adapter.join(path).rpartition("/")
    found.setdefault(owner, []).append(leaf)
  return found


def _stacked(file, path, part):
  """A tensor of every layer as one array, in our order of axes."""
  found = file.tensors[path, part]
  shapes = {x.shape for x in found.values()}
  if len(shapes) > 1:
    raise ValueError(
      f"the layers of a stack must be alike: {part} of {path!r} in "
      f"{file.where} has the shapes {sorted(shapes)}"
    )
  value = np.stack([found[layer] for layer in sorted(found)])
  return value if path.startswith("layers/") else value[0]


def _factors(file, module):
  """LoRA and DoRA."""
  told, values = file.settings, {}
  method = peft.dora if told.get("use_dora") else peft.lora
  how = "sqrt" if told.get("use_rslora") else "rank"
  groups: dict[tuple, list[str]] = {}
  for path in sorted(_adapted(file, module)):
    a, b = (_stacked(file, path, part) for part in _FACTORS)
    values[f"{path}/lora_a"] = a.swapaxes(-1, -2)
    values[f"{path}/lora_b"] = b.swapaxes(-1, -2)
    if told.get("use_dora"):
      values[f"{path}/dora_magnitude"] = _stacked(file, path, _SIZES)
    rank, alpha = (_told(file, path, key) for key in ("r", "lora_alpha"))
    if a.shape[-2] != rank:
      raise ValueError(
        f"the rank of {path!r} in {file.where} must be that of its config, "
        f"{rank}: {a.shape[-2]} came"
      )
    groups.setdefault((rank, alpha), []).append(path)
  for (rank, alpha), paths in groups.items():
    where = "|".join(map(re.escape, paths))
    module = method(module, rank, where, alpha=alpha, scaling=how)
  return module, values


def _told(file, path, key):
  """Rank or alpha of one of our layers, the same in all of a stack."""
  found = file.settings.get(_PATTERNS[key])
  usual = file.settings.get(key, 8)  # the library's default for both
  each = {
    settings.pattern(found, name, usual)
    for name in naming.theirs(file.names, path)
  }
  if len(each) > 1:
    raise ValueError(
      f"the layers of a stack must have one {key}: those of {path!r} in "
      f"{file.where} have {sorted(each)}"
    )
  return each.pop()


def _gains(file, module):
  """IA3: the shape says on which side a gain is."""
  values: dict[str, np.ndarray] = {}
  sides: dict[str, list[str]] = {"output": [], "input": []}
  for path in sorted(_adapted(file, module)):
    gain = _stacked(file, path, "ia3_l")
    side = "input" if gain.shape[-2] == 1 else "output"
    sides[side].append(path)
    values[f"{path}/ia3_gain"] = gain.reshape(*gain.shape[:-2], -1)
  for side, paths in sides.items():
    if paths:
      where = "|".join(map(re.escape, paths))
      module = peft.ia3(module, where, side=side)
  return module, values


def _soft(file, module):
  """A prompt [P, D], or a prefix [P, layers * 2 * groups * d]."""
  soft = np.asarray(file.soft, np.float32)
  if file.settings["peft_type"] == "PROMPT_TUNING":
    layout.check_place("prompt", module)
    return peft.prompt(module, len(soft)), {"prompt": soft}
  layout.check_place("prefix", module)
  config, length = module.config, len(soft)
  shape = (length, config.depth, 2, config.groups, config.per_head)
  if soft.size != np.prod(shape):
    raise ValueError(
      f"{_PROMPT} in {file.where} must have {np.prod(shape[1:])} columns for "
      f"this {type(module).__name__}: {soft.shape[-1]} came"
    )
  both = np.moveaxis(soft.reshape(shape), 0, 2)  # [layers, 2, P, groups, d]
  key = rotation.turned(both[:, 0], -length, config.theta)
  at = "layers/attention/prefix/prefix"
  return peft.prefix(module, length), {
    f"{at}_key": key,
    f"{at}_value": both[:, 1],
  }


def _whole(file, module):
  """{path: array} of the modules that were saved whole."""
  convert = family.find(file.names.kind).convert
  values = {}
  for path, leaves in _held(module).items():
    for leaf in leaves:
      part = family.LEAVES.get(leaf)
      if (path, part) in file.tensors:
        name = f"{path}/{leaf}"
        found = {
          layer: convert(name, x, module.config)
          for layer, x in file.tensors[path, part].items()
        }
        file.tensors[path, part] = found
        values[name] = _stacked(file, path, part)
  return values


def _filled(file, module, values: Mapping[str, Any]):
  """The module with these values, of the shapes that it has."""
  parts = peft.split(module)
  for name, like in parts.params.items():
    if name not in values:
      raise ValueError(
        f"an adapter is read into a module without any: {name!r} of this "
        f"{type(module).__name__} trains already; load it anew"
      )
    if values[name].shape != like.shape:
      raise ValueError(
        f"{name!r} in {file.where} must have shape {like.shape} in this "
        f"module: {values[name].shape} came"
      )
  params = {name: jnp.asarray(values[name]) for name in parts.params}
  return peft.merge(parts.graph, params, *parts[2:])
