"""Purposes: every key is for one use, in one round, between certain clients."""

from fedjax_peft.privacy import keys, terms


def mask(
  scheme: keys.Scheme,
  known: terms.Terms,
  secret: bytes,
  public: bytes,
  one: int,
  other: int,
) -> bytes:
  """The key of the keystream that two clients share, the same for both.

  Args:
    scheme: of the keys.
    known: the terms of the round.
    secret: of one of them, to agree on masks with.
    public: of the other.
    one: place of either.
    other: place of the other.
  """
  low, high = sorted((one, other))
  shared = scheme.exchange(secret, public)
  return _derive(known, shared, b"mask", low, high)


def seal(
  scheme: keys.Scheme,
  known: terms.Terms,
  secret: bytes,
  public: bytes,
  sender: int,
  receiver: int,
) -> bytes:
  """The key that seals what one client says to another; not the way back.

  Args:
    scheme: of the keys.
    known: the terms of the round.
    secret: of one of them, to agree on seals with.
    public: of the other.
    sender: its place.
    receiver: its place.
  """
  shared = scheme.exchange(secret, public)
  return _derive(known, shared, b"seal", sender, receiver)


def stream(known: terms.Terms, seed: bytes, place: int) -> bytes:
  """The key of a client's own keystream.

  Args:
    known: the terms of the round.
    seed: 32 bytes that it drew.
    place: its place.
  """
  return _derive(known, seed, b"stream", place)


def commitment(known: terms.Terms, seed: bytes, place: int) -> bytes:
  """What a client says of its seed: enough to recognize it, not to find it.

  Args:
    known: the terms of the round.
    seed: 32 bytes that it drew.
    place: its place.
  """
  return _derive(known, seed, b"commitment", place)


def about(known: terms.Terms, sender: int, receiver: int) -> bytes:
  """What is authenticated with a seal.

  Args:
    known: the terms of the round.
    sender: its place.
    receiver: its place.
  """
  return known.session + _number(sender) + _number(receiver)


def _derive(known, secret, use, *places):
  """HKDF, salted with the round."""
  info = use + b"".join(map(_number, places))
  return keys.derive(secret, known.session, info)


def _number(place):
  """Four bytes."""
  return place.to_bytes(4, "little")
