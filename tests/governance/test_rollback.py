"""A poisoned round is found on the server's examples and taken back."""

import functools

import jax
import numpy as np
import optax
import pytest

import fedjax_peft as fp
import toy
from fedjax_peft import attack
from fedjax_peft.governance import gate, history, holdout, log, signing, version
from fedjax_peft.governance import trail as trails

LIARS, BAD = (3, 8), 2  # who attacks, and in which round (from zero)


@functools.cache
def people():
  """Clients whose labels follow from their features, and the server's rows."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(240, 5)).astype(np.float32)
  label = x[:, :3].argmax(1).astype(np.int32)
  owner = np.repeat(np.arange(12), 20)
  made = fp.data.population({"x": x, "label": label}, owner, heldout=0.3)
  return holdout.split(attack.attackers(made, LIARS), 0.5)


def cohort(poisoned=(BAD,)):
  """Honest clients, but in poisoned rounds one who lies."""

  def draw(rng, number, data):
    honest = rng.permutation(np.setdiff1d(np.arange(12), LIARS))[:3]
    return [LIARS[0], *honest[:2]] if number in poisoned else honest

  return fp.Sampler("visits", draw, lambda data: 3)


@functools.cache
def algorithm():
  """Attackers say a million times what they found; clients remember rows."""
  job = fp.train(toy.net(), fp.local(optax.sgd(0.3), batch=7, epochs=2))
  link = fp.chain(fp.weigh(), fp.links.error_feedback(fp.links.top_k(0.5)))
  return fp.federated(attack.scale(job, 1e6), [fp.tier("cloud", link=link)])


@functools.cache
def measure():
  data, rows = people()
  return holdout.measure(algorithm(), toy.net(), data, rows)


def run(rounds=5, how="loss", poisoned=(BAD,), executor="shard_map", **options):
  """(state, record) of every round, copied."""
  guard = gate.gate(measure(), metric=how, tolerance=0.3) if how else None
  made = fp.run(
    algorithm(),
    toy.net(),
    people()[0],
    cohort=cohort(poisoned),
    rounds=rounds,
    settings=toy.lanes(executor, segment=4),
    gate=guard,
    **options,
  )
  return [
    (jax.tree.map(lambda x: np.array(x, copy=True), state), record)
    for state, record in made
  ]


def held(state):
  return state.nodes, state.clients


@pytest.fixture(scope="module")
def guarded():
  return run()


def test_without_a_gate_the_attack_destroys_the_model(guarded):
  state, _ = run(rounds=BAD + 1, how=None)[-1]
  assert not measure()(state)["loss"] < 100
  assert measure()(guarded[BAD][0])["loss"] < 2


def test_a_poisoned_round_goes_back_to_the_last_good_state(guarded):
  said = [record["gate/rejected"] for _, record in guarded]
  assert said == [0, 0, 1, 0, 0]
  before, after = guarded[BAD - 1][0], guarded[BAD][0]
  assert toy.same_bits(held(before), held(after))
  assert version.of_state(before) == version.of_state(after)
  assert [int(s.round) for s, _ in guarded] == [1, 2, 3, 4, 5]
  record = guarded[BAD][1]
  assert record["gate/version"] == guarded[BAD - 1][1]["gate/version"] == 2
  assert not record["gate/loss"] < 100
  assert record["gate/why"].startswith("loss is ")
  # Rows are there to be taken back: a cohort's remember what was not sent.
  liars = jax.tree.leaves(run(BAD + 1, None)[-1][0].clients)
  honest = jax.tree.leaves(after.clients)
  assert any(np.any(a[3] != b[3]) for a, b in zip(liars, honest, strict=True))


def test_the_run_goes_on_as_if_it_had_skipped_the_round(guarded):
  good = guarded[BAD - 1][0]
  skipped = good._replace(round=np.int32(BAD + 1), plan={})
  rest = run(how=None, state=skipped)
  assert len(rest) == 2
  for (state, _), (other, _) in zip(guarded[BAD + 1 :], rest, strict=True):
    assert toy.same_bits(held(state), held(other))
  start = guarded[0][1]["start/gate/loss"]
  assert guarded[-1][1]["gate/loss"] < 0.8 * start


def test_a_run_without_bad_rounds_is_the_same_with_a_gate():
  plain, watched = run(3, None, ()), run(3, "loss", ())
  for (state, record), (other, more) in zip(plain, watched, strict=True):
    assert toy.same_bits(held(state), held(other))
    left = {k: v for k, v in record.items() if not k.startswith("wall/")}
    assert left.items() <= more.items()


def test_a_rollback_compiles_nothing_anew(guarded):
  programs = [record["wall/programs"] for _, record in guarded]
  assert programs == [1] * 5


@pytest.mark.parametrize(
  "executor",
  ["stream", "pmap", pytest.param("debug", marks=pytest.mark.slow)],
)
def test_rounds_are_taken_back_under_every_executor(executor):
  found = run(BAD + 2, executor=executor)
  assert [r["gate/rejected"] for _, r in found] == [0, 0, 1, 0]
  assert toy.same_bits(held(found[BAD - 1][0]), held(found[BAD][0]))
  assert not toy.same_bits(held(found[BAD][0]), held(found[BAD + 1][0]))


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_run_goes_on_with_the_same_verdicts_where_it_was_saved(guarded, at):
  rest = run(state=guarded[at - 1][0])
  for (state, record), (other, more) in zip(guarded[at:], rest, strict=True):
    assert toy.same_bits(state, other)
    for key in ("gate/rejected", "gate/version", "gate/loss", "gate/best"):
      assert record[key] == more[key]


def test_a_run_that_only_gets_worse_ends_with_its_first_model():
  found = run(9, poisoned=range(9))
  assert len(found) == 3
  assert "3 rounds in a row were rejected" in found[-1][1]["stopped"]
  state = algorithm().init(clients=12, cohort=3)
  assert toy.same_bits(held(found[-1][0]), held(jax.device_get(state)))


def test_a_trail_tells_what_happened_and_is_signed(tmp_path):
  path, signer = tmp_path / "log", signing.signer(b"a" * 32)
  first = algorithm().init(clients=12, cohort=3)
  state = first._replace(plan=gate.gate(measure()).init())

  def rounds(number, state, **options):
    trail = trails.Trail(path, state, config="c" * 64, signer=signer, **options)
    guard = gate.gate(measure(), metric="loss", tolerance=0.3)
    made = fp.run(
      algorithm(),
      toy.net(),
      people()[0],
      cohort=cohort(),
      rounds=number,
      settings=toy.lanes(segment=4),
      state=state,
      gate=guard,
    )
    return [
      (jax.tree.map(lambda x: np.array(x, copy=True), s), r)
      for s, r in trails.noted(made, trail)
    ]

  found = rounds(4, state)
  rounds(5, found[1][0])  # as if the rest had been lost
  assert log.verify(path, signer.identity) is None
  entries = log.read(path)
  assert [e["kind"] for e in entries] == [
    *("start", "round", "round", "round", "rollback", "round", "stop"),
    *("resume", "round", "rollback", "round", "round", "stop"),
  ]
  assert entries[7]["repeats"] == [3, 4]
  told, broken = history.follow(entries)
  assert broken is None
  assert told.rejected == {BAD + 1}
  assert told.at[5].number == 4
  for number, (copied, record) in enumerate(found, start=1):
    assert told.at[number].state == version.of_state(copied)
    assert entries[number + (number > 3)]["cohort"] == record["gate/cohort"]
  with pytest.raises(ValueError, match="must be a version that the audit log"):
    rounds(5, found[1][0]._replace(nodes=found[0][0].nodes))
  signer = signing.signer(b"b" * 32)
  with pytest.raises(ValueError, match="line 1 is broken: it is not signed by"):
    rounds(5, found[1][0])
  path.write_bytes(
    path.read_bytes().replace(b'"rejected":true', b'"rejected":1')
  )
  with pytest.raises(ValueError, match="line 4 is broken"):
    trails.Trail(path, state, config="c" * 64, signer=signing.signer(b"a" * 32))


def test_a_server_has_examples_that_nobody_else_is_tested_on():
  data = toy.people((9,) * 8, heldout=0.4, unseen=0.25)
  before = np.unique(data.test)
  for share in (0.01, 0.3, 0.99):
    rest, rows = holdout.split(data, share, seed=3)
    left = np.unique(rest.test)
    assert rows.size == min(max(round(share * before.size), 1), before.size - 1)
    np.testing.assert_array_equal(np.union1d(left, rows), before)
    assert not np.isin(rows, left).any()
    assert not np.isin(rows, rest.heldout.rows).any()
    assert toy.same_bits(rest.train, data.train)
    again, same = holdout.split(data, share, seed=3)
    assert toy.same_bits((again.heldout, same), (rest.heldout, rows))
  assert not np.array_equal(rows, holdout.split(data, 0.3, seed=4)[1])
  for share in (0.0, 1.0, float("nan")):
    with pytest.raises(ValueError, match=r"must be in \(0, 1\)"):
      holdout.split(data, share)
  with pytest.raises(ValueError, match="at least two are expected: got 0"):
    holdout.split(toy.people(), 0.5)


def test_a_measure_is_the_mean_over_the_servers_examples(tol):
  data, rows = people()
  state = algorithm().init(clients=12, cohort=3)
  model = toy.net()
  mine = {k: v[rows] for k, v in data.examples.items()}
  each, metrics, _ = model.loss(
    state.params, model.base, mine, jax.random.key(0)
  )
  found = measure()(state)
  wanted = float(np.mean(np.asarray(each, np.float64)))
  assert found["loss"] == pytest.approx(wanted, rel=tol(np.float32, 12))
  right = np.asarray(metrics["accuracy"][0]).sum()
  assert found["accuracy"] == right / len(rows)


def test_leaves_that_live_on_clients_are_not_measured():
  data, rows = people()
  job = fp.train(
    toy.net(), fp.local(optax.sgd(0.1), batch=4), rules={"head/.*": "device"}
  )
  made = fp.federated(job, [fp.tier("cloud")])
  with pytest.raises(ValueError, match="'head/kernel' lives at 'device'"):
    holdout.measure(made, toy.net(), data, rows)
