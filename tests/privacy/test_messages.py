"""Messages: one way to write each, and every other way is refused."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from fedjax_peft.privacy import bits
from fedjax_peft.privacy import messages as m

SESSION = bytes(range(16))
CHECK = hypothesis.settings(deadline=None, max_examples=30, derandomize=True)

EXAMPLES = (
  m.Advertise(SESSION, 3, b"m" * 32, b"s" * 32),
  m.Keys(SESSION, m.SERVER, ((1, b"a" * 32, b"b" * 32, b"c" * 64),) * 1),
  m.Keys(SESSION, m.SERVER, ()),
  m.Shares(SESSION, 3, b"c" * 32, ((0, b"x" * 82), (2, b"y" * 82))),
  m.Delivery(SESSION, m.SERVER, ((0, b"x" * 82), (7, b"y" * 82))),
  m.Masked(SESSION, 3, np.arange(5, dtype="<u4").tobytes()),
  m.Survivors(SESSION, m.SERVER, bits.pack([0, 9], 10)),
  m.Consent(SESSION, 3, b"d" * 32),
  m.Consents(SESSION, m.SERVER, ((1, b"s" * 64),)),
  m.Reveal(SESSION, 3, ((1, m.SEED, b"a" * 33), (4, m.PAIR, b"b" * 33))),
)
ids = [f"{type(x).__name__}-{len(x.rows)}" for x in EXAMPLES]

# Head 21, count 4; the rest is what the fields are.
BYTES = (85, 157, 25, 229, 197, 45, 27, 53, 93, 101)


@pytest.mark.parametrize(
  ("message", "size"), list(zip(EXAMPLES, BYTES, strict=True)), ids=ids
)
def test_messages_come_back_and_have_the_bytes_of_their_fields(message, size):
  data = m.encode(message)
  assert len(data) == size
  assert m.decode(data, type(message), SESSION) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=ids)
def test_every_other_length_and_kind_is_refused(message):
  data, kind = m.encode(message), type(message)
  for wrong in [*(data[:i] for i in range(len(data))), data + b"\0"]:
    with pytest.raises(ValueError, match=r"bytes"):
      m.decode(wrong, kind, SESSION)
  for other in {type(x) for x in EXAMPLES} - {kind}:
    with pytest.raises(ValueError, match=r"expected|has|announces"):
      m.decode(data, other, SESSION)
  with pytest.raises(ValueError, match="another round"):
    m.decode(data, kind, bytes(16))


@pytest.mark.parametrize("message", EXAMPLES, ids=ids)
@CHECK
@hypothesis.given(data=st.data())
def test_what_is_read_is_what_was_written_or_refused(message, data):
  # One encoding a message: bytes that are accepted are those of what is read.
  wire = bytearray(m.encode(message))
  for _ in range(data.draw(st.integers(1, 3))):
    at = data.draw(st.integers(0, len(wire) - 1))
    wire[at] = data.draw(st.integers(0, 255))
  try:
    read = m.decode(bytes(wire), type(message), SESSION)
  except ValueError:
    return
  assert m.encode(read) == bytes(wire)


def test_rows_out_of_order_or_twice_are_refused():
  row = b"x" * 82
  for places in [(2, 1), (1, 1), (0, 2, 1)]:
    data = m.encode(m.Delivery(SESSION, 0, tuple((p, row) for p in places)))
    with pytest.raises(ValueError, match="rising order of clients"):
      m.decode(data, m.Delivery, SESSION)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 31])
def test_bits_are_of_exactly_so_many_clients(n):
  for some in [(), (0,), range(n), range(0, n, 3)]:
    data = bits.pack(some, n)
    assert len(data) == -(-n // 8)
    assert bits.unpack(data, n) == set(some)
    with pytest.raises(ValueError, match=f"each of {n} clients"):
      bits.unpack(data + b"\0", n)
  if n % 8:
    with pytest.raises(ValueError, match=f"each of {n} clients"):
      bits.unpack(bits.pack([n], n + 1), n)
