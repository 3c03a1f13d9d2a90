"""Dropouts: drawn as said, survived as planned, counted as they cross."""

import math

import numpy as np
import pytest
import scipy.stats

from fedjax_peft.privacy import (
  client,
  conversation,
  dropout,
  keys,
  terms,
)

SCHEME = keys.simulated(bytes(32))
STEPS = (0.05, 0.0, 0.1, 0.02, 0.03)
IDS = np.arange(20000)


def p_value(late, lost):
  """Of a chi-square test of the steps at which clients are lost."""
  expected = np.append(lost, 1 - sum(lost)) * late.size
  got = np.bincount(late, minlength=6)
  some = expected > 0
  assert not got[~some].any()
  return scipy.stats.chisquare(got[some], expected[some]).pvalue


def test_clients_are_lost_at_each_step_as_often_as_said():
  # Fixed seed; p > 0.01, and < 1e-6 where each loss is a fifth likelier.
  late = dropout.drawn(dropout.risk(STEPS), IDS, (5, 2, 0))
  assert p_value(late, STEPS) > 0.01
  assert p_value(late, [1.2 * x for x in STEPS]) < 1e-6
  late = dropout.drawn(dropout.risk(0.2), IDS, (5, 2, 0))
  assert p_value(late, [0.04] * 5) > 0.01


def test_whether_a_client_is_lost_does_not_depend_on_the_others():
  wanted = dropout.risk(0.3)
  late = dropout.drawn(wanted, IDS, (5, 2, 0))
  np.testing.assert_array_equal(
    dropout.drawn(wanted, IDS[::-7], (5, 2, 0)), late[::-7]
  )
  for other in (6, 2, 0), (5, 3, 0), (5, 2, 1):
    again = dropout.drawn(wanted, IDS, other)
    # Two independent draws agree with probability 0.7^2 + 5 * 0.06^2 = 0.508.
    assert abs(np.mean(again == late) - 0.508) < 4 * 0.5 / math.sqrt(IDS.size)


@pytest.mark.parametrize("clients", [20, 300])
@pytest.mark.parametrize("lost", [0.02, 0.2])
def test_a_ring_is_made_for_all_losses_but_the_rarest(clients, lost):
  wanted = dropout.risk(lost, correctness=0.01, security=1e-6)
  k, t = dropout.ring(wanted, clients)
  most = scipy.stats.binom(clients, lost).isf(0.005)
  risk = dropout.degree.failure(clients, most / clients, 0.1, k, t)
  assert risk.recovery <= 0.005
  assert risk.secrets + risk.parted <= 1e-6
  with pytest.raises(ValueError, match=f"clients={clients} may all be lost"):
    dropout.ring(dropout.risk(0.99, correctness=1e-6), clients)


def test_rounds_fail_no_more_often_than_they_may():
  # 200 rounds of 30 clients: at most 1 in 20 fails (one-sided, p > 0.01); with
  # the same rings and twice the losses more do (p < 1e-6).
  wanted = dropout.risk(0.1, correctness=0.05, security=1e-3)
  ids = np.arange(30)

  def p_of(lost):
    failed = 0
    for number in range(200):
      # What is lost beyond the plan is lost at the latest step that counts.
      more = dropout.drawn(dropout.risk(lost), ids, (1, number, 7))
      found = dropout.attempt(wanted, ids, (1, number, 0), late=more)
      failed += found.why is not None
    return scipy.stats.binomtest(failed, 200, 0.05, "greater").pvalue

  assert p_of(0.0) > 0.01
  assert p_of(0.4) < 1e-6


def held(known, secrets, values, late):
  """(survivors or None, bytes up, bytes down) of a conversation."""
  up, down = dict.fromkeys(client.STEPS, 0), dict.fromkeys(conversation.DOWN, 0)

  def carry(step, i, data):
    (up if step in up else down)[step] += len(data)
    is_lost = step in up and client.STEPS.index(step) >= late[i]
    return () if is_lost else (data,)

  try:
    outcome = conversation.hold(known, SCHEME, secrets, values, carry)
  except terms.TooFewError:
    return None, up, down
  assert (outcome.up_bytes, outcome.down_bytes) == (up, down)
  return outcome.survivors, up, down


def test_survivors_failures_and_bytes_are_those_of_a_conversation():
  n, size = 7, 3
  ids = np.array([1, 3, 5, 7, 9, 22, 40])
  secrets = [SCHEME.draw(f"identity/{i}", 32) for i in ids]
  values = np.ones((n, size), np.uint32)
  wires = 4 * size, 1000
  fails = set()
  for number in range(40):
    draw = 8, number, 0
    wanted = dropout.risk(0.45, correctness=0.9, security=0.5)
    k, t = dropout.ring(wanted, n)
    known = terms.agree(
      dropout.session(dropout.number(draw)),
      tuple(map(SCHEME.identity, secrets)),
      neighbours=k,
      threshold=t,
      size=size,
    )
    late = dropout.drawn(wanted, ids, draw)
    survivors, up, down = held(known, secrets, values, late)
    found = dropout.attempt(wanted, ids, draw, wires=wires)
    record = found.record
    fails.add(survivors is None)
    mixed = dropout.attempt(wanted, ids[::-1], draw, wires=wires)
    np.testing.assert_array_equal(mixed.lost[::-1], found.lost)
    assert mixed.record == found.record
    assert (found.why is not None) == (survivors is None)
    here = set(np.flatnonzero(~found.lost))
    assert here == set(survivors or ())
    assert record["survived"] == len(here)
    # The values of those who survive are the round's wires, counted there.
    up["mask"] -= record["lost_up_bytes"] + wires[0] * len(here)
    assert {f"{k}_up_bytes": v for k, v in up.items()}.items() <= record.items()
    down["lost"] = 0 if found.why is None else n * wires[1]
    counted = {f"{k}_down_bytes": v for k, v in down.items()}
    assert counted.items() <= record.items()
  assert fails == {True, False}


def test_too_few_clients_to_be_safe_are_not_asked():
  found = dropout.attempt(dropout.risk(0.1), np.arange(2), (0, 0, 0))
  assert found.lost.all()
  assert "clients" in found.why
  assert set(found.record.values()) == {0}


@pytest.mark.parametrize("lost", [-0.1, 1.0, (0.1,) * 4, (0.2,) * 5, math.nan])
def test_what_is_no_probability_is_refused(lost):
  with pytest.raises(ValueError, match="advertise, share, mask, .*: got"):
    dropout.risk(lost)
  with pytest.raises(ValueError, match="corrupt must be in"):
    dropout.risk(0.1, corrupt=1.0)


def test_what_each_adds_to_its_report_is_known_before_the_round():
  wanted = dropout.risk(0.0, correctness=0.01, security=1e-6)
  record = dropout.attempt(wanted, np.arange(30), (0, 0, 0)).record
  assert record["survived"] == 30
  up, down = dropout.beside(wanted, 30)
  for way, each in ("up", up), ("down", down):
    whole = sum(v for k, v in record.items() if k.endswith(f"_{way}_bytes"))
    assert whole == 30 * each > 0
