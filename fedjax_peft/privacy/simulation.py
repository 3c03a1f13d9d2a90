"""A secure sum without its cryptography: for thousands of clients.

Every mask is really added and really taken off again, in one call of the
kernel for all clients, and every byte of the protocol is counted. What is left
out are messages: secrets are cut from one stream of the run's key, and who
hears what follows from who drops when. The sum, the survivors, the bytes and
the failures are those of `conversation`.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft.kernels.mask import api as mask_kernel
from fedjax_peft.privacy import client, conversation, keys, messages, terms


class Heard(NamedTuple):
  """Who said what.

  Attributes:
    around: int [n, k], everyone's neighbours.
    sent: bool [5, n], who sent the message of each step.
    arrived: bool [5, n], and whose arrived.
  """

  around: np.ndarray
  sent: np.ndarray
  arrived: np.ndarray


def hold(
  known: terms.Terms, key: bytes, values: np.ndarray, lost: Sequence[int]
) -> conversation.Outcome:
  """Runs a round.

  Args:
    known: the terms of the round.
    key: the run's key, any bytes.
    values: uint32 [n, D].
    lost: int [n], the step from which on a client's messages do not arrive,
      in the order of `client.STEPS`; 5 is never.

  Raises:
    ValueError: if the values or the steps are of another shape or dtype.
    TooFewError: if too many drop; nothing is known then.

  Example:
    >>> ids = tuple(bytes([i]) * 32 for i in range(3))
    >>> known = terms.agree(bytes(16), ids, neighbours=2, threshold=2, size=4)
    >>> hold(known, b"key", np.eye(3, 4, dtype=np.uint32), [5, 5, 5]).total
    array([1, 1, 1, 0], dtype=uint32)
  """
  shape = known.clients, known.size
  if (
    values.dtype != np.uint32
    or values.shape != shape
    or (len(lost) != known.clients)
  ):
    raise ValueError(
      f"expected values uint32{list(shape)} and {known.clients} steps: got "
      f"{values.dtype}{list(values.shape)} and {len(lost)}"
    )
  heard = listen(known, lost)
  enough(known, heard)
  total = _sum(known, key, values, heard)
  up, down = traffic(known, heard)
  survivors = np.flatnonzero(heard.arrived[client.STEPS.index("mask")])
  return conversation.Outcome(total, frozenset(survivors.tolist()), up, down)


def listen(known: terms.Terms, lost: Sequence[int] | np.ndarray) -> Heard:
  """Who sends and is heard in each step, whatever comes of it.

  Args:
    known: the terms of the round.
    lost: int [n], as in `hold`.
  """
  around = np.array([known.around(i) for i in range(known.clients)])
  late = np.asarray(lost)
  sent, arrived = [np.ones(known.clients, bool)], []
  for step in range(len(client.STEPS)):
    arrived.append(sent[-1] & (late > step))
    goes_on = arrived[-1][around].sum(1) >= known.threshold
    sent.append(arrived[-1] & goes_on)
  return Heard(around, np.stack(sent[:-1]), np.stack(arrived))


def enough(known: terms.Terms, heard: Heard) -> None:
  """Raises TooFewError unless the sum of those who sent it can be known.

  Args:
    known: the terms of the round.
    heard: who said what.
  """
  for name, arrived in zip(client.STEPS, heard.arrived, strict=True):
    terms.need(f"clients that {name}", int(arrived.sum()), 1)
  _, shared, masked, _, revealed = heard.arrived
  near = masked[heard.around].any(1)
  holders = revealed[heard.around].sum(1)
  for i in np.flatnonzero(shared & (masked | near)):
    what = f"shares of client {i}'s {'seed' if masked[i] else 'mask secret'}"
    terms.need(what, int(holders[i]), known.threshold)


def traffic(
  known: terms.Terms, heard: Heard
) -> tuple[dict[str, int], dict[str, int]]:
  """Bytes by step of the clients, and by step of the server.

  Args:
    known: the terms of the round.
    heard: who said what.
  """
  n = known.clients
  near = heard.arrived[:, heard.around].sum(2)  # [5, n]
  none = np.zeros(n, int)
  up = (
    (messages.Advertise, none),
    (messages.Shares, near[0]),
    (messages.Masked, none + known.size),
    (messages.Consent, none),
    (messages.Reveal, near[1]),
  )
  down = (
    (messages.Keys, near[0]),
    (messages.Delivery, near[1]),
    (messages.Survivors, none + -(-n // 8)),
    (messages.Consents, near[3]),
  )

  def count(kind, rows, who, more):
    return int((messages.size(kind, rows) + more)[who].sum())

  signed = keys.SIGNATURE_BYTES
  return (
    {
      name: count(*what, who, signed)
      for name, what, who in zip(client.STEPS, up, heard.sent)
    },
    {
      name: count(*what, who, 0)
      for name, what, who in zip(conversation.DOWN, down, heard.arrived)
    },
  )


_mask_add = jax.jit(mask_kernel.mask_add, donate_argnums=0)


def _sum(known, key, values, heard):
  """Masks what is sent, sums what arrives, and takes the masks off."""
  n, k = heard.around.shape
  _, shared, masked, _, _ = heard.arrived
  one, other = np.repeat(np.arange(n), k), heard.around.ravel()
  one, other = one[one < other], other[one < other]
  count = n + one.size
  stream = hashlib.shake_256(known.session + key).digest(32 * count)
  words = np.frombuffer(stream, "<u4").reshape(count, 8)
  nonce, nobody = np.zeros(3, np.uint32), np.full(n, -1)

  def add(q, plus, minus):
    rows = (np.asarray(x, np.int32) for x in (plus, minus))
    return np.asarray(_mask_add(jnp.array(q), words, *rows, nonce))

  # Everyone's own stream first, then those of pairs, who both shared.
  met = shared[one] & shared[other]
  wires = add(
    values,
    np.concatenate([np.arange(n), np.where(met, one, -1)]),
    np.concatenate([nobody, np.where(met, other, -1)]),
  )
  # Those that did not arrive are few; no copy is made of the others.
  total = wires.sum(0, dtype=np.uint32)
  total -= wires[~masked].sum(0, dtype=np.uint32)
  left = met & masked[one] & ~masked[other], met & ~masked[one] & masked[other]
  off = np.concatenate([masked, left[0]]), np.concatenate([nobody > 0, left[1]])
  return add(total[None], np.where(off[1], 0, -1), np.where(off[0], 0, -1))[0]
