"""A small convolutional network, trained from scratch.

The network of LeCun et al., 1998, with rectifiers and max-pooling, as the
benchmarks of federated learning on images use it: for 28 x 28 grey images and
ten classes 44,426 parameters.

Li et al., Federated Learning on Non-IID Data Silos (NIID-Bench), 2021,
https://arxiv.org/abs/2102.02079
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft.models import image as images
from fedjax_peft.models import stage


@dataclasses.dataclass(frozen=True)
class CNNConfig:
  """Shape of a `CNN`; the defaults are those of NIID-Bench on grey images.

  Attributes:
    image_size: height and width of an image; nothing is resized.
    channels: of an image.
    window: height and width of a filter.
    filters: filters of each convolution; after each, the height and width
      that remain must be even, and are halved.
    hidden: sizes of the dense layers.
    classes: outputs of the head; 0 is no head, the embedding is returned.
  """

  image_size: int = 28
  channels: int = 1
  window: int = 5
  filters: tuple[int, ...] = (6, 16)
  hidden: tuple[int, ...] = (120, 84)
  classes: int = 0

  def __post_init__(self):
    for name in ("image_size", "channels", "window", "filters", "hidden"):
      value = getattr(self, name)
      if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
        raise ValueError(f"{name} must be at least 1: {name}={value}")
    if self.classes < 0:
      raise ValueError(f"classes must not be negative: classes={self.classes}")
    if self.side < 1:
      raise ValueError(
        "each convolution must leave an even number of rows:"
        f" image_size={self.image_size} window={self.window} with"
        f" {len(self.filters)} convolutions does not; choose another window"
      )

  @property
  def side(self) -> int:
    """Height and width after the last pooling; 0 if it does not come out."""
    side = self.image_size
    for _ in self.filters:
      side = side - self.window + 1
      side = 0 if side % 2 else max(side // 2, 0)
    return side


class CNN(nnx.Module):
  """Images to class logits, or to one embedding an image.

  A convolution is a product of windows and a matrix: with one matrix a client
  that is one batched product, where `nnx.Conv` becomes a grouped convolution
  (on two CPU cores 40 against 50 ms for the gradient of 8 clients times 32
  images), and `peft.lora` and low-rank local SGD apply to it.

  Layers are at `convolutions/0..`, `dense/0..` and `head`.

  Example:
    >>> cnn = CNN(CNNConfig(classes=10), nnx.Rngs(0))
    >>> cnn(jnp.zeros((5, 28, 28), jnp.uint8)).shape
    (5, 10)
  """

  def __init__(self, config: CNNConfig, rngs: nnx.Rngs):
    self.config = config
    self.crossing = nnx.data(None)
    self.span = stage.whole(self)

    def chain(area, *sizes):
      pairs = itertools.pairwise(sizes)
      return nnx.List([nnx.Linear(area * a, b, rngs=rngs) for a, b in pairs])

    flat = config.side**2 * config.filters[-1]
    self.convolutions = chain(
      config.window**2, config.channels, *config.filters
    )
    self.dense = chain(1, flat, *config.hidden)
    self.head = (
      nnx.Linear(config.hidden[-1], config.classes, rngs=rngs)
      if config.classes
      else None
    )

  part = stage.part

  def stages(self) -> tuple[stage.Stage, ...]:
    """Each convolution, with its pooling, each dense layer, and the head."""
    config = self.config
    names = [f"convolutions/{i}" for i in range(len(config.filters))]
    names += [f"dense/{i}" for i in range(len(config.hidden))]
    return tuple(stage.Stage(name, (name,)) for name in (*names, "head"))

  def __call__(self, image: stage.Passed) -> stage.Passed:
    """Classifies a batch of images.

    Args:
      image: `[B, H, W]` or `[B, H, W, C]`, uint8, or floats in [0, 1], of the
        size of the config; one grey channel is repeated. The message before
        it if this is a part that does not begin the model.

    Returns:
      Logits `[B, classes]`, or the last hidden layer if `classes` is 0; the
      message of a part that does not end the model.

    Raises:
      ValueError: if the image is of another shape.
    """
    x = self.features(image)
    return x if self.head is None else self.head(x)

  def features(self, image: stage.Passed) -> stage.Passed:
    """What the head reads, `[B, hidden[-1]]`, or a message; as for a call."""
    if self.span.begins:
      x = _pixels(image, self.config)
    else:
      x, _ = stage.received(image)
    visit, start = stage.arm(self), len(self.convolutions)
    for i, layer in enumerate(self.convolutions):
      if layer is not None:  # else it is in another part
        x = _halve(jax.nn.relu(layer(_windows(x, self.config.window))))
        x = stage.after(visit, i, x)
    for i, layer in enumerate(self.dense, start):
      if layer is not None:
        x = jax.nn.relu(layer(x.reshape(len(x), -1)))
        x = stage.after(visit, i, x)
    return x if self.span.ends else stage.message(x)


def _pixels(image, config):
  """Images as floats [B, H, W, C], of the size of the config."""
  x = images.pixels(image, config.channels)
  if x.shape[1:3] != (config.image_size,) * 2:
    raise ValueError(
      f"images must have {config.image_size} rows and columns:"
      f" image.shape={image.shape}; set image_size"
    )
  return jnp.broadcast_to(x, (*x.shape[:3], config.channels))


def _windows(x, size):
  """Windows of x [B, H, W, C], valid ones only: [B, H', W', size^2 * C]."""
  height, width = (n - size + 1 for n in x.shape[1:3])
  places = itertools.product(range(size), repeat=2)
  shifted = [x[:, i : i + height, j : j + width] for i, j in places]
  return jnp.concatenate(shifted, axis=-1)


def _halve(x):
  """Max-pools x [B, H, W, C] over squares of two pixels."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
  return x.max((2, 4))
