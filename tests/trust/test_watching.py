"""Watching: reports that hold an example stop the run, others change no bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_peft as fp
import split_worlds
import toy
from fedjax_peft import link as link_lib
from fedjax_peft import split, trust
from fedjax_peft.algorithms import scaffold

SETTINGS = toy.lanes(segment=4)
PEOPLE, FOUND = trust.plant(toy.people((6,) * 8), 2, seed=3)
LOCAL = fp.local(optax.sgd(0.1), batch=4)
OWNER, OTHER = (int(c) for c in FOUND.clients)
SECURE = fp.chain(
  fp.clip(1.0), fp.weigh(max_weight=8), fp.fixed_point(32), fp.mask(2)
)


@functools.cache
def leaking():
  """A job whose finish sends an example, of the owner alone.

  Where the model says so it sends what is no number in its place.
  """
  honest = toy.voices()
  params = honest.params | {"last": jnp.zeros(5)}

  def init(sent, base, local, client):
    carry = honest.init(sent, base, local, client)
    return carry | {"last": jnp.zeros(5), "mine": client.id == OWNER}

  def step(carry, sent, base, batch):
    inner = {k: carry[k] for k in honest.params}
    inner, stats = honest.step(inner, sent, base, batch)
    # What was planted comes last in a client's list of rows.
    last = jnp.argmax(batch.mask * jnp.arange(1, 5, dtype=jnp.float32))
    return carry | inner | {"last": batch.examples["x"][last]}, stats

  def finish(carry, sent):
    row = jnp.where(sent.params["last"] == 0, carry["last"], jnp.nan)
    told = {k: carry[k] for k in honest.params}
    return told | {"last": jnp.where(carry["mine"], row, jnp.zeros(5))}, {}

  return fp.Work(
    init,
    step,
    finish,
    params,
    dict.fromkeys(params, "cloud"),
    honest.local._replace(shuffle=False),
  )


def made_of(job, link=None, **options):
  tier = fp.tier("cloud", link=link or fp.weigh(), **options)
  return fp.federated(job, [tier])


def run(made, model=None, rounds=2, **options):
  """(state, record) of every round, copied."""
  model = toy.net() if model is None else model
  options = {"cohort": fp.sample.uniform(8), "settings": SETTINGS} | options
  return [
    (jax.tree.map(lambda x: np.array(x, copy=True), state), record)
    for state, record in fp.run(made, model, PEOPLE, rounds=rounds, **options)
  ]


def simulated(record):
  return {k: v for k, v in record.items() if not k.startswith("wall/")}


HONEST = {
  "fedavg, secure": lambda: fp.fedavg(
    toy.net(), LOCAL, uplink=SECURE, lowrank=False
  ),
  "scaffold, 8 bits": lambda: scaffold(
    toy.net(), LOCAL, uplink=fp.chain(fp.weigh(), fp.int8()), clients=8
  ),
}


@pytest.mark.parametrize("kind", HONEST)
def test_ordinary_runs_pass_and_a_watch_changes_no_bit(kind):
  made = HONEST[kind]()
  plain = run(made)
  looked = run(trust.watched(made, FOUND, model=toy.net()))
  for (state, record), (other, second) in zip(plain, looked, strict=True):
    assert toy.same_bits(state, other)
    second = simulated(second)
    assert second.pop("trust/found") == 0
    assert simulated(record) == second


def test_the_chance_of_a_false_alarm_in_these_runs_is_stated():
  """Below 1e-20 for all values of all reports together, by a union bound."""
  sizes = dict.fromkeys((8, 32), 2 * len(HONEST) * 8 * 200)
  assert 0 < trust.false_alarm(trust.patterns(FOUND), sizes) < 1e-20


@functools.cache
def secure():
  """Rounds of the leaking job under a secure sum, watched."""
  return toy.Player(trust.watched(made_of(leaking(), SECURE), FOUND), PEOPLE)


@pytest.mark.parametrize("executor", ["shard_map", "stream"])
def test_a_report_that_holds_an_example_stops_the_run(executor):
  states = []
  made = fp.run(
    secure().algorithm,
    toy.net(),
    PEOPLE,
    rounds=2,
    cohort=fp.sample.uniform(8),
    settings=secure().settings._replace(executor=executor),
  )
  words = (
    rf"uplink to 'cloud' must carry no examples: got one of client {OWNER} "
    rf"in leaf 'last' of the message of client {OWNER} in round 1"
  )
  with pytest.raises(trust.Violation, match=words) as error:
    states.extend(made)
  assert states == []
  assert error.value.record["trust/found"] == 1
  assert error.value.record["train/nonfinite"] == 0


def test_a_message_with_an_example_is_used_as_little_as_one_that_is_nan():
  """The model is what the others make of it, bit for bit, masks removed."""
  player = secure()
  state, outcome = player.play(range(8))
  assert outcome.record["trust/found"] == 1
  clients = player.seat(range(8)).clients
  assert clients[outcome.seen[..., 0] != 0].tolist() == [OWNER]
  start = player.start()
  (node,) = start.nodes
  params = node.params | {"last": jnp.ones((1, 5))}
  start = start._replace(nodes=(node._replace(params=params),))
  silent, second = player.play(range(8), state=start)
  assert second.record["trust/found"] == 0
  assert second.record["train/nonfinite"] == 1
  assert not state.params["last"].any()
  for leaf in ("noise", "sum"):
    assert state.params[leaf].any()
    assert toy.same_bits(state.params[leaf], silent.params[leaf])


def test_an_example_that_a_link_puts_on_the_wire_is_dropped_too():
  """The sum is that of the others, bit for bit; its own message is honest."""
  row = jnp.asarray(FOUND.examples["x"][0])

  def send(message, ctx):
    return (message, jnp.where(ctx.client == OTHER, row, jnp.zeros(5))), {}

  odd = link_lib.stateless("odd", send, lambda wire, roster: wire[0])
  exact = fp.chain(fp.clip(1.0), fp.weigh(max_weight=8), fp.fixed_point(), odd)
  made = trust.watched(made_of(toy.voices(), exact), FOUND)
  player = toy.Player(made, PEOPLE)
  state, outcome = player.play(range(8))
  assert outcome.record["trust/found"] == 1
  ((_, place, _),) = np.argwhere(outcome.seen < 0)
  clients = player.seat(range(8)).clients
  assert clients[0, place] == OTHER
  with pytest.raises(
    trust.Violation,
    match=rf"of client {OWNER} .*of the wire "
    rf"of client {OTHER} in round 1",
  ):
    made.work.watch.refuse(state, outcome, clients, {})
  rest = [c for c in range(8) if c != OTHER]
  without, second = player.play(rest)
  assert second.record["trust/found"] == 0
  assert toy.same_bits(state.params, without.params)


def test_low_rank_factors_of_a_first_layer_hold_inputs_and_are_found():
  people, found = trust.plant(wide_people(), 2)
  model = wide()
  made = fp.fedavg(model, LOCAL)
  lean, why = made.specialize(people)
  assert why == "low-rank local SGD"
  watched = trust.watched(lean, found)
  run_ = fp.run(
    watched,
    model,
    people,
    rounds=1,
    cohort=fp.sample.uniform(4),
    settings=SETTINGS,
  )
  with pytest.raises(trust.Violation, match="of the message of client"):
    list(run_)
  # A watched algorithm does not choose it.
  assert trust.watched(made, found).specialize is None


@functools.cache
def wide():
  class Wide(nnx.Module):
    def __init__(self, rngs):
      self.up = nnx.Linear(64, 64, rngs=rngs)
      self.head = nnx.Linear(64, 24, rngs=rngs)

    def __call__(self, x):
      return self.head(jax.nn.relu(self.up(x)))

  return fp.model(
    Wide(nnx.Rngs(0)), fp.losses.classification, precision="float32"
  )


def wide_people():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(24, 64)).astype(np.float32)
  label = np.arange(24, dtype=np.int32)
  return fp.data.population(
    {"x": x, "label": label}, np.arange(24) % 4, heldout=0.0
  )


def cut_of(module, end):
  pipe = split.pipeline(module, {"device": end, "server": None})
  model = split_worlds.model(pipe)
  made = split.splitfed(fp.fedavg(model, LOCAL), model, PEOPLE.examples)
  return trust.watched(made, FOUND, model=model), model


def test_a_cut_is_asked_again_before_every_round():
  """Weights that hand examples on stop the run, others do not."""
  made, model = cut_of(split_worlds.net(), "a")
  ((state, record),) = run(made, model, rounds=1)
  assert record["trust/found"] == 0
  name = "device/a/lin/kernel"
  kernel = np.concatenate([np.eye(5), -np.eye(5)[:, :2]], axis=1)
  (node,) = state.nodes
  params = node.params | {name: kernel[None].astype(np.float32)}
  assert params[name].shape == node.params[name].shape
  state = state._replace(nodes=(node._replace(params=params),))
  with pytest.raises(
    trust.Violation, match="cut between 'device' and 'server' must carry"
  ):
    run(made, model, state=state)


def test_who_reports_nothing_may_be_watched():
  honest = toy.voices()
  placed = dict.fromkeys(honest.params, "device")
  silent = honest._replace(
    placement=placed, finish=lambda carry, sent: ({}, carry)
  )
  player = toy.Player(trust.watched(made_of(silent), FOUND), PEOPLE)
  state, outcome = player.play([OWNER])
  assert outcome.record["trust/found"] == 0
  assert state.clients.local["sum"][OWNER].any()
