"""Images: from the examples of a data set to what a model looks at.

Pixels are numbers in [0, 1], channels last; resizing is two products with a
matrix that depends on the sizes only, so that it is a constant of the program
and the same for all clients.

Keys, Cubic convolution interpolation for digital image processing, 1981
"""

import jax
import jax.numpy as jnp
import numpy as np


def pixels(image: jax.Array, channels: int) -> jax.Array:
  """Examples as float32 pixels.

  Args:
    image: `[B, H, W]` or `[B, H, W, C]`; integers are divided by 255, floats
      are taken to be in [0, 1].
    channels: of the model.

  Returns:
    float32 `[B, H, W, channels]`, or `[B, H, W, 1]` if the image is grey.

  Raises:
    ValueError: if the image has another rank or number of channels.

  Example:
    >>> pixels(jnp.full((2, 3, 3), 255, jnp.uint8), 3)[0, 0]
    Array([[1.],
           [1.],
           [1.]], dtype=float32)
  """
  shape = image.shape
  if image.ndim == 3:
    image = image[..., None]
  if image.ndim != 4 or image.shape[-1] not in (1, channels):
    raise ValueError(
      "images must be [batch, height, width] or [batch, height, width,"
      f" channels] with 1 or {channels} channels: image.shape={shape}"
    )
  x = image.astype(jnp.float32)
  if jnp.issubdtype(image.dtype, jnp.integer):
    x = x / 255
  return x


def resize(x: jax.Array, size: int) -> jax.Array:
  """Stretches x `[B, H, W, C]` to a square of `size`, as Pillow does.

  The matrices are `cubic(H, size, antialias=True)` and the same for W. Cubic
  interpolation overshoots at edges; nothing is clipped or rounded.
  """
  for axis, letters in ((1, "bhwc,ih->biwc"), (2, "bhwc,iw->bhic")):
    if x.shape[axis] != size:
      matrix = jnp.asarray(cubic(x.shape[axis], size, antialias=True))
      x = jnp.einsum(letters, x, matrix, precision="highest")
  return x


def cubic(source: int, target: int, *, antialias: bool) -> np.ndarray:
  """The matrix that resizes one axis; pixels are at the centres of cells.

  Two rules go by the name "bicubic", and a model wants the one it was trained
  with: the difference is visible in its features.

  Args:
    source: size of the axis before.
    target: size of the axis after.
    antialias: True is the rule of Pillow, `jax.image` and torch's antialias:
      sharpness -0.5, weights beyond the edge left out, a wider kernel when
      shrinking. False is that of torch's `interpolate`, OpenCV and ONNX:
      sharpness -0.75, the edge repeated, no wider kernel.

  Returns:
    float32 `[target, source]`; every row sums to one.

  Example:
    >>> cubic(2, 4, antialias=False)[1].tolist()
    [0.7734375, 0.2265625]
  """
  scale = source / target
  centre = (np.arange(target) + 0.5) * scale - 0.5
  stretch = max(scale, 1.0) if antialias else 1.0
  reach = int(np.ceil(2 * stretch)) + 1
  near = np.floor(centre).astype(int)[:, None] + np.arange(-reach, reach + 1)
  sharpness = -0.5 if antialias else -0.75
  weight = _keys((centre[:, None] - near) / stretch, sharpness)
  if antialias:
    weight = np.where((near >= 0) & (near < source), weight, 0)
  matrix = np.zeros((target, source))
  rows = np.broadcast_to(np.arange(target)[:, None], near.shape)
  np.add.at(matrix, (rows, near.clip(0, source - 1)), weight)
  return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)


def _keys(distance, sharpness):
  """The cubic convolution kernel, zero from distance 2 on."""
  x, a = np.abs(distance), sharpness
  inner = ((a + 2) * x - (a + 3)) * x * x + 1
  outer = (((x - 5) * x + 8) * x - 4) * a
  return np.where(x <= 1, inner, np.where(x < 2, outer, 0))
