"""Ranges: no sum wraps on a planned grid, and one step finer it would."""

import math
import re

import numpy as np
import pytest
import scipy.linalg

from fedjax_peft.privacy import ranges


def decoded(rows, bits):
  """The sum modulo 2^bits, read as a signed integer."""
  half = 2 ** (bits - 1)
  return (np.sum(rows, axis=0, dtype=object) + half) % 2**bits - half


def weights_of(total, largest, senders):
  """Integer weights of at most `largest` that add up to the total."""
  weights = np.zeros(senders, int)
  for i in range(senders):
    weights[i] = min(largest, total - weights.sum())
  assert weights.sum() == total
  return weights


CASES = [
  {"senders": 1, "bits": 8},
  {"senders": 100, "bits": 16},
  {"senders": 3, "bits": 2 + 3},
  {"senders": 7, "bits": 16, "max_weight": 50},
  {"senders": 7, "bits": 12, "max_weight": 50, "total_weight": 211},
  {"senders": 1000, "bits": 32, "max_weight": 300},
  {"senders": 33, "bits": 20, "norm": "linf", "clip_norm": 0.013},
]


@pytest.mark.parametrize("case", CASES)
def test_the_worst_messages_do_not_wrap_and_would_on_a_finer_grid(case):
  case = {"clip_norm": 0.7, "dimension": 3, **case}
  plan = ranges.plan(**case)
  weights = weights_of(
    plan.load.total_weight, plan.load.max_weight, case["senders"]
  )
  clip = case["clip_norm"]

  def rows(levels):
    # One coordinate holds the whole norm, of either sign; in float64.
    messages = weights[:, None] * clip * np.array([1.0, -1.0, 0.3])
    return np.rint(messages / (clip / levels)).astype(int)

  sent = rows(plan.levels)
  np.testing.assert_array_equal(decoded(sent, plan.bits), sent.sum(axis=0))
  assert abs(sent.sum(axis=0)[0]) == plan.largest <= plan.capacity
  finer = rows(plan.levels + 1)
  total = finer.sum(axis=0)
  assert decoded(finer, plan.bits)[0] != total[0]
  assert (plan.failure, plan.bound) == (0, "worst case")
  assert plan.step == clip / plan.levels


def test_rotated_sums_wrap_no_more_often_than_stated():
  # Monte Carlo over 2000 rotations of the worst message for the bound. The
  # stated probability is loose, by a factor of about 3 here; but without its
  # logarithm, at one standard deviation, most sums wrap.
  block, failure, senders = 128, 0.05, 5
  case = {
    "senders": senders,
    "clip_norm": 2.0,
    "dimension": block,
    "bits": 16,
    "rotation": block,
  }
  plan = ranges.plan(**case, failure=failure)
  sure = ranges.plan(**case)
  assert sure.failure == 0
  assert plan.failure == failure
  assert plan.bound == "Hoeffding (random rotation)"
  assert plan.levels > 2.5 * sure.levels  # that is what a rotation is for
  rng = np.random.default_rng(5)
  signs = rng.choice([-1.0, 1.0], (2000, block))
  matrix = scipy.linalg.hadamard(block) / math.sqrt(block)
  rotated = (signs * 2.0 / math.sqrt(block)) @ matrix

  def wraps(levels):
    sums = senders * np.rint(rotated / (2.0 / levels))
    return np.mean(np.abs(sums).max(axis=1) > plan.capacity)

  assert 0 < wraps(plan.levels) <= failure
  assert wraps(round(sure.levels * math.sqrt(block))) > 0.9


@pytest.mark.parametrize("kind", ["discrete_gaussian", "skellam"])
def test_noise_takes_room_that_is_proved(kind):
  case = {"senders": 20, "clip_norm": 1.0, "dimension": 50, "bits": 12}
  plan = ranges.plan(**case, noise=6.0, noise_kind=kind, failure=1e-2)
  plain = ranges.plan(**case)
  assert plan.levels < plain.levels
  assert plan.noise == 6
  assert plan.failure == 1e-2
  rng = np.random.default_rng(11)
  if kind == "skellam":
    shape = (4000, 50)  # sums of Skellam variables are one
    drawn = rng.poisson(18.0 * 20, shape) - rng.poisson(18.0 * 20, shape)
  else:  # wide enough that rounding a Gaussian is as good
    drawn = np.rint(6.0 * math.sqrt(20) * rng.standard_normal((4000, 50)))
  worst = drawn + 20 * plan.levels
  assert np.mean((worst > plan.capacity).any(axis=1)) <= 1e-2
  assert np.mean((worst + 20 > plan.capacity - 18).any(axis=1)) < 1e-1
  # Room for four standard deviations of one coordinate is not enough for 50.
  fewer = plan.capacity - 2 * 6.0 * math.sqrt(20)
  assert np.mean((drawn + fewer > plan.capacity).any(axis=1)) > 0.5


def test_noise_in_the_unit_of_the_message_takes_more_steps_of_a_finer_grid():
  case = {"senders": 20, "clip_norm": 2.0, "dimension": 50, "failure": 1e-6}
  wide, narrow = (
    ranges.plan(**case, bits=b, noise=0.5, noise_unit="message")
    for b in (24, 12)
  )
  for plan in wide, narrow:
    assert plan.noise * plan.step == pytest.approx(0.5)
    assert plan.largest <= plan.capacity
    same = ranges.plan(**case, bits=plan.bits, noise=plan.noise)
    assert abs(same.levels - plan.levels) <= 1
  assert wide.noise > 4000 * narrow.noise


def test_rotation_and_noise_share_the_failure():
  case = {
    "senders": 20,
    "clip_norm": 1.0,
    "dimension": 512,
    "bits": 20,
    "rotation": 256,
    "failure": 1e-6,
  }
  both = ranges.plan(**case, noise=30.0)
  assert both.failure == pytest.approx(1e-6)
  assert both.bound == (
    "Hoeffding (random rotation) + sub-Gaussian (Discrete Gaussian noise)"
  )
  assert ranges.plan(**case).levels > both.levels
  case["rotation"] = None
  assert ranges.plan(**case, noise=30.0).levels < both.levels


def test_the_proof_is_in_sentences_with_the_plans_numbers():
  plan = ranges.plan(
    senders=20,
    clip_norm=1.0,
    dimension=512,
    bits=20,
    rotation=256,
    noise=30.0,
    failure=1e-6,
  )
  text = " ".join(plan.proof)
  for number in plan.levels, plan.largest, plan.capacity, "1e-06", "5e-07":
    assert str(number) in text
  assert all(sentence.endswith(".") for sentence in plan.proof)
  assert plan.modulus == 2**20


def levels(**change):
  case = {
    "senders": 50,
    "clip_norm": 1.0,
    "dimension": 4096,
    "bits": 24,
    "max_weight": 10,
    "rotation": 256,
    "noise": 2000.0,
    "failure": 1e-6,
  }
  return ranges.plan(**case | change).levels


def test_a_grid_is_finer_the_less_there_is_to_add_up():
  at = levels()
  assert levels(senders=51) < at < levels(senders=49)
  assert levels(max_weight=11) < at < levels(total_weight=499)
  assert levels(bits=23) < at < levels(bits=25)
  assert levels(failure=1e-7) < at < levels(failure=1e-5)
  assert levels(noise=2100.0) < at < levels(noise=0.0)
  assert levels(dimension=10**6) < at < levels(dimension=256)
  assert levels(rotation=128) < at < levels(rotation=512)
  assert levels(noise_kind="skellam") <= at
  assert levels(rotation=None) < at
  # The number of steps to the clip norm does not depend on its unit.
  assert levels(clip_norm=7.0) == at


def test_the_fewest_bits_are_found_for_a_step():
  case = {"senders": 100, "clip_norm": 1.0, "dimension": 9}
  plan = ranges.plan(**case, bits=None, coarsest=1e-3)
  assert plan.step <= 1e-3
  assert plan.bits == math.ceil(math.log2(100 * 1000 + 1)) + 1
  with pytest.raises(ValueError, match="can reach"):
    ranges.plan(**case, bits=plan.bits - 1, coarsest=1e-3)


@pytest.mark.parametrize(
  "case",
  [
    {"senders": 400, "bits": 8},
    {"senders": 400, "bits": 12, "max_weight": 30},
    {"senders": 400, "bits": 16, "coarsest": 1e-3},
    {"senders": 400, "bits": 16, "coarsest": 1e-3, "rotation": 256},
    {"senders": 400, "bits": 14, "coarsest": 0.1, "noise": 40.0},
  ],
)
def test_a_refusal_names_the_smallest_changes_that_work(case):
  case = {"clip_norm": 1.0, "dimension": 1000, "failure": 1e-6, **case}
  with pytest.raises(ValueError, match="wrap modulo") as caught:
    ranges.plan(**case)
  text = str(caught.value)
  bits = int(re.search(r"use .*bits=(\d+)", text)[1])
  assert ranges.plan(**case | {"bits": bits})
  with pytest.raises(ValueError, match="wrap modulo"):
    ranges.plan(**case | {"bits": bits - 1})
  found = re.search(r"senders=(\d+) with total_weight=(\d+)", text)
  if found:
    senders, total = map(int, found.groups())
    assert ranges.plan(**case | {"senders": senders, "total_weight": total})
    more = senders + 1
    total = more * case.get("max_weight", 1)
    with pytest.raises(ValueError, match="wrap modulo"):
      ranges.plan(**case | {"senders": more, "total_weight": total})
  step = re.search(r"coarsest=([0-9.e-]+)", text)
  if step:
    assert ranges.plan(**case | {"coarsest": float(step[1])})
    with pytest.raises(ValueError, match="wrap modulo"):
      ranges.plan(**case | {"coarsest": float(step[1]) * 0.999})
  assert found or step


def test_weights_must_fit_the_modulus_too():
  case = {"senders": 2, "clip_norm": 1.0, "dimension": 4, "max_weight": 100}
  with pytest.raises(ValueError, match="total weight .* 200 .*use bits=9"):
    ranges.plan(**case, bits=8)
  assert ranges.plan(**case, bits=9).levels == 1
  with pytest.raises(ValueError, match="smaller weights"):
    ranges.plan(**case | {"max_weight": 2**32, "senders": 1})


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"clip_norm": math.inf}, "clip_norm must be a positive"),
    ({"senders": 0}, "senders must be an integer"),
    ({"dimension": 0}, "dimension"),
    ({"bits": 33}, "bits must be one of"),
    ({"bits": None}, "say one of the two"),
    ({"norm": "l1"}, "norm must be one of"),
    ({"total_weight": 31}, "from 1 to senders x max_weight = 30"),
    ({"failure": 1.0}, r"probability in \[0, 1\)"),
    ({"noise": -1.0}, "finite std >= 0"),
    ({"noise": 1.0}, "use failure=1e-9"),
    ({"noise": 1.0, "failure": 0.1, "noise_kind": "laplace"}, "noise_kind"),
    ({"rotation": 256, "norm": "linf"}, "clip by norm='l2'"),
    ({"coarsest": 0.0}, "coarsest must be a positive"),
  ],
)
def test_arguments_that_say_nothing_are_refused(change, message):
  case = {"senders": 10, "clip_norm": 1.0, "dimension": 5, "max_weight": 3}
  with pytest.raises(ValueError, match=message):
    ranges.plan(**case | change)
