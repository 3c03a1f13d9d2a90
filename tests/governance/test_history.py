"""A history: lines that are authentic and cannot have happened are found."""

import pytest

from fedjax_peft.governance import history, signing, version

A, B = (signing.signer(x * 32) for x in (b"a", b"b"))
C = "c" * 64


def start(signer=A):
  made = version.first("0" * 64, C)
  signed = version.to_dict(version.sign(made, signer))
  identity = signer and signer.identity
  return made, {"kind": "start", "identity": identity, "signed": signed}


def good(parent, number, state="1" * 64, signer=A, config=None):
  made = version.following(parent, number, state, config)
  signed = version.to_dict(version.sign(made, signer))
  entry = {"kind": "round", "round": number, "rejected": False}
  return made, entry | {"signed": signed}


def bad(number):
  return {"kind": "round", "round": number, "rejected": True}


def back(made, number):
  return {
    "kind": "rollback",
    "round": number,
    "version": made.number,
    "state": made.state,
  }


def resume(number, made, drift=False, config=C):
  return {
    "kind": "resume",
    "round": number,
    "version": made.number,
    "config": config,
    "drift": drift,
  }


STOP = {"kind": "stop", "round": 3, "why": "done"}
V0, START = start()
V1, ONE = good(V0, 1)
V2, THREE = good(V1, 3, "3" * 64)
STORY = [START, ONE, bad(2), back(V1, 2), THREE, STOP]


def line(*entries):
  """The first line that cannot have happened."""
  found = history.follow(entries)[1]
  return None if found is None else found.line


def test_a_story_tells_which_version_was_in_force_when():
  found, broken = history.follow(STORY)
  assert broken is None
  assert found.at == {0: V0, 1: V1, 2: V1, 3: V2}
  assert (found.round, found.rejected) == (3, {2})
  assert (found.identity, found.config) == (A.identity, C)


@pytest.mark.parametrize("to", range(4))
def test_a_resumed_run_repeats_rounds_to_the_same_versions(to):
  then = found = history.follow(STORY)[0]
  again = {1: [ONE], 2: [bad(2), back(V1, 2)], 3: [THREE, STOP]}
  rest = [x for k, v in again.items() if k > to for x in v]
  found, broken = history.follow([*STORY, resume(to, then.at[to]), *rest])
  assert broken is None
  assert found == then


def test_a_repeated_round_that_comes_out_otherwise_is_found_unless_told():
  other = good(V1, 3, "f" * 64)[1]
  assert line(*STORY, resume(2, V1), other) == 8
  assert line(*STORY, resume(2, V1, drift=True), other) is None
  changed = good(V1, 3, "3" * 64, config="d" * 64)[1]
  assert line(*STORY, resume(2, V1), changed) == 8
  drifted = resume(2, V1, drift=True, config="d" * 64)
  assert line(*STORY, drifted, changed) is None
  assert line(*STORY, drifted, THREE) == 8


@pytest.mark.parametrize(
  ("story", "broken"),
  [
    ([ONE], 1),
    ([START, START], 2),
    ([START, good(V0, 2)[1]], 2),  # a round is missing
    ([START, ONE, ONE], 3),
    ([START, ONE, bad(3)], 3),
    ([START, ONE, good(V0, 2)[1]], 3),  # a parent that is not in force
    ([START, bad(1), back(V0, 1), good(V1, 2)[1]], 4),
    ([START, ONE, good(V1, 2, signer=B)[1]], 3),
    ([START, ONE, good(V1, 2, signer=None)[1]], 3),
    ([start(B)[1] | {"identity": A.identity}], 1),
    ([START, ONE, back(V1, 1)], 3),  # nothing was rejected
    ([START, ONE, bad(2), back(V0, 2)], 4),
    ([START, ONE, bad(2), back(V1._replace(state="f" * 64), 2)], 4),
    ([START, ONE, resume(2, V1)], 3),  # a round that was not there
    ([START, ONE, resume(1, V0)], 3),
    ([START, ONE, {"kind": "party"}], 3),
    ([START, {"round": 1}], 2),
    ([START, {"kind": "round", "round": 1, "rejected": False}], 2),
    ([START, ONE | {"round": 2}], 2),
    ([START, bad(1), ONE | {"round": 2}], 3),  # signed for another round
  ],
)
def test_what_cannot_have_happened_is_found(story, broken):
  assert line(*story) == broken


def test_a_run_may_have_nobody_who_signs():
  first, begun = start(None)
  entry = good(first, 1, signer=None)[1]
  assert line(begun, entry) is None
