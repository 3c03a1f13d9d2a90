"""The secure sum: the plain one exactly, whoever drops when, or nothing."""

import itertools
import re

import hypothesis
import jax
import numpy as np
import pytest
import scipy.stats
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import strategies as st

import fedjax_peft as fp
from fedjax_peft.kernels.mask import layout
from fedjax_peft.links import masking
from fedjax_peft.privacy import (
  bits,
  client,
  conversation,
  graph,
  keys,
  messages,
  purpose,
  server,
  streams,
  terms,
)

SCHEME = keys.simulated(b"the key of the tests, 32 bytes..")
NEVER = len(client.STEPS)


class Setting:
  """Terms, secrets and values of a round."""

  def __init__(self, n, k, t, size=3, scheme=SCHEME, session=b"s" * 16):
    self.scheme, self.n = scheme, n
    self.secrets = [scheme.draw(f"identity/{i}", 32) for i in range(n)]
    self.known = terms.agree(
      session,
      tuple(map(scheme.identity, self.secrets)),
      neighbours=k,
      threshold=t,
      size=size,
    )
    rng = np.random.default_rng(n)
    self.values = rng.integers(0, 2**32, (n, size), np.uint32)

  def hold(self, carry=conversation.everything):
    return conversation.hold(
      self.known, self.scheme, self.secrets, self.values, carry
    )

  def plain(self, who):
    return self.values[sorted(who)].sum(0, dtype=np.uint32)

  def drops(self, at):
    """A wire on which client i's messages are lost from step at[i] on."""

    def carry(step, i, data):
      up = step in client.STEPS
      return () if up and client.STEPS.index(step) >= at[i] else (data,)

    return self.hold(carry)

  def expected(self, at):
    """Who survives, and whether the sum can be known: counted on sets."""
    near = [set(self.known.around(i)) for i in range(self.n)]
    t = self.known.threshold
    said = [{i for i in range(self.n) if at[i] > 0}]
    for step in range(1, len(client.STEPS)):
      left = {i for i in said[-1] if at[i] > step}
      said.append({i for i in left if len(near[i] & said[-1]) >= t})
    _, shared, masked, _, revealed = said
    matter = {i for i in shared if i in masked or near[i] & masked}
    known = all(len(near[i] & revealed) >= t for i in matter)
    return masked, bool(all(said) and known)


def check(setting, at):
  """The law: the plain sum of the survivors, or nothing; says which."""
  survivors, is_known = setting.expected(at)
  if not is_known:
    with pytest.raises(terms.TooFewError, match="are needed, "):
      setting.drops(at)
    return False
  outcome = setting.drops(at)
  assert outcome.survivors == survivors
  np.testing.assert_array_equal(outcome.total, setting.plain(survivors))
  return True


@pytest.mark.parametrize(
  ("n", "k", "t", "steps"),
  [(4, 2, 2, range(1, 6)), (4, 3, 2, (0, 3, 5)), (5, 4, 3, (2, 4, 5))],
)
def test_the_sum_is_exact_or_unknown_for_every_dropout(n, k, t, steps):
  setting = Setting(n, k, t)
  known = [check(setting, at) for at in itertools.product(steps, repeat=n)]
  assert 0 < sum(known) < len(known)


def test_the_sum_is_exact_or_unknown_for_many_clients():
  setting = Setting(60, 12, 7, size=20)
  rng = np.random.default_rng(7)
  known = []
  for rate in (0.0, 0.05, 0.15, 0.3, 0.6):
    drops = rng.random(60) < rate
    known.append(check(setting, np.where(drops, rng.integers(0, 5, 60), NEVER)))
  assert known[:3] == [True] * 3
  assert not known[-1]


@pytest.mark.parametrize("step", range(5))
def test_real_keys_give_the_same_sum_and_the_same_bytes(step):
  at = [NEVER, step, NEVER, NEVER, NEVER, NEVER]
  real, simulated = (Setting(6, 4, 3, scheme=s) for s in (keys.real(), SCHEME))
  assert check(real, at)
  found, expected = real.drops(at), simulated.drops(at)
  np.testing.assert_array_equal(found.total, expected.total)
  assert found[1:] == expected[1:]


def test_bytes_are_those_of_the_formula():
  n, k, size = 7, 4, 9
  outcome = Setting(n, k, 3, size=size).hold()
  head, count, signature = 21, 4, 64
  up = {
    "advertise": 64,
    "share": 32 + count + k * (4 + 82),
    "mask": count + 4 * size,
    "consent": 32,
    "reveal": count + k * (4 + 1 + 33),
  }
  down = {
    "keys": k * (4 + 32 + 32 + 64),
    "deliver": k * (4 + 82),
    "survivors": 1,
    "consents": k * (4 + 64),
  }
  assert outcome.up_bytes == {
    s: n * (head + b + signature) for s, b in up.items()
  }
  assert outcome.down_bytes == {
    s: n * (head + count + b) for s, b in down.items()
  }


# Masks.


def openssl(key, size):
  """The first values' keystream by another implementation of ChaCha20."""
  words = 16 * 128 * -(-size // 2048)
  cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None)
  stream = np.frombuffer(cipher.encryptor().update(bytes(4 * words)), "<u4")
  return stream[layout.order(size)]


def recorded(setting, at=None):
  """All messages on their way up, {(step, client): bytes}, and the outcome."""
  seen = {}

  def carry(step, i, data):
    seen[step, i] = data
    return () if step == at and i == 0 else (data,)

  return seen, setting.hold(carry)


def masked(seen, setting, i):
  """The masked values of client i, uint32 [D]."""
  body, _ = messages.split(seen["mask", i])
  rows = messages.decode(body, messages.Masked, setting.known.session).rows
  return np.frombuffer(rows, "<u4")


def mask_keys(setting, i):
  """(keys whose stream client i adds, keys whose stream it subtracts)."""
  known, session = setting.known, setting.known.session

  def draw(j, what):
    return SCHEME.draw(f"{session.hex()}/{j}/{what}", 32)

  plus, minus = [purpose.stream(known, draw(i, "seed"), i)], []
  for j in known.around(i):
    public = SCHEME.public(draw(j, "mask"))
    key = purpose.mask(SCHEME, known, draw(i, "mask"), public, i, j)
    (plus if i < j else minus).append(key)
  return plus, minus


def test_masks_are_those_of_chacha20_and_of_the_link():
  setting = Setting(5, 4, 3, size=2500)
  seen, _ = recorded(setting)
  for i in range(5):
    plus, minus = mask_keys(setting, i)
    expected = setting.values[i].copy()
    for key in plus:
      expected += openssl(key, 2500)
    for key in minus:
      expected -= openssl(key, 2500)
    found = masked(seen, setting, i)
    np.testing.assert_array_equal(found, expected)
    words = np.frombuffer(b"".join(plus + minus), "<u4").reshape(-1, 8)
    sign = np.arange(5) < len(plus)
    pairs = masking.Pairs(words, sign, ~sign, np.zeros(5, np.int32))
    np.testing.assert_array_equal(found, masking.add(setting.values[i], pairs))


def test_masks_of_the_link_come_off_by_the_protocols_streams():
  roster = fp.Roster(
    np.arange(4, dtype=np.int32),
    np.ones(4, np.int32),
    fp.link.alone().key,
    None,
    None,
  )
  values = np.arange(12, dtype=np.uint32).reshape(4, 3)
  pairs = jax.jit(lambda who: masking.pairs_of(who, 1, 2))(roster)
  wire = np.asarray(masking.add(values[1], pairs))
  drawn = [np.asarray(x).astype("<u4").tobytes() for x in pairs.keys]
  plus = [x for x, here in zip(drawn, pairs.plus, strict=True) if here]
  minus = [x for x, here in zip(drawn, pairs.minus, strict=True) if here]
  assert len(plus) + len(minus) == 2
  np.testing.assert_array_equal(streams.add(wire, minus, plus), values[1])


def p_uniform(words):
  """p-value of a chi-square test on the bytes of integers."""
  data = np.frombuffer(np.asarray(words).tobytes(), np.uint8)
  return scipy.stats.chisquare(np.bincount(data, minlength=256)).pvalue


def test_a_masked_wire_is_uniform():
  setting = Setting(4, 2, 2, size=20_000)
  setting.values[:] = 7
  seen, outcome = recorded(setting)
  wires = np.stack([masked(seen, setting, i) for i in range(4)])
  # Fixed keys; a false alarm has probability 1e-6 each. Even the sum of all
  # is uniform: everyone's own keystream is in it.
  for wire in [*wires, wires.sum(0, dtype=np.uint32)]:
    assert p_uniform(wire) > 1e-6
  # Masks that are broken are not: doubled ones, and only those of pairs,
  # which cancel in the sum.
  stream = openssl(mask_keys(setting, 0)[0][0], 20_000)
  assert p_uniform(2 * stream) < 1e-6
  own = sum(openssl(mask_keys(setting, i)[0][0], 20_000) for i in range(4))
  assert p_uniform(wires.sum(0, dtype=np.uint32) - own) < 1e-6
  np.testing.assert_array_equal(outcome.total, 28)


def test_nobody_gives_away_both_secrets_of_a_neighbour():
  setting = Setting(6, 4, 3)
  seen, outcome = recorded(setting, at="mask")
  for (step, i), data in seen.items():
    if step == "reveal":
      body, _ = messages.split(data)
      rows = messages.decode(body, messages.Reveal, setting.known.session).rows
      about = [j for j, _, _ in rows]
      assert about == list(setting.known.around(i))
      for j, kind, _ in rows:
        expected = messages.SEED if j in outcome.survivors else messages.PAIR
        assert kind == expected


# Messages that should not be.


def play_until(setting, step):
  """Clients, a server, and what the clients were told before a step."""
  clients = [
    client.Client(setting.known, i, s, SCHEME)
    for i, s in enumerate(setting.secrets)
  ]
  hub = server.Server(setting.known, SCHEME)
  closing = [hub.keys, hub.deliver, hub.survivors, hub.consents]
  told = dict.fromkeys(range(setting.n), b"")
  for now in client.STEPS[: client.STEPS.index(step)]:
    for i, data in told.items():
      hub.hear(i, answer(setting, clients[i], now, data))
    told = closing.pop(0)()
  return clients, hub, told


def answer(setting, one, step, data):
  """What a client says in a step."""
  if step == "advertise":
    return one.advertise()
  if step == "mask":
    return one.mask(data, setting.values[one._place])
  return getattr(one, step)(data)


def test_a_second_list_of_survivors_is_not_answered():
  setting = Setting(5, 4, 3)
  clients, _, told = play_until(setting, "consent")
  clients[0].consent(told[0])
  fewer = messages.Survivors(
    setting.known.session, messages.SERVER, bits.pack([0, 1, 2, 3], 5)
  )
  with pytest.raises(ValueError, match="expects to reveal next: got consent"):
    clients[0].consent(messages.encode(fewer))


def test_neighbours_who_were_told_another_list_are_noticed():
  setting = Setting(5, 4, 3)
  clients, hub, told = play_until(setting, "consent")
  other = messages.encode(
    messages.Survivors(
      setting.known.session, messages.SERVER, bits.pack([0, 1, 2, 3], 5)
    )
  )
  hub.hear(0, clients[0].consent(told[0]))
  for i in (1, 2, 3):
    hub.hear(i, clients[i].consent(other))
  consents = hub.consents()
  with pytest.raises(ValueError, match="Consent signed by client"):
    clients[0].reveal(consents[0])


def test_keys_that_the_server_swapped_are_noticed():
  setting = Setting(4, 3, 2)
  clients, _, told = play_until(setting, "share")
  said = messages.decode(told[0], messages.Keys, setting.known.session)
  (j, mask_key, seal_key, signature), *rest = said.rows
  for swapped in ((SCHEME.public(bytes(32)), seal_key), (seal_key, mask_key)):
    rows = ((j, *swapped, signature), *rest)
    with pytest.raises(ValueError, match="Advertise signed by client 1"):
      clients[0].share(messages.encode(said._replace(rows=rows)))
  assert clients[0].share(told[0])  # what was refused changed nothing


def test_a_neighbour_that_never_shared_cannot_survive():
  setting = Setting(4, 3, 2)
  clients, hub, told = play_until(setting, "share")
  for i in (0, 1, 2):
    hub.hear(i, clients[i].share(told[i]))
  for i, data in hub.deliver().items():
    clients[i].mask(data, setting.values[i])
  everyone = messages.Survivors(
    setting.known.session, messages.SERVER, bits.pack(range(4), 4)
  )
  with pytest.raises(ValueError, match=r"\[1, 2\] only: got \[3\]"):
    clients[0].consent(messages.encode(everyone))


def test_shares_of_something_else_never_give_a_sum():
  setting = Setting(4, 3, 3)
  clients, hub, told = play_until(setting, "reveal")
  for i, data in told.items():
    said = clients[i].reveal(data)
    if i == 2:
      body, _ = messages.split(said)
      body = body[:-1] + bytes([body[-1] ^ 1])
      said = body + SCHEME.sign(setting.secrets[2], body)
    hub.hear(i, said)
  with pytest.raises(ValueError, match="client 3's seed: got shares of"):
    hub.total()


def test_messages_at_another_time_or_of_others_are_refused():
  setting = Setting(4, 3, 2)
  clients, hub, told = play_until(setting, "share")
  old = client.Client(setting.known, 1, setting.secrets[1], SCHEME).advertise()
  said = clients[1].share(told[1])
  with pytest.raises(ValueError, match="expected Shares: got Advertise"):
    hub.hear(1, old)
  with pytest.raises(ValueError, match="of client 2: got one that says"):
    hub.hear(2, said)
  forged = messages.split(said)[0] + bytes(64)
  with pytest.raises(ValueError, match="signed by client 1"):
    hub.hear(1, forged)
  with pytest.raises(ValueError, match="expected to end the step of Masked"):
    hub.survivors()
  hub.hear(1, said)
  with pytest.raises(ValueError, match="got another"):
    hub.hear(1, said)
  others, _, theirs = play_until(Setting(4, 3, 2, session=b"t" * 16), "share")
  early = others[0].share(theirs[0])
  with pytest.raises(ValueError, match="of another round"):
    hub.hear(0, early)
  hub.hear(3, clients[3].share(told[3]))
  hub.hear(0, clients[0].share(told[0]))
  hub.deliver()
  late = clients[2].share(told[2])
  with pytest.raises(ValueError, match="client 2, who has dropped"):
    hub.hear(2, late)


TARGETS = list(itertools.product(client.STEPS + conversation.DOWN, range(4)))
FAULTS = ("flip", "cut", "longer", "twice", "older", "row", "lost")


@hypothesis.settings(deadline=None, max_examples=200, derandomize=True)
@hypothesis.given(
  target=st.sampled_from(TARGETS),
  fault=st.sampled_from(FAULTS),
  where=st.integers(0, 2**16),
)
def test_whatever_happens_on_the_wire_no_sum_is_wrong(target, fault, where):
  setting = Setting(4, 3, 2)
  seen, changed = [b"nothing"], []

  def carry(step, i, wire):
    arrived = (wire,)
    if (step, i) == target:
      arrived = broken(wire, fault, where, seen)
      changed.append(arrived != (wire,))
    seen.append(wire)
    return arrived

  try:
    outcome, said = setting.hold(carry), ""
  except (ValueError, terms.TooFewError) as error:
    outcome, said = None, str(error)
  if outcome is None:
    assert changed == [True]
    assert re.search("expect|are needed|has .* bytes: got|announces", said)
    return
  np.testing.assert_array_equal(outcome.total, setting.plain(outcome.survivors))
  # It went on because nothing changed, a message was lost like any other, or
  # the signatures that were left were still enough.
  step, _ = target
  assert (
    changed == [False]
    or fault == "lost"
    or (fault, step) == ("row", "consents")
  )


def broken(wire, fault, where, seen):
  """What arrives of a message."""
  at = where % len(wire)
  other = bytes([wire[at] ^ (1 + where % 255)])
  return {
    "flip": (wire[:at] + other + wire[at + 1 :],),
    "cut": (wire[:at],),
    "longer": (wire + other,),
    "twice": (wire, wire),
    "older": (seen[where % len(seen)],),
    "row": (without_a_row(wire),),
    "lost": (),
  }[fault]


def without_a_row(wire):
  """A message, well formed, that tells of one client less, if it can."""
  sizes = {2: 132, 4: 86, 8: 68}  # Keys, Delivery, Consents
  size = sizes.get(wire[0], 0)
  if not size:
    return wire[:-1]
  (count,) = np.frombuffer(wire[21:25], "<u4")
  return wire[:21] + np.uint32(count - 1).tobytes() + wire[25:-size]


def test_terms_that_cannot_be_kept_are_refused():
  ids = tuple(bytes([i]) * 32 for i in range(5))

  def agree(session=b"s" * 16, ids=ids, neighbours=4, threshold=3, size=1):
    return terms.agree(
      session, ids, neighbours=neighbours, threshold=threshold, size=size
    )

  assert agree().clients == 5
  for wrong, match in (
    ({"session": b"short"}, "16 bytes"),
    ({"ids": (*ids[:4], ids[0])}, "identity of its own"),
    ({"ids": (*ids[:4], b"x")}, "place=4"),
    ({"neighbours": 3}, "neighbours=4"),
    ({"threshold": 5}, "neighbours=4"),
    ({"threshold": 1}, "threshold=1"),
    ({"size": 0}, "size"),
  ):
    with pytest.raises(ValueError, match=match):
      agree(**wrong)
  with pytest.raises(ValueError, match="client 1's identity"):
    client.Client(Setting(4, 3, 2).known, 1, bytes(32), SCHEME)


def test_values_of_another_kind_are_refused():
  setting = Setting(4, 3, 2)
  clients, _, told = play_until(setting, "mask")
  for wrong in (setting.values[0].astype(np.int64), setting.values[0][:2]):
    with pytest.raises(ValueError, match=r"expected values uint32\[3\]"):
      clients[0].mask(told[0], wrong)


def test_shares_say_where_they_lie():
  known = Setting(9, 4, 3).known
  assert known.around(2) == graph.ring(known.session, 9, 4)[2]
  assert [known.share_of(2, j) for j in known.around(2)] == [1, 2, 3, 4]
