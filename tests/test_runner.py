"""Runs: rounds one after another, from Python."""

import itertools

import jax
import numpy as np
import optax
import pytest

import fedjax_peft as fp
import laws
import toy

DATA = toy.people((6,) * 12, unseen=0.25)
SETTINGS = toy.lanes(segment=4)
LINK = fp.chain(fp.clip(1.0), fp.weigh(max_weight=8), fp.fixed_point())


def spoken(**options):
  return fp.federated(toy.voices(), [fp.tier("cloud", link=LINK, **options)])


def run(rounds=4, algorithm=None, **options):
  """(state, record) of every round, copied."""
  options = {"cohort": fp.sample.uniform(5), "settings": SETTINGS} | options
  made = fp.run(
    algorithm or spoken(), toy.net(), DATA, rounds=rounds, **options
  )
  return [
    (jax.tree.map(lambda x: np.array(x, copy=True), state), record)
    for state, record in made
  ]


def simulated(record):
  """What does not depend on the machine."""
  return {k: v for k, v in record.items() if not k.startswith("wall/")}


@pytest.fixture(scope="module")
def whole():
  return run()


def test_the_same_settings_give_the_same_bits(whole):
  again = run()
  for (state, record), (other, second) in zip(whole, again, strict=True):
    assert toy.same_bits(state, other)
    assert simulated(record) == simulated(second)


def test_a_run_goes_on_where_it_was_saved(whole):
  rest = run(state=whole[1][0])
  assert len(rest) == 2
  for (state, record), (other, second) in zip(whole[2:], rest, strict=True):
    assert toy.same_bits(state, other)
    assert simulated(record) == simulated(second)
  assert run(state=whole[-1][0]) == []


def test_only_clients_to_train_on_take_part():
  asked = []

  def draw(rng, number, data):
    asked.append(number)
    return np.flatnonzero(data.seen)[number : number + 3]

  turns = fp.Sampler("turns", draw, lambda data: 3)
  found = run(rounds=2, cohort=turns)
  assert set(asked) == {0, 1}
  seen = np.flatnonzero(DATA.seen)
  wanted = [
    toy.mean({c: toy.voice(DATA, c, round=r) for c in seen[r : r + 3]}, DATA)
    for r in (0, 1)
  ]
  # Clipped to norm 1, of which every client says more.
  assert found[0][1]["cloud/clip/fraction"] == 1
  assert found[0][1]["train/clients"] == 3
  turned = found[0][0].params["noise"]
  angle = np.sum(turned * wanted[0]["noise"])
  assert angle < 0  # params - new, applied as a step


def test_a_record_counts_rounds_clients_and_bytes(whole):
  _, record = whole[2]
  assert (record["round"], record["rounds"]) == (3, 4)
  assert record["train/clients"] == 5
  assert record["train/examples"] == 30
  up = toy.voices().params
  mine, shared = LINK.init(fp.Spec(up, senders=5))
  message = laws.one(jax.tree.map(lambda x: x[None], up), 0)
  wire, _, _ = LINK.send(message, mine, shared, laws.link_lib.alone())
  held = sum(x.nbytes for x in jax.tree.leaves(wire))
  assert record["up_bytes_client"] == held == (6 + 5 + 1) * 4
  assert record["cloud/up_bytes"] == 5 * held
  assert record["down_bytes_client"] == (6 + 5) * 4
  assert all(isinstance(v, int | float) for v in record.values())
  assert list(record)[-1].startswith("wall/")


def test_a_record_is_one_line_to_read(whole):
  record = fp.Record(whole[0][1])
  assert str(record).startswith("1/4  loss 2.000  up 0 kB/client")
  record |= {"eval/accuracy": 0.5, "eval/accuracy_worst10": 0.25}
  assert "acc 0.500  (worst 10% 0.250)" in str(record)


def test_evaluation_comes_every_so_often_and_after_the_last_round():
  tables = []

  def measure(state):
    number = int(state.round)
    return fp.evaluate.Report({"eval/x": number}, {"client": [number]})

  found = run(
    rounds=5,
    evaluate=measure,
    every=2,
    first=True,
    tables=lambda number, columns: tables.append((number, columns)),
  )
  records = [record for _, record in found]
  assert [r.get("eval/x") for r in records] == [None, 2, None, 4, 5]
  assert [r.get("start/eval/x") for r in records] == [0, None, None, None, None]
  assert tables == [(n, {"client": [n]}) for n in (2, 4, 5)]


def test_poisson_rounds_may_be_empty_and_are_recorded():
  found = run(rounds=6, cohort=fp.sample.poisson(0.1))
  counts = [record["train/clients"] for _, record in found]
  assert min(counts) == 0
  assert len(set(counts)) > 1
  for (before, _), (after, record) in itertools.pairwise(found):
    if record["train/clients"] == 0:
      assert toy.same_bits(before.params, after.params)
      assert record["cloud/up_bytes"] == 0


def test_clients_start_from_the_model_of_the_round_before():
  how = fp.local(optax.sgd(0.2), batch=6)
  algorithm = fp.fedavg(toy.net(), how, lowrank=False)
  everyone = fp.Sampler(
    "all", lambda rng, r, data: np.flatnonzero(data.seen), lambda data: 9
  )
  found = run(3, algorithm, cohort=everyone)
  losses = [record["train/loss"] for _, record in found]
  assert losses == sorted(losses, reverse=True)
  assert losses[0] - losses[-1] > 1e-3


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"cohort": fp.sample.uniform(10)}, "cohort size=10, .* use size=9"),
    ({"rounds": 0}, "rounds must be an integer of at least 1"),
    ({"every": 0}, "every must be an integer of at least 1"),
    ({"settings": toy.lanes(width=5)}, "room for all lanes"),
    (
      {
        "algorithm": fp.federated(
          toy.voices(), [fp.tier("cloud", link=fp.fixed_point())]
        )
      },
      "write clip",
    ),
    (
      {"cohort": fp.Sampler("own", lambda *_: [0, 0], lambda data: 2)},
      "drew a client twice",
    ),
  ],
)
def test_what_cannot_work_is_refused_before_the_first_round(options, words):
  with pytest.raises(ValueError, match=words):
    run(**options)
