import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from fedjax_peft.data import Ragged, tokens


def wordpiece():
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
  words += ["the", "king", "is", "dead", "long", "live"]
  model = tokenizers.models.WordLevel(
    {word: index for index, word in enumerate(words)}, "[UNK]"
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  return tokenizer


def test_a_models_special_tokens_survive_truncation(home):
  found = tokens.rows(
    ["the king is dead", "long live the king"], wordpiece(), 4
  )
  assert found["tokens"].tolist() == [[2, 4, 5, 3], [2, 8, 9, 3]]
  found = tokens.rows(["the king", "is"], wordpiece(), 5)
  assert found["tokens"].tolist() == [[2, 4, 5, 3, 0], [2, 6, 3, 0, 0]]
  assert found["length"].tolist() == [4, 3]
  assert {x.dtype for x in found.values()} == {np.dtype(np.int32)}


def test_the_users_tokenizer_keeps_its_own_truncation(home):
  tokenizer = wordpiece()
  tokenizer.enable_truncation(max_length=3)
  tokens.rows(["the king is dead"], tokenizer, 6)
  assert tokenizer.truncation["max_length"] == 3
  ids = tokens.ids(["the king is dead"], tokenizer)
  assert ids[0].tolist() == [4, 5, 6, 7]


def test_a_function_can_tokenize():
  found = tokens.rows(
    ["ab", "abcd"], lambda texts: [list(x.encode()) for x in texts], 3
  )
  assert found["tokens"].tolist() == [[97, 98, 0], [97, 98, 99]]


def test_hashes_are_words_below_the_vocabulary_and_never_padding():
  found = tokens.rows(["The king, the KING!"], "hash:50", 8)
  row = found["tokens"][0]
  assert found["length"] == 6
  assert row[0] == row[3]
  assert row[1] == row[4]
  assert row[:6].min() > 0
  assert row.max() < 50


def test_characters_fit_98_ids():
  text = "".join(map(chr, range(32, 127))) + "\n\u00e9"
  ids = tokens.ids([text], "char")[0]
  assert len(set(ids.tolist())) == 97
  assert ids.min() == 1
  assert ids.max() == 97


@hypothesis.given(
  sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8),
  length=st.integers(2, 9),
)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_windows_predict_every_token_of_a_stream_once(sizes, length):
  ends = np.cumsum([1, *sizes])
  stream = Ragged.of(
    [np.arange(start, end) for start, end in itertools.pairwise(ends)]
  )
  found, owned = tokens.windows(stream, length)
  assert len(owned.rows) == len(found["tokens"])
  for client, ids in enumerate(stream):
    rows = owned[client]
    predicted = [found["tokens"][row, 1 : found["length"][row]] for row in rows]
    np.testing.assert_array_equal(
      np.concatenate([ids[:0], *predicted]), ids[1:]
    )
    assert (found["length"][rows] >= 2).all()
  padding = np.arange(length) >= found["length"][:, None]
  assert (found["tokens"][padding] == 0).all()


def test_slow_tokenization_is_kept_and_read_back(home, monkeypatch):
  texts = ["the king is dead", "long live the king"]
  fast = tokens.rows(texts, wordpiece(), 6)
  assert not list(home.rglob("*.npz"))
  keep = tokens.cache.arrays
  monkeypatch.setattr(
    tokens.cache, "arrays", lambda name, make: keep(name, make, slow=0.0)
  )
  slow = tokens.rows(texts, wordpiece(), 6)
  (stored,) = home.rglob("*.npz")
  written = stored.stat().st_mtime_ns
  again = tokens.rows(texts, wordpiece(), 6)
  assert stored.stat().st_mtime_ns == written
  for key in fast:
    np.testing.assert_array_equal(fast[key], slow[key])
    np.testing.assert_array_equal(fast[key], again[key])
  tokens.rows(texts, wordpiece(), 5)
  assert len(list(home.rglob("*.npz"))) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(home):
  home.write_text("a file where the directory should be")
  found = tokens.cache.arrays("x", lambda: {"a": np.ones(2)}, slow=0.0)
  assert found["a"].tolist() == [1, 1]


def test_a_text_without_tokens_is_refused():
  with pytest.raises(ValueError, match="every text must have a token: ' ' has"):
    tokens.rows(["a", " "], "hash:10", 4)
  with pytest.raises(ValueError, match='write "hash:V" with V >= 2'):
    tokens.rows(["a"], "hash:one", 4)
  with pytest.raises(ValueError, match="2 tokens or more: tokens=1"):
    tokens.windows(Ragged.of([[1, 2]]), 1)
