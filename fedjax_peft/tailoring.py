"""Tailoring: a client works on what it was sent, made to its measure.

Clients of different ranks, cuts or links run one compiled program; what differs
between them are numbers, and these change what they were sent.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import work

ONLINE = "online"  # trait: steps of a round in which a client's link is there
ALWAYS = 2**30  # of these, where nothing cuts it


class Tailored(NamedTuple):
  """What such a client holds between two batches.

  Attributes:
    facts: {trait: scalar}.
    taken: int32 scalar, its steps so far in this round.
    job: carry of the job that trains.
  """

  facts: dict[str, jax.Array]
  taken: jax.Array
  job: Any


def tailored(
  job: work.Work,
  traits: Sequence[str],
  change: Callable[[work.Sent, dict[str, jax.Array], jax.Array], work.Sent],
) -> work.Work:
  """A job whose clients start from, and train on, a `sent` of their own.

  Reports are against what everybody was sent.

  Args:
    job: what clients do.
    traits: names of the traits that are read.
    change: (sent, {trait: scalar}, steps taken) -> sent of such a client.
  """

  def init(sent, base, local, client):
    facts = {k: client.traits[k] for k in traits}
    none = jnp.int32(0)
    mine = change(sent, facts, none)
    return Tailored(facts, none, job.init(mine, base, local, client))

  def step(carry, sent, base, batch):
    mine = change(sent, carry.facts, carry.taken)
    inner, stats = job.step(carry.job, mine, base, batch)
    return carry._replace(taken=carry.taken + 1, job=inner), stats

  def finish(carry, sent):
    return job.finish(carry.job, sent)

  reads = (*job.traits, *traits)
  return job._replace(init=init, step=step, finish=finish, traits=reads)
