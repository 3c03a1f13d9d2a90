"""Keys: against the vectors of the RFCs, and both schemes by one law."""

import pytest

from fedjax_peft.privacy import keys

H = bytes.fromhex


def schemes():
  return {"real": keys.real(), "simulated": keys.simulated(b"k" * 32)}


def test_x25519_is_that_of_rfc_7748():
  # Section 6.1.
  scheme = keys.real()
  a = H("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
  b = H("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
  A = H("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
  B = H("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
  shared = H("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
  assert (scheme.public(a), scheme.public(b)) == (A, B)
  assert scheme.exchange(a, B) == scheme.exchange(b, A) == shared


def test_hkdf_is_that_of_rfc_5869():
  # Appendices A.1 and A.3.
  secret = b"\x0b" * 22
  assert keys.derive(
    secret, bytes(range(13)), H("f0f1f2f3f4f5f6f7f8f9"), 42
  ) == (
    H(
      "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
      "34007208d5b887185865"
    )
  )
  assert keys.derive(secret, b"", b"", 42) == H(
    "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
    "9d201395faa4b61a96c8"
  )


@pytest.mark.parametrize("name", ["real", "simulated"])
def test_two_clients_agree_and_a_third_does_not(name):
  scheme = schemes()[name]
  a, b, c = (scheme.draw(x, 32) for x in "abc")
  A, B, C = map(scheme.public, (a, b, c))
  assert scheme.exchange(a, B) == scheme.exchange(b, A)
  assert len({scheme.exchange(a, B), scheme.exchange(a, C)}) == 2
  assert len({a, A, scheme.identity(a)}) == 3
  assert {len(x) for x in (A, scheme.identity(a), scheme.exchange(a, B))} == {
    32
  }


@pytest.mark.parametrize("name", ["real", "simulated"])
def test_a_signature_is_of_one_message_by_one_client(name):
  scheme = schemes()[name]
  a, b = scheme.draw("a", 32), scheme.draw("b", 32)
  signature = scheme.sign(a, b"hello")
  assert len(signature) == keys.SIGNATURE_BYTES
  assert scheme.verify(scheme.identity(a), signature, b"hello")
  assert not scheme.verify(scheme.identity(a), signature, b"hallo")
  assert not scheme.verify(scheme.identity(b), signature, b"hello")
  changed = bytes([signature[0] ^ 1]) + signature[1:]
  assert not scheme.verify(scheme.identity(a), changed, b"hello")


def test_simulated_secrets_follow_from_the_runs_key():
  one, same = keys.simulated(b"a" * 32), keys.simulated(b"a" * 32)
  other = keys.simulated(b"b" * 32)
  assert one.draw("x", 40) == same.draw("x", 40)
  assert len({one.draw("x", 40), one.draw("y", 40), other.draw("x", 40)}) == 3
  real = keys.real()
  assert real.draw("x", 32) != real.draw("x", 32)
  with pytest.raises(ValueError, match="32 bytes: got 5"):
    keys.simulated(b"short")


def test_a_seal_opens_with_its_key_and_for_its_purpose_only():
  key = bytes(range(32))
  sealed = keys.seal(key, b"shares", b"1 to 2")
  assert len(sealed) == 6 + keys.TAG_BYTES
  assert keys.unseal(key, sealed, b"1 to 2") == b"shares"
  for args in (
    (bytes(32), sealed, b"1 to 2"),
    (key, sealed, b"2 to 1"),
    (key, sealed[:-1], b"1 to 2"),
    (key, b"", b"1 to 2"),
    *((key, sealed[:i] + b"\xff" + sealed[i + 1 :], b"1 to 2") for i in (0, 9)),
  ):
    with pytest.raises(ValueError, match="sealed for this receiver"):
      keys.unseal(*args)


def test_keys_with_which_nothing_can_be_agreed_on_are_refused():
  with pytest.raises(ValueError, match="a public key of X25519"):
    keys.real().exchange(bytes(range(32)), bytes(32))  # a point of low order
