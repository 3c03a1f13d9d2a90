"""Soft tokens: what a model does with a prompt or prefix that it is given.

A model that takes prompts has an attribute `prompt`, None or a Variable [P, D],
and a `prompt_width` D. It puts the prompt before the embedded words, lets every
word see it, and leaves out what comes out in its places. An attention that
takes prefixes has an attribute `prefix`, None or a module (key, value) ->
(key, value) that adds P pairs before those of the words, and a `prefix_shape`
(heads, width of a head); every word sees them.
"""

import jax
import jax.numpy as jnp
from flax import nnx


def count(prompt: nnx.Variable | None) -> int:
  """P, zero without a prompt."""
  return 0 if prompt is None else prompt.shape[0]


def prepend(prompt: nnx.Variable | jax.Array | None, x: jax.Array) -> jax.Array:
  """A prompt [P, ...], if any, before every row of x [B, T, ...]."""
  if prompt is None:
    return x
  rows = jnp.broadcast_to(prompt[...], (x.shape[0], *prompt.shape))
  return jnp.concatenate([rows.astype(x.dtype), x], axis=1)


def extend(valid: jax.Array | None, count: int) -> jax.Array | None:
  """A mask bool [B, T] with `count` places before it that all may see."""
  if valid is None or not count:
    return valid
  return jnp.pad(valid, ((0, 0), (count, 0)), constant_values=True)
