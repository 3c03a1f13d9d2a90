"""A device whose link is gone goes on with the last gradient that came."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_peft as fp
import split_worlds as worlds
import toy
from fedjax_peft import split
from fedjax_peft.data import schedule
from fedjax_peft.split import memory, offline

BATCH, STEPS, RATE = 4, 3, 0.1
CLIENT = 8  # has nine examples: three batches of a pass, one of them short
ALWAYS = 99
LOCAL = fp.local(optax.sgd(RATE), batch=BATCH, steps=STEPS)


def cut():
  return split.pipeline(worlds.net(), {"device": "a", "server": None})


@functools.cache
def player():
  """Rounds of clients that go on without a link."""
  data = toy.people().with_traits(online=np.full(10, ALWAYS))
  pipe = offline.with_memory(cut(), BATCH, data.examples)
  loss = offline.gated(fp.losses.classification)
  model = fp.model(pipe, loss, precision="float32")
  how = memory.remembering(LOCAL)
  made = fp.fedavg(model, how, placement=offline.PLACEMENT)
  made = offline.tolerant(split.splitfed(made, model, data.examples))
  return toy.Player(made, data, model.base)


def online(steps):
  """The same rounds, in which links are there for so many steps."""
  other = player().over()
  other.data = toy.people().with_traits(online=np.full(10, steps))
  return other


@functools.cache
def plain():
  """The same model, whose links are always there."""
  data = toy.people()
  model = fp.model(cut(), fp.losses.classification, precision="float32")
  made = split.splitfed(fp.fedavg(model, LOCAL), model, data.examples)
  return toy.Player(made, data, model.base), model


def by_hand(params, steps):
  """One client's round in a plain loop, its link there for some steps."""
  data, (_, model) = toy.people(), plain()
  rows = schedule.batches(
    data.train, np.array([CLIENT]), batch=BATCH, steps=STEPS, seed=(0, 0)
  ).rows
  came = None
  for i, batch in enumerate(rows):
    here = np.where(batch < 0, batch[0], batch)
    mask = jnp.asarray(batch >= 0, jnp.float32)
    examples = {k: jnp.asarray(v[here]) for k, v in data.examples.items()}
    mine = {k: v for k, v in params.items() if k.startswith("device/")}
    theirs = {k: v for k, v in params.items() if k not in mine}

    def front(mine, theirs=theirs, examples=examples):
      module = model.module({**mine, **theirs}, model.base)
      return module.device(x=examples["x"])["x"]

    def behind(x, theirs, mine=mine, examples=examples, mask=mask):
      module = model.module({**mine, **theirs}, model.base)
      logits = module.server({"x": x})
      each, _ = fp.losses.classification(
        lambda **_: logits, examples, jax.random.key(0)
      )
      return jnp.sum(each * mask) / jnp.sum(mask)

    x, back = jax.vjp(front, mine)
    if i < steps:
      came, grads = jax.grad(behind, (0, 1))(x, theirs)
      theirs = {k: v - RATE * grads[k] for k, v in theirs.items()}
    if came is not None:
      moves = back(came)[0]
      mine = {k: v - RATE * moves[k] for k, v in mine.items()}
    params = mine | theirs
  return params, came


def test_with_a_link_all_the_time_nothing_is_different():
  got, _ = player().play([3, 1, 8], [5, 8])
  want, _ = plain()[0].play([3, 1, 8], [5, 8])
  for name, value in want.params.items():
    assert toy.same_bits(got.params[name], value)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_device_goes_along_the_last_gradient_and_the_server_waits(
  steps, tol
):
  state, _ = online(steps).play([CLIENT])
  want, came = by_hand(plain()[1].params, steps)
  for name, value in want.items():
    assert np.allclose(state.params[name], value, atol=tol(jnp.float32, 64))
  start = plain()[1].params
  moved = {k for k in want if not np.allclose(want[k], start[k], atol=1e-6)}
  assert moved == set(want)
  held = state.clients.local[offline.GRADIENT][CLIENT]
  assert np.allclose(held, came, atol=tol(jnp.float32, 64))


def test_without_any_link_and_any_gradient_nothing_moves():
  state, _ = online(0).play([CLIENT])
  for name, value in plain()[1].params.items():
    assert np.array_equal(state.params[name], value)


def test_a_gradient_of_an_earlier_round_is_used():
  state, _ = online(ALWAYS).play([CLIENT])
  later, _ = online(0).play([CLIENT], state=state)
  other, _ = online(0).play([1], state=state)  # who has never heard any
  device = "device/a/lin/kernel"
  server = "server/head/kernel"
  assert not np.array_equal(later.params[device], state.params[device])
  assert np.array_equal(later.params[server], state.params[server])
  assert np.array_equal(other.params[device], state.params[device])


def test_when_links_come_back_the_loss_goes_on_falling():
  ids = list(range(10))
  state, first = online(ALWAYS).play(ids)
  gone = state
  for _ in range(2):
    gone, _ = online(1).play(ids, state=gone)
  back, again = online(ALWAYS).play(ids, state=gone)
  _, later = online(ALWAYS).play(ids, state=back)
  losses = [float(o.record["train/loss"]) for o in (first, again, later)]
  assert losses[0] > losses[1] > losses[2]


def test_what_is_missing_is_named():
  data = toy.people()
  one_way = split.pipeline(
    worlds.net(), {"device": "a", "server": None}, split.Wire(down=None)
  )
  with pytest.raises(ValueError, match="the first wire lets none back"):
    offline.with_memory(one_way, BATCH, data.examples)
  model = plain()[1]
  made = split.splitfed(fp.fedavg(model, LOCAL), model, data.examples)
  with pytest.raises(
    ValueError, match="keeps 'memory/offline/gradient' as 'device'"
  ):
    offline.tolerant(made)
