"""Searching: whether a canary is in a message, at any place of any leaf.

All leaves of one width are laid end to end as unsigned words. Two words of a
pattern are looked for first, everywhere; only where some client's message has
them is the rest compared, so that what holds no canary is read about once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft.trust import pattern

PyTree = Any
_UNSIGNED = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}


def searcher(made: pattern.Patterns) -> Callable[[PyTree], jax.Array]:
  """Looks for canaries in the messages of several clients at once.

  Args:
    made: what they look like.

  Returns:
    (pytree, axis K leads) -> int32 [K, 2]: 1 + the number of a leaf that holds
    one, in the order of `jax.tree.leaves`, and which canary it is; (0, 0) where
    there is none. For use under jit, not under vmap.
  """

  def look(values: PyTree) -> jax.Array:
    leaves = jax.tree.leaves(values)
    if not leaves:
      raise ValueError("a message must have a leaf, got none; send something")
    found = jnp.zeros((len(leaves[0]), 2), jnp.int32)
    for width in sorted(_UNSIGNED):
      here = [
        i for i, x in enumerate(leaves) if pattern.width_of(x.dtype) == width
      ]
      if not here or (width not in made.words and width != 8):
        continue
      hits = _in_words([leaves[i] for i in here], made, width)
      if width == 8 and len(made.codes):
        codes = _in_codes([leaves[i] for i in here], made)
        hits = jnp.where(hits[:, :1] > 0, hits, codes)
      number = jnp.array([0, *(i + 1 for i in here)], jnp.int32)
      hits = hits.at[:, 0].set(number[hits[:, 0]])
      found = jnp.where(found[:, :1] > 0, found, hits)
    return found

  return jax.jit(look)


def _in_words(leaves, made, width) -> jax.Array:
  """(1 + which of the leaves, canary) [K, 2] that hold a pattern as it is."""
  nothing = jnp.zeros((len(leaves[0]), 2), jnp.int32)
  if width not in made.words:
    return nothing
  words = made.words[width]
  longest = words.shape[1]
  line = jnp.concatenate([_as_words(x, width) for x in leaves], axis=1)
  size = line.shape[1]
  if not size:
    return nothing
  # A pattern that is shorter may be at the very end.
  line = jnp.pad(line, ((0, 0), (0, longest)))

  def all_of(line):
    def one(p, length):
      def add(j, same):
        here = jax.lax.dynamic_slice(line, (j,), (size,)) == p[j]
        return same & (here | (j >= length))

      same = jax.lax.fori_loop(0, longest, add, jnp.ones(size, bool))
      fits = jnp.arange(size) <= size - length
      return same & fits

    every = jax.lax.map(lambda x: one(*x), (words, made.lengths[width]))
    return _first(every, [x[0].size for x in leaves], made.whose[width])

  begins = jnp.zeros((len(line), size), bool)
  for p in words:
    begins |= (line[:, :size] == p[0]) & (line[:, 1 : size + 1] == p[1])
  return jax.lax.cond(
    jnp.any(begins), jax.vmap(all_of), lambda line: nothing, line
  )


def _in_codes(leaves, made) -> jax.Array:
  """The same, for codes of 8 bits of any scale and offset."""
  run = pattern.RUN
  found = jnp.zeros((len(leaves[0]), 2), jnp.int32)
  for i, leaf in enumerate(leaves):
    line = leaf.reshape(len(leaf), -1)
    if line.shape[1] < run:
      continue
    middle = jnp.float32(128 if leaf.dtype == jnp.uint8 else 0)
    line = line.astype(jnp.float32) - middle
    best = jax.vmap(lambda line: _likeness(line, made.codes))(line)  # [K, G]
    which = jnp.asarray(made.code_of)[jnp.argmax(best, axis=1)]
    is_like = jnp.max(best, axis=1) > pattern.LIKE
    hit = jnp.stack([jnp.full_like(which, i + 1), which], axis=1)
    hit = jnp.where(is_like[:, None], hit, 0)
    found = jnp.where(found[:, :1] > 0, found, hit)
  return found


def _likeness(line: jax.Array, codes: np.ndarray) -> jax.Array:
  """Largest squared correlation of each code with a run of a line, [G]."""
  run = codes.shape[1]
  places = line.size - run + 1

  def add(j, sums):
    x = jax.lax.dynamic_slice(line, (j,), (places,))
    code = jnp.asarray(codes)[:, j]
    total, squares, along = sums
    return total + x, squares + x * x, along + code[:, None] * x[None]

  zero = jnp.zeros(places)
  start = (zero, zero, jnp.zeros((len(codes), places)))
  total, squares, along = jax.lax.fori_loop(0, run, add, start)
  spread = squares - total * total / run
  # What hardly varies is no code: less than one step from value to value.
  spread = jnp.where(spread > run, spread, jnp.inf)
  return jnp.max(along * along / spread[None], axis=1)


def _first(every, sizes, whose) -> jax.Array:
  """(1 + leaf, canary) of the first hit; `every` is bool [P, places]."""
  ends = jnp.asarray(np.cumsum(sizes), jnp.int32)
  place = jnp.argmax(jnp.any(every, axis=0)).astype(jnp.int32)
  leaf = jnp.searchsorted(ends, place, side="right").astype(jnp.int32)
  which = jnp.asarray(whose, jnp.int32)[jnp.argmax(every[:, place])]
  hit = jnp.stack([leaf + 1, which])
  return jnp.where(jnp.any(every), hit, 0)


def _as_words(x: jax.Array, width: int) -> jax.Array:
  """The bits of numbers [K, ...] as words [K, n]."""
  x = x.reshape(len(x), -1)
  return jax.lax.bitcast_convert_type(x, _UNSIGNED[width])
