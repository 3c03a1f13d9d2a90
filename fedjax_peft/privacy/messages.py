"""Messages: what clients and server say, byte for byte.

A message is a head (its kind, the session, the sender), fields of fixed sizes,
and rows of one fixed size, sorted by the client that they are about. There is
one way to write each message, and anything else is refused, so that counted
bytes are those that cross.

A client signs what it says: 64 bytes more. Two of these signatures are handed
on to neighbours, who can write down what was signed themselves.
"""

import hashlib
import itertools
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from fedjax_peft.privacy import keys, shamir, terms

SERVER = 2**32 - 1  # as a sender
SEALED_BYTES = 2 * shamir.SHARE_BYTES + keys.TAG_BYTES
SEED, PAIR = 0, 1  # of which secret a share is
_HEAD = struct.Struct("<B16sI")
_COUNT = struct.Struct("<I")


class Advertise(NamedTuple):
  """Client: the keys to agree on masks and on seals with."""

  session: bytes
  sender: int
  mask_key: bytes
  seal_key: bytes
  rows: tuple = ()


class Keys(NamedTuple):
  """Server: (neighbour, mask key, seal key, signature of its `Advertise`)."""

  session: bytes
  sender: int
  rows: tuple[tuple[int, bytes, bytes, bytes], ...]


class Shares(NamedTuple):
  """Client: a commitment to its seed, and (neighbour, sealed shares)."""

  session: bytes
  sender: int
  commitment: bytes
  rows: tuple[tuple[int, bytes], ...]


class Delivery(NamedTuple):
  """Server: (neighbour, shares that it sealed for the receiver)."""

  session: bytes
  sender: int
  rows: tuple[tuple[int, bytes], ...]


class Masked(NamedTuple):
  """Client: its values under masks, uint32 little-endian [D]."""

  session: bytes
  sender: int
  rows: bytes


class Survivors(NamedTuple):
  """Server: one bit a client, whether its masked values arrived."""

  session: bytes
  sender: int
  rows: bytes


class Consent(NamedTuple):
  """Client: the digest of the survivors that it was told."""

  session: bytes
  sender: int
  digest: bytes
  rows: tuple = ()


class Consents(NamedTuple):
  """Server: (neighbour, signature of its `Consent`)."""

  session: bytes
  sender: int
  rows: tuple[tuple[int, bytes], ...]


class Reveal(NamedTuple):
  """Client: (neighbour, SEED or PAIR, share of that secret)."""

  session: bytes
  sender: int
  rows: tuple[tuple[int, int, bytes], ...]


Message = TypeVar("Message")

# Fields between the head and the rows, and those of a row.
_LAYOUTS: dict[type, tuple[struct.Struct, struct.Struct | None]] = {
  kind: (struct.Struct("<" + fields), struct.Struct("<" + row) if row else None)
  for kind, fields, row in (
    (Advertise, "32s32s", None),
    (Keys, "", "I32s32s64s"),
    (Shares, "32s", f"I{SEALED_BYTES}s"),
    (Delivery, "", f"I{SEALED_BYTES}s"),
    (Masked, "", "I"),
    (Survivors, "", "B"),
    (Consent, "32s", None),
    (Consents, "", "I64s"),
    (Reveal, "", f"IB{shamir.SHARE_BYTES}s"),
  )
}
_NUMBERS = {kind: i + 1 for i, kind in enumerate(_LAYOUTS)}
_NAMES = {i: kind.__name__ for kind, i in _NUMBERS.items()}


def encode(message: Any) -> bytes:
  """The bytes of a message, without a signature.

  Args:
    message: one of the NamedTuples of this module.

  Example:
    >>> len(encode(Consent(bytes(16), 3, bytes(32))))
    53
  """
  fields, row = _LAYOUTS[type(message)]
  body = _HEAD.pack(_NUMBERS[type(message)], message.session, message.sender)
  body += fields.pack(*message[2:-1])
  if row is None:
    return body
  rows = message.rows
  if not isinstance(rows, bytes):
    rows = b"".join(row.pack(*r) for r in rows)
  return body + _COUNT.pack(len(rows) // row.size) + rows


def size(kind: type, rows: Any) -> Any:
  """Bytes of a message without its signature; rows may be an array."""
  fields, row = _LAYOUTS[kind]
  each = 0 if row is None else row.size
  return _HEAD.size + fields.size + (_COUNT.size if each else 0) + each * rows


def decode(data: bytes, kind: type[Message], session: bytes) -> Message:
  """The message that bytes are, if they are what is expected.

  Args:
    data: what arrived, without a signature.
    kind: which message is expected.
    session: of which round.

  Raises:
    ValueError: if they are of another kind or round, too short or too long,
      or if rows are not in order.
  """
  fields, row = _LAYOUTS[kind]
  name, least = kind.__name__, _HEAD.size + fields.size
  least += 0 if row is None else _COUNT.size
  if len(data) < least or (row is None and len(data) > least):
    raise ValueError(
      f"{name} has {'' if row is None else 'at least '}{least} bytes: got "
      f"{len(data)}"
    )
  number, theirs, sender = _HEAD.unpack_from(data)
  if number != _NUMBERS[kind]:
    got = _NAMES.get(number, f"kind {number}")
    raise ValueError(f"expected {name}: got {got} from {sender}")
  if theirs != session:
    raise ValueError(
      f"expected {name} of session {session.hex()}: got one of "
      f"{theirs.hex()}; it is of another round"
    )
  known = fields.unpack_from(data, _HEAD.size)
  rows = () if row is None else (_rows(data, least, kind, row),)
  make: Callable[..., Message] = kind
  return make(theirs, sender, *known, *rows)


def _rows(data, begin, kind, row):
  """What follows the count: tuples in order, or bytes of plain numbers."""
  (count,) = _COUNT.unpack_from(data, begin - _COUNT.size)
  expected, got = count * row.size, len(data) - begin
  if got != expected:
    raise ValueError(
      f"{kind.__name__} announces {count} rows of {row.size} bytes: got {got} "
      f"bytes, expected {expected}"
    )
  if kind in (Masked, Survivors):
    return data[begin:]
  rows = tuple(row.iter_unpack(data[begin:]))
  about = [r[0] for r in rows]
  if any(a >= b for a, b in itertools.pairwise(about)):
    raise ValueError(
      f"rows of {kind.__name__} are expected in rising order of clients: "
      f"got {about}"
    )
  return rows


def from_client(
  data: bytes,
  kind: type,
  sender: int,
  known: terms.Terms,
  scheme: keys.Scheme,
) -> tuple[Any, bytes]:
  """The message of a client, and its signature.

  Args:
    data: what arrived.
    kind: which message is expected.
    sender: the place of the client on whose connection it arrived.
    known: the terms of the round.
    scheme: verifies.

  Raises:
    ValueError: as `decode`, or if another client sent it, or signed it.
  """
  body, signature = split(data)
  message: Any = decode(body, kind, known.session)
  if message.sender != sender:
    raise ValueError(
      f"expected {kind.__name__} of client {sender}: got one that says it is "
      f"from {message.sender}"
    )
  if not scheme.verify(known.identities[sender], signature, body):
    raise ValueError(
      f"expected {kind.__name__} signed by client {sender}: got bytes that "
      "were changed, or signed by another"
    )
  return message, signature


def split(data: bytes) -> tuple[bytes, bytes]:
  """What a client said, and its signature."""
  return data[: -keys.SIGNATURE_BYTES], data[-keys.SIGNATURE_BYTES :]


def digest(survivors: Survivors) -> bytes:
  """What stands for a list of survivors in a `Consent`, 32 bytes."""
  return hashlib.sha256(encode(survivors)).digest()
