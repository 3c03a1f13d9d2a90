"""Tokens: text to int32 rows, by a model's tokenizer or a tiny one.

Padding is 0 and is told apart by `length`, never by its value.
"""

import re
import zlib
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import tokenizers

from fedjax_peft.data import cache
from fedjax_peft.data.ragged import Ragged

Tokenizer: TypeAlias = (
  str | tokenizers.Tokenizer | Callable[[list[str]], list[list[int]]]
)


def rows(
  texts: Sequence[str], tokenizer: Tokenizer, tokens: int
) -> dict[str, np.ndarray]:
  """One row of at most T tokens per text.

  Args:
    texts: M texts.
    tokenizer: "minilm", "smollm2" or another pretrained model's name; a
      `tokenizers.Tokenizer`; "char"; "hash:V" for V word hashes; or a function
      from texts to lists of ids. The first two put the model's special tokens
      (such as [CLS] and [SEP]) and count them.
    tokens: T.

  Returns:
    `tokens` int32 [M, T], zero after the text, and `length` int32 [M].

  Raises:
    ValueError: for a text without a token.

  Example:
    >>> rows(["a b", "b"], "hash:100", 3)["tokens"]
    array([[46, 30,  0],
           [30,  0,  0]], dtype=int32)
  """
  ragged = ids(texts, tokenizer, limit=tokens)
  sizes = ragged.sizes
  if len(texts) and sizes.min() == 0:
    empty = texts[int(np.argmin(sizes))]
    raise ValueError(f"every text must have a token: {empty!r} has none")
  return _padded(ragged, tokens)


def windows(
  stream: Ragged, tokens: int
) -> tuple[dict[str, np.ndarray], Ragged]:
  """Cuts each client's stream of tokens into windows for next-token loss.

  Neighbouring windows share one token, so that every token but the first of a
  stream is predicted exactly once.

  Args:
    stream: token ids per client (as `ids` returns); `rows` are ids.
    tokens: T >= 2, tokens per window; the last one of a stream may be shorter,
      but has at least 2.

  Returns:
    The windows of all clients, `tokens` int32 [M, T] and `length` int32 [M],
    and which windows each client has.

  Example:
    >>> examples, owned = windows(Ragged.of([[1, 2, 3, 4], [5]]), 3)
    >>> examples["tokens"], owned.sizes
    (array([[1, 2, 3],
           [3, 4, 0]], dtype=int32), array([2, 0]))
  """
  if tokens < 2:
    raise ValueError(f"a window must have 2 tokens or more: {tokens=}")
  counts = -(-np.maximum(stream.sizes - 1, 0) // (tokens - 1))
  owned = Ragged.grouped(np.repeat(np.arange(len(stream)), counts), len(stream))
  place = np.arange(len(owned.rows)) - owned.indptr[owned.owner]
  start = stream.indptr[owned.owner] + place * (tokens - 1)
  length = np.minimum(stream.indptr[owned.owner + 1] - start, tokens)
  index = start[:, None] + np.arange(tokens)
  valid = np.arange(tokens) < length[:, None]
  table = np.where(valid, stream.rows[np.where(valid, index, 0)], 0)
  return {"tokens": table, "length": length.astype(np.int32)}, owned


def ids(
  texts: Sequence[str], tokenizer: Tokenizer, *, limit: int | None = None
) -> Ragged:
  """Token ids of each text; long computations are kept in the cache.

  Args:
    texts: M texts.
    tokenizer: see `rows`.
    limit: at most so many ids per text, special tokens among them; None is
      all ids without special tokens.
  """
  texts = list(texts)
  if isinstance(tokenizer, str) and not re.fullmatch("char|hash:.*", tokenizer):
    # Models know how to read data, not the other way round at import.
    from fedjax_peft.models import pretrained

    tokenizer = pretrained.tokenizer(tokenizer)
  if isinstance(tokenizer, tokenizers.Tokenizer):
    written = tokenizer.to_str()
    name = f"tokens-{cache.key(texts, written, str(limit))}"
    kept = cache.arrays(name, lambda: _encoded(texts, written, limit))
    return Ragged(kept["indptr"], kept["rows"])
  encode = _named(tokenizer) if isinstance(tokenizer, str) else tokenizer
  return Ragged.of([found[:limit] for found in encode(texts)])


def char_id(character: str) -> int:
  r"""The id of a character in "char": 2 = newline, 3 to 97 = ASCII, 1 = other.

  Example:
    >>> [char_id(x) for x in "\n ~\u00e9"]
    [2, 3, 97, 1]
  """
  if character == "\n":
    return 2
  return ord(character) - 29 if " " <= character <= "~" else 1


def _encoded(
  texts: list[str], written: str, limit: int | None
) -> dict[str, np.ndarray]:
  """Runs a tokenizer, on a copy, since truncation is a state of it."""
  tokenizer = tokenizers.Tokenizer.from_str(written)
  tokenizer.no_padding()
  tokenizer.no_truncation()
  if limit is not None:
    tokenizer.enable_truncation(max_length=limit)
  special = limit is not None
  found = tokenizer.encode_batch_fast(texts, add_special_tokens=special)
  ragged = Ragged.of([encoding.ids for encoding in found])
  return {"indptr": ragged.indptr, "rows": ragged.rows}


def _named(name: str) -> Callable[[list[str]], list[list[int]]]:
  """The tiny tokenizers "char" and "hash:V"."""
  if name == "char":
    return lambda texts: [[char_id(x) for x in text] for text in texts]
  size = name.removeprefix("hash:")
  if not size.isdigit() or int(size) < 2:
    raise ValueError(f'write "hash:V" with V >= 2: {name!r} came')
  buckets = int(size) - 1
  known: dict[str, int] = {}

  def word(text):
    if text not in known:
      known[text] = zlib.crc32(text.encode()) % buckets + 1
    return known[text]

  def encode(texts):
    pieces = (re.findall(r"\w+|[^\w\s]", text.lower()) for text in texts)
    return [[word(x) for x in found] for found in pieces]

  return encode


def _padded(ragged: Ragged, tokens: int) -> dict[str, np.ndarray]:
  """Lists of at most T ids as a table [M, T] and their lengths [M]."""
  valid = np.arange(tokens) < ragged.sizes[:, None]
  table = np.zeros(valid.shape, np.int32)
  table[valid] = ragged.rows
  return {"tokens": table, "length": ragged.sizes.astype(np.int32)}
