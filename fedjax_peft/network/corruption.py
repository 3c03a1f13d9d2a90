"""Corruption: messages that are wrong when they leave the client, and labels.

Whose message it hits is a trait that is drawn anew each round and is traced:
one program holds both, and a select chooses. Others do bit for bit what they
did.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import data as data_lib
from fedjax_peft import tree, validate, work
from fedjax_peft.network import draw

LABEL = "label"
TRAIT = "corrupt"
BITS = {"nan": 1, "noise": 2, "zero": 4, "bitflip": 8}  # of the trait

_CORRUPT = 2**32 - 3  # folded into keys; steps count up from zero


class Carry(NamedTuple):
  """What a client that may be hit holds between two batches.

  Attributes:
    job: carry of the job that is wrapped.
    hit: bool scalar.
    key: random key of (seed, round, client), of this corruption alone.
  """

  job: Any
  hit: jax.Array
  key: jax.Array


def wrapper(
  kind: str, *, sigma: float = 1.0, flips: float = 1e-3
) -> Callable[[work.Work], work.Work]:
  """What a corruption makes of a job; see `fault.corrupt`.

  Args:
    kind: one of `BITS`.
    sigma: > 0, noise in units of the root mean square of a leaf.
    flips: fraction of the values that flip a bit, in (0, 1].

  Returns:
    (Work) -> Work that reads the trait `corrupt`. Factors (low-rank local
    SGD) are corrupted as factors, by noise the left ones alone. Integer
    leaves can only become zero. What stays on the device is not touched.

  Raises:
    ValueError: if an argument is out of range.
  """
  validate.one_of(BITS, kind=kind)
  validate.positive(sigma=sigma, flips=flips)
  if flips > 1:
    raise ValueError(f"flips must be in (0, 1], got flips={flips}")

  def noise(x, key):
    if tree.is_factored(x):
      return x._replace(left=noise(x.left, key))
    level = sigma * jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
    drawn = jax.random.normal(key, x.shape, jnp.float32)
    return x + (level * drawn).astype(x.dtype)

  def flip(x, key):
    if tree.is_factored(x):
      left, right = jax.random.split(key)
      return tree.Factored(flip(x.left, left), flip(x.right, right))
    width = 8 * x.dtype.itemsize
    raw = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
    whether, which = jax.random.split(key)
    hit = jax.random.uniform(whether, x.shape) < flips
    place = jax.random.randint(which, x.shape, 0, width).astype(raw.dtype)
    one = jnp.where(hit, jnp.ones_like(raw) << place, jnp.zeros_like(raw))
    return jax.lax.bitcast_convert_type(raw ^ one, x.dtype)

  def change(message, key):
    if kind == "zero":
      return tree.zeros_like(message)
    if kind == "nan":
      return tree.map_float(lambda x: jnp.full_like(x, jnp.nan), message)
    one = noise if kind == "noise" else flip
    leaves, treedef = jax.tree.flatten(message, is_leaf=tree.is_factored)
    keys = jax.random.split(key, max(len(leaves), 1))
    changed = [
      one(x, key) if tree.is_factored(x) or tree.is_float(x) else x
      for x, key in zip(leaves, keys)
    ]
    return jax.tree.unflatten(treedef, changed)

  def wrap(job):
    return _on_message(job, BITS[kind], change)

  return wrap


def _on_message(job, bit, change):
  """The same work; who is hit sends something else."""

  def init(sent, base, local, client):
    if TRAIT not in client.traits:
      raise ValueError(
        f"a corruption reads the trait '{TRAIT}', the clients have "
        f"{sorted(client.traits)}; give them what the fault's `traits` says "
        "of the round"
      )
    inner = job.init(sent, base, local, client)
    key = jax.random.fold_in(jax.random.fold_in(client.key, _CORRUPT), bit)
    hit = (jnp.asarray(client.traits[TRAIT]) & bit) > 0
    return Carry(inner, hit, key)

  def step(carry, sent, base, batch):
    inner, stats = job.step(carry.job, sent, base, batch)
    return carry._replace(job=inner), stats

  def finish(carry, sent):
    message, local = job.finish(carry.job, sent)
    changed = change(message, carry.key)
    return tree.where(carry.hit, changed, message), local

  traits = tuple(dict.fromkeys((*job.traits, TRAIT)))
  return job._replace(init=init, step=step, finish=finish, traits=traits)


def mislabeled(
  population: data_lib.Population, rate: float, classes: int, seed: int
) -> data_lib.Population:
  """The same clients, some of whose training labels are others.

  Args:
    population: examples with the integer leaf `label`, one for each row.
    rate: probability per training row, in [0, 1].
    classes: labels are below it; each other one is as likely.
    seed: of the run; which rows it is depends on nothing else.

  Raises:
    ValueError: if there is no such leaf or a label is out of range.
  """
  label = population.examples.get(LABEL)
  if label is None or label.ndim != 1 or label.dtype.kind not in "iu":
    dtypes = {k: str(v.dtype) for k, v in population.examples.items()}
    raise ValueError(
      f"mislabel changes an integer '{LABEL}' for each row, the examples of "
      f"'{population.name}' have {dtypes}"
    )
  rows = np.unique(population.train.rows)
  if rows.size and label[rows].max() >= classes:
    raise ValueError(
      f"labels of '{population.name}' must be below classes={classes}, got "
      f"{label[rows].max()}"
    )
  rows = rows[draw.uniform(seed, "mislabel", 0, rows) < rate]
  drawn = draw.uniform(seed, "mislabel/which", 0, rows) * (classes - 1)
  other = (label[rows] + 1 + drawn.astype(np.int64)) % classes
  changed = label.copy()
  changed[rows] = other.astype(label.dtype)
  examples = {**population.examples, LABEL: changed}
  return dataclasses.replace(population, examples=examples)
