"""Features: what a head reads, offered by the models that have one."""

import jax.numpy as jnp
import numpy as np
import pytest

import toy
from fedjax_peft import models

TOKENS = jnp.array([[3, 4, 0], [5, 6, 7]], jnp.int32)
IMAGES = np.random.default_rng(0).integers(0, 255, (2, 8, 8), dtype=np.uint8)
SMALL = {"width": 8, "depth": 1, "heads": 2, "ffn": 8}
CASES = {
  "encoder": (
    {"vocab": 9, "pooler": True, **SMALL},
    {"tokens": TOKENS, "length": jnp.array([2, 3], jnp.int32)},
  ),
  "vit": (
    {"image_size": 8, "patch": 4, "pool": "both", **SMALL},
    {"image": IMAGES},
  ),
  "cnn": (
    {"image_size": 8, "window": 3, "filters": (2,), "hidden": (5,)},
    {"image": IMAGES},
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_features_are_what_comes_out_of_the_model_without_a_head(name):
  options, examples = CASES[name]
  headless = models.load(name, classes=0, **options)
  whole = models.load(name, classes=3, **options)
  features = whole.features(**examples)
  assert features.shape == (2, whole.head.in_features)
  assert toy.same_bits(np.asarray(features), np.asarray(headless(**examples)))
  assert toy.same_bits(
    np.asarray(whole(**examples)), np.asarray(whole.head(features))
  )
