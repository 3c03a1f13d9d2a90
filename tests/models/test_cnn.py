"""The small convolutional network, against convolutions, and trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_peft as fp
import toy
from fedjax_peft import models

SMALL = {"image_size": 14, "window": 3, "filters": (3, 4), "hidden": (9,)}


@functools.cache
def cnn(**options):
  return models.load("cnn", classes=10, **options)


def images(*shape):
  return jax.random.uniform(jax.random.key(0), shape)


def test_it_has_the_parameters_of_the_benchmark():
  """5x5x6 + 6, 5x5x6x16 + 16, 256x120 + 120, 120x84 + 84, 84x10 + 10."""
  sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(cnn()))]
  assert sum(sizes) == 156 + 2416 + 30_840 + 10_164 + 850


@pytest.mark.parametrize("options", [{}, SMALL | {"channels": 3}])
def test_windows_and_a_matrix_are_a_convolution(options, tol):
  model, size = cnn(**options), options.get("image_size", 28)
  window, channels = options.get("window", 5), options.get("channels", 1)
  x = images(3, size, size, channels)
  wanted = x
  for layer in model.convolutions:
    kernel = layer.kernel[...]
    kernel = kernel.reshape(window, window, -1, kernel.shape[1])
    wanted = jax.lax.conv_general_dilated(
      *(wanted, kernel, (1, 1), "VALID"),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    wanted = jax.nn.relu(wanted + layer.bias[...][None, None, None])
    wanted = nnx.max_pool(wanted, (2, 2), strides=(2, 2))
  wanted = wanted.reshape(3, -1)
  for layer in model.dense:
    wanted = jax.nn.relu(layer(wanted))
  came, wanted = model(x), model.head(wanted)
  assert jnp.abs(came).max() > 0.01
  np.testing.assert_allclose(came, wanted, rtol=0, atol=tol(jnp.float32, 256))


def test_a_federation_trains_it_from_scratch():
  rng = np.random.default_rng(0)
  label = rng.integers(0, 10, 32).astype(np.int32)
  image = rng.integers(0, 100, (32, 14, 14, 1))
  image = (image + 15 * label[:, None, None, None]).astype(np.uint8)
  data = fp.data.population({"image": image, "label": label}, np.arange(32) % 4)
  model = fp.model(cnn(**SMALL), fp.losses.classification)
  algorithm = fp.fedavg(model, fp.local(optax.sgd(0.1, 0.9), batch=8, epochs=4))
  made = fp.run(
    algorithm,
    model,
    data,
    cohort=fp.sample.uniform(4),
    rounds=5,
    settings=toy.lanes(segment=4),
  )
  losses = [record["train/loss"] for _, record in made]
  assert losses[-1] < 0.95 * losses[0]


def test_without_classes_the_last_hidden_layer_is_returned():
  model = models.load("cnn")
  assert model.head is None
  assert model(jnp.zeros((2, 28, 28), jnp.uint8)).shape == (2, 84)


def test_images_of_another_size_are_refused():
  with pytest.raises(ValueError, match="28 rows and columns.*set image_size"):
    cnn()(images(2, 32, 32, 1))


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("image_size", 27, "even number of rows"),
    ("window", 30, "even number of rows"),
    ("filters", (), "filters must be at least 1"),
    ("hidden", (3, 0), "hidden must be at least 1"),
    ("classes", -1, "must not be negative"),
  ],
)
def test_a_config_that_cannot_work_is_refused(field, value, message):
  with pytest.raises(ValueError, match=message):
    models.CNNConfig(**{field: value})
