"""Wrapping: a job that some clients do otherwise.

Whether a client attacks is a trait, which is traced: one program holds both,
and a select chooses. A job's carry gets the trait and the client's key beside
it; nothing else of it changes, so wrapped jobs can be wrapped again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import tree, work

TRAIT = "attacker"

_ATTACK = 2**32 - 2  # folded into keys; steps count up from zero


class Carry(NamedTuple):
  """What a client that may attack holds between two batches.

  Attributes:
    job: carry of the job that is wrapped.
    attacks: bool scalar.
    key: random key of (seed, round, client), of attacks alone.
  """

  job: Any
  attacks: jax.Array
  key: jax.Array


def on_examples(
  job: work.Work, change: Callable[[dict, jax.Array], dict]
) -> work.Work:
  """Attackers train on other examples than they have.

  Args:
    job: what clients do.
    change: (examples {feature: [B, ...]}, key) -> examples of the same shapes
      and dtypes. Rows must be changed one by one, since some are padding. The
      key is that of (seed, round, client, step).

  Returns:
    The Work; it reads the trait `attacker`.

  Raises:
    ValueError: if a step of the job takes several batches at once.
  """

  def step(carry, sent, base, batch):
    key = jax.random.fold_in(batch.key, _ATTACK)
    changed = change(batch.examples, key)
    examples = tree.where(carry.attacks, changed, batch.examples)
    batch = batch._replace(examples=examples)
    inner, stats = job.step(carry.job, sent, base, batch)
    return carry._replace(job=inner), stats

  return _wrapped(job)._replace(step=step)


def on_message(
  job: work.Work, change: Callable[[dict, work.Sent, jax.Array], dict]
) -> work.Work:
  """Attackers report something else than what they found.

  Args:
    job: what clients do.
    change: (message, sent, key) -> message of the same shapes and dtypes. The
      key is that of (seed, round, client).

  Returns:
    The Work; it reads the trait `attacker`. What stays on the device is as the
    job left it.

  Raises:
    ValueError: if a step of the job takes several batches at once; when it
      first reports, if its message is in factors.
  """

  def finish(carry, sent):
    message, local = job.finish(carry.job, sent)
    if any(map(tree.is_factored, tree.leaves(message))):
      raise ValueError(
        "an attack changes whole messages, got factors (low-rank local SGD); "
        "build the job with fp.train"
      )
    changed = change(message, sent, carry.key)
    return tree.where(carry.attacks, changed, message), local

  return _wrapped(job)._replace(finish=finish)


def _wrapped(job):
  """The same work, whose carry knows who attacks."""
  if job.stride != 1:
    raise ValueError(
      "an attack needs a job that takes one batch at a time, got "
      f"stride={job.stride} (low-rank local SGD); build it with fp.train"
    )

  def init(sent, base, local, client):
    if TRAIT not in client.traits:
      raise ValueError(
        f"an attack reads the trait '{TRAIT}', the clients have "
        f"{sorted(client.traits)}; give it to them with "
        "attack.attackers(data, 0.2)"
      )
    inner = job.init(sent, base, local, client)
    key = jax.random.fold_in(client.key, _ATTACK)
    return Carry(inner, jnp.asarray(client.traits[TRAIT]) > 0, key)

  def step(carry, sent, base, batch):
    inner, stats = job.step(carry.job, sent, base, batch)
    return carry._replace(job=inner), stats

  def finish(carry, sent):
    return job.finish(carry.job, sent)

  traits = tuple(dict.fromkeys((*job.traits, TRAIT)))
  return job._replace(init=init, step=step, finish=finish, traits=traits)
