"""A causal language model of the Llama family, pre-normalized.

One module for Llama, Mistral, SmolLM, Qwen 2 and 3, Gemma and Gemma 2: what
differs is in `DecoderConfig`.

Touvron et al., LLaMA, 2023, https://arxiv.org/abs/2302.13971
Su et al., RoFormer (rotary positions), 2021, https://arxiv.org/abs/2104.09864
Ainslie et al., Grouped-query attention, 2023, https://arxiv.org/abs/2305.13245
Gemma Team, Gemma 2, 2024, https://arxiv.org/abs/2408.00118
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft.models import soft, stack, stage

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Shape of a `Decoder`; the defaults are those of SmolLM2-135M.

  Attributes:
    vocab: number of token ids `V`.
    width: size of the residual stream `D`.
    depth: number of blocks.
    heads: query heads.
    groups: key and value heads; divides `heads`.
    head_width: size of one head, even; None is `width // heads`.
    ffn: size of the hidden layer of a block.
    eps: RMSNorm epsilon.
    theta: base of the rotary wavelengths.
    activation: of the gate: "silu", "gelu" (erf) or "gelu_tanh".
    tied: the output projection is the embedding table.
    bias: query, key and value have a bias (Qwen 2).
    head_norm: RMSNorm on each query and key head (Qwen 3).
    embedding_scale: factor on the embedded tokens (Gemma: sqrt(width)).
    query_scale: factor on the queries; None is 1 / sqrt(head width).
    post_norm: RMSNorm also on what a block adds (Gemma 2).
    attention_cap: scores s become cap tanh(s / cap) (Gemma 2); None: as is.
    logit_cap: the same for the logits.
    window: tokens that a layer attends to, or None for all. Texts that a
      window would cut are refused, since windows are not implemented.
    keep: what a block stores for the backward pass: "all", "dots" (matrix
      products; the rest is computed again) or "none" (only its input).
    unroll: repeat the block instead of scanning; see `stack.apply`.
  """

  vocab: int = 49152
  width: int = 576
  depth: int = 30
  heads: int = 9
  groups: int = 3
  head_width: int | None = None
  ffn: int = 1536
  eps: float = 1e-5
  theta: float = 1e5
  activation: str = "silu"
  tied: bool = True
  bias: bool = False
  head_norm: bool = False
  embedding_scale: float = 1.0
  query_scale: float | None = None
  post_norm: bool = False
  attention_cap: float | None = None
  logit_cap: float | None = None
  window: int | None = None
  keep: str = "dots"
  unroll: bool = False

  def __post_init__(self):
    stack.check(self, "vocab", "width", "depth", "heads", "groups", "ffn")
    if self.heads % self.groups:
      raise ValueError(
        f"groups must divide heads: heads={self.heads} groups={self.groups}"
      )
    if self.head_width is None and self.width % self.heads:
      raise ValueError(
        f"heads must divide width: width={self.width} heads={self.heads};"
        " set head_width"
      )
    if self.per_head % 2:
      raise ValueError(
        f"rotary heads must have an even width: head_width={self.per_head}"
      )
    for name in ("query_scale", "attention_cap", "logit_cap", "window"):
      value = getattr(self, name)
      if value is not None and value <= 0:
        raise ValueError(f"{name} must be positive or None: {name}={value}")
    if self.activation not in _ACTIVATIONS:
      raise ValueError(
        f"activation must be one of {sorted(_ACTIVATIONS)}:"
        f" activation={self.activation!r}"
      )

  @property
  def per_head(self) -> int:
    """Size of one attention head."""
    return self.head_width or self.width // self.heads


class Embeddings(nnx.Module):
  """The token table, scaled on the way in."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    self.token = nnx.Embed(config.vocab, config.width, rngs=rngs)
    self.scale = config.embedding_scale

  def __call__(
    self, tokens: jax.Array, prompt: nnx.Variable | None = None
  ) -> jax.Array:
    """Tokens int32 `[B, T]`, after a prompt `[P, D]`, to `[B, P + T, D]`."""
    return soft.prepend(prompt, self.token(tokens)) * self.scale


class Attention(nnx.Module):
  """Causal grouped-query attention; scores and softmax are in float32."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    inner = config.heads * config.per_head
    shared = config.groups * config.per_head
    linear = functools.partial(nnx.Linear, use_bias=config.bias, rngs=rngs)
    self.query = linear(config.width, inner)
    self.key = linear(config.width, shared)
    self.value = linear(config.width, shared)
    self.output = nnx.Linear(inner, config.width, use_bias=False, rngs=rngs)
    norm = functools.partial(_norm, config.per_head, config, rngs)
    self.query_norm = norm() if config.head_norm else None
    self.key_norm = norm() if config.head_norm else None
    self.width = config.per_head
    self.groups = config.groups
    self.scale = config.query_scale or config.per_head**-0.5
    self.cap = config.attention_cap
    self.prefix = nnx.data(None)
    self.prefix_shape = (config.groups, config.per_head)

  def __call__(self, x: jax.Array, rotation: jax.Array) -> jax.Array:
    """Mixes x `[B, T, D]`; rotation is the table of `_rotation`."""

    def split(t):  # [B, T, heads, d]
      heads = (t.shape[-1] // self.width, self.width)
      return t.astype(jnp.float32).reshape(*t.shape[:-1], *heads)

    query, key = split(self.query(x)), split(self.key(x))
    value = split(self.value(x))
    if self.query_norm is not None and self.key_norm is not None:
      query, key = self.query_norm(query), self.key_norm(key)
    query, key = _rotate(query, rotation), _rotate(key, rotation)
    query = query * self.scale
    if self.prefix is not None:  # [B, P + T, groups, d]
      key, value = self.prefix(key, value)
    before = key.shape[1] - x.shape[1]
    # One key head serves `r` query heads: [B, T, groups, r, d].
    query = query.reshape(*query.shape[:2], self.groups, -1, self.width)
    scores = _capped(jnp.einsum("bqgrd,bkgd->bgrqk", query, key), self.cap)
    causal = jnp.tri(x.shape[1], key.shape[1], before, dtype=bool)
    scores = jnp.where(causal[None, None, None], scores, -1e30)
    mixed = jnp.einsum("bgrqk,bkgd->bqgrd", jax.nn.softmax(scores), value)
    return self.output(mixed.reshape(*x.shape[:-1], -1).astype(x.dtype))


class FeedForward(nnx.Module):
  """A gated pair of dense layers (SwiGLU, or GeGLU)."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
    self.gate = linear(config.width, config.ffn)
    self.up = linear(config.width, config.ffn)
    self.down = linear(config.ffn, config.width)
    self.activation = config.activation

  def __call__(self, x: jax.Array) -> jax.Array:
    """The same map on each token of x `[B, T, D]`."""
    return self.down(_ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class Block(nnx.Module):
  """Attention and feed-forward, each of the normalized stream, added to it."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    self.attention_norm = _norm(config.width, config, rngs)
    self.attention = Attention(config, rngs)
    self.ffn_norm = _norm(config.width, config, rngs)
    self.ffn = FeedForward(config, rngs)
    post = functools.partial(_norm, config.width, config, rngs)
    self.attention_post_norm = post() if config.post_norm else None
    self.ffn_post_norm = post() if config.post_norm else None

  def __call__(self, x: jax.Array, rotation: jax.Array) -> jax.Array:
    """The stream x `[B, T, D]` after this block."""
    added = self.attention(self.attention_norm(x), rotation)
    if self.attention_post_norm is not None:
      added = self.attention_post_norm(added)
    x = x + added
    added = self.ffn(self.ffn_norm(x))
    if self.ffn_post_norm is not None:
      added = self.ffn_post_norm(added)
    return x + added


class Decoder(nnx.Module):
  """Tokens to the logits of each next token.

  Layers are at `layers/attention/{query,key,value,output}`,
  `layers/ffn/{gate,up,down}`, `layers/{attention,ffn}_norm` and, in Gemma 2,
  `layers/{attention,ffn}_post_norm` (stacked over depth), `embeddings/token`,
  `norm` and, if not tied, `head`. A `prompt` is embedded like P more words
  before the others; what comes out in its places is left out.

  Example:
    >>> config = DecoderConfig(
    ...   vocab=9, width=8, depth=2, heads=2, groups=1, ffn=16
    ... )
    >>> decoder = Decoder(config, nnx.Rngs(0))
    >>> tokens = jnp.array([[3, 4, 0]], jnp.int32)
    >>> decoder(tokens, jnp.array([2], jnp.int32)).shape
    (1, 3, 9)
  """

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    self.config = config
    self.prompt = nnx.data(None)
    self.prompt_width = config.width
    self.crossing = nnx.data(None)
    self.span = stage.whole(self)
    self.embeddings = Embeddings(config, rngs)
    self.layers = stack.build(
      functools.partial(Block, config), config.depth, rngs
    )
    self.norm = _norm(config.width, config, rngs)
    linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
    self.head = None if config.tied else linear(config.width, config.vocab)

  part = stage.part

  def stages(self) -> tuple[stage.Stage, ...]:
    """The embeddings, each layer, and the head with its norm."""
    first = stage.Stage("embeddings", ("embeddings", "prompt"))
    reads = ("embeddings",) if self.config.tied else ()
    last = stage.Stage("head", ("norm", "head"), reads=reads)
    return (first, *stage.layers(self.config.depth), last)

  def __call__(
    self, tokens: stage.Passed, length: jax.Array | None = None
  ) -> stage.Passed:
    """Predicts the token after each position.

    Args:
      tokens: int32 `[B, T]`; the message before it if this is a part that does
        not begin the model.
      length: int32 `[B]`, number of valid tokens. Padding is on the right, so
        no valid position can see it and no mask is needed; what comes out at
        padding positions means nothing.

    Returns:
      Logits float32 `[B, T, V]`; the message of a part that does not end the
      model.

    Raises:
      ValueError: if `T` exceeds `config.window`.
    """
    x = self.hidden(tokens, length)
    return self.unembed(x) if self.span.ends else x

  def hidden(
    self, tokens: stage.Passed, length: jax.Array | None = None
  ) -> stage.Passed:
    """The normalized stream `[B, T, D]`, or a message; as for a call."""
    del length
    visit = stage.arm(self)
    if self.span.begins:
      count = soft.count(self.prompt)
      _check_window(tokens, count, self.config.window)
      x = stage.after(visit, 0, self.embeddings(tokens, self.prompt))
    else:
      x, count = stage.received(tokens)
    x = stack.apply(
      self.layers,
      x,
      _rotation(x.shape[1], self.config),
      keep=self.config.keep,
      unroll=self.config.unroll,
      visit=visit,
      first=max(self.span.start, 1),
    )
    if not self.span.ends:
      return stage.message(x, count)
    return self.norm(x[:, count:] if count else x)

  def unembed(self, hidden: jax.Array) -> jax.Array:
    """Logits float32 `[..., V]` of the stream `[..., D]`."""
    attend = self.embeddings.token.attend if self.head is None else self.head
    return _capped(attend(hidden).astype(jnp.float32), self.config.logit_cap)


def _check_window(tokens, count, window):
  """Refuses texts that a window would cut, after a prompt of `count`."""
  if window is not None and count + tokens.shape[-1] > window:
    raise ValueError(
      f"attention in a sliding window of {window} tokens is not implemented:"
      f" tokens.shape={tokens.shape}; cut texts to {window - count} tokens"
    )


def _norm(width, config, rngs):
  """RMSNorm."""
  return nnx.RMSNorm(width, epsilon=config.eps, rngs=rngs)


def _capped(x, cap):
  """Bounds x softly to (-cap, cap)."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def _rotation(length, config):
  """Cosine and sine of the rotary angles, float32 [2, T, d / 2]."""
  half = config.per_head // 2
  wave = config.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  position = jnp.arange(length, dtype=jnp.float32)
  angle = position[:, None] * wave[None]  # [T, d / 2]
  return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def _rotate(x, rotation):
  """Rotates the pairs (i, i + d / 2) of x [B, T, heads, d]."""
  cos, sin = rotation[:, None, :, None, :]  # [1, T, 1, d / 2]
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
