"""A toy federation: the smallest model, clients and job that laws need."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import fedjax_peft as fp
from fedjax_peft import launch
from fedjax_peft import settings as settings_lib
from fedjax_peft.data import schedule

SIZES = (1, 2, 3, 4, 5, 6, 7, 9, 11, 13)


class Net(nnx.Module):
  """Two layers, two leaves, one nonlinearity."""

  def __init__(self, rngs):
    self.up = nnx.Linear(5, 7, use_bias=False, rngs=rngs)
    self.head = nnx.Linear(7, 3, use_bias=False, rngs=rngs)

  def __call__(self, x):
    return self.head(jax.nn.relu(self.up(x)))


@functools.cache
def net() -> fp.Model:
  return fp.model(
    Net(nnx.Rngs(0)), fp.losses.classification, precision="float32"
  )


@functools.cache
def people(sizes=SIZES, heldout=0.0, unseen=0.0, seed=0):
  """Clients of given sizes, features [5] and one of three labels."""
  rng = np.random.default_rng(seed)
  owner = np.repeat(np.arange(len(sizes)), sizes)
  features = rng.normal(size=(owner.size, 5)).astype(np.float32)
  label = rng.integers(0, 3, owner.size).astype(np.int32)
  return fp.data.population(
    {"x": features, "label": label}, owner, heldout=heldout, unseen=unseen
  )


def client(id=0, weight=1, **traits) -> fp.Client:
  """A client, to call a Work's init with."""
  key = jax.random.key(id)
  return fp.Client(key, jnp.int32(id), jnp.int32(weight), traits)


def voices(batch=4, **options) -> fp.Work:
  """A job of exact arithmetic: noise from the client's key, sums of features.

  Nothing in it is reassociated by a compiler, so that a message has the same
  bits however it is computed.
  """

  def init(sent, base, local, client):
    noise = jax.random.normal(client.key, (2, 3))
    return {"noise": noise, "sum": jnp.zeros(5)}

  def step(carry, sent, base, batch):
    here = (batch.mask > 0)[:, None]
    rows = jnp.where(here, batch.examples["x"], jnp.zeros(()))
    total = carry["sum"]
    for row in rows:
      total = total + row
    count = jnp.sum(batch.mask)
    return carry | {"sum": total}, {"loss": (count * 2, count)}

  def finish(carry, sent):
    return carry, {}

  params = {"noise": jnp.zeros((2, 3)), "sum": jnp.zeros(5)}
  how = fp.local(optax.identity(), batch=batch, **options)
  placed = dict.fromkeys(params, "cloud")
  return fp.Work(init, step, finish, params, placed, how)


def voice(data, client, seed=0, round=0) -> dict:
  """What a client of `voices` says, worked out by hand."""
  key = jax.random.fold_in(jax.random.key(seed), round)
  noise = jax.random.normal(jax.random.fold_in(key, client), (2, 3))
  rows = data.examples["x"][data.train[client]]
  return {"noise": np.asarray(noise), "sum": rows.sum(0)}


def mean(messages: dict, data) -> dict:
  """{client: message} averaged, each counting as its client has examples."""
  weights = np.array([data.train.sizes[c] for c in messages], np.float64)
  return jax.tree.map(
    lambda *x: np.tensordot(weights / weights.sum(), np.stack(x), 1),
    *messages.values(),
  )


@functools.cache
def _gradient():
  """Gradient of the mean loss of `net` over whole, unpadded batches."""
  model = net()

  def mean_loss(params, rows):
    each, _, _ = model.loss(params, model.base, rows, jax.random.key(0))
    return jnp.mean(each)

  return jax.jit(jax.grad(mean_loss))


def gradient(params, data, rows) -> dict:
  """Gradient of the mean loss over these rows, computed at once."""
  rows = {k: v[rows] for k, v in data.examples.items()}
  return jax.tree.map(np.asarray, _gradient()(params, rows))


def train(params, data, client, how, rate, mu=0.0, seed=0, round=0) -> dict:
  """SGD on one client's batches in a plain loop, without any padding."""
  plan = schedule.batches(
    data.train,
    np.array([client]),
    batch=how.batch,
    epochs=how.epochs,
    steps=how.steps,
    seed=(seed, round),
  )
  new = params
  for rows in plan.rows:
    grads = gradient(new, data, rows[rows >= 0])
    new = {
      k: new[k] - np.float32(rate) * (grads[k] + mu * (new[k] - params[k]))
      for k in new
    }
  return new


def lanes(executor="shard_map", devices=1, blocks=1, width=2, segment=4):
  return fp.Settings(executor, devices, blocks, width, segment)


class Player:
  """Rounds of one algorithm on given cohorts; compiled once."""

  def __init__(self, algorithm, data, base=None, settings=None, most=None):
    self.algorithm, self.data = algorithm, data
    self.settings = lanes() if settings is None else settings
    self.most = len(data) if most is None else most
    self.base = settings_lib.everywhere(base or {}, self.settings)
    self.step = launch.launcher(algorithm, self.settings)
    self.examples = dict(data.examples)
    if self.settings.executor in ("shard_map", "pmap"):
      self.examples = settings_lib.everywhere(self.examples, self.settings)

  def over(self, **features):
    """The same rounds, some features replaced by others."""
    other = copy.copy(self)
    other.examples = dict(self.data.examples) | features
    if self.settings.executor in ("shard_map", "pmap"):
      other.examples = settings_lib.everywhere(other.examples, self.settings)
    return other

  def start(self):
    return self.algorithm.init(clients=len(self.data), cohort=self.most)

  def seat(self, ids, seed=0, round=0):
    return launch.seat(
      self.data.train,
      np.asarray(ids, np.int32),
      self.algorithm.work,
      self.settings,
      examples=self.examples,
      traits=self.data.traits,
      nodes=self.algorithm.tiers[0].size,
      seed=seed,
      round=round,
    )

  def play(self, *cohorts, state=None, seed=0):
    """One round for each cohort; returns (state, last outcome) as numpy."""
    state = self.start() if state is None else state
    state = settings_lib.everywhere(jax.device_get(state), self.settings)
    outcome = None
    for ids in cohorts:
      seated = self.seat(ids, seed, int(state.round))
      key = jax.random.key(seed)
      state, outcome = self.step.run(state, self.base, seated, key)
    return jax.device_get((state, outcome))

  def first(self, turn):
    """A first round as a plan's turn wants it: (cohort, state, outcome)."""
    cohort = launch.seat(
      self.data.train,
      turn,
      self.algorithm.work,
      self.settings,
      examples=self.examples,
    )
    key = jax.random.key(0)
    played = self.step.run(self.start(), self.base, cohort, key)
    return cohort, *jax.device_get(played)


def same_bits(a, b) -> bool:
  """Equal structure, dtypes and bytes."""
  left, right = jax.tree.flatten(a), jax.tree.flatten(b)
  return left[1] == right[1] and all(
    np.asarray(x).dtype == np.asarray(y).dtype
    and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(left[0], right[0], strict=True)
  )
