"""Simulated secure sums: those of the protocol, without its messages."""

import itertools

import numpy as np
import pytest

from fedjax_peft.privacy import (
  client,
  conversation,
  keys,
  messages,
  simulation,
  terms,
)

SCHEME = keys.simulated(bytes(32))


def setting(n, k, t, size):
  secrets = [SCHEME.draw(f"identity/{i}", 32) for i in range(n)]
  known = terms.agree(
    b"s" * 16,
    tuple(map(SCHEME.identity, secrets)),
    neighbours=k,
    threshold=t,
    size=size,
  )
  rng = np.random.default_rng(n)
  return known, secrets, rng.integers(0, 2**32, (n, size), np.uint32)


def same_as_the_protocol(known, secrets, values, lost):
  """Compares the outcome of both, or that both fail; says which."""

  def carry(step, i, data):
    up = step in client.STEPS
    return () if up and client.STEPS.index(step) >= lost[i] else (data,)

  try:
    expected = conversation.hold(known, SCHEME, secrets, values, carry)
  except terms.TooFewError:
    with pytest.raises(terms.TooFewError, match="are needed, "):
      simulation.hold(known, b"key", values, lost)
    return False
  found = simulation.hold(known, b"key", values, lost)
  np.testing.assert_array_equal(found.total, expected.total)
  assert found[1:] == expected[1:]
  return True


@pytest.mark.parametrize(
  ("n", "k", "t", "steps"),
  [(4, 2, 2, (0, 1, 2, 5)), (4, 3, 2, (3, 4, 5)), (5, 4, 3, (2, 5))],
)
def test_sum_survivors_bytes_and_failures_are_the_protocols(n, k, t, steps):
  parts = setting(n, k, t, 3)
  known = [
    same_as_the_protocol(*parts, lost)
    for lost in itertools.product(steps, repeat=n)
  ]
  assert 0 < sum(known) < len(known)


def test_it_agrees_with_the_protocol_for_many_clients():
  rng = np.random.default_rng(3)
  drops = rng.random(40) < 0.2
  lost = np.where(drops, rng.integers(0, 5, 40), 5)
  assert same_as_the_protocol(*setting(40, 12, 6, 20), lost)


def test_a_thousand_clients_sum_exactly_with_dropouts():
  n = 1000
  known, _, values = setting(n, 36, 23, 40)
  rng = np.random.default_rng(5)
  lost = np.full(n, 5)
  gone = rng.choice(n, 50, replace=False)
  lost[gone] = rng.integers(0, 5, 50)
  outcome = simulation.hold(known, b"key", values, lost)
  here = lost > client.STEPS.index("mask")
  assert outcome.survivors == set(np.flatnonzero(here))
  expected = values[here].sum(0, dtype=np.uint32)
  np.testing.assert_array_equal(outcome.total, expected)
  # The control: without one who survived it is another sum.
  here[np.flatnonzero(here)[0]] = False
  assert (outcome.total != values[here].sum(0, dtype=np.uint32)).any()


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_sizes_are_those_of_what_is_encoded(rows):
  about = tuple((i, b"x" * 82) for i in range(rows))
  for message in (
    messages.Shares(bytes(16), 1, bytes(32), about),
    messages.Delivery(bytes(16), 1, about),
    messages.Masked(bytes(16), 1, bytes(4 * rows)),
    messages.Survivors(bytes(16), 1, bytes(rows)),
  ):
    expected = len(messages.encode(message))
    assert messages.size(type(message), rows) == expected


def test_values_of_another_kind_are_refused():
  known, _, values = setting(4, 2, 2, 3)
  for wrong, lost in (
    (values.astype(np.int64), [5] * 4),
    (values[:3], [5] * 4),
    (values, [5] * 3),
  ):
    with pytest.raises(ValueError, match=r"uint32\[4, 3\] and 4 steps: got"):
      simulation.hold(known, b"key", wrong, lost)
