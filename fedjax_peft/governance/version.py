"""Versions: global states that follow each other, each naming the one before.

A version's state is what the receivers hold: the model at every tier, the
state of its optimizer and of its links. The round that is next and the plan's
memory are not part of it: they go on when a round is taken back.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_peft import record
from fedjax_peft import rounds as round_lib
from fedjax_peft.governance import signing

NONE = "0" * 64  # the parent of the first
_PURPOSE = "version"
_HELD = (".nodes", ".pool")


class Version(NamedTuple):
  """A state that was accepted; digests are 64 hex digits.

  Attributes:
    number: 0 for the state before the first round, then 1, 2, ...
    round: rounds done.
    state: digest of the state, see `of_state`.
    parent: digest of the version before, `NONE` for the first.
    config: digest of the config.
  """

  number: int
  round: int
  state: str
  parent: str
  config: str


class Signed(NamedTuple):
  """A version and who vouches for it.

  Attributes:
    version: what is signed.
    signature: 128 hex digits; "" where nobody signs.
  """

  version: Version
  signature: str


def of_state(state: round_lib.State) -> str:
  """The digest of what the receivers hold.

  It is `record.digest` of {path: leaf}, so that a checkpoint, which is such a
  dict, tells it without the model.
  """
  leaves = jax.tree_util.tree_leaves_with_path(
    state._replace(clients=round_lib.Rows({}, ()), plan={})
  )
  return of_arrays({jax.tree_util.keystr(p): record.host(x) for p, x in leaves})


def of_arrays(arrays: Mapping[str, np.ndarray]) -> str:
  """The digest of the leaves of a state.

  Args:
    arrays: {path: leaf}; what the receivers do not hold is left out, and so
      are leaves without values.
  """
  held = {k: x for k, x in arrays.items() if k.startswith(_HELD) and x.size}
  return record.digest(held)


def first(state: str, config: str) -> Version:
  """The version before the first round, of two digests."""
  return Version(0, 0, state, NONE, config)


def following(
  parent: Version, round: int, state: str, config: str | None = None
) -> Version:
  """The version that a good round makes of its parent.

  Args:
    parent: the version that the round started from.
    round: rounds done.
    state: digest of the state.
    config: digest of the config, None for the parent's.
  """
  config = parent.config if config is None else config
  return Version(parent.number + 1, round, state, digest(parent), config)


def digest(version: Version) -> str:
  """SHA-256 of a version, as its children name it."""
  return hashlib.sha256(signing.encode(version._asdict())).hexdigest()


def sign(version: Version, signer: signing.Signer | None) -> Signed:
  """A version with a signature, or with none."""
  if signer is None:
    return Signed(version, "")
  return Signed(version, signer.sign(_PURPOSE, version._asdict()))


def check(
  signed: Signed,
  identity: str | None,
  parent: Version | None,
  config: str | None = None,
) -> Version:
  """The version, if it is signed by who it should be and follows its parent.

  Args:
    signed: what somebody gave us.
    identity: whose signature is expected; None expects none.
    parent: the newest version that is known to be good; None if `signed` must
      be the first.
    config: digest of the config, None for the parent's.

  Raises:
    ValueError: for another signature, another parent, a number that was there
      before or that leaves one out, or a round that was there before.
  """
  found, signature = signed
  if identity is not None and not signing.is_signed(
    identity, signature, _PURPOSE, found._asdict()
  ):
    raise ValueError(
      f"version {found.number} must be signed by {identity[:12]}..., got a "
      "signature of something else or by another key; do not use that state"
    )
  if parent is None:
    want = first(found.state, found.config)
  else:
    want = following(parent, found.round, found.state, config)
  for field in ("number", "parent", "config", "round"):
    got, expected = getattr(found, field), getattr(want, field)
    if got != expected:
      raise ValueError(
        f"version {want.number} is expected next, with {field}={expected!r}: "
        f"got {field}={got!r}; it was replayed, or is of another run"
      )
  if parent is not None and found.round <= parent.round:
    raise ValueError(
      f"version {want.number} must be of a round after {parent.round}: got "
      f"round={found.round}; it was replayed"
    )
  return found


def to_dict(signed: Signed) -> dict[str, Any]:
  """A signed version as JSON can hold it."""
  return {"version": signed.version._asdict(), "signature": signed.signature}


def from_dict(saved: Mapping[str, Any]) -> Signed:
  """The signed version that `to_dict` wrote.

  Raises:
    ValueError: if a field is missing, unknown or of another type.
  """
  kinds = {k: int if k in ("number", "round") else str for k in Version._fields}
  fields: Any = saved.get("version")
  good = isinstance(fields, dict) and fields.keys() == kinds.keys()
  if not good or any(type(fields[k]) is not t for k, t in kinds.items()):
    raise ValueError(
      f"a version has the fields {list(kinds)}, got {fields!r}; was it written "
      "by another program?"
    )
  return Signed(Version(**fields), str(saved.get("signature", "")))
