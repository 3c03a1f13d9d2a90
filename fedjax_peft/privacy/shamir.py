"""Shamir's shares: any few say nothing, enough of them say everything.

A secret is the value at 0 of a random polynomial of degree t - 1, shares are
its values at 1, 2, ...: t of them determine it, and for any t - 1 of them every
secret is equally likely.

Shamir, How to share a secret, 1979, https://doi.org/10.1145/359168.359176
"""

import functools
from collections.abc import Callable, Iterable, Sequence

SECRET_BYTES = 32
SHARE_BYTES = 33
PRIME = 2**256 + 297  # the smallest prime above every secret
_DRAW_BYTES = 48  # modulo PRIME these are uniform to 2^-127


def split(
  secret: bytes, threshold: int, shares: int, draw: Callable[[int], bytes]
) -> tuple[int, ...]:
  """Splits a secret into shares, any `threshold` of which give it back.

  Args:
    secret: 32 bytes.
    threshold: t, how many shares are needed, 1..shares.
    shares: how many there are.
    draw: (number of bytes) -> that many random bytes.

  Returns:
    Integers in 0..PRIME-1; entry i is the value at x = i + 1.

  Raises:
    ValueError: if the secret has another size, or the threshold is beyond the
      number of shares.

  Example:
    >>> points = split(bytes(31) + b"!", 2, 3, lambda size: bytes([1]) * size)
    >>> combine([(1, points[0]), (3, points[2])], 2)[-1:]
    b'!'
  """
  if len(secret) != SECRET_BYTES:
    raise ValueError(
      f"a secret has {SECRET_BYTES} bytes: got {len(secret)}; derive a key of "
      "that size from it and share the key"
    )
  if not 1 <= threshold <= shares:
    raise ValueError(
      f"threshold must be between 1 and shares: got {threshold=}, {shares=}"
    )
  random = draw(_DRAW_BYTES * (threshold - 1))
  coefficients = [int.from_bytes(secret, "big")] + [
    int.from_bytes(random[i : i + _DRAW_BYTES], "big") % PRIME
    for i in range(0, len(random), _DRAW_BYTES)
  ]
  return tuple(evaluate(coefficients, x) for x in range(1, shares + 1))


def evaluate(coefficients: Sequence[int], x: int, prime: int = PRIME) -> int:
  """The value at x of a polynomial, its constant first, modulo a prime."""
  value = 0
  for c in reversed(coefficients):
    value = value * x + c  # x is small: one remainder at the end is cheaper
  return value % prime


def combine(points: Iterable[tuple[int, int]], threshold: int) -> bytes:
  """The secret that shares are of.

  Guarantees:
    with more shares than needed, each of them is checked against the others.

  Args:
    points: (x, share) pairs, at least `threshold`.
    threshold: t of `split`.

  Raises:
    ValueError: if there are too few, two at one x, one out of range, or if
      they cannot be shares of one secret.
  """
  points = list(points)
  xs, ys = tuple(x for x, _ in points), [y for _, y in points]
  if len(points) < threshold:
    raise ValueError(
      f"{threshold} shares are needed: got {len(points)}; nothing can be said "
      "of the secret"
    )
  if len(set(xs)) != len(xs):
    raise ValueError(f"every share must have an x of its own: got x={xs}")
  for x, y in points:
    if not (0 < x < PRIME and 0 <= y < PRIME):
      raise ValueError(
        f"a share is a number below {PRIME=} at 0 < x < PRIME: got {y} at {x=}"
      )
  some = xs[:threshold]
  secret = _at(some, ys, 0)
  for x, y in points[threshold:]:
    if _at(some, ys, x) != y:
      raise ValueError(
        f"the share at {x=} is not of the same secret as those at x={some}"
      )
  if secret >= 2 ** (8 * SECRET_BYTES):
    raise ValueError(
      f"the shares at x={some} are not shares of one secret: expected a value "
      f"of {SECRET_BYTES} bytes"
    )
  return secret.to_bytes(SECRET_BYTES, "big")


def _at(xs, ys, x):
  """The polynomial through (xs, ys) at x."""
  return sum(w * y for w, y in zip(weights(xs, x), ys)) % PRIME


@functools.lru_cache(maxsize=4096)
def weights(
  xs: tuple[int, ...], at: int, prime: int = PRIME
) -> tuple[int, ...]:
  """Lagrange's weights: the value at a point from the values at `xs`.

  Args:
    xs: all different modulo the prime.
    at: the point.
    prime: of the field.

  Example:
    >>> weights((1, 2, 4), 0, 7)
    (5, 5, 5)
  """
  found = []
  for i, x in enumerate(xs):
    above = below = 1
    for other in xs[:i] + xs[i + 1 :]:
      above, below = above * (at - other), below * (x - other)
    found.append(above * pow(below, -1, prime) % prime)
  return tuple(found)
