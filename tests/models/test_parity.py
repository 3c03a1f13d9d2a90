"""Our modules against Hugging Face transformers on the same weights.

reference/README.md says how the expected values were made.
"""

import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjax_peft import models

REFERENCE = pathlib.Path(__file__).parent / "reference"


@nnx.jit
def run(model, *features):
  return model(*features)


def read(path):
  with np.load(path) as file:
    return dict(file)


def check(came, expected, limit):
  """The largest error relative to the largest value is below the limit."""
  error = np.abs(came - expected).max() / np.abs(expected).max()
  assert error <= limit


@nnx.jit
def hidden(model, image):
  return model.hidden(image)


@pytest.mark.parametrize(
  "kind",
  ["bert", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"],
)
def test_a_small_checkpoint_gives_the_outputs_of_transformers(kind, tol):
  model = models.load(REFERENCE / kind)
  expected = read(REFERENCE / kind / "expected.npz")
  tokens, length = expected["tokens"], expected["length"]
  came = np.asarray(run(model, jnp.asarray(tokens), jnp.asarray(length)))
  values = expected["values"]
  if kind != "bert":
    valid = np.arange(tokens.shape[1]) < length[:, None]
    came, values = came[valid], values[valid]
  # 3 layers of 4 products each, at most 24 terms a product.
  check(came, values, tol(jnp.float32, 3 * 4 * 24))


@pytest.mark.parametrize(
  "kind", ["vit", "deit", "dinov2", "dinov2_with_registers"]
)
@pytest.mark.parametrize("size", [28, 42, 21])
def test_a_small_vision_checkpoint_gives_the_outputs_of_transformers(
  kind, size, tol
):
  """At the size of its positions, and at two that they are resized to."""
  model = models.load(REFERENCE / kind, image_size=size)
  expected = read(REFERENCE / kind / "expected.npz")
  image = jnp.asarray(expected["image"][:, :size, :size])
  # 3 layers of 4 products each, at most 36 terms, and patches of 147.
  limit = tol(jnp.float32, 3 * 4 * 36 + 147)
  check(hidden(model, image), expected[f"hidden{size}"], limit)
  if f"pooler{size}" in expected:
    model = models.load(REFERENCE / kind, image_size=size, pooler=True)
    check(run(model, image), expected[f"pooler{size}"], limit)


@pytest.mark.data
def test_minilm_gives_the_sentence_embeddings_of_transformers(tol):
  model = models.load("minilm")
  expected = read(REFERENCE / "minilm.npz")
  tokens, length = expected["tokens"], expected["length"]
  came = run(model, jnp.asarray(tokens), jnp.asarray(length))
  check(np.asarray(came), expected["embedding"], tol(jnp.float32, 1536))


@pytest.mark.data
def test_the_minilm_tokenizer_is_that_of_the_reference():
  expected = read(REFERENCE / "minilm.npz")
  tokenizer = models.tokenizer("minilm")
  for i, sentence in enumerate(expected["sentences"]):
    ids = tokenizer.encode(str(sentence)).ids
    assert ids == expected["tokens"][i, : expected["length"][i]].tolist()


@pytest.mark.data
def test_minilm_gets_a_new_head_for_classes():
  model = models.load("minilm", classes=6, seed=3)
  assert model.head.kernel[...].shape == (384, 6)
  tokens = jnp.ones((2, 4), jnp.int32)
  assert run(model, tokens).shape == (2, 6)
  other = models.load("minilm", classes=6, seed=4)
  assert (model.head.kernel[...] != other.head.kernel[...]).any()


@pytest.mark.data
@pytest.mark.slow
def test_smollm2_gives_the_logits_of_transformers(tol):
  began = time.perf_counter()
  model = models.load("smollm2")
  jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
  seconds = time.perf_counter() - began
  assert seconds < 30  # dequantized when prepared; below 1 on an idle machine
  expected = json.loads((REFERENCE / "smollm2.json").read_text())
  tokens = jnp.asarray([expected["tokens"]], jnp.int32)
  logits = np.asarray(run(model, tokens))[0]
  some = np.asarray(expected["some_logits"])
  check(logits[:, expected["some"]], some, tol(jnp.float32, 1536))
  top = np.argsort(-logits, axis=1)[:, :5]
  np.testing.assert_array_equal(top, expected["top5"])
  check(
    np.take_along_axis(logits, top, 1),
    np.asarray(expected["top5_logits"]),
    tol(jnp.float32, 1536),
  )


@pytest.mark.data
@pytest.mark.slow
def test_the_smollm2_tokenizer_is_that_of_the_reference():
  expected = json.loads((REFERENCE / "smollm2.json").read_text())
  tokenizer = models.tokenizer("smollm2")
  ids = tokenizer.encode(expected["prompt"]).ids
  assert ids == expected["tokens"][1:]  # theirs puts a start token in front
  assert tokenizer.decode(ids) == expected["prompt"]
  special = tokenizer.encode("<|im_start|>user").ids
  assert special[0] == expected["tokens"][0]


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("size", [56, 112, 224])
def test_dinov2_small_gives_the_features_of_onnxruntime(size, tol):
  model = models.load("dinov2_small", image_size=size)
  expected = read(REFERENCE / "dinov2_small.npz")
  times = size // 28
  image = expected["image"].repeat(times, 1).repeat(times, 2)
  came = hidden(model, jnp.asarray(image))[:, :: 2 * times, ::3]
  check(came, expected[f"hidden{size}"], tol(jnp.float32, 1536))


@pytest.mark.data
@pytest.mark.slow
def test_dinov2_small_pools_both_and_gets_a_new_head():
  model = models.load("dinov2_small", image_size=56, classes=10)
  assert model.head.kernel[...].shape == (2 * 384, 10)
  assert run(model, jnp.zeros((2, 28, 28), jnp.uint8)).shape == (2, 10)
