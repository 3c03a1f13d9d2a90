"""A bidirectional text encoder of the BERT family, post-layernorm.

Devlin et al., BERT, 2018, https://arxiv.org/abs/1810.04805
Reimers and Gurevych, Sentence-BERT, 2019, https://arxiv.org/abs/1908.10084
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft.models import soft, stack, stage

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
}
_POOLS = ("first", "mean")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """Shape of an `Encoder`; the defaults are those of MiniLM-L6.

  Attributes:
    vocab: number of token ids `V`.
    width: size of the residual stream `D`.
    depth: number of blocks.
    heads: attention heads.
    head_width: size of one head; None is `width // heads`.
    ffn: size of the hidden layer of a block.
    positions: longest sequence the position table covers.
    types: rows of the token-type table (row 0 is used); 0 is no table.
    eps: layernorm epsilon.
    activation: "gelu" (erf), "gelu_tanh" or "relu".
    pool: "mean" over the valid tokens or the "first" token.
    pooler: a tanh dense layer on what was pooled, as in BERT.
    classes: outputs of the head; 0 is no head, the embedding is returned.
    keep: what a block stores for the backward pass: "all", "dots" (matrix
      products; the rest is computed again) or "none" (only its input).
    unroll: repeat the block instead of scanning; see `stack.apply`.
  """

  vocab: int = 30522
  width: int = 384
  depth: int = 6
  heads: int = 12
  head_width: int | None = None
  ffn: int = 1536
  positions: int = 512
  types: int = 2
  eps: float = 1e-12
  activation: str = "gelu"
  pool: str = "mean"
  pooler: bool = False
  classes: int = 0
  keep: str = "dots"
  unroll: bool = False

  def __post_init__(self):
    stack.check(self, "vocab", "width", "depth", "heads", "ffn", "positions")
    if min(self.types, self.classes) < 0:
      raise ValueError(
        "types and classes must not be negative:"
        f" types={self.types} classes={self.classes}"
      )
    if self.head_width is None and self.width % self.heads:
      raise ValueError(
        f"heads must divide width: width={self.width} heads={self.heads};"
        " set head_width"
      )
    if self.activation not in _ACTIVATIONS:
      raise ValueError(
        f"activation must be one of {sorted(_ACTIVATIONS)}:"
        f" activation={self.activation!r}"
      )
    if self.pool not in _POOLS:
      raise ValueError(f"pool must be one of {_POOLS}: pool={self.pool!r}")

  @property
  def per_head(self) -> int:
    """Size of one attention head."""
    return self.head_width or self.width // self.heads


class Embeddings(nnx.Module):
  """Token + position + type 0, normalized."""

  def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
    self.token = nnx.Embed(config.vocab, config.width, rngs=rngs)
    self.position = nnx.Embed(config.positions, config.width, rngs=rngs)
    self.type = (
      nnx.Embed(config.types, config.width, rngs=rngs) if config.types else None
    )
    self.norm = _norm(config, rngs)

  def __call__(
    self, tokens: jax.Array, prompt: nnx.Variable | None = None
  ) -> jax.Array:
    """Tokens int32 `[B, T]`, after a prompt `[P, D]`, to `[B, P + T, D]`."""
    x = soft.prepend(prompt, self.token(tokens))
    x = x + self.position(jnp.arange(x.shape[-2]))[None]
    if self.type is not None:
      x = x + self.type(jnp.zeros((1, 1), jnp.int32))
    return self.norm(x)


class Attention(nnx.Module):
  """Multi-head self-attention; scores and their softmax are in float32."""

  def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
    inner = config.heads * config.per_head
    self.query = nnx.Linear(config.width, inner, rngs=rngs)
    self.key = nnx.Linear(config.width, inner, rngs=rngs)
    self.value = nnx.Linear(config.width, inner, rngs=rngs)
    self.output = nnx.Linear(inner, config.width, rngs=rngs)
    self.heads = config.heads
    self.prefix = nnx.data(None)
    self.prefix_shape = (config.heads, config.per_head)

  def __call__(self, x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Mixes x `[B, T, D]` over the tokens that are valid, bool `[B, T]`."""

    def split(t):
      return t.astype(jnp.float32).reshape(*t.shape[:-1], self.heads, -1)

    # Scaling the query is cheaper than scaling the scores when T > head width,
    # and fuses with the cast and the bias.
    query, key = split(self.query(x)), split(self.key(x))  # [B, T, heads, d]
    value = split(self.value(x))
    query = query * (query.shape[-1] ** -0.5)
    if self.prefix is not None:  # [B, P + T, heads, d]
      key, value = self.prefix(key, value)
      valid = soft.extend(valid, key.shape[1] - x.shape[1])
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
    if valid is not None:
      scores = jnp.where(valid[:, None, None, :], scores, -1e30)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
    return self.output(mixed.reshape(*x.shape[:-1], -1).astype(x.dtype))


class FeedForward(nnx.Module):
  """Two dense layers with an activation between."""

  def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
    self.up = nnx.Linear(config.width, config.ffn, rngs=rngs)
    self.down = nnx.Linear(config.ffn, config.width, rngs=rngs)
    self.activation = config.activation

  def __call__(self, x: jax.Array) -> jax.Array:
    """The same map on each token of x `[B, T, D]`."""
    return self.down(_ACTIVATIONS[self.activation](self.up(x)))


class Block(nnx.Module):
  """Attention and feed-forward, each added to its input and normalized."""

  def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
    self.attention = Attention(config, rngs)
    self.attention_norm = _norm(config, rngs)
    self.ffn = FeedForward(config, rngs)
    self.ffn_norm = _norm(config, rngs)

  def __call__(self, x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """The stream x `[B, T, D]` after this block."""
    x = self.attention_norm(x + self.attention(x, valid))
    return self.ffn_norm(x + self.ffn(x))


class Encoder(nnx.Module):
  """Tokens to class logits, or to one embedding a text.

  Layers are at `layers/attention/{query,key,value,output}`,
  `layers/ffn/{up,down}`, `layers/{attention,ffn}_norm` (stacked over depth),
  `embeddings/{token,position,type,norm}`, `pooler` and `head`. A `prompt` is
  embedded like P more words before the others; what comes out in its places
  is left out.

  Example:
    >>> config = EncoderConfig(vocab=9, width=8, depth=2, heads=2, ffn=16)
    >>> encoder = Encoder(config, nnx.Rngs(0))
    >>> tokens = jnp.array([[3, 4, 0]], jnp.int32)
    >>> encoder(tokens, jnp.array([2], jnp.int32)).shape
    (1, 8)
  """

  def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
    self.config = config
    self.prompt = nnx.data(None)
    self.prompt_width = config.width
    self.crossing = nnx.data(None)
    self.span = stage.whole(self)
    self.embeddings = Embeddings(config, rngs)
    self.layers = stack.build(
      functools.partial(Block, config), config.depth, rngs
    )
    self.pooler = (
      nnx.Linear(config.width, config.width, rngs=rngs)
      if config.pooler
      else None
    )
    self.head = (
      nnx.Linear(config.width, config.classes, rngs=rngs)
      if config.classes
      else None
    )

  part = stage.part

  def stages(self) -> tuple[stage.Stage, ...]:
    """The embeddings, each layer, and the head with pool and pooler."""
    first = stage.Stage("embeddings", ("embeddings", "prompt"))
    last = stage.Stage("head", ("pooler", "head"))
    return (first, *stage.layers(self.config.depth), last)

  def __call__(
    self, tokens: stage.Passed, length: jax.Array | None = None
  ) -> stage.Passed:
    """Encodes a batch of texts.

    Args:
      tokens: int32 `[B, T]`, `P + T <= config.positions`; the message before
        it if this is a part that does not begin the model.
      length: int32 `[B]`, number of valid tokens, the rest is padding and has
        no influence; None says that all tokens are valid, and skips the masks.

    Returns:
      Logits `[B, classes]`, or the pooled embedding `[B, D]` (not normalized
      to length one) if `classes` is 0; the message of a part that does not end
      the model.

    Raises:
      ValueError: if `T` exceeds the position table.
    """
    x = self.features(tokens, length)
    return x if self.head is None else self.head(x)

  def features(
    self, tokens: stage.Passed, length: jax.Array | None = None
  ) -> stage.Passed:
    """What the head reads, `[B, D]`, or a message; arguments as for a call."""
    if self.span.begins:
      x, places = tokens, 0
      _check_length(tokens, self.config.positions - soft.count(self.prompt))
    else:
      x, places = stage.received(tokens)
      length = tokens.get("length")
    valid = None
    if length is not None:
      count = x.shape[1] - places
      valid = jnp.arange(count)[None] < length[:, None]  # [B, T]
    x = self.hidden(x, valid, places)
    if not self.span.ends:
      more = {} if length is None else {"length": length}
      return stage.message(x, places + soft.count(self.prompt), **more)
    x = x[:, 0] if self.config.pool == "first" else _mean(x, valid)  # [B, D]
    if self.pooler is not None:
      x = jnp.tanh(self.pooler(x))
    return x

  def hidden(
    self, tokens: jax.Array, valid: jax.Array | None, places: int = 0
  ) -> jax.Array:
    """The last block's stream.

    Args:
      tokens: int32 `[B, T]`; the stream `[B, places + T, D]` before this part
        if it does not begin the model.
      valid: bool `[B, T]`, or None if all tokens are.
      places: of a prompt, in that stream.

    Returns:
      `[B, T, D]`, with the places of a prompt if the model does not end here.
    """
    x, visit = tokens, stage.arm(self)
    if self.span.begins:
      x = stage.after(visit, 0, self.embeddings(tokens, self.prompt))
    count = places + soft.count(self.prompt)
    x = stack.apply(
      self.layers,
      x,
      soft.extend(valid, count),
      keep=self.config.keep,
      unroll=self.config.unroll,
      visit=visit,
      first=max(self.span.start, 1),
    )
    return x[:, count:] if count and self.span.ends else x


def _check_length(tokens, longest):
  """Refuses texts that the position table does not cover."""
  if tokens.shape[-1] > longest:
    raise ValueError(
      f"texts must have at most {longest} tokens:"
      f" tokens.shape={tokens.shape}; truncate them"
    )


def _norm(config, rngs):
  """A layernorm whose variance does not cancel (no E[x^2] - E[x]^2)."""
  return nnx.LayerNorm(
    config.width, epsilon=config.eps, use_fast_variance=False, rngs=rngs
  )


def _mean(x, valid):
  """Mean over the valid tokens; zero for an empty text."""
  if valid is None:
    return x.mean(1)
  weight = valid[..., None].astype(x.dtype)  # [B, T, 1]
  return (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
