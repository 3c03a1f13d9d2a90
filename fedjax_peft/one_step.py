"""One step of a client, traced alone: what it computes and what it holds."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_peft import executor, flops, tree, work

PyTree = Any


def function(job: work.Work):
  """(base, rows) -> what a client has after its first step.

  Args:
    job: what clients do; of its traits each is 1.
  """

  def one(base, rows):
    params = {k: jnp.asarray(v) for k, v in job.params.items()}
    sent = work.Sent(params, {"round": jnp.int32(0)})
    own = {k: v for k, v in params.items() if job.placement.get(k) == "device"}
    key, number = jax.random.key(0), jnp.int32(1)
    client = work.Client(key, number, number, dict.fromkeys(job.traits, number))
    keys = executor.step_key(key, jnp.int32(0), job.stride)
    batch = work.Batch(rows, jnp.ones(job.rows), keys)
    carry = job.init(sent, base, own, client)
    return executor.alone(job.step)(carry, sent, base, batch)

  return one


def rows(job: work.Work, examples: dict) -> dict:
  """Specs of the examples that a step gets."""
  return {
    k: jax.ShapeDtypeStruct((job.rows, *v.shape[1:]), v.dtype)
    for k, v in examples.items()
  }


def flops_of(job: work.Work, base: PyTree, examples: dict) -> int:
  """FLOPs of the products in one local step of a client, all traits being 1."""
  return flops.count(function(job), tree.spec(base), rows(job, examples))
