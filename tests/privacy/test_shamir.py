"""Shares: enough of them say everything, one fewer says nothing at all."""

import collections
import hashlib
import itertools

import pytest

from fedjax_peft.privacy import shamir


def draw(size):
  return hashlib.shake_256(b"coefficients").digest(size)


def secret(i=0):
  return hashlib.sha256(bytes([i])).digest()


@pytest.mark.parametrize(("t", "n"), [(1, 3), (2, 5), (4, 5), (5, 5)])
def test_any_t_shares_give_the_secret(t, n):
  points = list(enumerate(shamir.split(secret(), t, n, draw), 1))
  for some in itertools.permutations(points, t):
    assert shamir.combine(some, t) == secret()
  assert shamir.combine(points, t) == secret()


@pytest.mark.parametrize("value", [0, 1, 2**256 - 1])
def test_secrets_at_the_ends_of_their_range_come_back(value):
  known = value.to_bytes(32, "big")
  shares = shamir.split(known, 3, 4, draw)
  assert max(shares).bit_length() <= 8 * shamir.SHARE_BYTES
  assert shamir.combine(
    [(2, shares[1]), (4, shares[3]), (1, shares[0])], 3
  ) == (known)


@pytest.mark.parametrize(("prime", "t"), [(5, 2), (5, 3), (7, 3)])
def test_fewer_shares_are_independent_of_the_secret(prime, t):
  # All polynomials of degree t - 1 over a small field, which is all there is
  # to know: for any t - 1 points and any secret, all values equally often.
  def seen(secret, xs):
    return collections.Counter(
      tuple(shamir.evaluate([secret, *more], x, prime) for x in xs)
      for more in itertools.product(range(prime), repeat=t - 1)
    )

  for xs in itertools.combinations(range(1, prime), t - 1):
    views = [seen(s, xs) for s in range(prime)]
    assert all(v == views[0] for v in views)
    assert set(views[0].values()) == {1}
    assert len(views[0]) == prime ** (t - 1)
  # The control: one share more tells every secret from every other.
  xs = range(1, t + 1)
  views = [set(seen(s, xs)) for s in range(prime)]
  assert all(a.isdisjoint(b) for a, b in itertools.combinations(views, 2))


def test_weights_interpolate_every_polynomial_of_a_small_field():
  prime, xs = 7, (1, 3, 4)
  for c in itertools.product(range(prime), repeat=3):
    ys = [shamir.evaluate(c, x, prime) for x in xs]
    for at in (0, 2, 3):
      found = sum(w * y for w, y in zip(shamir.weights(xs, at, prime), ys))
      assert found % prime == shamir.evaluate(c, at, prime)


def test_the_field_is_one_and_holds_every_secret():
  # Miller and Rabin's test, to forty bases: a composite passes one of them
  # with probability at most 1/4.
  odd, twos = shamir.PRIME - 1, 0
  while odd % 2 == 0:
    odd, twos = odd // 2, twos + 1
  for base in range(2, 42):
    x = pow(base, odd, shamir.PRIME)
    chain = [pow(x, 2**i, shamir.PRIME) for i in range(twos)]
    assert x == 1 or shamir.PRIME - 1 in chain
  assert shamir.PRIME > 2**256


def test_wrong_shares_are_refused():
  shares = shamir.split(secret(), 3, 5, draw)
  points = list(enumerate(shares, 1))
  with pytest.raises(ValueError, match="3 shares are needed: got 2"):
    shamir.combine(points[:2], 3)
  with pytest.raises(ValueError, match="an x of its own"):
    shamir.combine([points[0], points[0], points[1]], 3)
  for x, y in [(0, 1), (shamir.PRIME, 1), (9, shamir.PRIME), (9, -1)]:
    with pytest.raises(ValueError, match="a share is a number below"):
      shamir.combine([*points[:2], (x, y)], 3)
  for wrong in range(5):
    changed = list(points)
    changed[wrong] = (wrong + 1, shares[wrong] ^ 1)
    with pytest.raises(ValueError, match="not (of|shares of) (the same|one)"):
      shamir.combine(changed, 3)


def test_what_cannot_be_split_is_refused():
  with pytest.raises(ValueError, match="32 bytes: got 31"):
    shamir.split(bytes(31), 2, 3, draw)
  for t, n in [(0, 3), (4, 3)]:
    with pytest.raises(ValueError, match=f"threshold={t}, shares={n}"):
      shamir.split(bytes(32), t, n, draw)
