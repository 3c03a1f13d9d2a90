"""A vision transformer, pre-normalized: ViT, DeiT and DINOv2 in one module.

What differs between them is in `ViTConfig`; attention and feed-forward are
those of the text encoder.

Dosovitskiy et al., An Image is Worth 16x16 Words, 2020,
https://arxiv.org/abs/2010.11929
Touvron et al., DeiT, 2020, https://arxiv.org/abs/2012.12877
Oquab et al., DINOv2, 2023, https://arxiv.org/abs/2304.07193
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft.models import encoder, image, soft, stack, stage

_POOLS = ("first", "mean", "both")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """Shape of a `ViT`; the defaults are those of DINOv2-small at 224 pixels.

  Attributes:
    image_size: height and width of what the model looks at, in pixels; images
      of other sizes are stretched to it. A multiple of `patch`.
    patch: height and width of a patch.
    channels: of an image; a grey image is repeated.
    width: size of the residual stream `D`.
    depth: number of blocks.
    heads: attention heads; divides `width`.
    ffn: size of the hidden layer of a block.
    eps: layernorm epsilon.
    activation: "gelu" (erf), "gelu_tanh" or "relu".
    layer_scale: initial factor on what a block adds (LayerScale); 0 is none.
    distilled: a second leading token, with a position (DeiT).
    registers: further tokens without a position (DINOv2 with registers).
    mean, std: of the channels of pixels in [0, 1], over the training images.
    pool: "first" (the class token), "mean" over the patches, or "both", one
      after the other.
    pooler: a tanh dense layer on what was pooled (ViT without a head).
    classes: outputs of the head; 0 is no head, the embedding is returned.
    keep: what a block stores for the backward pass: "all", "dots" (matrix
      products; the rest is computed again) or "none" (only its input).
    unroll: repeat the block instead of scanning; see `stack.apply`.
  """

  image_size: int = 224
  patch: int = 14
  channels: int = 3
  width: int = 384
  depth: int = 12
  heads: int = 6
  ffn: int = 1536
  eps: float = 1e-6
  activation: str = "gelu"
  layer_scale: float = 1.0
  distilled: bool = False
  registers: int = 0
  mean: tuple[float, ...] = (0.485, 0.456, 0.406)
  std: tuple[float, ...] = (0.229, 0.224, 0.225)
  pool: str = "first"
  pooler: bool = False
  classes: int = 0
  keep: str = "dots"
  unroll: bool = False

  def __post_init__(self):
    stack.check(self, "image_size", "patch", "channels")
    _block(self)  # checks what is common with the text encoder
    if self.image_size % self.patch:
      near = max(self.image_size // self.patch, 1) * self.patch
      raise ValueError(
        f"patch must divide image_size: image_size={self.image_size}"
        f" patch={self.patch}; use image_size={near}"
      )
    if min(self.registers, self.layer_scale) < 0:
      raise ValueError(
        "registers and layer_scale must not be negative:"
        f" registers={self.registers} layer_scale={self.layer_scale}"
      )
    if not len(self.mean) == len(self.std) == self.channels:
      raise ValueError(
        f"mean and std must have one entry for each of {self.channels}"
        f" channels: mean={self.mean} std={self.std}"
      )
    if self.pool not in _POOLS:
      raise ValueError(f"pool must be one of {_POOLS}: pool={self.pool!r}")

  @property
  def grid(self) -> int:
    """Patches along one side of the image."""
    return self.image_size // self.patch

  @property
  def leading(self) -> int:
    """Tokens with a position before the patches."""
    return 1 + self.distilled

  @property
  def pooled(self) -> int:
    """Size of what is pooled."""
    return self.width * (2 if self.pool == "both" else 1)


class Embeddings(nnx.Module):
  """Patches through one matrix product, after the tokens that are learned."""

  def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
    def table(*shape):
      init = nnx.initializers.normal(0.02)
      return nnx.Param(init(rngs.params(), (*shape, config.width)))

    inputs = config.patch**2 * config.channels
    self.patch = nnx.Linear(inputs, config.width, rngs=rngs)
    self.class_token = table()
    self.distillation_token = table() if config.distilled else None
    self.registers = table(config.registers) if config.registers else None
    self.position = table(config.leading + config.grid**2)
    self.size = config.patch

  def __call__(
    self, x: jax.Array, visit: stage.Visit | None = None
  ) -> jax.Array:
    """Normalized pixels `[B, H, W, C]` to the stream `[B, T, D]`.

    Either half may be absent in a part of a model: without the product x is
    embedded patches `[B, grid * grid, D]`, without the tokens these are
    returned. `visit` sees them in between.
    """
    if self.patch is not None:
      x = stage.after(visit, 0, self.patch(_patches(x, self.size)))
    if self.class_token is None:
      return x
    first = [self.class_token[...]]
    if self.distillation_token is not None:
      first.append(self.distillation_token[...])
    x = soft.prepend(jnp.stack(first), x) + self.position[...][None]
    if self.registers is None:
      return x
    leading, patches = jnp.split(x, [len(first)], axis=1)
    return jnp.concatenate(
      [leading, soft.prepend(self.registers, patches)], axis=1
    )


class Block(nnx.Module):
  """Attention and feed-forward of the normalized stream, scaled and added."""

  def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
    def scale():
      start = jnp.full(config.width, config.layer_scale, jnp.float32)
      return nnx.Param(start) if config.layer_scale else None

    self.attention_norm = _norm(config, rngs)
    self.attention = encoder.Attention(_block(config), rngs)
    self.attention_scale = scale()
    self.ffn_norm = _norm(config, rngs)
    self.ffn = encoder.FeedForward(_block(config), rngs)
    self.ffn_scale = scale()

  def __call__(self, x: jax.Array) -> jax.Array:
    """The stream x `[B, T, D]` after this block."""

    def scaled(added, scale):
      return added if scale is None else added * scale[...][None, None]

    added = self.attention(self.attention_norm(x), None)
    x = x + scaled(added, self.attention_scale)
    return x + scaled(self.ffn(self.ffn_norm(x)), self.ffn_scale)


class ViT(nnx.Module):
  """Images to class logits, or to one embedding an image.

  Layers are at `layers/attention/{query,key,value,output}`,
  `layers/ffn/{up,down}`, `layers/{attention,ffn}_norm` and, with LayerScale,
  `layers/{attention,ffn}_scale` (stacked over depth), `embeddings/patch`,
  `norm`, `pooler` and `head`. A `prompt` comes before the embedded patches and
  has no positions; what comes out in its places is left out.

  Example:
    >>> config = ViTConfig(image_size=8, patch=4, width=8, depth=2, heads=2)
    >>> vit = ViT(config, nnx.Rngs(0))
    >>> vit(jnp.zeros((5, 28, 28), jnp.uint8)).shape
    (5, 8)
  """

  def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
    self.config = config
    self.prompt = nnx.data(None)
    self.prompt_width = config.width
    self.crossing = nnx.data(None)
    self.span = stage.whole(self)
    self.embeddings = Embeddings(config, rngs)
    self.layers = stack.build(
      functools.partial(Block, config), config.depth, rngs
    )
    self.norm = _norm(config, rngs)
    linear = functools.partial(nnx.Linear, config.pooled, rngs=rngs)
    self.pooler = linear(config.pooled) if config.pooler else None
    self.head = linear(config.classes) if config.classes else None

  part = stage.part

  def stages(self) -> tuple[stage.Stage, ...]:
    """The product of patches, tokens, each layer, and the head with its norm.

    A stream is smallest after the patches: tokens come without products.
    """
    kinds = ("class_token", "distillation_token", "registers", "position")
    tokens = (*(f"embeddings/{kind}" for kind in kinds), "prompt")
    return (
      stage.Stage("patches", ("embeddings/patch",)),
      stage.Stage("tokens", tokens),
      *stage.layers(self.config.depth),
      stage.Stage("head", ("norm", "pooler", "head")),
    )

  def __call__(self, image: stage.Passed) -> stage.Passed:
    """Encodes a batch of images.

    Args:
      image: `[B, H, W]` or `[B, H, W, C]`, uint8, or floats in [0, 1]; C is 1
        or `config.channels`, H and W are any and are stretched to
        `config.image_size`. The message before it if this is a part that does
        not begin the model.

    Returns:
      Logits `[B, classes]`, or the pooled embedding `[B, config.pooled]` (not
      normalized to length one) if `classes` is 0; the message of a part that
      does not end the model.

    Raises:
      ValueError: if the image is of another shape.
    """
    x = self.features(image)
    return x if self.head is None else self.head(x)

  def features(self, image: stage.Passed) -> stage.Passed:
    """What the head reads, `[B, config.pooled]`, or a message; as a call."""
    x, pool = self.hidden(image), self.config.pool
    if not self.span.ends:
      return x
    patches = x[:, self.config.leading + self.config.registers :]
    pooled = {
      "first": lambda: x[:, 0],
      "mean": lambda: patches.mean(1),
      "both": lambda: jnp.concatenate([x[:, 0], patches.mean(1)], axis=-1),
    }[pool]()
    if self.pooler is not None:
      pooled = jnp.tanh(self.pooler(pooled))
    return pooled

  def hidden(self, image: stage.Passed) -> stage.Passed:
    """The normalized stream `[B, T, D]`, or a message; as a call.

    T is leading, registers, patches.
    """
    config, visit, span = self.config, stage.arm(self), self.span
    if span.begins:
      x, count = standardize(image, config), 0
    else:
      x, count = stage.received(image)
    if span.start < 2:
      x = self.embeddings(x, visit)
    if span.start < 2 <= span.stop:
      x = stage.after(visit, 1, soft.prepend(self.prompt, x))
    count += soft.count(self.prompt)
    x = stack.apply(
      self.layers,
      x,
      keep=config.keep,
      unroll=config.unroll,
      visit=visit,
      first=max(span.start, 2),
    )
    return self.norm(x[:, count:]) if span.ends else stage.message(x, count)


def standardize(examples: jax.Array, config: ViTConfig) -> jax.Array:
  """What the patches are cut from: resized pixels, less mean, over std.

  Args:
    examples: as for a call of `ViT`.
    config: of the model.

  Returns:
    float32 `[B, image_size, image_size, channels]`.
  """
  x = image.resize(image.pixels(examples, config.channels), config.image_size)
  mean, std = (jnp.array(v, jnp.float32) for v in (config.mean, config.std))
  return (x - mean[None, None, None]) / std[None, None, None]  # grey: repeats


def _patches(x, size):
  """Cuts x [B, H, W, C] into patches [B, grid * grid, size * size * C]."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // size, size, width // size, size, channels)
  return x.swapaxes(2, 3).reshape(batch, -1, size * size * channels)


def _norm(config, rngs):
  """A layernorm whose variance does not cancel (no E[x^2] - E[x]^2)."""
  return nnx.LayerNorm(
    config.width, epsilon=config.eps, use_fast_variance=False, rngs=rngs
  )


def _block(config):
  """The part of a config that attention and feed-forward read."""
  return encoder.EncoderConfig(
    width=config.width,
    depth=config.depth,
    heads=config.heads,
    ffn=config.ffn,
    activation=config.activation,
    classes=config.classes,
    keep=config.keep,
    types=0,
  )
