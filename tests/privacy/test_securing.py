"""Secured rounds: the sum of those who are left, or none at all."""

import functools

import jax
import numpy as np
import pytest

import fedjax_peft as fp
import toy
from fedjax_peft import plan, traffic
from fedjax_peft.links import masking
from fedjax_peft.privacy import client, conversation, dropout, securing

DATA = toy.people((6,) * 12)
IDS = np.array([3, 1, 8, 7, 5, 0, 11], np.int32)
LOST = np.array([False, True, False, False, True, True, False])


def spoken(mask):
  link = fp.chain(fp.clip(1.0), fp.weigh(max_weight=8), fp.fixed_point(), mask)
  return fp.federated(toy.voices(), [fp.tier("cloud", link=link)])


@functools.cache
def player(executor="shard_map", devices=2, mask=True):
  link = masking.mask(4) if mask else fp.chain()
  return toy.Player(
    spoken(link), DATA, settings=toy.lanes(executor, devices), most=7
  )


def play(here, turn):
  """(state, outcome, bytes) of a first round."""
  cohort, state, outcome = here.first(turn)
  crossed = traffic.of_round(
    here.algorithm,
    traffic.sizes(here.algorithm, 7),
    {},
    cohort,
    outcome.record,
    0,
  )
  return state, outcome, crossed


@pytest.mark.parametrize(
  ("executor", "devices"),
  [
    ("shard_map", 2),
    pytest.param("shard_map", 1, marks=pytest.mark.slow),
    pytest.param("stream", 1, marks=pytest.mark.slow),
    pytest.param("debug", 1, marks=pytest.mark.slow),
  ],
)
def test_who_is_lost_leaves_no_trace_in_the_sum(executor, devices):
  turn = plan.Turn(IDS, lost=LOST)
  state, outcome, crossed = play(player(executor, devices), turn)
  alone = play(player(mask=False), plan.Turn(IDS[~LOST]))
  assert toy.same_bits(state.params, alone[0].params)
  for name in "clients", "examples", "nonfinite", "loss":
    assert outcome.record[f"train/{name}"] == alone[1].record[f"train/{name}"]
  # They got the model, and reported nothing.
  wires = crossed["up_bytes_client"], crossed["down_bytes_client"]
  assert wires == (alone[2]["up_bytes_client"], alone[2]["down_bytes_client"])
  assert crossed["cloud/up_bytes"] == 4 * wires[0]
  assert crossed["cloud/down_bytes"] == 7 * wires[1]


def test_masks_of_the_lost_are_in_the_sum_until_they_are_taken_off():
  # The control: a receiver that is not told who is lost.
  deaf = masking.mask(4)._replace(
    receive=lambda wire, shared, roster, key: (wire, shared)
  )
  here = toy.Player(spoken(deaf), DATA, settings=toy.lanes(devices=2), most=7)
  turn = plan.Turn(IDS, lost=LOST)
  masked = play(here, turn)[0]
  alone = play(player(mask=False), plan.Turn(IDS[~LOST]))[0]
  assert not toy.same_bits(masked.params, alone.params)
  # Without anyone lost there is nothing to be told.
  turn = plan.Turn(IDS)
  assert toy.same_bits(
    play(here, turn)[0].params, play(player(mask=False), turn)[0].params
  )


def test_nobody_is_left_without_a_place_or_given_work():
  everyone = plan.Turn(IDS, lost=np.ones(7, bool))
  here = player()
  state, outcome, crossed = play(here, everyone)
  assert toy.same_bits(state.params, jax.device_get(here.start().params))
  assert outcome.record["train/clients"] == 0
  assert outcome.record["train/nonfinite"] == 0
  assert crossed["cloud/up_bytes"] == crossed["up_bytes_client"] == 0


RISK = dropout.risk(0.45, corrupt=0.1, security=0.5, correctness=0.9)


def drawn(seed=0, size=7):
  return plan.sampled(fp.sample.uniform(size), DATA, seed)


def run(cohort, rounds=6):
  """(params, record) of every round."""
  made = fp.run(
    spoken(masking.mask(4)),
    toy.net(),
    DATA,
    cohort=cohort,
    rounds=rounds,
    settings=toy.lanes(devices=2),
  )
  return [(jax.device_get(state.params), record) for state, record in made]


def test_a_round_below_the_threshold_changes_nothing_and_the_run_goes_on():
  made = securing.secured(drawn(), RISK, seed=0)
  found = run(made)
  before = jax.device_get(player().start().params)
  for params, record in found:
    failed = record["secure/failed"]
    assert failed in (0, 1)
    assert toy.same_bits(params, before) == bool(failed)
    assert record["secure/asked"] == 7
    assert record["train/clients"] == record["secure/survived"]
    assert (record["secure/survived"] == 0) == bool(failed)
    assert record["train/nonfinite"] == 0
    assert record["cloud/up_bytes"] == 0 or not failed
    before = params
  assert {record["secure/failed"] for _, record in found} == {0, 1}


def test_others_are_asked_where_an_attempt_failed():
  again = [drawn(seed=1), drawn(seed=2)]
  once = securing.secured(drawn(), RISK, seed=0)
  more = securing.secured(drawn(), RISK, seed=0, again=again, wires=(52, 44))
  fails = []
  for number in range(60):
    (one, _), (turn, _) = once.turn({}, number, {}), more.turn({}, number, {})
    tried = [
      dropout.attempt(RISK, ids, (0, number, i), wires=(52, 44))
      for i, ids in enumerate(
        p.turn({}, number, {})[0].clients for p in (drawn(), *again)
      )
    ]
    failed = int(turn.record["secure/failed"])
    fails.append(failed)
    assert all(x.why is not None for x in tried[:failed])
    assert one.record["secure/failed"] == min(failed, 1)
    used = tried[: failed + 1]
    if failed < 3:
      ids = (drawn(), *again)[failed].turn({}, number, {})[0].clients
      np.testing.assert_array_equal(turn.clients, ids)
      np.testing.assert_array_equal(turn.lost, used[-1].lost)
    else:
      assert turn.clients.size == turn.lost.size == 0
    for name in used[0].record:
      of = [x.record[name] for x in used]
      wanted = of[-1] if name in ("neighbours", "threshold") else sum(of)
      assert turn.record[f"secure/{name}"] == wanted
  assert set(fails) >= {0, 1, 3}


def test_a_turn_is_a_function_of_seed_and_round():
  one, two = (securing.secured(drawn(), RISK, seed=4) for _ in range(2))
  (first, _), (second, _) = one.turn({}, 9, {}), two.turn({}, 9, {})
  assert toy.same_bits(tuple(first), tuple(second))
  other = securing.secured(drawn(), RISK, seed=5)
  late = [other.turn({}, i, {})[0].record for i in range(9)]
  assert late != [one.turn({}, i, {})[0].record for i in range(9)]


def test_who_a_plan_has_lost_is_lost_and_asked_like_the_others():
  def turn(memory, number, told):
    lost = np.arange(7) == number
    traits = {"place": np.arange(7)}
    return plan.Turn(IDS, lost=lost, traits=traits), memory

  wanted = RISK._replace(lost=(0.0,) * 5, security=0.9)
  made = securing.secured(drawn()._replace(turn=turn), wanted, seed=0)
  for number in range(7):
    found, _ = made.turn({}, number, {})
    if found.clients.size:
      np.testing.assert_array_equal(found.lost, np.arange(7) == number)
    else:
      assert found.record["secure/failed"] == 1
      assert found.traits["place"].size == found.lost.size == 0


def test_rounds_that_are_no_single_sum_are_refused():
  def stations(memory, number, told):
    return plan.Turn(IDS, nodes=np.arange(7) % 2), memory

  def costly(memory, number, told):
    return plan.Turn(IDS, table={"client": IDS}), memory

  grouped = plan.grouped(drawn(), plan.Grouping("g", np.zeros(12, np.int32)))
  before = np.ones(12)
  cut = plan.sampled(fp.sample.uniform(7), DATA, 0, before=before)
  for made, what in (
    (drawn()._replace(updates=2), "rounds that close"),
    (grouped, "one tier of size 1"),
    (cut, "does not hide what crosses a cut"),
    (drawn(size=2), "clients must be an integer of at least 3"),
  ):
    with pytest.raises(ValueError, match=what):
      securing.secured(made, RISK, seed=0)
  made = securing.secured(drawn()._replace(turn=stations), RISK, seed=0)
  with pytest.raises(ValueError, match=r"one receiver: got .* \[0, 1\]"):
    made.turn({}, 0, {})
  plans = drawn()._replace(turn=costly), drawn()
  made = securing.secured(plans[0], RISK, seed=0, again=plans[1:])
  with pytest.raises(ValueError, match="leave `again` empty"):
    made.turn({}, 0, {})


def test_every_step_of_the_protocol_is_in_the_record():
  record = securing.secured(drawn(), RISK, seed=0).turn({}, 0, {})[0].record
  for step in (*client.STEPS, "lost"):
    assert f"secure/{step}_up_bytes" in record
  for step in (*conversation.DOWN, "lost"):
    assert f"secure/{step}_down_bytes" in record
