"""Setup: what a round is made of, and what its messages look like."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import hierarchy, link, placement, tree, work


class Setup(NamedTuple):
  """What a round is made of.

  Attributes:
    job: what clients do.
    boundaries: the tiers, lowest first.
    frozen: names of the leaves that never change.
    owned: names of the leaves that live on the clients.
    served: names of the leaves that the receivers alone change.
    notes: what clients tell of themselves beside their message.
    pool: P, how many earlier models are kept for clients that report late.
    updates: U, how often the model moves in a round, at most.
  """

  job: work.Work
  boundaries: tuple[hierarchy.Boundary, ...]
  frozen: tuple[str, ...]
  owned: tuple[str, ...]
  served: tuple[str, ...] = ()
  notes: tuple["Note", ...] = ()
  pool: int = 0
  updates: int = 1


class Note(NamedTuple):
  """Something that a client tells of itself, beside its message and unmasked.

  The receiver remembers the last one of each client, in `Rows.told`.

  Attributes:
    name: under which it is remembered.
    make: (message, stats) -> float32 array, for one client; the stats are
      {name: (numerator, denominator)} over its steps.
    shape: of that array.
    first: what is remembered of a client that has never reported.
  """

  name: str
  make: Callable
  shape: tuple[int, ...] = ()
  first: float = math.nan

  @property
  def nbytes(self) -> int:
    """Bytes on the wire."""
    return 4 * math.prod(self.shape)


def message(job: work.Work) -> dict:
  """Shapes and dtypes of what a client sends."""
  owned = {k for k, v in job.placement.items() if v == placement.DEVICE}

  def one():
    params = {k: jnp.asarray(v) for k, v in job.params.items()}
    sent = work.Sent(
      {k: v for k, v in params.items() if k not in owned},
      {"round": jnp.int32(0)},
    )
    local = {k: params[k] for k in sorted(owned)}
    traits = dict.fromkeys(job.traits, jnp.int32(1))
    client = work.Client(jax.random.key(0), jnp.int32(0), jnp.int32(1), traits)
    carry = job.init(sent, {}, local, client)
    return job.finish(carry, sent)[0]

  return jax.eval_shape(one)


def specs(setup, cohort) -> list[link.Spec]:
  """What is known of the messages at each boundary."""
  specs = [link.Spec(message(setup.job), senders=cohort)]
  for low, high in zip(setup.boundaries, setup.boundaries[1:], strict=False):
    leaves = tree.spec(high.pick(setup.job.params))
    specs.append(link.Spec(leaves, senders=low.tier.size))
  return specs


def message_bytes(setup, cohort, *, traits=None, round=0):
  """Bytes of one message at each boundary, up and down.

  Args:
    setup: of the round.
    cohort: most senders.
    traits: {name: number} of the client that sends and is told.
    round: in which round.
  """
  sizes = {}
  for i, (at, spec) in enumerate(
    zip(setup.boundaries, specs(setup, cohort), strict=True)
  ):
    leaves = tree.spec(at.pick(setup.job.params))
    if at.tier.news is not None:
      leaves = at.tier.news(leaves, cohort, round)
    if i == 0:
      compact = functools.partial(
        setup.job.compact, traits=traits or {}, round=round
      )
      leaves = compact(leaves)
      spec = spec._replace(message=compact(spec.message))
    up = at.uplink.link.after(spec)
    down = at.tier.down.after(link.Spec(leaves))
    told = sum(note.nbytes for note in setup.notes) if i == 0 else 0
    sizes[f"{at.tier.name}/up_bytes"] = tree.nbytes(up.message) + told
    sizes[f"{at.tier.name}/down_bytes"] = tree.nbytes(down.message)
  return sizes
