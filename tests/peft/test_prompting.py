"""Prompts and prefixes: the same as words put before the others by hand."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peft_worlds as worlds
from fedjax_peft import models, peft
from fedjax_peft.models import decoder as decoders

P, WIDTH, T = worlds.P, worlds.WIDTH, worlds.T
KINDS = ("encoder", "decoder")


@functools.cache
def lengthened(kind):
  """The module with P more words, and those words before every text."""
  w = worlds.world(kind)
  module = peft.prompt(w.module, P, deviation=1.0)
  longer = nnx.clone(w.module)
  table = longer.embeddings.token
  more = jnp.concatenate([table.embedding[...], module.prompt[...]])
  table.embedding = nnx.Param(more)
  tokens, length = w.inputs
  new = jnp.broadcast_to(jnp.arange(P) + worlds.VOCAB, (worlds.B, P))
  return module, longer, (jnp.concatenate([new, tokens], 1), length + P)


def close(got, want, tol):
  # two layers, each of four products of up to 20 terms
  atol = 8 * tol(jnp.float32, 20) * np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def test_a_prompt_is_more_words_before_the_others_of_a_decoder(tol):
  module, longer, inputs = lengthened("decoder")
  want = longer.hidden(inputs[0])[:, P:]
  got = module(*worlds.world("decoder").inputs)
  assert got.shape == (worlds.B, T, worlds.VOCAB)
  close(got, worlds.world("decoder").module.unembed(want), tol)


def test_a_prompt_is_more_words_before_the_others_of_an_encoder(tol):
  module, longer, (tokens, length) = lengthened("encoder")
  valid = jnp.arange(P + T)[None] < length[:, None]
  want = longer.hidden(tokens, valid)[:, P:]  # what is pooled are the words
  weight = valid[:, P:, None].astype(jnp.float32)
  want = longer.head((want * weight).sum(1) / weight.sum(1))
  close(module(*worlds.world("encoder").inputs), want, tol)


@pytest.mark.parametrize("method", ["prompt", "deep_prompt", "prefix"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_influence_beside_soft_tokens(kind, method):
  w = worlds.world(kind)
  module = peft.METHODS[method](w.module, 2, deviation=1.0)
  tokens, length = w.inputs
  valid = np.arange(T)[None] < np.asarray(length)[:, None]
  other = jnp.where(valid, tokens, (tokens + 1) % worlds.VOCAB)
  one, two = jax.jit(lambda *x: (module(x[0], x[2]), module(x[1], x[2])))(
    tokens, other, length
  )
  if kind == "decoder":
    one, two = one[valid], two[valid]
  np.testing.assert_array_equal(one, two)


def blocks(module):
  """The blocks of a stacked module, one by one."""
  graph, state = nnx.split(module)
  return [
    nnx.merge(graph, jax.tree.map(operator.itemgetter(i), state))
    for i in range(worlds.DEPTH)
  ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_reads_its_own_deep_prompt(kind, tol):
  w = worlds.world(kind)
  module = peft.deep_prompt(w.module, P, deviation=1.0)
  prompts = module.layers.deep_prompt[...]
  assert prompts.shape == (worlds.DEPTH, P, WIDTH)
  tokens, length = w.inputs
  empty, _, _ = lengthened(kind)
  x = empty.embeddings(tokens, jnp.zeros((P, WIDTH)))[:, P:]
  if kind == "decoder":
    shared = decoders._rotation(P + T, w.module.config)
  else:
    shared = jnp.arange(P + T)[None] < (length + P)[:, None]
  for block, prompt in zip(blocks(w.module.layers), prompts, strict=True):
    rows = jnp.broadcast_to(prompt, (worlds.B, P, WIDTH))
    x = block(jnp.concatenate([rows, x], 1), shared)[:, P:]
  if kind == "decoder":
    close(module(*w.inputs), w.module.unembed(w.module.norm(x)), tol)
  else:
    close(module.hidden(tokens, shared[:, P:]), x, tol)


def attention(query, key, value, mask):
  """Softmax attention of one head in float64."""
  scores = query @ key.T / np.sqrt(query.shape[-1])
  scores = np.where(mask, scores, -np.inf)
  weight = np.exp(scores - scores.max(-1, keepdims=True))
  return weight / weight.sum(-1, keepdims=True) @ value


def test_a_prefix_of_an_encoder_is_more_keys_and_values(tol):
  w = worlds.world("encoder")
  module = peft.prefix(w.module, P, deviation=1.0)
  block = blocks(module.layers)[1].attention
  x = jax.random.normal(jax.random.key(1), (1, T, WIDTH))
  valid = jnp.arange(T)[None] < 3
  split = lambda t: np.asarray(t, np.float64)[0].reshape(T, 2, -1)  # noqa: E731
  query, key = split(block.query(x)), split(block.key(x))
  value = split(block.value(x))
  more = [
    np.asarray(p[...], np.float64)
    for p in (block.prefix.prefix_key, block.prefix.prefix_value)
  ]
  key, value = (
    np.concatenate(pair) for pair in zip(more, (key, value), strict=True)
  )
  mask = np.concatenate([np.ones(P, bool), np.asarray(valid[0])])
  mixed = [
    attention(query[:, h], key[:, h], value[:, h], mask[None]) for h in range(2)
  ]
  want = block.output(
    jnp.asarray(np.stack(mixed, 1).reshape(1, T, -1), jnp.float32)
  )
  close(block(x, valid), want, tol)


def test_a_prefix_of_a_decoder_is_seen_by_all_and_keeps_order(tol):
  """The last word's output is that of attention to prefix and all words."""
  w = worlds.world("decoder")
  module = peft.prefix(w.module, P, deviation=1.0)
  block = blocks(module.layers)[0].attention
  x = jax.random.normal(jax.random.key(1), (1, T, WIDTH))
  rotation = decoders._rotation(T, w.module.config)
  heads = lambda t: t.reshape(1, T, 2, -1)  # noqa: E731
  turn = lambda t: decoders._rotate(heads(t), rotation)  # noqa: E731
  query, key = turn(block.query(x)), turn(block.key(x))
  value = heads(block.value(x))
  key, value = block.prefix(key, value)
  query, key, value = (
    np.asarray(t, np.float64)[0] for t in (query, key, value)
  )
  mask = np.arange(P + T)[None] <= P + np.arange(T)[:, None]
  mixed = [
    attention(query[:, h], key[:, h], value[:, h], mask) for h in range(2)
  ]
  want = block.output(
    jnp.asarray(np.stack(mixed, 1).reshape(1, T, -1), jnp.float32)
  )
  close(block(x, rotation), want, tol)
  # no word sees a later one, prefix or not
  moved = x.at[:, -1].add(1.0)
  np.testing.assert_array_equal(
    block(moved, rotation)[:, :-1], block(x, rotation)[:, :-1]
  )


@pytest.mark.parametrize("kind", KINDS)
def test_soft_tokens_are_counted_and_alone_they_train(kind):
  module = worlds.world(kind).module
  for method, count in [
    ("prompt", P * WIDTH),
    ("deep_prompt", worlds.DEPTH * P * WIDTH),
    ("prefix", worlds.DEPTH * 2 * P * WIDTH),  # heads * d is the width here
  ]:
    parts = peft.split(peft.METHODS[method](module, P))
    assert peft.count(parts.params) == count
    assert all("pr" in name.rsplit("/", 1)[-1] for name in parts.params)


def test_gradients_reach_soft_tokens_under_vmap_and_freeze():
  w = worlds.world("encoder")
  module = peft.prefix(peft.deep_prompt(w.module, 2), 3)
  parts = peft.split(peft.freeze(peft.lora(module, 2), "float32"))

  def loss(params, base):
    return (peft.merge(parts.graph, params, {}, {}, base)(*w.inputs) ** 2).sum()

  params = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), parts.params)
  slope = jax.jit(jax.vmap(jax.grad(loss), (0, None)))(params, parts.base)
  names = {name.rsplit("/", 1)[-1] for name in slope}
  assert names == {
    *("deep_prompt", "prefix_key", "prefix_value", "lora_a", "lora_b")
  }
  for name, value in slope.items():
    assert name.endswith("lora_a") or np.abs(value).max((1, 2, 3)).min() > 0


def test_texts_that_a_prompt_makes_too_long_are_refused():
  w = worlds.world("encoder")
  module = peft.prompt(w.module, P + 1)
  with pytest.raises(ValueError, match=f"at most {T - 1} tokens"):
    module(*w.inputs)


def test_modules_without_the_protocol_are_told_what_it_is():
  mlp, encoder = (worlds.world(n).module for n in ("mlp", "encoder"))
  with pytest.raises(ValueError, match="attributes 'prompt', None at first"):
    peft.prompt(mlp)
  with pytest.raises(ValueError, match="'prefix_shape'"):
    peft.prefix(mlp)
  with pytest.raises(ValueError, match="takes one prompt"):
    peft.deep_prompt(peft.prompt(encoder))
  with pytest.raises(ValueError, match="did you mean 'layers/attention'"):
    peft.prefix(encoder, where="layers/attn")
  with pytest.raises(ValueError, match="call prompt first"):
    peft.prompt(peft.freeze(peft.head(encoder)))
  two = nnx.Dict(a=encoder, b=models.load("encoder", vocab=9, width=8, heads=2))
  with pytest.raises(ValueError, match=r"got \['a', 'b'\]"):
    peft.deep_prompt(two, where="a/layers")
