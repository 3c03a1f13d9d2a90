"""The laws of the executor: a client's bits, the sum's bits, a run's bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_peft as fp
import laws
import toy
from fedjax_peft import tree

COHORT = (7, 0, 9, 3, 4, 8, 1, 6)
INTEGERS = fp.chain(
  fp.clip(1.0), fp.weigh(max_weight=8), fp.fixed_point(bits=32)
)
HOW = fp.local(optax.sgd(0.1), batch=4, epochs=2)
NET, VOICES = toy.people(), toy.people(seed=1)


def personal():
  """Heads stay on their clients, so that each client's bits can be read."""
  return fp.fedavg(
    toy.net(),
    HOW,
    uplink=INTEGERS,
    placement={"head/.*": "device"},
    lowrank=False,
  )


def spoken(link=INTEGERS, **options):
  """Exact messages, summed."""
  return fp.federated(toy.voices(**options), [fp.tier("cloud", link=link)])


def player(settings=None):
  return toy.Player(personal(), NET, toy.net().base, settings)


@pytest.fixture(scope="module")
def reference():
  return player()


@pytest.fixture(scope="module")
def trained(reference):
  """Two rounds: one cohort, then the same in another order."""
  return reference.play(COHORT, COHORT[::-1])


# The client law.


def test_a_client_trains_the_same_in_any_order(reference, trained):
  state, _ = reference.play(COHORT[3:] + COHORT[:3], sorted(COHORT))
  assert toy.same_bits(state.clients, trained[0].clients)
  assert toy.same_bits(state.params, trained[0].params)


def test_a_client_trains_the_same_in_any_company(reference, trained):
  few, _ = reference.play((4, 7, 2))
  many, _ = reference.play(COHORT)
  for client in (4, 7):
    assert toy.same_bits(
      few.clients.local["head/kernel"][client],
      many.clients.local["head/kernel"][client],
    )


@pytest.mark.parametrize(
  "settings",
  [
    toy.lanes(blocks=2),
    toy.lanes(segment=2),
    toy.lanes("stream"),
    toy.lanes("pmap"),
  ],
  ids=["blocks", "segments", "stream", "pmap"],
)
def test_a_client_trains_the_same_however_lanes_are_arranged(settings, trained):
  state, outcome = player(settings).play(COHORT, COHORT[::-1])
  assert toy.same_bits(state.clients, trained[0].clients)
  assert toy.same_bits(state.params, trained[0].params)
  assert outcome.record["train/loss"] == pytest.approx(
    trained[1].record["train/loss"], rel=1e-6
  )


@pytest.mark.parametrize(
  "settings",
  [toy.lanes(width=1), toy.lanes(width=4), toy.lanes(devices=2)],
  ids=["narrow", "wide", "two devices"],
)
def test_a_client_trains_nearly_the_same_on_other_shapes(
  settings, trained, tol
):
  # 8 steps of products of length 7 in two rounds, then a mean of 8 clients.
  state, _ = player(settings).play(COHORT, COHORT[::-1])
  eps = tol(jnp.float32, 8 * 7 * 2 * 8)
  for found, wanted in (
    (state.clients, trained[0].clients),
    (state.params, trained[0].params),
  ):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=eps, atol=eps),
      found,
      wanted,
    )


def test_another_seed_is_another_run(reference, trained):
  state, _ = reference.play(COHORT, COHORT[::-1], seed=1)
  assert not toy.same_bits(state.clients, trained[0].clients)


def test_an_executor_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match="did you mean 'shard_map'"):
    player(toy.lanes("shard_mop"))


def test_more_devices_than_there_are_is_refused():
  with pytest.raises(ValueError, match="want 64 devices, but 2 are here"):
    player(toy.lanes(devices=64))


# The run law.


def test_a_run_goes_on_from_a_saved_state_bit_for_bit(reference):
  cohorts = COHORT, COHORT[::-1], COHORT[2:] + COHORT[:2]
  whole, last = reference.play(*cohorts)
  saved, _ = reference.play(cohorts[0])
  saved = jax.tree.map(lambda x: np.array(x, copy=True), saved)  # on disk
  state, outcome = reference.play(*cohorts[1:], state=saved)
  assert toy.same_bits(state, whole)
  assert toy.same_bits(outcome, last)


# The sum law.


@pytest.fixture(scope="module")
def heard():
  return toy.Player(spoken(), VOICES).play(COHORT, COHORT)


@pytest.mark.parametrize(
  "settings",
  [
    toy.lanes(segment=2),
    toy.lanes(width=1, segment=1),
    toy.lanes(devices=2, width=3),
  ],
  ids=["segments", "one lane", "two devices"],
)
def test_integers_add_up_to_the_same_bits_however_they_meet(settings, heard):
  state, _ = toy.Player(spoken(), VOICES, settings=settings).play(
    COHORT[::-1], sorted(COHORT)
  )
  assert toy.same_bits(state.params, heard[0].params)


def test_the_sum_is_what_the_clients_said(heard):
  wanted = {"noise": np.zeros((2, 3)), "sum": np.zeros(5)}
  for number in range(2):
    clipped = {}
    for c in COHORT:
      said = toy.voice(VOICES, c, round=number)
      length = np.sqrt(sum(np.sum(x**2) for x in said.values()))
      clipped[c] = {k: x / max(length, 1) for k, x in said.items()}
    weights = np.minimum(VOICES.train.sizes[list(COHORT)], 8)
    for k in wanted:
      rows = np.stack([clipped[c][k] for c in COHORT])
      wanted[k] = wanted[k] - np.tensordot(weights / weights.sum(), rows, 1)
  for k, x in wanted.items():
    np.testing.assert_allclose(heard[0].params[k], x, atol=1e-6)


@pytest.fixture(scope="module")
def floats():
  server = optax.sgd(1.0, momentum=0.9)
  return toy.Player(
    fp.federated(toy.voices(), [fp.tier("cloud", server=server)]), VOICES
  )


def test_floats_add_up_to_the_same_bits_under_the_same_settings(floats):
  once, _ = floats.play(COHORT)
  again, _ = floats.play(COHORT)
  assert toy.same_bits(once, again)
  turned, _ = floats.play(COHORT[::-1])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    turned.params,
    once.params,
  )


# Who counts.


def test_a_round_without_clients_changes_nothing_but_its_number(floats):
  before, _ = floats.play(COHORT)
  after, outcome = floats.play((), state=before)
  assert toy.same_bits(after._replace(round=before.round), before)
  assert int(after.round) == 2
  assert outcome.record["train/clients"] == 0
  assert all(np.isfinite(x) for x in outcome.record.values())


def test_empty_places_and_clients_without_examples_do_not_count():
  rng = np.random.default_rng(0)
  data = fp.data.population(
    {"x": rng.normal(size=(15, 5)).astype(np.float32)},
    [[0, 1, 2], [], [3, 4, 5, 6, 7], [8], [], [9, 10, 11, 12]],
    heldout=[[], [13], [], [], [14], []],
    unseen=[False, True, False, False, True, False],
  )
  algorithm = fp.federated(toy.voices(), [fp.tier("cloud")])
  # Five of six places, one of them a client that has nothing to train on.
  state, outcome = toy.Player(algorithm, data).play((0, 1, 2, 3, 5))
  assert outcome.record["train/clients"] == 4
  assert outcome.record["train/examples"] == 13
  wanted = toy.mean({c: toy.voice(data, c) for c in (0, 2, 3, 5)}, data)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(-a, b, rtol=1e-5, atol=1e-6),
    state.params,
    wanted,
  )


def shouting(data, rows, value):
  """The features x, some of them very large."""
  features = np.array(data.examples["x"])
  features[rows] = value
  return features


def test_a_message_that_is_not_finite_is_dropped_and_counted():
  loud = shouting(VOICES, VOICES.train[4][:2], 3e38)  # their sum is inf
  algorithm = fp.federated(
    toy.voices(), [fp.tier("cloud", link=fp.chain(laws.feedback(), fp.weigh()))]
  )
  play = toy.Player(algorithm, VOICES)
  state, outcome = play.over(x=loud).play(COHORT)
  assert outcome.record["train/nonfinite"] == 1
  assert outcome.record["train/clients"] == 8
  assert all(np.isfinite(x) for x in outcome.record.values())
  rest = [c for c in COHORT if c != 4]
  wanted = toy.mean({c: toy.voice(VOICES, c) for c in rest}, VOICES)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(-a, b, atol=0.0626),
    state.params,
    wanted,
  )
  # What a link remembers is committed only where the message arrived.
  (memory, _), clean = state.clients.mine, play.play(COHORT)[0].clients.mine[0]
  others = np.array(rest)
  assert toy.same_bits(memory["sum"][others], clean["sum"][others])
  assert np.any(clean["sum"][4] != 0)
  assert np.all(memory["sum"][[2, 4, 5]] == 0)


def test_padding_brings_nothing_of_another_client():
  # Row 0 is where padding pointed once: its gradient is not finite.
  local = fp.fedavg(toy.net(), HOW, placement={".*": "device"}, lowrank=False)
  play = toy.Player(local, NET, toy.net().base)
  loud = next(c for c in range(10) if 0 in NET.train[c])
  quiet = np.array([c for c in range(10) if c != loud])
  calm, _ = play.play(range(10))
  shouted = play.over(x=shouting(NET, 0, np.inf))
  state, outcome = shouted.play(range(10))
  one, two = (
    jax.tree.map(lambda x: x[quiet], x.clients.local) for x in (state, calm)
  )
  assert toy.same_bits(one, two)
  assert outcome.record["train/nonfinite"] == 1
  # What a client keeps is never replaced by what is not finite.
  for leaf in jax.tree.leaves(state.clients.local):
    assert np.isfinite(leaf).all()


# Size and number of programs.


def test_clients_of_one_size_need_one_program_for_many_rounds():
  data = toy.people((6,) * 12)
  play = toy.Player(spoken(), data)
  rng = np.random.default_rng(0)
  cohorts = [rng.permutation(12)[:7] for _ in range(6)]
  state, _ = play.play(*cohorts)
  assert int(state.round) == 6
  assert play.step.programs() == 1


def test_heavy_tailed_cohorts_need_few_shapes():
  sizes = np.ceil(np.random.default_rng(0).lognormal(2, 1, 200)).astype(int)
  play = toy.Player(
    spoken(), toy.people(tuple(sizes)), settings=toy.lanes(width=4, segment=16)
  )
  rng = np.random.default_rng(1)
  shapes = set()
  for number in range(60):
    seated = play.seat(rng.permutation(200)[:32], round=number)
    shapes.add(tuple(np.shape(x) for x in jax.tree.leaves(seated)))
  assert len(shapes) <= 6


def test_a_flight_grows_by_a_few_scalars_a_client_whatever_they_send():
  def flight(cohort, width):
    """Bytes of a flight whose clients say `width` values."""
    short = toy.voices()
    wide = {"noise": jnp.zeros((2, 3)), "sum": jnp.zeros(width)}
    data = toy.people((3,) * cohort)
    features = {"x": jax.ShapeDtypeStruct((3 * cohort, width), jnp.float32)}

    def init(sent, base, local, client):
      return short.init(sent, base, local, client) | {"sum": jnp.zeros(width)}

    job = short._replace(params=wide, init=init)
    algorithm = fp.federated(job, [fp.tier("cloud", link=INTEGERS)])
    play = toy.Player(algorithm, data)
    seated = play.seat(range(cohort))._replace(examples=features)
    begun = jax.eval_shape(
      lambda s, c, k: algorithm.begin(s, {}, c, k, shape=(1, 2), width=4),
      jax.eval_shape(lambda: algorithm.init(clients=cohort, cohort=cohort)),
      seated,
      jax.eval_shape(lambda: jax.random.key(0)),
    )
    return tree.nbytes(begun[2])

  for width in (10, 1000):
    each = (flight(512, width) - flight(128, width)) / 384
    assert 0 < each <= 64
  assert flight(128, 1000) > flight(128, 10)


def test_a_round_of_static_length_is_a_differentiable_function(tol):
  # Where clients end, by where they start: against a central difference of
  # the compiled round.
  how = fp.local(optax.sgd(0.1), batch=4)
  algorithm = fp.fedavg(toy.net(), how, lowrank=False)
  play = toy.Player(algorithm, NET, toy.net().base)
  seated, state, ids = play.seat((3, 5)), play.start(), (3, 5)
  plan = seated.schedule._replace(ticks=None)
  seated = seated._replace(segments=None, schedule=plan)

  def starting(params):
    node = state.nodes[0]._replace(params=params)
    return state._replace(nodes=(node,))

  def length(params):
    return sum(jnp.sum(jnp.square(x)) for x in params.values())

  @jax.jit
  @jax.value_and_grad
  def end(params):
    new, _ = algorithm.round(
      starting(params), play.base, seated, jax.random.key(0), shape=(1, 2)
    )
    return length(new.params)

  def played(params):
    return float(length(play.play(ids, state=starting(params))[0].params))

  start = state.nodes[0].params
  value, slope = end(start)
  assert float(value) == pytest.approx(played(start), rel=tol(jnp.float32, 56))
  rng, step = np.random.default_rng(0), 1e-2
  along = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), start
  )
  ahead, back = (
    played(jax.tree.map(lambda x, d: x + s * d, start, along))
    for s in (step, -step)
  )
  wanted = sum(float(jnp.vdot(slope[k], along[k])) for k in start)
  # Rounding of 1e-6 / step, and the kinks of relu.
  assert (ahead - back) / (2 * step) == pytest.approx(wanted, rel=2e-2)
