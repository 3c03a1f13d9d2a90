"""A client of a secure sum: five messages, and secrets that are used once.

What it sends is under its own keystream and under one with each neighbour.
Whoever survives has its own taken off, whoever drops those with neighbours: of
one neighbour a client gives away a share of one or of the other, never both.

Bonawitz et al., Practical Secure Aggregation, 2017,
https://eprint.iacr.org/2017/281; Bell et al., 2020,
https://eprint.iacr.org/2020/704
"""

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

STEPS = ("advertise", "share", "mask", "consent", "reveal")


class Client:
  """One client in one round.

  A class, since its secrets must not be used twice: each method works once,
  in the order advertise, share, mask, consent, reveal. A message that is
  refused changes nothing.

  Args:
    known: the terms of the round.
    place: its place in them.
    identity: its secret to sign with, that of `known.identities[place]`.
    scheme: where secrets come from.

  Raises:
    ValueError: by every method, if a message is not what is expected, or if
      it is not the method's turn.
    TooFewError: by every method, if fewer neighbours than the threshold are
      left; the client then says nothing more.
  """

  def __init__(
    self,
    known: terms.Terms,
    place: int,
    identity: bytes,
    scheme: keys.Scheme,
  ):
    if not 0 <= place < known.clients or (
      scheme.identity(identity) != known.identities[place]
    ):
      raise ValueError(
        f"expected the secret of client {place}'s identity among "
        f"{known.clients}: got that of another"
      )
    self._known, self._place, self._scheme = known, place, scheme
    self._identity = identity
    self._mask = self._draw("mask")
    self._seal = self._draw("seal")
    self._seed = self._draw("seed")
    self._done = 0

  def advertise(self) -> bytes:
    """Says which keys to agree on secrets with: `Advertise`."""
    self._turn("advertise")
    public = self._scheme.public
    return self._say(messages.Advertise, public(self._mask), public(self._seal))

  def share(self, data: bytes) -> bytes:
    """Splits its secrets among its neighbours.

    Args:
      data: `Keys` of those who advertised.

    Returns:
      `Shares`.
    """
    self._turn("share")
    rows = self._hear(data, messages.Keys).rows
    self._expect_places([r[0] for r in rows], self._around())
    for j, mask_key, seal_key, signature in rows:
      said = messages.Advertise(self._known.session, j, mask_key, seal_key)
      self._expect_signed(j, signature, said)
    self._mask_keys = {r[0]: r[1] for r in rows}
    self._seal_keys = {r[0]: r[2] for r in rows}
    sealed = tuple((j, self._sealed(j, own)) for j, own in self._split(rows))
    committed = purpose.commitment(self._known, self._seed, self._place)
    return self._say(messages.Shares, committed, sealed)

  def mask(self, data: bytes, values: np.ndarray) -> bytes:
    """Hides its values.

    Args:
      data: `Delivery` of its neighbours' shares.
      values: uint32 [D]; the sum is modulo 2^32.

    Returns:
      `Masked`.
    """
    self._turn("mask")
    if values.dtype != np.uint32 or values.shape != (self._known.size,):
      raise ValueError(
        f"expected values uint32[{self._known.size}]: got "
        f"{values.dtype}{list(values.shape)}"
      )
    rows = self._hear(data, messages.Delivery).rows
    self._expect_places([j for j, _ in rows], self._mask_keys)
    self._shares = {j: self._unsealed(j, sealed) for j, sealed in rows}
    plus = [purpose.stream(self._known, self._seed, self._place)]
    minus = []
    for j in self._shares:
      key = self._with(j, purpose.mask, self._place, j)
      (plus if self._place < j else minus).append(key)
    words = streams.add(values, plus, minus)
    return self._say(messages.Masked, words.astype("<u4").tobytes())

  def consent(self, data: bytes) -> bytes:
    """Signs the list of those whose sum is to be known.

    Args:
      data: `Survivors`.

    Returns:
      `Consent`.
    """
    self._turn("consent")
    told = self._hear(data, messages.Survivors)
    left = bits.unpack(told.rows, self._known.clients)
    if self._place not in left:
      raise ValueError(
        f"expected client {self._place} among the survivors: got {sorted(left)}"
      )
    near = left.intersection(self._around())
    self._expect_places(near, self._shares)
    self._left, self._near, self._digest = left, near, messages.digest(told)
    return self._say(messages.Consent, self._digest)

  def reveal(self, data: bytes) -> bytes:
    """Gives away one share of each neighbour.

    Args:
      data: `Consents`: enough neighbours were told the same list.

    Returns:
      `Reveal`.
    """
    self._turn("reveal")
    rows = self._hear(data, messages.Consents).rows
    self._expect_places([j for j, _ in rows], self._near)
    for j, signature in rows:
      said = messages.Consent(self._known.session, j, self._digest)
      self._expect_signed(j, signature, said)
    shares = []
    for j, both in sorted(self._shares.items()):
      kind = messages.SEED if j in self._left else messages.PAIR
      shares.append((j, kind, both[kind]))
    del self._shares, self._mask, self._seal, self._seed
    return self._say(messages.Reveal, tuple(shares))

  def _draw(self, what, size=keys.KEY_BYTES):
    """Random bytes, of this round and client."""
    label = f"{self._known.session.hex()}/{self._place}/{what}"
    return self._scheme.draw(label, size)

  def _around(self):
    """Its neighbours."""
    return self._known.around(self._place)

  def _turn(self, step):
    """Raises ValueError unless it is this method's turn."""
    turn = STEPS[self._done] if self._done < len(STEPS) else "nothing"
    if step != turn:
      raise ValueError(
        f"client {self._place} expects to {turn} next: got {step}; each "
        "message is for one time and in order"
      )

  def _say(self, kind, *fields):
    """A signed message; what was to be done is done."""
    message = kind(self._known.session, self._place, *fields)
    body = messages.encode(message)
    self._done += 1
    return body + self._scheme.sign(self._identity, body)

  def _hear(self, data, kind):
    """A message of the server."""
    message = messages.decode(data, kind, self._known.session)
    if message.sender != messages.SERVER:
      raise ValueError(
        f"expected {kind.__name__} of the server: got one of {message.sender}"
      )
    return message

  def _expect_places(self, got, allowed):
    """Raises unless all are allowed, and enough."""
    strange = sorted(set(got) - set(allowed))
    if strange:
      raise ValueError(
        f"client {self._place} expects to hear of {sorted(allowed)} only: got "
        f"{strange}"
      )
    what = f"neighbours of client {self._place}"
    terms.need(what, len(got), self._known.threshold)

  def _expect_signed(self, j, signature, said):
    """Raises ValueError unless client j said so."""
    body = messages.encode(said)
    if not self._scheme.verify(self._known.identities[j], signature, body):
      raise ValueError(
        f"expected {type(said).__name__} signed by client {j}: got a "
        "signature of something else; the server may have changed it"
      )

  def _split(self, rows):
    """(neighbour, its shares of the seed and of the mask secret)."""
    k, t = self._known.neighbours, self._known.threshold

    def split(secret, what):
      return shamir.split(secret, t, k, lambda size: self._draw(what, size))

    seed, pair = (
      split(self._seed, "seed/split"),
      split(self._mask, "mask/split"),
    )
    for j in (r[0] for r in rows):
      at = self._known.share_of(self._place, j) - 1
      yield (
        j,
        b"".join(
          x[at].to_bytes(shamir.SHARE_BYTES, "big") for x in (seed, pair)
        ),
      )

  def _sealed(self, j, plain):
    """Shares that only client j can read."""
    key = self._with(j, purpose.seal, self._place, j)
    return keys.seal(key, plain, purpose.about(self._known, self._place, j))

  def _unsealed(self, j, sealed):
    """The shares of the seed and of the mask secret of client j."""
    key = self._with(j, purpose.seal, j, self._place)
    plain = keys.unseal(key, sealed, purpose.about(self._known, j, self._place))
    return plain[: shamir.SHARE_BYTES], plain[shamir.SHARE_BYTES :]

  def _with(self, j, use, *places):
    """A key that client j and this one have, for one purpose."""
    if use is purpose.mask:
      secret, public = self._mask, self._mask_keys[j]
    else:
      secret, public = self._seal, self._seal_keys[j]
    return use(self._scheme, self._known, secret, public, *places)
