"""Conversations inside rounds: the same bits as masks that cancel."""

import functools

import jax
import numpy as np
import pytest

import fedjax_peft as fp
import toy
from fedjax_peft import plan
from fedjax_peft.links import masking
from fedjax_peft.privacy import client, conversing, dropout, keys, securing

DATA = toy.people((6,) * 12)
RISK = dropout.risk(0.4, security=0.5, correctness=0.9)
GRID = (fp.clip(1.0), fp.weigh(max_weight=8), fp.fixed_point())
SCHEMES = {"real": keys.real(), "simulated": keys.simulated(bytes(32))}


def secured():
  drawn = plan.sampled(fp.sample.uniform(7), DATA, 0)
  return securing.secured(drawn, RISK, seed=0)


def ends(scheme="real"):
  return conversing.conversing(RISK, SCHEMES[scheme])


def spoken(link, reduce=None):
  tier = fp.tier("cloud", link=fp.chain(*GRID, link), reduce=reduce)
  return fp.federated(toy.voices(), [tier])


def player(algorithm, executor="shard_map", devices=2):
  settings = toy.lanes(executor, devices)
  return toy.Player(algorithm, DATA, settings=settings, most=7)


@functools.cache
def masked():
  return player(spoken(masking.mask(4)))


def play(here, turn):
  """(state, outcome) of a first round."""
  return here.first(turn)[1:]


def turns(count=20):
  """Turns in which clients are lost at many steps, and their steps."""
  made = secured()
  for number in range(count):
    turn, _ = made.turn({}, number, {})
    if turn.clients.size:
      yield turn, turn.traits[securing.LATE]


@pytest.mark.parametrize(
  ("executor", "devices", "scheme"),
  [
    ("shard_map", 2, "real"),
    pytest.param("shard_map", 1, "simulated", marks=pytest.mark.slow),
    pytest.param("stream", 1, "real", marks=pytest.mark.slow),
    pytest.param("debug", 1, "simulated", marks=pytest.mark.slow),
  ],
)
def test_a_conversation_says_what_masks_say(executor, devices, scheme):
  here = player(spoken(*ends(scheme)), executor, devices)
  seen = set()
  for turn, late in turns():
    state, outcome = play(here, turn)
    other, beside = play(masked(), turn)
    assert toy.same_bits(state.params, other.params)
    names = "clients", "examples", "nonfinite"
    for name in (f"train/{n}" for n in names):
      assert outcome.record[name] == beside.record[name]
    seen |= set(late.tolist())
  # Clients were lost at every step; rounds of nobody are as they were.
  assert seen == set(range(len(client.STEPS) + 1))
  nobody = plan.Turn(
    np.zeros(0, np.int32), traits={k: v[:0] for k, v in turn.traits.items()}
  )
  start = jax.device_get(here.start().params)
  assert toy.same_bits(play(here, nobody)[0].params, start)


def hold(late, arrived=None):
  """The callback on seven clients that are lost like this."""
  late = np.array(late, np.int32)
  arrived = late > dropout.MASK if arrived is None else np.array(arrived)
  rows = np.arange(21, dtype=np.uint16).reshape(7, 3) + np.uint16(65530)
  present = np.arange(7) < arrived.sum()
  members = conversing._Members(
    np.array([5, 3, 9, 0, 1, 7, 2]),
    np.ones(7, bool),
    arrived,
    late,
    np.full(7, 11, np.int32),
  )
  (total,) = conversing._talk(
    RISK, SCHEMES["simulated"], present, members, [rows]
  )
  return total, rows[present].sum(0, dtype=np.uint16)


def test_a_round_with_too_few_left_raises_and_says_nothing():
  total, expected = hold([5, 5, 0, 5, 5, 5, 2])
  np.testing.assert_array_equal(total, expected)
  with pytest.raises(dropout.terms.TooFewError, match="are needed"):
    hold([5, 3, 3, 3, 3, 3, 3])
  # What is not finite is lost with its mask on, whatever the plan said.
  total, expected = hold([5] * 7, [True] * 6 + [False])
  np.testing.assert_array_equal(total, expected)


def test_what_is_no_conversation_is_refused():
  link, reduce = ends()
  with pytest.raises(ValueError, match="every wire: got their sum"):
    play(player(spoken(link)), plan.Turn(np.arange(3)))
  with pytest.raises(ValueError, match=r"who drops when, .* the traits \[\]"):
    play(player(spoken(link, reduce)), plan.Turn(np.arange(3)))
  spec = fp.Spec({"a": jax.ShapeDtypeStruct((3,), np.float32)})
  with pytest.raises(ValueError, match=r"unsigned .* got float32\[3\] at"):
    link.init(spec)
