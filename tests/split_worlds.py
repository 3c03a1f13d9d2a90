"""Small worlds to cut: a net whose gradients are written out, and a tiny zoo.

The net has three stages, a and b with a rectifier and a linear head; `Slope`
is its cross-entropy's gradient in float64, with what crosses each cut on the
way. Plain loops of every scheme are made of it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import fedjax_peft as fp
import toy
from fedjax_peft import models, split
from fedjax_peft.data import schedule

STAGES = ("a", "b", "head")
WIDTHS = (5, 7, 6, 3)  # before, between and after the stages
ENDS = {"device": "a", "server": None}
PLAIN = split.Wire()
RATE = 0.1
COHORT = (3, 1, 5, 8)  # clients with 4, 2, 6 and 11 examples
BATCH = 4
PEOPLE = toy.people()


class Layer(nnx.Module):
  """A linear layer without bias, and a rectifier."""

  def __init__(self, before, after, rngs):
    self.lin = nnx.Linear(before, after, use_bias=False, rngs=rngs)

  def __call__(self, x):
    return jax.nn.relu(self.lin(x))


@functools.cache
def net() -> split.Modules:
  rngs = nnx.Rngs(0)
  last = nnx.Linear(*WIDTHS[2:], use_bias=False, rngs=rngs)
  layers = [Layer(WIDTHS[i], WIDTHS[i + 1], rngs) for i in range(2)]
  return split.Modules(list(zip(STAGES, (*layers, last))))


def model(module, loss=fp.losses.classification) -> fp.Model:
  return fp.model(module, loss, precision="float32")


@functools.cache
def whole() -> fp.Model:
  return model(net())


def cut(wires=PLAIN, ends=None) -> fp.Model:
  return model(split.pipeline(net(), ENDS if ends is None else ends, wires))


@functools.cache
def plain() -> fp.Model:
  """The net, cut after its first stage by a wire that changes nothing."""
  return cut()


def rising(round):
  """SGD in round 0, with momentum in later ones: two tests in one program."""
  decay = jnp.where(round > 0, 0.9, 0.0)
  return optax.chain(optax.trace(decay), optax.scale(-RATE))


def momentum(round) -> float:
  return 0.9 if round else 0.0


LOCAL = fp.local(rising, batch=BATCH)


def splitfed(made: fp.Model) -> fp.Algorithm:
  return split.splitfed(fp.fedavg(made, LOCAL), made, PEOPLE.examples)


@functools.cache
def fedavg_player() -> toy.Player:
  made = fp.fedavg(whole(), LOCAL, lowrank=False)
  return toy.Player(made, PEOPLE, whole().base)


@functools.cache
def splitfed_player() -> toy.Player:
  return toy.Player(splitfed(plain()), PEOPLE, plain().base)


# Plain loops, in float64. Leaves are called like their stages.


def stages_of(leaves) -> dict[str, np.ndarray]:
  """{stage: kernel} of the leaves of the net, however it is cut."""
  found = {}
  for path, leaf in leaves.items():
    for name in STAGES:
      if name in path.split("/"):
        found[name] = np.asarray(leaf, np.float64)
  assert set(found) == set(STAGES)
  return found


def start() -> dict[str, np.ndarray]:
  return stages_of(whole().params)


class Slope(NamedTuple):
  """Of the mean loss of a batch.

  Attributes:
    loss: [B].
    kernels: {stage: gradient}.
    crossing: [B, 7], the gradient by what stage a hands on.
  """

  loss: np.ndarray
  kernels: dict[str, np.ndarray]
  crossing: np.ndarray


def slope(kernels, rows, crossing=None) -> Slope:
  """The gradient over these rows of the examples.

  Args:
    kernels: {stage: kernel}.
    rows: of the examples.
    crossing: [B, 7], what comes back over the first cut; None is what comes.
  """
  a, b, head = (kernels[name] for name in STAGES)
  x = np.asarray(PEOPLE.examples["x"][rows], np.float64)
  label = PEOPLE.examples["label"][rows]
  first = np.maximum(x @ a, 0)
  second = np.maximum(first @ b, 0)
  logits = second @ head
  logits = logits - logits.max(1, keepdims=True)
  likely = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  each = -np.log(likely[np.arange(len(rows)), label])
  by_logits = (likely - np.eye(3)[label]) / len(rows)
  by_second = by_logits @ head.T * (second > 0)
  came = by_second @ b.T
  back = came if crossing is None else crossing
  found = {
    "a": x.T @ (back * (first > 0)),
    "b": first.T @ by_second,
    "head": second.T @ by_logits,
  }
  return Slope(each, found, came)


def batches(client, how=LOCAL, round=0) -> list[np.ndarray]:
  """Rows of a client's batches, without padding."""
  plan = schedule.batches(
    PEOPLE.train,
    np.array([client]),
    batch=how.batch,
    epochs=how.epochs,
    steps=how.steps,
    seed=(0, round),
  )
  return [rows[rows >= 0] for rows in plan.rows]


def mean(models, clients) -> dict[str, np.ndarray]:
  """Models averaged, each counting as its client has examples."""
  sizes = np.array([PEOPLE.train.sizes[c] for c in clients], np.float64)
  return {
    k: np.tensordot(sizes / sizes.sum(), np.stack([m[k] for m in models]), 1)
    for k in models[0]
  }


def distance(came, wanted) -> float:
  """The largest difference of two models."""
  came = stages_of(came)
  return max(np.abs(came[k] - wanted[k]).max() for k in wanted)


# A zoo, filled with noise: biases and adapters that start as nothing too.

SMALL = {"width": 8, "depth": 2, "heads": 2, "ffn": 12}
TEXT = {"vocab": 11, **SMALL}
IMAGES = {"image_size": 6, "channels": 1}
ZOO = {
  "encoder": TEXT | {"classes": 3},
  "decoder": TEXT | {"groups": 1},
  "vit": IMAGES
  | {"patch": 3, "mean": (0.5,), "std": (0.25,), "layer_scale": 0.0}
  | {"classes": 3, **SMALL},
  "cnn": IMAGES | {"window": 3, "filters": (4,), "hidden": (7,), "classes": 3},
}


def noisy(module, seed=0, scale=0.4):
  """The module, its float leaves drawn anew; it may be abstract."""
  graph, state = nnx.split(module, graph=True)
  rng = np.random.default_rng(seed)

  def fill(x):
    if jnp.issubdtype(x.dtype, jnp.floating):
      return jnp.asarray(scale * rng.normal(size=x.shape), x.dtype)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.key(0)
    return jnp.zeros(x.shape, x.dtype)

  return nnx.merge(graph, jax.tree.map(fill, state))


@functools.cache
def zoo(kind):
  return noisy(nnx.eval_shape(lambda: models.load(kind, **ZOO[kind])))


def examples(kind, batch=3) -> dict[str, np.ndarray]:
  """A batch that such a model can be trained on."""
  rng = np.random.default_rng(1)
  label = {"label": np.arange(batch, dtype=np.int32) % 3}
  if kind in ("vit", "cnn"):
    return {"image": rng.uniform(size=(batch, 6, 6)).astype(np.float32)} | label
  if kind == "net":
    return {k: v[:batch] for k, v in PEOPLE.examples.items()}
  tokens = rng.integers(0, 11, (batch, 5), dtype=np.int32)
  length = np.array([2, 5, 4, 3], np.int32)[:batch]
  more = {} if kind == "decoder" else label
  return {"tokens": tokens, "length": length, **more}


def loss_of(kind):
  return fp.losses.next_token if kind == "decoder" else fp.losses.classification
