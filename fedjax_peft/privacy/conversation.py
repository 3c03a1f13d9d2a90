"""A conversation: all messages of a secure sum, over wires that may lose them.

Clients and server live in one process here and see nothing of each other but
bytes. Whoever's message is lost, on the way up or down, has dropped.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_peft.privacy import client, keys, server, terms

DOWN = ("keys", "deliver", "survivors", "consents")


class Outcome(NamedTuple):
  """What a secure sum came to.

  Attributes:
    total: uint32 [D], the sum over the survivors modulo 2^32.
    survivors: places of those who are in it.
    up_bytes: {step of the clients: bytes sent by all of them}.
    down_bytes: {step of the server: bytes sent to all clients}.
  """

  total: np.ndarray
  survivors: frozenset[int]
  up_bytes: dict[str, int]
  down_bytes: dict[str, int]


def everything(step: str, place: int, data: bytes) -> Iterable[bytes]:
  """A wire that loses nothing.

  Args:
    step: of `client.STEPS` on the way up, of `DOWN` on the way down.
    place: of the client.
    data: the message.
  """
  return (data,)


def hold(
  known: terms.Terms,
  scheme: keys.Scheme,
  identities: Sequence[bytes],
  values: np.ndarray,
  carry: Callable[[str, int, bytes], Iterable[bytes]] = everything,
) -> Outcome:
  """Runs a round.

  Args:
    known: the terms of the round.
    scheme: `keys.real()` or `keys.simulated(key)`.
    identities: n secrets to sign with.
    values: uint32 [n, D].
    carry: (step, place, message) -> the messages that arrive, see
      `everything`; none is a dropout.

  Raises:
    ValueError: if a message was changed on the way.
    TooFewError: if too many dropped; nothing is known then.

  Example:
    >>> scheme = keys.simulated(bytes(32))
    >>> secrets = [scheme.draw(f"identity/{i}", 32) for i in range(3)]
    >>> known = terms.agree(
    ...   bytes(16),
    ...   tuple(map(scheme.identity, secrets)),
    ...   neighbours=2,
    ...   threshold=2,
    ...   size=4,
    ... )
    >>> hold(known, scheme, secrets, np.eye(3, 4, dtype=np.uint32)).total
    array([1, 1, 1, 0], dtype=uint32)
  """
  clients = [
    client.Client(known, i, secret, scheme)
    for i, secret in enumerate(identities)
  ]
  hub = server.Server(known, scheme)
  closing = (hub.keys, hub.deliver, hub.survivors, hub.consents)
  told: list[tuple[int, bytes]] = [(i, b"") for i in range(known.clients)]
  up, down = dict.fromkeys(client.STEPS, 0), dict.fromkeys(DOWN, 0)
  survivors = frozenset[int]()
  for at, step in enumerate(client.STEPS):
    for i, data in told:
      try:
        said = _answer(clients[i], step, data, values[i])
      except terms.TooFewError:
        continue  # it says nothing more: a dropout like any other
      up[step] += len(said)
      for arrived in carry(step, i, said):
        hub.hear(i, arrived)
    if step == "reveal":
      break
    answers = closing[at]()
    if DOWN[at] == "survivors":
      survivors = frozenset(answers)
    down[DOWN[at]] = sum(map(len, answers.values()))
    told = [
      (i, arrived)
      for i, data in answers.items()
      for arrived in carry(DOWN[at], i, data)
    ]
  return Outcome(hub.total(), survivors, up, down)


def _answer(one, step, data, values):
  """What a client says next."""
  if step == "advertise":
    return one.advertise()
  if step == "mask":
    return one.mask(data, values)
  return getattr(one, step)(data)
