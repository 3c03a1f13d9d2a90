"""ONNX conversion, on small files written by Google's protobuf."""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from google.protobuf import (
  descriptor_pb2,
  descriptor_pool,
  message_factory,
)
from safetensors import numpy as safetensors_numpy

from fedjax_peft import models
from fedjax_peft.models import onnx_file

DINO = pathlib.Path(__file__).parent / "reference" / "dinov2"
# The part of onnx.proto that is read: message -> {field: (number, type)}.
SCHEMA = {
  "Tensor": {
    "dims": (1, "int64 packed"),
    "data_type": (2, "int32"),
    "name": (8, "string"),
    "raw_data": (9, "bytes"),
    "doc": (12, "string"),
  },
  "Node": {
    "input": (1, "string repeated"),
    "output": (2, "string repeated"),
    "name": (3, "string"),
    "op_type": (4, "string"),
  },
  "Graph": {
    "node": (1, ".Node repeated"),
    "name": (2, "string"),
    "initializer": (5, ".Tensor repeated"),
  },
  "Model": {
    "ir_version": (1, "int64"),
    "producer": (2, "string"),
    "scale": (3, "float"),
    "weight": (4, "double"),
    "graph": (7, ".Graph"),
  },
}


def messages(packed):
  """Message classes of SCHEMA, of proto2, so that packing is told."""
  file = descriptor_pb2.FileDescriptorProto(name="onnx.proto", syntax="proto2")
  kinds = descriptor_pb2.FieldDescriptorProto
  for message, fields in SCHEMA.items():
    made = file.message_type.add(name=message)
    for name, (number, kind) in fields.items():
      field = made.field.add(name=name, number=number)
      field.label = kinds.LABEL_OPTIONAL
      if "repeated" in kind or "packed" in kind:
        field.label = kinds.LABEL_REPEATED
      field.options.packed = "packed" in kind and packed
      if kind[0] == ".":
        field.type, field.type_name = kinds.TYPE_MESSAGE, kind.split()[0]
      else:
        field.type = getattr(kinds, f"TYPE_{kind.split()[0].upper()}")
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  get = message_factory.GetMessageClass
  return {name: get(pool.FindMessageTypeByName(name)) for name in SCHEMA}


def write(path, weights, nodes, packed=False):
  """An ONNX file with these initializers and (name, kind, inputs)."""
  kinds = messages(packed)
  model = kinds["Model"](ir_version=8, producer="x", scale=1.5, weight=2.5)
  model.graph.name = "main"
  for name, value in weights.items():
    model.graph.initializer.append(
      kinds["Tensor"](
        dims=value.shape,
        data_type=onnx_type(value.dtype),
        name=name,
        raw_data=value.tobytes(),
        doc="y" * 300,
      )
    )
  for name, kind, inputs in nodes:
    node = kinds["Node"](name=name, op_type=kind, input=inputs, output=["z"])
    model.graph.node.append(node)
  path.write_bytes(model.SerializeToString())


def onnx_type(dtype):
  known = {np.float32: 1, np.int64: 7, np.float16: 10, np.float64: 11}
  return known.get(np.dtype(dtype).type, 6)


def exported(prefix="backbone"):
  """The tiny DINOv2 as torch exports it: weights and nodes."""
  weights, nodes = {}, [("/Shape", "Shape", ["input"])]
  for name, value in safetensors_numpy.load_file(
    DINO / "model.safetensors"
  ).items():
    layer = f"/{prefix}/" + name.rpartition(".")[0].replace(".", "/")
    layer = layer.replace("layer/", "layer.")
    if name == "embeddings.position_embeddings":
      anonymous = {
        "onnx::Concat_1": value[:, :1],
        "onnx::Reshape_2": value[:, 1:],
      }
      weights |= {k: np.ascontiguousarray(v) for k, v in anonymous.items()}
      at = f"/{prefix}/embeddings"
      nodes.append((f"{at}/Reshape_1", "Reshape", ["onnx::Reshape_2", "n"]))
      nodes.append((f"{at}/Concat_6", "Concat", ["onnx::Concat_1", "m"]))
    elif value.ndim == 2 and "mask" not in name:
      unnamed = f"onnx::MatMul_{len(weights)}"
      weights[unnamed] = np.ascontiguousarray(value.T)
      nodes.append((f"{layer}/MatMul", "MatMul", ["x", unnamed]))
    else:
      weights[f"{prefix}.{name}"] = value
  weights["decoder.conv.weight"] = np.zeros((2, 3), np.float16)
  return weights, nodes


def test_the_examples_of_the_encoding_guide_are_read():
  """https://protobuf.dev/programming-guides/encoding"""
  read = lambda text: list(onnx_file._fields(memoryview(bytes.fromhex(text))))  # noqa: E731
  assert read("089601") == [(1, 150)]
  assert read("120774657374696e67") == [(2, b"testing")]
  assert read("3206038e029ea705") == [(6, bytes.fromhex("038e029ea705"))]
  assert onnx_file._varints(bytes.fromhex("038e029ea705")) == [3, 270, 86942]


@pytest.mark.parametrize("packed", [True, False])
def test_tensors_and_nodes_are_read_as_google_writes_them(packed, tmp_path):
  weights = {
    "a": np.arange(600, dtype=np.float32).reshape(300, 1, 2),
    "b": np.array([-1, 2**40], np.int64),
    "c": np.array(2.5, np.float64),
    "d": np.zeros((0, 3), np.float16),
  }
  nodes = [("/n", "Add", ["a", "b"]), ("", "Constant", [])]
  write(tmp_path / "x.onnx", weights, nodes, packed)
  graph = onnx_file.read(tmp_path / "x.onnx")
  assert graph.nodes == [onnx_file.Node(n, k, tuple(i)) for n, k, i in nodes]
  assert graph.tensors.keys() == weights.keys()
  for name, value in weights.items():
    assert graph.tensors[name].dtype == value.dtype
    np.testing.assert_array_equal(graph.tensors[name], value)


def test_a_converted_model_equals_its_original(tmp_path):
  write(tmp_path / "x.onnx", *exported())
  onnx_file.convert(tmp_path / "x.onnx", tmp_path)
  settings = json.loads((DINO / "preprocessor_config.json").read_text())
  original = models.load(DINO)
  came = models.load(
    tmp_path,
    heads=4,  # of width 4; those of the published sizes are 64 wide
    mean=settings["image_mean"],
    std=settings["image_std"],
  )
  assert came.config == original.config
  pairs = zip(
    jax.tree.leaves(nnx.state(came)),
    jax.tree.leaves(nnx.state(original)),
    strict=True,
  )
  for a, b in pairs:
    np.testing.assert_array_equal(a, b)


def test_another_model_is_refused(tmp_path):
  write(tmp_path / "x.onnx", *exported(prefix="body"))
  with pytest.raises(ValueError, match="a DINOv2 under the name 'backbone'"):
    onnx_file.convert(tmp_path / "x.onnx", tmp_path)


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.999])
def test_a_truncated_file_is_named(keep, tmp_path):
  path = tmp_path / "x.onnx"
  write(path, *exported())
  data = path.read_bytes()
  path.write_bytes(data[: int(keep * len(data))])
  with pytest.raises(ValueError, match=r"x\.onnx is truncated or damaged"):
    onnx_file.convert(path, tmp_path)


def test_a_file_that_is_something_else_is_refused(tmp_path):
  path = tmp_path / "x.onnx"
  for data in (b"\x0f" * 9, b"PK\x03\x04 and more", b"\xff" * 40):
    path.write_bytes(data)
    with pytest.raises(ValueError, match="truncated or damaged, or no ONNX"):
      onnx_file.read(path)
  write(path, {"u": np.zeros(3, np.int32)}, [])
  with pytest.raises(ValueError, match="tensor 'u' has data type 6"):
    onnx_file.read(path)
