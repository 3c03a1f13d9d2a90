"""Pixels and resizing, against jax.image and the laws of interpolation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_peft.models import image

SIZES = [(28, 56), (28, 112), (5, 3), (37, 8), (6, 6), (1, 4), (32, 1)]


def noise(*shape):
  return jax.random.uniform(jax.random.key(0), shape)


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_antialiased_rows_are_those_of_jax_image(source, target, tol):
  came = image.cubic(source, target, antialias=True)
  wanted = jax.image.resize(jnp.eye(source), (target, source), "cubic")
  np.testing.assert_allclose(came, wanted, rtol=0, atol=tol(jnp.float32, 4))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("source", "target"), SIZES)
def test_resizing_keeps_constants_and_commutes_with_mirrors(
  source, target, antialias, tol
):
  came = image.cubic(source, target, antialias=antialias)
  limit = tol(jnp.float32, source)
  np.testing.assert_allclose(came.sum(1), 1, rtol=0, atol=limit)
  np.testing.assert_allclose(came[::-1, ::-1], came, rtol=0, atol=limit)
  if source == target:
    np.testing.assert_allclose(came, np.eye(source), rtol=0, atol=limit)


def test_the_two_rules_for_bicubic_differ():
  """-0.5 for one and -0.75 for the other, at a quarter between pixels."""
  inside = [image.cubic(9, 18, antialias=on)[8, 2:6] for on in (True, False)]
  # Keys' kernel at 1.25, 0.25, 0.75 and 1.75.
  np.testing.assert_allclose(
    inside[0], [-0.0234375, 0.2265625, 0.8671875, -0.0703125], atol=1e-7
  )
  np.testing.assert_allclose(
    inside[1], [-0.03515625, 0.26171875, 0.87890625, -0.10546875], atol=1e-7
  )


def test_an_image_is_resized_as_by_jax_image(tol):
  x = noise(2, 9, 11, 3)
  wanted = jax.image.resize(x, (2, 8, 8, 3), "cubic")
  came = image.resize(x, 8)
  np.testing.assert_allclose(came, wanted, rtol=0, atol=tol(jnp.float32, 36))
  np.testing.assert_array_equal(image.resize(x[:, :8, :8], 8), x[:, :8, :8])


def test_integers_are_scaled_and_floats_are_not():
  x = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16)
  came = image.pixels(x, 3)
  assert came.shape == (1, 16, 16, 1)
  np.testing.assert_allclose(
    came[..., 0], np.arange(256).reshape(1, 16, 16) / 255, rtol=1e-6
  )
  np.testing.assert_array_equal(image.pixels(came, 3), came)


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4, 2), (1, 2, 4, 4, 3)])
def test_what_is_no_batch_of_images_is_refused(shape):
  with pytest.raises(ValueError, match="with 1 or 3 channels: image.shape="):
    image.pixels(jnp.zeros(shape), 3)
