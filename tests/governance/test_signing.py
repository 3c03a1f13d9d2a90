"""Signing: as the RFC says, for one purpose, with a key of one's own."""

import json
import os
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from fedjax_peft.governance import signing


def test_a_signature_is_that_of_the_library(tmp_path):
  secret = bytes(range(32))
  who, value = signing.signer(secret), {"b": [1, None], "a": "x"}
  key = ed25519.Ed25519PrivateKey.from_private_bytes(secret)
  message = b'fedjax-peft version\n{"a":"x","b":[1,null]}'
  assert who.sign("version", value) == key.sign(message).hex()
  assert bytes.fromhex(who.identity) == key.public_key().public_bytes_raw()


def test_the_key_of_rfc_8032_has_its_identity():
  # Section 7.1, test 1.
  secret = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
  public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
  assert signing.signer(bytes.fromhex(secret)).identity == public


def test_a_signature_is_of_one_value_for_one_purpose_by_one_key():
  a, b = signing.signer(b"a" * 32), signing.signer(b"b" * 32)
  signature = a.sign("log", {"x": 1})
  assert signing.is_signed(a.identity, signature, "log", {"x": 1})
  for who, text, purpose, value in (
    (b.identity, signature, "log", {"x": 1}),
    (a.identity, b.sign("log", {"x": 1}), "log", {"x": 1}),
    (a.identity, signature, "version", {"x": 1}),
    (a.identity, signature, "log", {"x": 2}),
    (a.identity, signature.upper(), "log", {"x": 1}),
    (a.identity, signature[:-2], "log", {"x": 1}),
    (a.identity, "", "log", {"x": 1}),
    (a.identity, "no hex", "log", {"x": 1}),
    ("00", signature, "log", {"x": 1}),
  ):
    assert not signing.is_signed(who, text, purpose, value)


def test_a_value_has_one_form():
  left = signing.encode({"a": 1, "b": {"d": "é", "c": 0.1}})
  right = signing.encode({"b": {"c": 0.1, "d": "é"}, "a": 1})
  assert left == right
  assert signing.encode(json.loads(left)) == left
  with pytest.raises(ValueError, match="not JSON compliant"):
    signing.encode({"a": float("nan")})


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path):
  path = tmp_path / "key"
  before = os.umask(0)
  try:
    first = signing.key_of(path)
  finally:
    os.umask(before)
  assert stat.S_IMODE(path.stat().st_mode) == 0o600
  assert signing.key_of(path).identity == first.identity
  other = signing.key_of(tmp_path / "other")
  assert other.identity != first.identity
  assert first.identity not in path.read_text()
  with pytest.raises(ValueError, match="with the same key, but there is no"):
    signing.key_of(tmp_path / "none", make=False)
  assert signing.key_of(path, make=False).identity == first.identity


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_key_that_others_may_touch_is_refused(tmp_path, mode):
  path = tmp_path / "key"
  signing.key_of(path)
  path.chmod(mode)
  with pytest.raises(ValueError, match=f"mode {mode:04o}, expected 0600"):
    signing.key_of(path)


@pytest.mark.parametrize("text", ["", "abc", "00" * 31, "zz" * 32])
def test_a_file_that_is_no_key_is_refused(tmp_path, text):
  path = tmp_path / "key"
  path.touch(0o600)
  path.write_text(text)
  with pytest.raises(ValueError, match="64 hex digits"):
    signing.key_of(path)
