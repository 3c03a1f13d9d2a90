"""How rounds are executed, chosen from what the compiler says."""

import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_peft as fp
import toy
from fedjax_peft import settings as settings_lib


@pytest.fixture(scope="module")
def chosen():
  algorithm = fp.fedavg(
    toy.net(), fp.local(optax.sgd(0.1), batch=4), lowrank=False
  )

  def choose(cohort=64, **options):
    return fp.choose(
      algorithm, toy.net().base, toy.people().examples, cohort, **options
    )

  return choose


def test_a_small_model_gets_lanes_for_the_whole_cohort(chosen):
  found = chosen()
  assert found.executor == "shard_map"
  assert found.devices == 2
  assert found.width == 32
  assert found.segment >= found.width * found.blocks


def test_lanes_are_a_power_of_two_and_no_more_than_clients(chosen):
  found = chosen(cohort=11)
  assert found.width & (found.width - 1) == 0
  assert found.width <= 6


def test_a_model_that_fills_a_cache_gets_few_lanes(chosen):
  module = nnx.Linear(512, 512, rngs=nnx.Rngs(0))  # 1 MiB

  def loss(module, rows, key):
    return module(rows["x"])[:, 0], {}

  model = fp.model(module, loss)
  local = fp.local(optax.sgd(0.1), batch=4)
  algorithm = fp.fedavg(model, local, lowrank=False)
  examples = {"x": np.zeros((8, 512), np.float32)}
  found = fp.choose(algorithm, model.base, examples, 1000, devices=2)
  assert found.width == found.segment == 4
  assert chosen(cohort=1000).width > 4


def test_what_is_set_is_kept(chosen):
  found = chosen(
    executor_name="stream", devices=1, blocks=2, width=4, segment=9
  )
  assert found == fp.Settings("stream", 1, 2, 4, 9)


def test_a_segment_always_has_room_for_the_lanes(chosen):
  assert chosen(devices=1, blocks=3, width=4, segment=5).segment == 12


HAND_MADE = {  # (lanes, settings, cohort): whether clients can work so
  ("one", toy.lanes(width=1), 4): True,
  ("one", toy.lanes(width=2), 4): False,
  ("one", toy.lanes(width=1, blocks=2), 4): False,
  ("one", toy.lanes(width=1, devices=2), 4): False,
  ("all", toy.lanes(width=4), 4): True,
  ("all", toy.lanes(width=5), 4): True,
  ("all", toy.lanes(width=3), 4): False,
  ("all", toy.lanes(width=2, blocks=2), 4): False,
  ("all", toy.lanes(width=4, devices=2), 4): False,
  ("any", toy.lanes(width=3, blocks=2, devices=2), 4): True,
}


@pytest.mark.parametrize(("lanes", "made", "cohort"), HAND_MADE)
def test_settings_made_by_hand_are_refused_before_the_first_round(
  lanes, made, cohort
):
  """By the run itself, in one sentence that says what to use."""
  if HAND_MADE[lanes, made, cohort]:
    assert settings_lib.checked(made, lanes, cohort) == made
    return
  job = toy.voices()._replace(lanes=lanes)
  rounds = fp.run(
    fp.federated(job, [fp.tier("cloud")]),
    toy.net(),
    toy.people(),
    cohort=fp.sample.uniform(cohort),
    rounds=1,
    settings=made,
  )
  width = {"one": 1, "all": cohort}[lanes]
  with pytest.raises(ValueError, match=f"width={width}, or leave") as refused:
    next(rounds)
  sentence = str(refused.value)
  assert f"got devices={made.devices} blocks={made.blocks}" in sentence
  assert "\n" not in sentence
