"""Private runs: epsilon in every record, sums that clients drop out of."""

import re
import shutil

import jax
import numpy as np
import pytest

from fedjax_peft import __main__, build, config, record, summing
from fedjax_peft.privacy import accounting, events

pytestmark = pytest.mark.usefixtures("standard_promotion")

SEEN = 11  # clients to train on
SECURE = (
  "privacy.secure={dropout=0.1, corrupt=0.0, correctness=0.05,"
  " security=1e-6, retries=1}"
)
PRIVATE = (
  "uplink=[]",
  "privacy.mechanism=gaussian",
  "privacy.clip_norm=0.5",
  "privacy.multiplier=1.2",
  "privacy.delta=1e-3",
  "cohort.sampler=poisson",
  "cohort.size=6",
)


def arguments(*sets):
  return [x for one in sets for x in ("--set", one)]


def fedjax_peft(capsys, *given):
  code = __main__.main([str(x) for x in given])
  out = capsys.readouterr()
  return code, out.out, out.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_text):
  """The directory of a private run, its config beside it; do not change."""
  root = tmp_path_factory.mktemp("private")
  (root / "tiny.toml").write_text(tiny_text)
  command = ["train", str(root / "tiny.toml"), "--out", str(root / "run")]
  with jax.numpy_dtype_promotion("standard"):
    assert __main__.main([*command, *arguments(*PRIVATE, SECURE)]) == 0
  return root


def plain(path):
  """The records without what depends on the machine."""
  return [
    {k: v for k, v in line.items() if not k.startswith("wall/")}
    for line in record.read(path)
  ]


def planned(path, rounds, *sets):
  """What the records of a run say of its plan; nothing is trained."""
  run = config.load(path, [*PRIVATE, *sets, f"rounds={rounds}"])
  parts = build.build(run)
  memory, found = parts.cohort.init(), []
  for number in range(rounds):
    turn, memory = parts.cohort.turn(memory, number, {})
    found.append(turn.record)
  return parts, found


def test_every_record_says_the_epsilon_of_the_rounds_that_were_released(
  finished,
):
  event = events.poisson(1.2, 6 / SEEN)
  released = 0
  for line in plain(finished / "run" / "records.jsonl"):
    released += line["secure/survived"] > 0
    assert line["privacy/released"] == released
    told = 0.0
    if released:
      told = accounting.epsilon(event, 1e-3, rounds=released, accountant="rdp")
    assert line["privacy/epsilon"] == told
  assert released > 1


def test_a_record_says_who_dropped_out_and_what_each_step_took(finished):
  lines = plain(finished / "run" / "records.jsonl")
  dropped = sum(x["secure/asked"] - x["secure/survived"] for x in lines)
  assert dropped > 0
  for line in lines:
    assert line["train/clients"] == line["secure/survived"]
    if line["secure/survived"]:
      assert line["secure/advertise_up_bytes"] > 0
      assert line["secure/reveal_up_bytes"] > 0


def test_epsilon_goes_on_when_a_run_is_resumed(finished, tmp_path, capsys):
  shutil.copytree(finished, tmp_path / "copy")
  run, path = tmp_path / "copy" / "run", tmp_path / "copy" / "tiny.toml"
  before = plain(run / "records.jsonl")
  shutil.rmtree(run / "checkpoints" / "6")
  code, out, _ = fedjax_peft(
    capsys,
    *("train", path, "--out", run, "--resume"),
    *arguments(*PRIVATE, SECURE),
  )
  assert code == 0
  assert f"eps {before[-1]['privacy/epsilon']:.3f}" in out
  assert plain(run / "records.jsonl") == before


def test_a_run_ends_when_its_epsilon_is_spent(tiny, capsys):
  event = events.poisson(1.2, 6 / SEEN)
  two = accounting.epsilon(event, 1e-3, rounds=2, accountant="rdp")
  code, out, _ = fedjax_peft(
    capsys,
    *("train", tiny),
    *arguments(*PRIVATE, f"budget.epsilon={two}"),
  )
  assert code == 0
  assert "the budget of epsilon has run out" in out
  assert len(record.read(tiny.parent / "run" / "records.jsonl")) == 2


def test_noise_is_chosen_for_an_epsilon_of_the_whole_run(tiny, capsys):
  sets = [x for x in PRIVATE if "multiplier" not in x]
  code, out, _ = fedjax_peft(
    capsys, "privacy", tiny, *arguments(*sets, "privacy.epsilon=3.0")
  )
  assert code == 0
  told = re.search(r"rdp.*?([\d.]+)\s+after 6", " ".join(out.split()))
  assert float(told[1]) == pytest.approx(3.0, abs=1e-3)


def test_privacy_shows_mechanism_epsilon_range_and_proof(tiny, capsys):
  code, out, _ = fedjax_peft(
    capsys, "privacy", tiny, *arguments(*PRIVATE, SECURE)
  )
  out = " ".join(out.split())
  assert code == 0
  assert "clip > average > noise > grid > mask" in out
  assert "with and without any one client" in out
  event = events.poisson(1.2, 6 / SEEN)
  for by in ("rdp", "pld"):
    told = accounting.epsilon(event, 1e-3, rounds=6, accountant=by)
    assert f"{told:.4f} after 6" in out
  assert "the sum is its own residue modulo 2^32" in out
  assert "can take them out" in out


@pytest.mark.parametrize(
  ("sets", "said"),
  [
    (
      ("uplink=[{link='weigh', max_weight=4}]",),
      "divides by the weight of those who came",
    ),
    (("privacy.epsilon=3.0",), "write one of the two"),
    (("cohort.sampler=uniform", "privacy.accountant=pld"), "accountant='rdp'"),
    (("algorithm={name='local_only'}",), "adds nothing up"),
    (
      ("network.clock={kind='synchronous'}", "cohort.sampler=uniform"),
      "must not depend on others",
    ),
    (("aggregate.reduce={method='median'}",), "not linear"),
    (("uplink=[{link='int8'}]",), "decode every wire alone"),
    (("privacy.mechanism=skellam", SECURE), "cohort of known size"),
    (
      ("privacy.mechanism=skellam", "cohort.sampler=uniform"),
      "without a secure sum",
    ),
    (("privacy.mechanism=banded",), "cohort.sampler=cyclic"),
    (("privacy.mechanism=local", SECURE), "fits no grid"),
    (("privacy.metric=product",), "the other factor stays as it is"),
    (
      ("privacy.mechanism=example", "aggregate.rule={method='ffa'}"),
      "those of plain fedavg",
    ),
    (("privacy.mechanism=example", SECURE), "beside 'privacy.secure'"),
    (("privacy.mechanism=none",), "neither a mechanism nor a secure sum"),
  ],
)
def test_what_cannot_be_accounted_is_refused_in_one_sentence(
  sets, said, tiny, capsys
):
  code, _, err = fedjax_peft(
    capsys, "privacy", tiny, *arguments(*PRIVATE, *sets)
  )
  assert code == 2
  assert err.count("\n") == 1
  assert said in err


def test_a_clip_norm_must_be_said(tiny, capsys):
  sets = [x for x in PRIVATE if "clip_norm" not in x]
  code, _, err = fedjax_peft(capsys, "train", tiny, *arguments(*sets))
  assert code == 2
  assert "privacy.clip_norm is missing" in err


@pytest.mark.slow
def test_noise_by_every_client_is_accounted_without_sampling(tiny, capsys):
  """Its epsilon is near that of a Gaussian on everyone, never below."""
  code, _, _ = fedjax_peft(
    capsys,
    *("train", tiny),
    *arguments(
      *PRIVATE,
      SECURE,
      *("privacy.mechanism=discrete_gaussian", "cohort.sampler=uniform"),
    ),
  )
  assert code == 0
  lines = plain(tiny.parent / "run/records.jsonl")
  alike = events.poisson(1.2, 1.0)
  done = lines[-1]["privacy/released"]
  assert done > 0
  gauss = accounting.epsilon(alike, 1e-3, rounds=done, accountant="rdp")
  # Of whole numbers it costs a little more, never less.
  assert 0.999 * gauss <= lines[-1]["privacy/epsilon"] <= 1.2 * gauss
  assert all(line["cloud/grid/saturated"] == 0 for line in lines)


def test_banded_noise_charges_one_event_a_period(tiny):
  _, found = planned(
    tiny,
    6,
    *("privacy.mechanism=banded", "cohort.sampler=cyclic"),
    *("cohort.size=2", "cohort.period=3"),
  )
  event = events.poisson(1.2, 6 / SEEN)
  one, two = (
    accounting.epsilon(event, 1e-3, rounds=n, accountant="rdp") for n in (1, 2)
  )
  told = [x["privacy/epsilon"] for x in found]
  np.testing.assert_allclose(told, [one] * 3 + [two] * 3, rtol=1e-9)


@pytest.mark.slow
def test_steps_that_hide_examples_are_charged_by_visits(tiny, capsys):
  code, _, _ = fedjax_peft(
    capsys,
    *("train", tiny),
    *arguments(
      *[x for x in PRIVATE if not x.startswith("uplink")],
      *("privacy.mechanism=example", "client.epochs=2", "rounds=2"),
    ),
  )
  assert code == 0
  event = events.poisson(1.2, 1.0)
  lines = plain(tiny.parent / "run/records.jsonl")
  for n, line in enumerate(lines, 1):
    assert line["privacy/epsilon"] == accounting.epsilon(
      event, 1e-3, rounds=2 * n, accountant="rdp"
    )
    assert line["train/clipped"] > 0


def test_messages_are_clipped_by_what_they_change_in_the_model(tiny):
  parts, _ = planned(
    tiny, 1, "privacy.metric=product", "aggregate.rule={method='ffa'}"
  )
  names = parts.algorithm.tiers[0].link.name
  assert names == "frame > clip > average > noise"


def test_local_noise_is_charged_without_sampling(tiny):
  parts, found = planned(tiny, 2, "privacy.mechanism=local")
  assert found[-1]["privacy/epsilon"] == accounting.epsilon(
    events.poisson(1.2, 1.0), 1e-3, rounds=2, accountant="rdp"
  )
  assert "local_noise" in parts.algorithm.tiers[0].link.name


def test_a_cohort_of_fixed_size_is_accounted_as_what_it_is(tiny):
  _, found = planned(tiny, 2, "cohort.sampler=uniform")
  event = events.fixed_size(1.2, 6, SEEN)
  for n, line in enumerate(found, 1):
    assert line["privacy/epsilon"] == accounting.epsilon(
      event, 1e-3, rounds=n, accountant="rdp"
    )


def test_what_is_spent_is_said_even_when_a_run_breaks_off(
  finished, tmp_path, capsys, monkeypatch
):
  """The disk is full in the midst of a resumed run."""
  shutil.copytree(finished, tmp_path / "copy")
  run, path = tmp_path / "copy" / "run", tmp_path / "copy" / "tiny.toml"
  shutil.rmtree(run / "checkpoints" / "6")
  kept = plain(run / "records.jsonl")[3]

  def full(*_):
    raise OSError("no space left on device")

  monkeypatch.setattr(record, "append", full)
  code, out, err = fedjax_peft(
    capsys,
    *("train", path, "--out", run, "--resume"),
    *arguments(*PRIVATE, SECURE),
  )
  assert code == 2
  assert "no space left" in err
  said = f"epsilon {kept['privacy/epsilon']:.4f} at delta 0.001"
  assert said in " ".join(out.split())


def test_a_simulated_network_carries_what_the_secure_sum_adds(tiny):
  network = (
    "network.clock={kind='synchronous'}",
    "network.select={method='poisson', rate=0.5}",
    "network.radio={kind='wired', up=1e5}",
    "cohort.sampler=uniform",
  )
  quiet = SECURE.replace("dropout=0.1", "dropout=0.0").replace(
    ", retries=1", ""
  )
  _, (plain,) = planned(tiny, 1, *network)
  _, (secure,) = planned(tiny, 1, *network, quiet)
  run = config.load(tiny, [*PRIVATE, quiet])
  up, down = summing.beside(run)
  assert min(up, down) > 0
  # The mask leaves 32 bits a value as they were.
  added = secure["spent/bytes"] - plain["spent/bytes"]
  assert added == secure["secure/asked"] * (up + down)
