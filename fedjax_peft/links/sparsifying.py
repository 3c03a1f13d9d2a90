"""Sparsifying: a few values stand for a message.

`top_k` sends the largest and where they are; it is biased, so put
`error_feedback` around it. `rand_k` sends values at places that the round
draws for everyone: no places travel, wires can be added, and it is unbiased.

Stich et al., Sparsified SGD with Memory, 2018,
https://arxiv.org/abs/1809.07599; Konecny et al., Federated Learning:
Strategies for Improving Communication Efficiency, 2016,
https://arxiv.org/abs/1610.05492
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_peft import link, validate
from fedjax_peft.kernels.selection import api as kernel
from fedjax_peft.links import packing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse:
  """Some of the float values of a message, on the wire.

  Attributes:
    values: float32 [K].
    indices: int32 [K], ascending; () where the receiver knows them.
    rest: the integer leaves.
    form: what it decodes to.
  """

  values: jax.Array
  indices: Any
  rest: list
  form: packing.Form = dataclasses.field(metadata={"static": True})


def top_k(fraction: float) -> link.Link:
  """Sends the values of largest magnitude of a message, and their places.

  Guarantees:
    of the D values of all float leaves together exactly K = ceil(fraction D)
    are sent, as float32 with an int32 place each; of equal magnitudes the
    first; the others decode to zero, so that no norm grows.

  Args:
    fraction: of the values, 0 < fraction <= 1.

  Returns:
    A link with `receive_on="each"`; integer leaves pass unchanged.

  Raises:
    ValueError: if `fraction` is not in that range.
  """
  _check(fraction)

  def send(message, ctx):
    form = packing.form_of(message)
    vector, rest = form.pack(message)
    values, indices = kernel.top_k(vector, _kept(fraction, form))
    return Sparse(values, indices, rest, form), {}

  def receive(wire, roster):
    zero = jnp.zeros((wire.form.size,), jnp.float32)
    vector = zero.at[wire.indices].set(wire.values)
    return wire.form.unpack(vector, wire.rest)

  def fold(acc, wires, present):
    vector, rest = wires.form.pack(acc)
    vector = kernel.scatter_add(
      vector, wires.values, wires.indices, present.astype(jnp.float32)
    )
    return wires.form.unpack(
      vector,
      [
        a + jnp.sum(_those(present, x), axis=0, dtype=x.dtype)
        for a, x in zip(rest, wires.rest, strict=True)
      ],
    )

  return link.stateless("top_k", send, receive, receive_on="each", fold=fold)


def rand_k(fraction: float) -> link.Link:
  """Sends values at random places, the same for all senders of a round.

  Guarantees:
    each value is sent with probability K / D, K = ceil(fraction D), times
    D / K, so that what is received has the message as its mean over rounds;
    the receiver draws the places too, so that none travel.

  Args:
    fraction: of the values, 0 < fraction <= 1.

  Returns:
    A link with `receive_on="any"`: wires can be added, quantized on a shared
    grid and masked. The L2 bound grows by D / K.

  Raises:
    ValueError: if `fraction` is not in that range.
  """
  _check(fraction)

  def places(form, key):
    k = _kept(fraction, form)
    return jnp.sort(jax.random.permutation(key, form.size)[:k])

  def send(message, ctx):
    form = packing.form_of(message)
    vector, rest = form.pack(message)
    factor = form.size / max(_kept(fraction, form), 1)
    values = vector[places(form, ctx.roster.key)] * jnp.float32(factor)
    return Sparse(values, (), rest, form), {}

  def receive(wire, roster):
    zero = jnp.zeros((wire.form.size,), jnp.float32)
    vector = zero.at[places(wire.form, roster.key)].set(wire.values)
    return wire.form.unpack(vector, wire.rest)

  def bound(limit, spec):
    form = packing.form_of(spec.message)
    return limit * form.size / max(_kept(fraction, form), 1)

  return link.stateless("rand_k", send, receive, bound=bound)


def _check(fraction: float) -> None:
  """Raises ValueError unless 0 < fraction <= 1."""
  validate.positive(fraction=fraction)
  if fraction > 1:
    raise ValueError(f"fraction must be at most 1: got {fraction=}")


def _kept(fraction: float, form: packing.Form) -> int:
  """K: at least one value, if there is any."""
  return min(form.size, max(1, math.ceil(fraction * form.size)))


def _those(present: jax.Array, x: jax.Array) -> jax.Array:
  """Rows of who is there, zero for the others."""
  here = present.reshape(-1, *(1,) * (x.ndim - 1))
  return jnp.where(here, x, jnp.zeros_like(x))
