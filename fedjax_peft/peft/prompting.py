"""Prompts and prefixes: soft tokens that the words of a text can see.

They are no zero-initialized adapters: attention to even a neutral token takes
weight from the others, so the module's output changes when they are put in.

A module takes them through a protocol of two attributes that the encoder and
the decoder of this library offer:

* prompts: `prompt`, None until one is set, then a Variable [P, D], and
  `prompt_width`, D. The module embeds the prompt like P more words before the
  others and leaves out what comes out in their places.
* prefixes: an attention has `prefix`, None until one is set, then a module
  (key [B, T, heads, d], value) -> the same with P pairs before them, and
  `prefix_shape`, (heads, d). Words keep their positions.

Lester et al., Prompt Tuning, 2021, https://arxiv.org/abs/2104.08691
Jia et al., Visual Prompt Tuning (deep prompts), 2022,
https://arxiv.org/abs/2203.12119
Li and Liang, Prefix-Tuning, 2021, https://arxiv.org/abs/2101.00190
"""

import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_peft import validate
from fedjax_peft.peft import adapter, beside, frozen


class Prefix(nnx.Module):
  """Pairs of keys and values before those of the words.

  Attributes:
    prefix_key: Adapter, float32 [stack, P, heads, d].
    prefix_value: Adapter, likewise.
  """

  def __init__(self, key: jax.Array, value: jax.Array):
    self.prefix_key = adapter.Adapter(key)
    self.prefix_value = adapter.Adapter(value)

  def __call__(
    self, key: jax.Array, value: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, T, heads, d] with the prefix: [B, P + T, ...]."""
    return _before(self.prefix_key, key), _before(self.prefix_value, value)


class DeepPrompt(nnx.Module):
  """A block that reads its own vectors in the places of a prompt.

  Attributes:
    adapter_base: the block, (x [B, P + T, D], ...) -> [B, P + T, D].
    deep_prompt: Adapter, float32 [stack, P, D].
  """

  def __init__(self, base: nnx.Module, prompt: jax.Array):
    self.adapter_base = base
    self.deep_prompt = adapter.Adapter(prompt)

  def __call__(self, x: jax.Array, *args, **options) -> jax.Array:
    """The block's output for its own prompt."""
    words = x[:, self.deep_prompt.shape[0] :]
    x = _before(self.deep_prompt, words)
    return self.adapter_base(x, *args, **options)


def _before(soft, x):
  """Soft tokens [P, ...] before every row of x [B, T, ...]."""
  rows = jnp.broadcast_to(soft[...], (x.shape[0], *soft.shape))
  return jnp.concatenate([rows.astype(x.dtype), x], axis=1)


def prompt(
  module: nnx.Module,
  length: int = 16,
  where: str = ".*",
  *,
  deviation: float = 0.02,
  seed: int = 0,
) -> nnx.Module:
  """Puts soft tokens before the embedded text.

  Guarantees:
    the result computes what `module` would for texts that begin with `length`
    more words whose embeddings are the prompt.

  Args:
    module: an NNX module with the prompt protocol (see above); untouched.
    length: P >= 1. Texts may have P fewer tokens than the position table.
    where: regex, matched in full against the "/"-joined names of modules with
      the protocol; the name of `module` itself is "".
    deviation: standard deviation of the initial values.
    seed: of the initial values.

  Returns:
    A clone that trains P * D entries.

  Raises:
    ValueError: if no matched module offers the protocol, or one has a prompt;
      if the module is frozen already.

  Example:
    >>> from fedjax_peft import models, peft
    >>> model = models.load(
    ...   "encoder", vocab=9, width=8, depth=2, heads=2, ffn=16, positions=9
    ... )
    >>> {k: v.shape for k, v in peft.split(prompt(model, 4)).params.items()}
    {'prompt': (4, 8)}
  """
  validate.at_least(1, length=length)
  validate.positive(deviation=deviation)
  chosen = _takers(module, where, "prompt")

  def one(path, node):
    if path in chosen:
      size = (length, node.prompt_width)
      node.prompt = adapter.Adapter(_draw(path, size, deviation, seed))
    return node

  return adapter.replace(module, one)


def deep_prompt(
  module: nnx.Module,
  length: int = 16,
  where: str = "layers",
  *,
  deviation: float = 0.02,
  seed: int = 0,
) -> nnx.Module:
  """Gives every block soft tokens of its own.

  The module gets a prompt of zeros that does not train, and every block finds
  its own vectors in the places of that prompt.

  Args:
    module: an NNX module with the prompt protocol (see above) and blocks that
      map a stream [B, T, D], their first argument, to one; untouched.
    length: P >= 1.
    where: regex, matched in full against the "/"-joined names of the blocks. A
      module whose variables are stacked on a leading axis is one name.
    deviation: standard deviation of the initial values.
    seed: of the initial values.

  Returns:
    A clone that trains P * D entries a block.

  Raises:
    ValueError: as in `prompt`; if `where` matches no module; if not one module
      but several take prompts.

  Example:
    >>> from fedjax_peft import models, peft
    >>> model = models.load(
    ...   "encoder", vocab=9, width=8, depth=2, heads=2, ffn=16, positions=9
    ... )
    >>> tuned = deep_prompt(model, 4)
    >>> {k: v.shape for k, v in peft.split(tuned).params.items()}
    {'layers/deep_prompt': (2, 4, 8)}
  """
  validate.at_least(1, length=length)
  validate.positive(deviation=deviation)
  takers = _takers(module, ".*", "prompt")
  if len(takers) > 1:
    raise ValueError(
      "deep_prompt needs one module that takes prompts: got "
      f"{sorted(map(adapter.join, takers))}; apply it to each of them"
    )
  (taker,) = takers
  found = adapter.find(module, nnx.Module)
  width = found[taker][0].prompt_width
  names = {path: names for path, (_, names) in found.items()}
  blocks = adapter.select(where, names, "module")

  def one(path, node):
    if path == taker:
      node.prompt = adapter.Frozen(jnp.zeros((length, width), jnp.float32))
    if path not in blocks:
      return node
    size = (*beside.stack_within(node), length, width)
    return DeepPrompt(node, _draw(path, size, deviation, seed))

  return adapter.replace(module, one)


def prefix(
  module: nnx.Module,
  length: int = 16,
  where: str = ".*",
  *,
  deviation: float = 0.02,
  seed: int = 0,
) -> nnx.Module:
  """Puts trained keys and values before those of every matched attention.

  Args:
    module: an NNX module with attentions that have the prefix protocol (see
      above); untouched.
    length: P >= 1.
    where: regex, matched in full against the "/"-joined names of such
      attentions.
    deviation: standard deviation of the initial values.
    seed: of the initial values.

  Returns:
    A clone that trains 2 * P * heads * d entries an attention, `heads` being
    those of keys and values.

  Raises:
    ValueError: if no matched module offers the protocol, or one has a prefix;
      if the module is frozen already.

  Example:
    >>> from fedjax_peft import models, peft
    >>> model = models.load(
    ...   "encoder", vocab=9, width=8, depth=2, heads=2, ffn=16, positions=9
    ... )
    >>> params = peft.split(prefix(model, 3)).params
    >>> params["layers/attention/prefix/prefix_key"].shape
    (2, 3, 2, 4)
  """
  validate.at_least(1, length=length)
  validate.positive(deviation=deviation)
  chosen = _takers(module, where, "prefix")

  def one(path, node):
    if path in chosen:
      heads, width = node.prefix_shape
      size = (2, *beside.stack_within(node), length, heads, width)
      node.prefix = Prefix(*_draw(path, size, deviation, seed))
    return node

  return adapter.replace(module, one)


def _draw(path, size, deviation, seed):
  """Normal values that depend on (seed, name) only."""
  name = zlib.crc32(adapter.join(path).encode())
  key = jax.random.fold_in(jax.random.key(seed), name)
  return deviation * jax.random.normal(key, size, jnp.float32)


def _takers(module, where, kind):
  """Paths of the matched modules that take a prompt or a prefix."""
  frozen.refuse(module, kind)
  more = {"prompt": "prompt_width", "prefix": "prefix_shape"}[kind]
  found = {
    path: (node, names)
    for path, (node, names) in adapter.find(module, nnx.Module).items()
    if hasattr(node, kind) and hasattr(node, more)
  }
  if not found:
    raise ValueError(
      f"no module takes a {kind}: one that does has the attributes {kind!r}, "
      f"None at first, and {more!r}; see fedjax_peft.peft.prompting, or use "
      "bottleneck or lora, which need no such attributes"
    )
  names = {path: names for path, (_, names) in found.items()}
  chosen = adapter.select(where, names, f"module that takes a {kind}")
  for path in chosen:
    if getattr(found[path][0], kind) is not None:
      raise ValueError(
        f"a module takes one {kind}: {adapter.join(path)!r} has one; leave it "
        "out of where"
      )
  return chosen
