"""What a wire could not say in a step is said in the next one."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from flax import nnx
from hypothesis import strategies as st

import fedjax_peft as fp
import split_worlds as worlds
import toy
from fedjax_peft import link, links, split
from fedjax_peft.data import schedule
from fedjax_peft.split import cutting, feedback, memory, offline
from tolerance import tol

BATCH, STEPS, RATE = 4, 5, 0.1
CLIENT = 8  # has eleven examples: three batches of a pass, one of them short
LOCAL = fp.local(optax.sgd(RATE), batch=BATCH, steps=STEPS)
COARSE = links.affine(2, per="token", stochastic=False)
FEW = links.top_k(0.25)
WIRE = split.Wire(COARSE, FEW)

LOSSY = {
  **{f"affine({b})": links.affine(b, per="token") for b in (1, 2, 5, 16, 31)},
  "affine(1, tensor)": links.affine(1),
  "affine(3, channel)": links.affine(3, per="channel", stochastic=False),
  "top_k": links.top_k(0.1),
  "sign": links.sign(),
  "int4": links.int4(),
  "rotated": link.chain(links.rotate(), links.int8()),
  "few and coarse": link.chain(links.top_k(0.3), links.int8()),
}


# The law of what is held, on its own.


SHAPE = (BATCH, 3, 5)


@functools.cache
def stepping(wire):
  """(what is held at first, its graph, one step over the wire)."""
  spec = {"x": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
  graph, state = nnx.split(feedback.Held(wire, spec, nnx.Param))

  @jax.jit
  def step(floats, gradient, state, key, real):
    def across(floats, state):
      return nnx.merge(graph, state)(wire, floats, key, real)

    came, pull = jax.vjp(across, floats, state)
    return came, *pull(gradient)

  return state, graph, step


class Told:
  """Totals over steps, float64 [2, *SHAPE], and what is held at the end."""

  def __init__(self, wire, steps, real, key=0):
    state, graph, step = stepping(wire)
    self.sent, self.came = np.zeros((2, 2, *SHAPE))
    self.most = np.zeros((2, 1, 1, 1))  # in magnitude, of anything
    for i in range(steps):
      own = jax.random.fold_in(jax.random.key(key), i)
      # Neither is centred, and rows that are padding hear nothing.
      x = 2 + jax.random.normal(own, SHAPE)
      g = 0.1 * jax.random.normal(jax.random.fold_in(own, 1), x.shape)
      g = jnp.where(real[:, None, None] > 0, g, 0)
      came, back, state = step({"x": x}, {"x": g}, state, own, real)
      self.sent += np.stack([x, g])
      self.came += np.stack([came["x"], back["x"]])
      held = nnx.merge(graph, state)
      now = [_most(held.up, came), _most(held.down, back)]
      self.most = np.maximum(self.most, np.reshape(now, self.most.shape))
    self.held = np.stack([held.up["x"][...], held.down["x"][...]])


def _most(held, came):
  return max(float(jnp.abs(x["x"][...]).max()) for x in (held, came))


@pytest.mark.parametrize("name", LOSSY)
def test_what_was_received_is_what_was_sent_less_what_is_held(name):
  steps, real = 6, jnp.ones(BATCH)
  told = Told(split.Wire(LOSSY[name], LOSSY[name]), steps, real)
  # Each step rounds a sum, and the link's decoding, of values up to `most`.
  near = tol(jnp.float32, steps) * told.most * steps
  law = told.came + told.held - told.sent
  assert (np.abs(law) < near).all()
  if name in ("affine(16)", "affine(31)"):  # what is held is next to nothing
    return
  wrong = told.came - told.held - told.sent
  assert ((np.abs(wrong) / near).max(axis=(1, 2, 3)) > 100).all()


@pytest.mark.parametrize("name", ["affine(2)", "top_k", "sign", "rand_k"])
def test_what_is_held_stays_small_unless_a_link_scales_up(name):
  one = {**LOSSY, "rand_k": links.rand_k(0.1)}[name]
  few, many = (
    np.abs(Told(split.Wire(one, one), steps, jnp.ones(BATCH)).held).max()
    for steps in (8, 20)
  )
  assert (many > 100 * few) == (name == "rand_k")
  assert many < 20 or name == "rand_k"  # of values of about 2


@hypothesis.settings(deadline=None, max_examples=8, derandomize=True)
@hypothesis.given(
  st.lists(st.sampled_from([0.0, 1.0]), min_size=BATCH, max_size=BATCH)
)
def test_rows_that_are_padding_hold_nothing_and_move_nothing(rows):
  real = jnp.array(rows)
  told = Told(WIRE, 3, real)
  empty, here = np.array(rows) == 0, np.array(rows) > 0
  assert (told.held[:, empty] == 0).all()
  assert (told.came[1, empty] == 0).all()
  law = told.came + told.held - told.sent
  assert np.abs(law[:, here]).max(initial=0) < 3 * tol(jnp.float32, 3) * 10
  assert not here.any() or np.abs(told.held[:, here]).max() > 1e-3


def test_what_waits_for_its_row_is_not_lost():
  held = feedback.Held(
    WIRE, {"x": jax.ShapeDtypeStruct((2, 4), jnp.float32)}, nnx.Param
  )
  kept = jnp.arange(8.0).reshape(2, 4)
  held.up["x"][...] = kept
  graph, state = nnx.split(held)
  real, x = jnp.array([1.0, 0.0]), jnp.ones((2, 4))

  def run(state):
    key = jax.random.key(0)
    return nnx.merge(graph, state)(WIRE, {"x": x}, key, real)

  came, pull = jax.vjp(run, state)
  after = nnx.merge(graph, *pull({"x": x})).up["x"][...]
  assert np.array_equal(after[1], kept[1])  # as it was
  assert np.array_equal(came["x"][1], x[1])  # equal values cross exactly
  assert not np.array_equal(after[0], kept[0])


def test_a_batch_of_another_length_is_refused_where_it_is_trained_on():
  pipe = remembering_pipe(WIRE)
  x = toy.people().examples["x"][:3]
  with pytest.raises(ValueError, match=r"4 long: got \(3, 7\)"):
    pipe(x=x, **{cutting.REAL: jnp.ones(3)})


# The same in a federation.


def remembering_pipe(wire):
  pipe = split.pipeline(worlds.net(), {"device": "a", "server": None}, wire)
  return feedback.with_memory(pipe, BATCH, toy.people().examples)


def playing(scheme, model, how, places):
  examples = toy.people().examples
  if scheme == "splitfed":
    made = fp.fedavg(model, how, placement=places, lowrank=False)
    made = split.splitfed(made, model, examples)
  elif scheme == "lockstep":
    made = split.lockstep(model, how, examples, placement=places)
  else:
    made = split.in_turn(model, how, examples, shared=scheme, placement=places)
  settings = None if scheme == "splitfed" else toy.lanes(width=1, segment=1)
  most = None if scheme == "splitfed" else 1
  return toy.Player(made, toy.people(), model.base, settings, most)


@functools.cache
def player(scheme="splitfed", wire=WIRE):
  model = worlds.model(remembering_pipe(wire))
  return playing(scheme, model, memory.remembering(LOCAL), memory.PLACEMENT)


@functools.cache
def forgetful(wire):
  model = worlds.cut(wire, {"device": "a", "server": None})
  return playing("splitfed", model, LOCAL, None), model


def said(links_, whole):
  mine, shared = links_.init(link.Spec(whole))
  came, *_ = link.broadcast(links_)(whole, mine, shared, link.alone())
  return came["x"]


@jax.jit
def step_by_hand(params, up, down, examples, mask):
  """One step of a client, whose wire is written out."""
  _, model = forgetful(WIRE)
  mine = {k: v for k, v in params.items() if k.startswith("device/")}
  theirs = {k: v for k, v in params.items() if k not in mine}
  there = mask[:, None] > 0

  def front(mine):
    module = model.module({**mine, **theirs}, model.base)
    return module.device(x=examples["x"])["x"]

  def behind(x, theirs):
    logits = model.module({**mine, **theirs}, model.base).server({"x": x})
    each, _ = fp.losses.classification(
      lambda **_: logits, examples, jax.random.key(0)
    )
    return jnp.sum(each * mask) / jnp.sum(mask)

  x, pull = jax.vjp(front, mine)
  came = said(COARSE, {"x": x + up})
  up = jnp.where(there, x + up - came, up)
  # Of rows that are padding the server makes no gradient.
  gradient, slopes = jax.grad(behind, (0, 1))(came, theirs)
  back = said(FEW, {"x": jnp.where(there, gradient + down, 0)})
  down = jnp.where(there, gradient + down - back, down)
  slopes |= pull(back)[0]
  return {k: v - RATE * slopes[k] for k, v in params.items()}, up, down


def by_hand(rounds):
  """One client alone in a plain loop: its model, and what its wire holds."""
  data = toy.people()
  params, (up, down) = forgetful(WIRE)[1].params, jnp.zeros((2, BATCH, 7))
  how = {"batch": BATCH, "steps": STEPS}
  for number in range(rounds):
    ids, seed = np.array([CLIENT]), (0, number)
    for rows in schedule.batches(data.train, ids, seed=seed, **how).rows:
      here = np.where(rows < 0, rows[0], rows)
      examples = {k: jnp.asarray(v[here]) for k, v in data.examples.items()}
      mask = jnp.asarray(rows >= 0, jnp.float32)
      params, up, down = step_by_hand(params, up, down, examples, mask)
  return params, up, down


def test_a_round_is_that_of_a_plain_loop_and_so_is_the_next():
  for rounds in (1, 2):
    state, _ = player().play(*[[CLIENT]] * rounds)
    params, up, down = by_hand(rounds)
    near = tol(jnp.float32, 64)
    for name, value in params.items():
      assert np.allclose(state.params[name], value, atol=near), name
    local = state.clients.local
    for way, value in (("up", up), ("down", down)):
      held = local[f"memory/feedback/0/{way}/x"]
      assert np.allclose(held[CLIENT], value, atol=near)
      assert np.abs(held[CLIENT]).max() > 1e-3
      others = np.arange(len(held)) != CLIENT
      assert (held[others] == 0).all()
  without, _ = forgetful(WIRE)[0].play([CLIENT])
  name = "device/a/lin/kernel"
  assert not np.allclose(without.params[name], state.params[name], atol=1e-3)


@pytest.mark.parametrize("scheme", ["lockstep", "all", "server"])
def test_for_one_client_every_scheme_is_the_same(scheme):
  want, _ = player().play([CLIENT])
  got, _ = player(scheme).play([CLIENT])
  near = tol(jnp.float32, 64)
  for a, b in ((want.params, got.params), (want.clients[0], got.clients[0])):
    assert a.keys() == b.keys()
    for name, value in a.items():
      assert np.allclose(b[name], value, atol=near), name


def test_a_wire_that_loses_nothing_is_not_changed_by_a_bit():
  exact = split.Wire(links.affine(32), links.affine(32))
  got, _ = player("splitfed", exact).play([3, 1, 8], [5, 8])
  want, _ = forgetful(exact)[0].play([3, 1, 8], [5, 8])
  for name, value in want.params.items():
    assert toy.same_bits(got.params[name], value), name
  assert len(got.clients.local) == 2
  for held in got.clients.local.values():
    assert not held.any()


def test_while_a_link_is_gone_nothing_is_said_and_nothing_held():
  data, always = toy.people(), np.full(len(toy.SIZES), 99)
  pipe = remembering_pipe(WIRE)
  pipe = offline.with_memory(pipe, BATCH, data.examples)
  model = worlds.model(pipe, offline.gated(fp.losses.classification))
  how, places = memory.remembering(LOCAL), offline.PLACEMENT
  made = fp.fedavg(model, how, placement=places, lowrank=False)
  made = offline.tolerant(split.splitfed(made, model, data.examples))
  there = toy.Player(made, data.with_traits(online=always), model.base)
  gone = there.over()
  gone.data = data.with_traits(online=0 * always)
  state, _ = there.play([CLIENT])
  want, _ = player().play([CLIENT])
  for name, value in want.clients.local.items():
    near = tol(jnp.float32, 64)
    assert np.allclose(state.clients.local[name], value, atol=near), name
  later, _ = gone.play([CLIENT], state=state)
  for name, value in state.clients.local.items():
    # It becomes what it was: p + (p - p).
    assert np.array_equal(later.clients.local[name], value), name
  device = "device/a/lin/kernel"
  assert not np.array_equal(later.params[device], state.params[device])


def test_what_is_looked_at_and_not_trained_on_crosses_as_it_is():
  model = worlds.model(remembering_pipe(WIRE))
  full = {
    k: jnp.ones_like(v) if k.startswith("memory/") else v
    for k, v in model.params.items()
  }
  x = toy.people().examples["x"][:BATCH]
  plain = worlds.cut(WIRE, {"device": "a", "server": None})
  want = plain.module(plain.params, plain.base)(x=x)
  seen = model.module(full, model.base)
  assert np.array_equal(seen(x=x), want)
  trained_on = seen(x=x, **{cutting.REAL: jnp.ones(BATCH)})
  assert not np.allclose(trained_on, want, atol=1e-3)
  view = player().algorithm.work.view(full)
  held = [k for k in view if k.startswith("memory/")]
  assert len(held) == 2
  assert not any(view[k].any() for k in held)


def test_every_wire_has_a_memory_each_way_that_loses_something():
  wires = [split.Wire(up=FEW), split.Wire(down=None), split.Wire(down=FEW)]
  ends = {"device": "a", "server": "b", "home": None}
  three = split.pipeline(worlds.net(), ends, [wires[0], wires[2]])
  made = feedback.with_memory(three, BATCH, toy.people().examples)
  held = made.memory.feedback
  assert {i: (len(x.up), len(x.down)) for i, x in held.items()} == {
    "0": (1, 0),
    "1": (0, 1),
  }
  assert held["1"].down["x"][...].shape == (BATCH, 6)
  assert not any(
    map(feedback.loses, (None, link.chain(), link.chain(link.chain())))
  )


# Whether it helps.


ROWS, MORE = 32, 500  # examples, and steps on all of them


def floors(wire, remember, seeds=12):
  """Mean losses after many steps on the same rows, [seeds]."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(ROWS, 5)).astype(np.float32)
  examples = {"x": x, "label": rng.integers(0, 3, ROWS).astype(np.int32)}
  pipe = split.pipeline(worlds.net(), {"device": "b", "server": None}, wire)
  if remember:
    pipe = feedback.with_memory(pipe, ROWS, examples)
  model = worlds.model(pipe)
  batch = {**examples, cutting.REAL: jnp.ones(ROWS)}

  def loss(params, key):
    return jnp.mean(model.loss(params, model.base, batch, key)[0])

  def step(params, key):
    value, slopes = jax.value_and_grad(loss)(params, key)
    new = {
      k: slopes[k] if k.startswith("memory/") else v - 0.1 * slopes[k]
      for k, v in params.items()
    }
    return new, value

  @jax.jit
  @jax.vmap
  def descend(key):
    params = {
      k: v
      if k.startswith("memory/")
      else 0.5 * jax.random.normal(jax.random.fold_in(key, i), v.shape)
      for i, (k, v) in enumerate(sorted(model.params.items()))
    }
    _, values = jax.lax.scan(step, params, jax.random.split(key, MORE))
    return jnp.mean(values[-MORE // 10 :])

  return np.asarray(descend(jax.random.split(jax.random.key(7), seeds)))


def better(wire):
  """By how much a memory lowers the loss, [seeds], and how likely by chance."""
  gain = floors(wire, False) - floors(wire, True)
  return gain, scipy.stats.binomtest(int((gain > 0).sum()), gain.size).pvalue


# Twelve times out of twelve by chance: p = 2^-11, on both sides.
@pytest.mark.parametrize("name", ["top_k", "sign"])
def test_gradients_of_few_values_or_bits_reach_a_lower_loss(name):
  down = {"top_k": links.top_k(0.02), "sign": links.sign()}[name]
  gain, p = better(split.Wire(down=down))
  assert p < 1e-3
  assert gain.mean() > 0.2  # of a loss of log(3) for guessing


def test_coarse_activations_do_not():
  gain, p = better(split.Wire(up=links.affine(2, stochastic=False)))
  assert p < 1e-3
  assert gain.mean() < -0.1


# What cannot be is refused.


def test_what_has_nothing_to_say_later_is_refused():
  ends, examples = {"device": "a", "server": None}, toy.people().examples
  one = split.Wire(FEW, FEW, common=True)
  movable = split.movable(worlds.net(), WIRE)
  for module, sentence in (
    (split.pipeline(worlds.net(), ends), "no link loses anything"),
    (split.pipeline(worlds.net(), ends, one), "wire with common=True"),
    (movable, "cut in one place for all: got a Modules"),
  ):
    with pytest.raises(ValueError, match=sentence):
      feedback.with_memory(module, BATCH, examples)
  up = split.pipeline(worlds.net(), ends, split.Wire(up=FEW))
  with pytest.raises(ValueError, match="no link loses anything on its way d"):
    feedback.with_memory(up, BATCH, examples, ways=("down",))
  with pytest.raises(ValueError, match="got ways='dwon'; did you mean 'down'"):
    feedback.with_memory(up, BATCH, examples, ways=("dwon",))


def test_a_memory_that_leaves_or_is_trained_is_refused():
  model, examples = worlds.model(remembering_pipe(WIRE)), toy.people().examples
  how = memory.remembering(LOCAL)
  away = fp.fedavg(model, how)
  with pytest.raises(ValueError, match="a memory is of one client: got 'memor"):
    split.splitfed(away, model, examples)
  moved = fp.fedavg(model, LOCAL, placement=memory.PLACEMENT)
  with pytest.raises(ValueError, match="whose optimizer moves it; write split"):
    split.splitfed(moved, model, examples)
