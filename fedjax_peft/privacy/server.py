"""The server of a secure sum: hears, hands on, and unmasks the sum, no more.

Nothing is released unless all masks can be taken out: below the threshold of
any client that matters the round fails, and says how many were missing where.

Bonawitz et al., Practical Secure Aggregation, 2017,
https://eprint.iacr.org/2017/281; Bell et al., 2020,
https://eprint.iacr.org/2020/704
"""

from typing import Any

import numpy as np

from fedjax_peft.privacy import (
  bits,
  keys,
  messages,
  purpose,
  shamir,
  streams,
  terms,
)

# What clients say, in the order in which they say it.
_ORDER: tuple[type, ...] = (
  messages.Advertise,
  messages.Shares,
  messages.Masked,
  messages.Consent,
  messages.Reveal,
)


class Server:
  """The server in one round.

  A class, for what has been said so far. `hear` takes the messages of one
  step, in any order; the next method ends the step: `keys`, `deliver`,
  `survivors`, `consents`, `total`. Who has not been heard by then has
  dropped. A message that is refused changes nothing, and its sender may send
  a right one.

  Args:
    known: the terms of the round.
    scheme: that of the clients; a simulated one knows their secrets.

  Raises:
    ValueError: by every method, if a message is not what is expected, or if
      it is not the method's turn.
    TooFewError: by `total`, if masks cannot be taken out; by the others, if
      no client at all is left.
  """

  def __init__(self, known: terms.Terms, scheme: keys.Scheme):
    self._known, self._scheme = known, scheme
    self._heard: tuple[dict[int, Any], ...] = tuple({} for _ in _ORDER)
    self._signatures: tuple[dict[int, bytes], ...] = tuple({} for _ in _ORDER)
    self._step = 0

  def hear(self, sender: int, data: bytes) -> None:
    """Takes a message.

    Args:
      sender: the client on whose connection it arrived.
      data: the message of this step.
    """
    if self._step >= len(_ORDER):
      raise ValueError(
        f"expected no message any more: got one of client {sender}; the "
        "round is over"
      )
    kind, heard = _ORDER[self._step], self._heard[self._step]
    if sender not in self._there():
      raise ValueError(
        f"expected {kind.__name__} of one of {sorted(self._there())}: got one "
        f"of client {sender}, who has dropped or never took part"
      )
    message, signature = messages.from_client(
      data, kind, sender, self._known, self._scheme
    )
    if sender in heard:
      raise ValueError(
        f"expected one {kind.__name__} of client {sender}: got another"
      )
    self._check(message)
    heard[sender] = message
    self._signatures[self._step][sender] = signature

  def keys(self) -> dict[int, bytes]:
    """Ends the first step: `Keys` for each client that advertised."""
    said, signed = self._end(messages.Advertise)
    return {
      i: self._say(
        messages.Keys,
        tuple(
          (j, said[j].mask_key, said[j].seal_key, signed[j])
          for j in self._known.around(i)
          if j in said
        ),
      )
      for i in said
    }

  def deliver(self) -> dict[int, bytes]:
    """Ends the second step: `Delivery` for each client that shared."""
    said, _ = self._end(messages.Shares)
    sealed = {i: dict(message.rows) for i, message in said.items()}
    return {
      i: self._say(
        messages.Delivery,
        tuple((j, sealed[j][i]) for j in self._known.around(i) if j in said),
      )
      for i in said
    }

  def survivors(self) -> dict[int, bytes]:
    """Ends the third step: `Survivors` for each client that is one."""
    said, _ = self._end(messages.Masked)
    told = self._say(messages.Survivors, bits.pack(said, self._known.clients))
    return dict.fromkeys(said, told)

  def consents(self) -> dict[int, bytes]:
    """Ends the fourth step: `Consents` for each client that consented."""
    said, signed = self._end(messages.Consent)
    return {
      i: self._say(
        messages.Consents,
        tuple((j, signed[j]) for j in self._known.around(i) if j in said),
      )
      for i in said
    }

  def total(self) -> np.ndarray:
    """Ends the round.

    Returns:
      uint32 [D], the sum over all survivors modulo 2^32, exactly.
    """
    self._end(messages.Reveal)
    _, shared, masked, _, revealed = self._heard
    plus, minus = [], []
    points = self._points(revealed)
    # All secrets first: if one is missing, no mask is taken off at all.
    for i in sorted(shared):
      if i in masked:
        minus.append(self._stream(i, points))
      else:
        near = [j for j in self._known.around(i) if j in masked]
        pairs = self._pairs(i, near, points) if near else []
        # What client j added for the pair comes off, and the other way round.
        minus += [key for j, key in zip(near, pairs) if j < i]
        plus += [key for j, key in zip(near, pairs) if j > i]
    total = np.zeros(self._known.size, np.uint32)
    for message in masked.values():
      total += np.frombuffer(message.rows, "<u4")
    return streams.add(total, plus, minus)

  def _there(self):
    """Who may speak in this step."""
    if self._step == 0:
      return range(self._known.clients)
    return self._heard[self._step - 1]

  def _end(self, kind):
    """What was said in a step, by sender in order; the next step begins."""
    steps = [x.__name__ for x in _ORDER[self._step :]]
    if kind.__name__ not in steps[:1]:
      raise ValueError(
        f"expected to end the step of {kind.__name__}: got there with "
        f"{steps or 'no steps'} to go"
      )
    said, signed = self._heard[self._step], self._signatures[self._step]
    terms.need(f"clients that sent {kind.__name__}", len(said), 1)
    self._step += 1
    return dict(sorted(said.items())), signed

  def _say(self, kind, rows):
    """The bytes of a message."""
    return messages.encode(kind(self._known.session, messages.SERVER, rows))

  def _check(self, message):
    """Raises ValueError if a message does not fit what was said before."""
    if isinstance(message, messages.Advertise | messages.Consent):
      return
    got: Any
    expected: Any
    sender = message.sender
    if isinstance(message, messages.Masked):
      got, expected = len(message.rows) // 4, self._known.size
    elif isinstance(message, messages.Shares):
      advertised = self._heard[0]
      got = [j for j, _ in message.rows]
      expected = [j for j in self._known.around(sender) if j in advertised]
    else:
      _, shared, masked, _, _ = self._heard
      got = [(j, kind) for j, kind, _ in message.rows]
      expected = [
        (j, messages.SEED if j in masked else messages.PAIR)
        for j in self._known.around(sender)
        if j in shared
      ]
    if got != expected:
      raise ValueError(
        f"expected {type(message).__name__} of client {sender} to hold "
        f"{expected}: got {got}"
      )

  def _points(self, revealed):
    """The shares of each client's secret, [(x, share)], in rising x."""
    points = {}
    for holder, message in sorted(revealed.items()):
      for owner, _, share in message.rows:
        x = self._known.share_of(owner, holder)
        point = (x, int.from_bytes(share, "big"))
        points.setdefault(owner, []).append(point)
    return points

  def _secret(self, i, points, what, is_it):
    """A secret of client i, recognized by what the client said of it."""
    threshold, shares = self._known.threshold, points.get(i, [])
    terms.need(f"shares of client {i}'s {what}", len(shares), threshold)
    secret = shamir.combine(shares[:threshold], threshold)
    if not is_it(secret):
      raise ValueError(
        f"expected shares of client {i}'s {what}: got shares of something "
        "else; a client that holds or made them does not follow the protocol"
      )
    return secret

  def _stream(self, i, points):
    """The key of a survivor's own keystream."""
    committed = self._heard[1][i].commitment
    seed = self._secret(
      i,
      points,
      "seed",
      lambda s: purpose.commitment(self._known, s, i) == committed,
    )
    return purpose.stream(self._known, seed, i)

  def _pairs(self, i, near, points):
    """The keys of the keystreams of a dropped client and its neighbours."""
    advertised = self._heard[0]
    secret = self._secret(
      i,
      points,
      "mask secret",
      lambda s: self._scheme.public(s) == advertised[i].mask_key,
    )
    return [
      purpose.mask(
        self._scheme, self._known, secret, advertised[j].mask_key, i, j
      )
      for j in near
    ]
