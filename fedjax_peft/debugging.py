"""Debugging: one client after another, eagerly, until one fails.

The same round behind the same interface, without lanes, loops or compilation:
print and breakpoints work, and an error says whose it was and in which stage.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import executor, tree, work


class ClientError(RuntimeError):
  """A client's job failed; the message names client, round and stage."""


def one_by_one(algorithm) -> Callable:
  """Runs the clients of all devices one after another.

  Args:
    algorithm: whose `work` is run, and whose `absorb` takes the messages.

  Returns:
    ((Common, shared, number), (Flight, Schedule)) -> Flight; axis D leads.

  Raises:
    ClientError: with the client's id, the round, the stage (init, step number
      or finish) and the shapes it was called with; the cause is chained.
  """

  def run(shared_args, split_args):
    common, shared, _ = shared_args
    flights, plans = split_args
    job = algorithm.work
    if job.lanes == "all":
      raise ValueError(
        "the executor 'debug' takes one client after another, but clients of "
        "this algorithm hear of each other in every step; use 'shard_map'"
      )
    done = []
    for d in range(plans.slot.shape[0]):
      flight, plan = jax.tree.map(lambda x, d=d: x[d], (flights, plans))
      before = None
      for slot in np.unique(plan.slot[plan.slot >= 0]):
        buffer, before = _client(
          job, common, flight.group, plan, int(slot), before
        )
        flight = flight._replace(buffer=buffer)
        flight = algorithm.absorb(common, shared, flight, jnp.array([slot]))
      # The lanes and the buffer are no part of the result.
      done.append(flight._replace(lanes=(), buffer=()))
    return jax.tree.map(lambda *x: jnp.stack(x), *done)

  return run


def _client(job, common, group, plan, slot, before):
  """One client's job: a buffer of one row, and the carry that it leaves."""
  client = int(group.clients[slot])
  sent = common.sent
  if group.source is not None:
    sent = jax.tree.map(lambda x: x[group.source[slot]], sent.params)
    sent = work.Sent(sent, common.sent.extras)
  local = jax.tree.map(lambda x: x[slot], group.local)
  who = group.client(common.key, jnp.int32(slot))

  def stage(name, fun, *args):
    try:
      return fun(*args)
    except Exception as error:
      shapes = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", args[-1])
      number = int(common.sent.extras["round"])
      raise ClientError(
        f"client {client} failed in round {number}, stage {name}, called "
        f"with {shapes}: {error}"
      ) from error

  s, g, t, k = np.nonzero(plan.slot == slot)
  order = np.lexsort((t, s))
  carry = stage("init", job.init, sent, common.base, local, who)
  if job.handover is not None:
    before = jax.tree.map(jnp.zeros_like, carry) if before is None else before
    carry = stage("handover", job.handover, carry, before)
  stats = None
  for i, rows in enumerate(plan.rows[s, g, t, k][order]):
    examples = {
      name: jnp.asarray(np.asarray(x)[np.where(rows < 0, rows[0], rows)])
      for name, x in common.examples.items()
    }
    mask = jnp.asarray(rows >= 0, jnp.float32)
    step_key = executor.step_key(who.key, jnp.int32(i), job.stride)
    batch = work.Batch(examples, mask, step_key)
    carry, more = stage(f"step {i}", job.step, carry, sent, common.base, batch)
    stats = more if stats is None else jax.tree.map(jnp.add, stats, more)
  message, local = stage("finish", job.finish, carry, sent)
  if not bool(tree.is_finite((message, local))):
    number = int(common.sent.extras["round"])
    raise ClientError(
      f"client {client} ended round {number} with numbers that are not finite; "
      "lower its learning rate or look at its data"
    )
  return jax.tree.map(
    lambda x: jnp.asarray(x)[None], executor.Buffer(message, local, stats)
  ), carry
