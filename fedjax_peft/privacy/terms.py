"""Terms: what everyone knows before the first message of a secure sum."""

from typing import NamedTuple

from fedjax_peft import validate
from fedjax_peft.privacy import graph, keys

SESSION_BYTES = 16


class Terms(NamedTuple):
  """A round of secure aggregation; `agree` makes and checks one.

  Attributes:
    session: 16 bytes that no other round has; they also draw the graph.
    identities: n public keys of 32 bytes; the place of a client is that of
      its key. Clients must not have them from the server they do not trust.
    neighbours: k, with how many others each shares masks.
    threshold: t, how many neighbours can take a client's masks out.
    size: D, values of a message.
  """

  session: bytes
  identities: tuple[bytes, ...]
  neighbours: int
  threshold: int
  size: int

  @property
  def clients(self) -> int:
    """How many take part."""
    return len(self.identities)

  def around(self, place: int) -> tuple[int, ...]:
    """The neighbours of a client, sorted [k]."""
    return graph.ring(self.session, self.clients, self.neighbours)[place]

  def share_of(self, owner: int, holder: int) -> int:
    """The x of the share of `owner` that `holder` keeps, 1..k."""
    return self.around(owner).index(holder) + 1


class TooFewError(RuntimeError):
  """Fewer are left than the threshold: this round says nothing."""


def agree(
  session: bytes,
  identities: tuple[bytes, ...],
  *,
  neighbours: int,
  threshold: int,
  size: int,
) -> Terms:
  """Checks the terms of a round.

  Args:
    session: 16 bytes.
    identities: n different public keys.
    neighbours: k, even or n - 1.
    threshold: t, 2..k.
    size: D >= 1.

  Raises:
    ValueError: if one of them is not so.
  """
  if len(session) != SESSION_BYTES:
    raise ValueError(f"a session has {SESSION_BYTES} bytes: got {session!r}")
  identities = tuple(identities)
  graph.check(len(identities), neighbours)
  for place, identity in enumerate(identities):
    if len(identity) != keys.KEY_BYTES:
      raise ValueError(
        f"an identity has {keys.KEY_BYTES} bytes: got {identity!r} at {place=}"
      )
  if len(set(identities)) != len(identities):
    raise ValueError("every client must have an identity of its own")
  validate.at_least(1, size=size)
  if not 2 <= threshold <= neighbours:
    raise ValueError(
      f"threshold must be between 2 and {neighbours=}: got {threshold=}; see "
      "privacy.degree.parameters"
    )
  return Terms(session, identities, neighbours, threshold, size)


def need(what: str, got: int, needed: int) -> None:
  """Raises TooFewError if there are fewer than needed."""
  if got < needed:
    raise TooFewError(f"{what}: {needed} are needed, {got} are there")
