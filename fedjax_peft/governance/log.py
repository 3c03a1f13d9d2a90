"""Log: lines that can be added, and not changed, removed or put elsewhere.

Every line is JSON in its one form (`signing.encode`). It has its number, the
hash of the line before and its own hash, and it is signed where the first line
names who signs. A copy of the last line, `FILE.head`, tells where the log ends.
Whoever can replace both by an older pair takes the log back to that moment:
keep a head elsewhere, and give it to `verify`, if that matters.
"""

import errno
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedjax_peft import record
from fedjax_peft.governance import signing

NONE = "0" * 64  # the hash before the first line
_PURPOSE = "log"


class End(NamedTuple):
  """Where a log ends.

  Attributes:
    number: of the last line, from 1; 0 for no line.
    hash: its hash, 64 hex digits.
  """

  number: int = 0
  hash: str = NONE


class Broken(NamedTuple):
  """The first line that is not as it was written.

  Attributes:
    line: its number, from 1.
    why: what is wrong with it.
  """

  line: int
  why: str


def append(
  path: str | os.PathLike,
  end: End,
  entry: Mapping[str, Any],
  signer: signing.Signer | None = None,
) -> End:
  """Adds a line and waits until it, and then its copy, is on the disk.

  Args:
    path: the log; it is made if it does not exist.
    end: where it ends now.
    entry: what JSON can hold; the first has `identity`, that of the signer or
      None.
    signer: of all lines, or of none.

  Raises:
    ValueError: if a number is not finite.
    OSError: if the line cannot be written; what stood there before is kept.
  """
  path = pathlib.Path(path)
  body = dict(entry) | {"number": end.number + 1, "previous": end.hash}
  line = body | {"hash": hashlib.sha256(signing.encode(body)).hexdigest()}
  if signer is not None:
    line["signature"] = signer.sign(_PURPOSE, body)
  text = signing.encode(line)
  with open(path, "ab", buffering=0) as file:
    before = file.seek(0, os.SEEK_END)
    if file.write(text + b"\n") != len(text) + 1:
      file.truncate(before)
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    os.fsync(file.fileno())
  fresh = head_of(path).with_suffix(".tmp")
  fresh.write_bytes(text)
  record.replace(fresh, head_of(path))
  return End(body["number"], line["hash"])


def head_of(path: str | os.PathLike) -> pathlib.Path:
  """Where the copy of the last line lies."""
  return pathlib.Path(f"{os.fspath(path)}.head")


def cut_unfinished(path: str | os.PathLike) -> int:
  """Cuts off a last line that was being written when the process died.

  Returns:
    Its bytes; they are to be told by the next line.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return 0
  data = path.read_bytes()
  whole = data.rfind(b"\n") + 1
  if whole < len(data):
    record.truncate(path, whole)
  return len(data) - whole


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The entries of a log that `verify` found to be whole."""
  path = pathlib.Path(path)
  lines = path.read_bytes().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


def verify(
  path: str | os.PathLike,
  identity: str | None = None,
  head: bytes | None = None,
) -> Broken | None:
  """Finds the first line that was edited, removed, moved or cut off.

  Args:
    path: the log.
    identity: who must have signed; None believes the first line.
    head: a copy of what was the last line once; None takes the file beside the
      log, which at most the last line may be ahead of.

  Returns:
    The first broken line, None if all is well.
  """
  path, beside = pathlib.Path(path), head_of(path)
  data = path.read_bytes() if path.exists() else b""
  if head is not None:
    return check(data, head, identity, kept=True)
  return check(data, beside.read_bytes() if beside.exists() else None, identity)


def check(
  data: bytes,
  head: bytes | None,
  identity: str | None = None,
  *,
  kept: bool = False,
) -> Broken | None:
  """Finds the first broken line in the bytes of a log; see `verify`.

  Args:
    data: the log.
    head: a copy of its last line, or of the one before; None for no copy.
    identity: who must have signed; None believes the first line.
    kept: whether the head was kept elsewhere, so that the log may go on.
  """
  *lines, rest = data.split(b"\n")
  named = _named(lines[0]) if lines else None
  who = named if identity is None else identity
  end = End()
  for number, line in enumerate(lines, start=1):
    entry, why = _checked(line, end, who)
    if why or named != who:
      return Broken(number, why or f"it names another signer, {named}")
    end = End(number, entry["hash"])
  if rest:
    return Broken(len(lines) + 1, "it was not finished")
  return _ends(lines, head, kept)


def _named(line: bytes) -> Any:
  """Who signs, as the first line says."""
  try:
    return json.loads(line).get("identity")
  except (ValueError, AttributeError, RecursionError):
    return None


def _checked(line: bytes, end: End, who: str | None) -> tuple[Any, str]:
  """A line's entry, and what is wrong with it."""
  try:
    entry = json.loads(line)
    same = isinstance(entry, dict) and signing.encode(entry) == line
  except (ValueError, RecursionError):
    same = False
  if not same:
    return None, "it was edited"
  body = {k: v for k, v in entry.items() if k not in ("hash", "signature")}
  if entry.get("hash") != hashlib.sha256(signing.encode(body)).hexdigest():
    return entry, "it was edited"
  if (entry.get("number"), entry.get("previous")) != (end.number + 1, end.hash):
    return entry, f"it does not follow line {end.number}"
  signature = entry.get("signature")
  good = signature is None if who is None else isinstance(signature, str)
  if good and who is not None:
    good = signing.is_signed(who, signature, _PURPOSE, body)
  return entry, "" if good else f"it is not signed by {who or 'nobody'}"


def _ends(lines: list[bytes], head: bytes | None, kept: bool) -> Broken | None:
  """Whether the log ends where its head says."""
  try:
    number = 0 if head is None else json.loads(head)["number"]
  except (ValueError, KeyError, TypeError):
    number = None
  if type(number) is not int or number < 0:
    return Broken(max(len(lines), 1), "the head, a copy of it, was edited")
  if number > len(lines):
    return Broken(len(lines) + 1, f"it is missing: the head is line {number}")
  if head is not None and (not number or lines[number - 1] != head):
    return Broken(max(number, 1), "the head is another copy of it")
  if not kept and len(lines) > number + 1:
    return Broken(number + 2, f"the head is line {number}, too far behind")
  return None
