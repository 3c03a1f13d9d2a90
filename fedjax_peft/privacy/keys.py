"""Keys: two clients agree on one that the server, between them, cannot know.

X25519 agrees on a secret, HKDF-SHA256 makes a key of it for each purpose,
ChaCha20-Poly1305 seals what passes through the server, Ed25519 says who said
it. A simulated scheme makes every secret of the run's key instead, by hashing:
the same sizes, the same messages, the same bits in every run, and no security.

RFC 7748 (X25519), RFC 5869 (HKDF), RFC 8439 (AEAD), RFC 8032 (Ed25519)
"""

import hashlib
import secrets
from collections.abc import Callable
from typing import NamedTuple

from cryptography import exceptions
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, x25519
from cryptography.hazmat.primitives.ciphers import aead
from cryptography.hazmat.primitives.kdf import hkdf

KEY_BYTES = 32
SIGNATURE_BYTES = 64
TAG_BYTES = 16  # that a seal adds
_RAW = (serialization.Encoding.Raw, serialization.PublicFormat.Raw)


class Scheme(NamedTuple):
  """Where secrets come from and how two of them meet.

  Attributes:
    draw: (label, number of bytes) -> random bytes.
    public: (secret) -> the public key, 32 bytes, to agree with.
    exchange: (secret, public key of another) -> 32 bytes that both know.
    identity: (secret) -> the public key, 32 bytes, to verify with.
    sign: (secret, message) -> signature, 64 bytes.
    verify: (identity, signature, message) -> whether it is theirs.
  """

  draw: Callable[[str, int], bytes]
  public: Callable[[bytes], bytes]
  exchange: Callable[[bytes, bytes], bytes]
  identity: Callable[[bytes], bytes]
  sign: Callable[[bytes, bytes], bytes]
  verify: Callable[[bytes, bytes, bytes], bool]


def real() -> Scheme:
  """X25519 and Ed25519, with secrets from the operating system."""

  def public(secret):
    key = x25519.X25519PrivateKey.from_private_bytes(secret)
    return key.public_key().public_bytes(*_RAW)

  def exchange(secret, other):
    key = x25519.X25519PrivateKey.from_private_bytes(secret)
    try:
      return key.exchange(x25519.X25519PublicKey.from_public_bytes(other))
    except ValueError as error:
      raise ValueError(
        f"expected a public key of X25519: got {other.hex()}, with which "
        "nothing can be agreed on"
      ) from error

  def identity(secret):
    key = ed25519.Ed25519PrivateKey.from_private_bytes(secret)
    return key.public_key().public_bytes(*_RAW)

  def sign(secret, message):
    return ed25519.Ed25519PrivateKey.from_private_bytes(secret).sign(message)

  def verify(identity, signature, message):
    try:
      key = ed25519.Ed25519PublicKey.from_public_bytes(identity)
      key.verify(signature, message)
    except (exceptions.InvalidSignature, ValueError):
      return False
    return True

  def draw(label, size):
    return secrets.token_bytes(size)

  return Scheme(draw, public, exchange, identity, sign, verify)


def simulated(key: bytes) -> Scheme:
  """Secrets that follow from the run's key; who knows it knows everything.

  Args:
    key: 32 bytes.

  Raises:
    ValueError: if the key has another size.

  Example:
    >>> scheme = simulated(bytes(32))
    >>> a, b = (scheme.draw(x, 32) for x in "ab")
    >>> scheme.exchange(a, scheme.public(b)) == scheme.exchange(
    ...   b, scheme.public(a)
    ... )
    True
  """
  if len(key) != KEY_BYTES:
    raise ValueError(f"the run's key has {KEY_BYTES} bytes: got {len(key)}")

  def digest(*parts):
    return hashlib.sha256(b"".join(parts)).digest()

  def draw(label, size):
    return hashlib.shake_256(key + label.encode()).digest(size)

  def public(secret):
    return digest(b"public", secret)

  def exchange(secret, other):
    return digest(key, b"pair", *sorted((public(secret), other)))

  def identity(secret):
    return digest(b"identity", secret)

  def signature(identity, message):
    first = digest(key, b"sign", identity, message)
    return first + digest(first)

  def sign(secret, message):
    return signature(identity(secret), message)

  def verify(identity, claimed, message):
    return signature(identity, message) == claimed

  return Scheme(draw, public, exchange, identity, sign, verify)


def derive(
  secret: bytes, salt: bytes, info: bytes, size: int = KEY_BYTES
) -> bytes:
  """A key for one purpose (HKDF-SHA256).

  Args:
    secret: what two agreed on, or one drew.
    salt: the round; b"" for none.
    info: the purpose.
    size: bytes, at most 8,160.
  """
  make = hkdf.HKDF(hashes.SHA256(), length=size, salt=salt, info=info)
  return make.derive(secret)


def seal(key: bytes, plain: bytes, about: bytes) -> bytes:
  """Encrypts and authenticates; a key seals one message only.

  Args:
    key: 32 bytes, never used before: the nonce is always 0.
    plain: what is hidden.
    about: what is authenticated with it and known to both.

  Returns:
    16 bytes more than `plain`.
  """
  return aead.ChaCha20Poly1305(key).encrypt(bytes(12), plain, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
  """What was sealed.

  Args:
    key: as in `seal`.
    sealed: what `seal` returned.
    about: as in `seal`.

  Raises:
    ValueError: if it was not sealed with this key about this.
  """
  try:
    return aead.ChaCha20Poly1305(key).decrypt(bytes(12), sealed, about)
  except exceptions.InvalidTag as error:
    raise ValueError(
      f"expected {len(sealed)} bytes sealed for this receiver: got bytes that "
      "were changed, or sealed with another key"
    ) from error
