"""Signing: who vouches for a version, and that nobody else did.

What is signed is JSON in one form only (sorted keys, no spaces, ASCII), behind
the purpose that it is signed for, so that a signature of one thing is none of
another. Ed25519 is deterministic: a repeated round signs the same bits.
"""

import json
import os
import pathlib
import stat
from collections.abc import Callable
from typing import Any, NamedTuple

from fedjax_peft.privacy import keys


class Signer(NamedTuple):
  """Who signs.

  Attributes:
    identity: the public key, 64 hex digits; give it to who verifies.
    sign: (purpose, value that JSON can hold) -> signature, 128 hex digits.
  """

  identity: str
  sign: Callable[[str, Any], str]


def encode(value: Any) -> bytes:
  """The one form of a value that is hashed and signed.

  Raises:
    ValueError: if a number in it is not finite.

  Example:
    >>> encode({"b": 1, "a": [True, None]})
    b'{"a":[true,null],"b":1}'
  """
  text = json.dumps(
    value, sort_keys=True, separators=(",", ":"), allow_nan=False
  )
  return text.encode()


def signer(secret: bytes) -> Signer:
  """Signs with a secret of 32 bytes."""
  scheme = keys.real()

  def sign(purpose, value):
    return scheme.sign(secret, _message(purpose, value)).hex()

  return Signer(scheme.identity(secret).hex(), sign)


def is_signed(identity: str, signature: str, purpose: str, value: Any) -> bool:
  """Whether a signature is of this value, for this purpose, by this key.

  Args:
    identity: 64 hex digits.
    signature: 128 hex digits, in lower case.
    purpose: as in `Signer.sign`.
    value: as in `Signer.sign`.
  """
  try:
    key, raw = bytes.fromhex(identity), bytes.fromhex(signature)
  except ValueError:
    return False
  same = (key.hex(), raw.hex()) == (identity, signature)
  return same and keys.real().verify(key, raw, _message(purpose, value))


def _message(purpose: str, value: Any) -> bytes:
  """What is signed."""
  return f"fedjax-peft {purpose}\n".encode() + encode(value)


def key_of(path: str | os.PathLike, *, make: bool = True) -> Signer:
  """Signs with the key in a file, which is made if there is none.

  Args:
    path: 64 hex digits in a file that its owner alone may read (0600).
    make: whether a key may be made.

  Raises:
    ValueError: if others may read the file, or it holds no key.
    OSError: if it cannot be read or written.
  """
  path = pathlib.Path(path)
  if not make and not path.exists():
    raise ValueError(
      f"what was signed before is signed on with the same key, but there is no "
      f"{str(path)!r}; restore the file, or say where it is (governance.key)"
    )
  flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
  try:
    file = os.open(path, flags, 0o600)
  except FileExistsError:
    return signer(_read(path))
  with open(file, "w") as text:
    text.write(keys.real().draw("", keys.KEY_BYTES).hex() + "\n")
    text.flush()
    os.fsync(text.fileno())
  return signer(_read(path))


def _read(path: pathlib.Path) -> bytes:
  """The secret in a file that nobody else may read."""
  mode = stat.S_IMODE(path.stat().st_mode)
  if mode & 0o077:
    raise ValueError(
      f"a signing key is for its owner alone: {str(path)!r} has mode "
      f"{mode:04o}, expected 0600; run chmod 600, and make another key if "
      "somebody may have read it"
    )
  text = path.read_text().strip()
  try:
    secret = bytes.fromhex(text)
  except ValueError:
    secret = b""
  if len(secret) != keys.KEY_BYTES:
    raise ValueError(
      f"a signing key is {2 * keys.KEY_BYTES} hex digits: {str(path)!r} holds "
      f"{len(text)} characters that are none; restore the file"
    )
  return secret
