"""ONNX files of DINOv2 to a Hugging Face model directory.

Done once, when a model is prepared: afterwards it loads like any other
directory, memory-mapped. Of the file only the weights and the names of the
nodes are read, and so a reader of the wire format is enough.

Formats: https://protobuf.dev/programming-guides/encoding and
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from safetensors import numpy as safetensors_numpy

_DTYPES = {1: np.float32, 7: np.int64, 10: np.float16, 11: np.float64}
_PATCH = "embeddings.patch_embeddings.projection.weight"
_PER_HEAD = 64  # in all sizes of DINOv2; the file does not say


class Node(NamedTuple):
  """An operation: its name, its kind and what it reads."""

  name: str
  kind: str
  inputs: tuple[str, ...]


class Graph(NamedTuple):
  """What is kept of a file: operations in order, and tensors by name."""

  nodes: list[Node]
  tensors: dict[str, np.ndarray]


def convert(path: pathlib.Path, into: pathlib.Path):
  """Writes config.json and model.safetensors of the file's `backbone`.

  Args:
    path: an ONNX file as torch exports it, of a module whose attribute
      `backbone` is a DINOv2 of transformers; the rest is left out.
    into: an existing directory.

  Raises:
    ValueError: if the file is damaged or holds no such module.
  """
  weights = _weights(read(path), path)
  width, channels, patch, _ = weights[_PATCH].shape
  positions = weights["embeddings.position_embeddings"].shape[1]
  layers = {name.split(".")[2] for name in weights if "layer." in name}
  ffn = weights["encoder.layer.0.mlp.fc1.bias"].shape[0]
  config = {
    "model_type": "dinov2",
    "hidden_size": width,
    "num_hidden_layers": len(layers),
    "num_attention_heads": max(width // _PER_HEAD, 1),
    "mlp_ratio": ffn / width,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "image_size": math.isqrt(positions - 1) * patch,
    "patch_size": patch,
    "num_channels": channels,
  }
  (into / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  safetensors_numpy.save_file(weights, into / "model.safetensors")


def read(path: pathlib.Path) -> Graph:
  """Reads the operations and the weights of an ONNX file.

  Raises:
    ValueError: if the file is truncated or damaged.
  """
  nodes, tensors = [], {}
  try:
    model = _fields(memoryview(path.read_bytes()))
    graphs = [value for number, value in model if number == 7]
    for number, value in (
      field for graph in graphs for field in _fields(graph)
    ):
      if number == 1:
        nodes.append(_node(value))
      elif number == 5:  # an initializer
        name, tensor = _tensor(value)
        tensors[name] = tensor
  except (ValueError, TypeError, IndexError, KeyError) as error:
    raise ValueError(
      f"{path} is truncated or damaged, or no ONNX file"
      f" ({path.stat().st_size} bytes): {error}"
    ) from error
  return Graph(nodes, tensors)


def _weights(graph, path):
  """Tensors of the backbone by their transformers name.

  torch renames the weight of a product and stores it as [in, out]; the
  node that reads it is still named after the layer. What is constant, such as
  the two parts of the positions, has only the name of its reader.
  """
  weights, prefix = {}, "backbone."
  for name, tensor in graph.tensors.items():
    if name.startswith(prefix):
      weights[name.removeprefix(prefix)] = tensor
  first = patches = None
  for node in graph.nodes:
    layer, _, _ = node.name[1:].rpartition("/")
    known = [x for x in node.inputs if x.startswith("onnx::")]
    found = [graph.tensors[x] for x in known if x in graph.tensors]
    if not found or not layer.startswith("backbone/"):
      continue
    layer = layer.replace("/", ".").removeprefix(prefix)
    if node.kind == "MatMul":
      weights[f"{layer}.weight"] = np.ascontiguousarray(found[0].T)
    elif layer == "embeddings" and node.kind == "Concat":
      first = found[0]
    elif layer == "embeddings" and node.kind == "Reshape":
      patches = found[0]
  if first is None or patches is None or _PATCH not in weights:
    raise ValueError(
      f"{path} must hold a DINOv2 under the name 'backbone', with positions:"
      f" its tensors are {sorted(graph.tensors)[:8]}"
    )
  weights["embeddings.position_embeddings"] = np.concatenate(
    [first, patches], axis=1
  )
  return weights


def _node(data):
  """A NodeProto."""
  inputs, name, kind = [], "", ""
  for number, value in _fields(data):
    if number == 1:
      inputs.append(str(value, "utf-8"))
    elif number == 3:
      name = str(value, "utf-8")
    elif number == 4:
      kind = str(value, "utf-8")
  return Node(name, kind, tuple(inputs))


def _tensor(data):
  """A TensorProto whose values are in raw_data: name and array."""
  shape, dtype, name, raw = [], 0, "", memoryview(b"")
  for number, value in _fields(data):
    if number == 1:  # packed or one by one
      shape += [value] if isinstance(value, int) else _varints(value)
    elif number == 2:
      dtype = value
    elif number == 8:
      name = str(value, "utf-8")
    elif number == 9:
      raw = value
  if dtype not in _DTYPES:
    raise ValueError(f"tensor {name!r} has data type {dtype}, not one of ours")
  return name, np.frombuffer(raw, _DTYPES[dtype]).reshape(shape)


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
  """Numbers and values of a message; what has a length is given as bytes."""
  at = 0
  while at < len(data):
    key, at = _varint(data, at)
    kind = key & 7
    if kind == 0:
      value, at = _varint(data, at)
      yield key >> 3, value
      continue
    if kind == 2:
      size, at = _varint(data, at)
    elif kind in (1, 5):
      size = 8 if kind == 1 else 4
    else:
      raise ValueError(f"wire type {kind} at byte {at}")
    if at + size > len(data):
      raise ValueError(f"{size} bytes at byte {at} of {len(data)}")
    yield key >> 3, data[at : at + size]
    at += size


def _varint(data, at):
  """A number in groups of seven bits, lowest first, and where it ends."""
  value = shift = 0
  while True:
    byte = data[at]
    value |= (byte & 127) << shift
    at, shift = at + 1, shift + 7
    if byte < 128:
      return value, at


def _varints(data):
  """All numbers in the bytes of a packed field."""
  values, at = [], 0
  while at < len(data):
    value, at = _varint(data, at)
    values.append(value)
  return values
