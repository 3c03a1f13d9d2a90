"""The grid link: sums of masked wires are the sums of what was sent."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_peft as fp
from fedjax_peft import link
from fedjax_peft.links import clipping, masking, rotating, weighing
from fedjax_peft.privacy import grid, ranges

WEIGHTS = [1, 7, 20, 20]


def exchanged(chain, messages, weights):
  """The received sum, the sum of the decoded integers, and one's stats."""
  senders = len(weights)
  who = fp.Roster(
    jnp.arange(senders, dtype=jnp.int32),
    jnp.asarray(weights, jnp.int32),
    jax.random.key(3),
    None,
    None,
  )
  spec = link.Spec(
    jax.eval_shape(lambda m: jax.tree.map(lambda x: x[0], m), messages),
    senders=senders,
  )
  mine, shared = chain.init(spec)

  def one(message, i):
    ctx = fp.Context(jax.random.key(0), who.clients[i], who.weights[i], {}, who)
    wire, _, stats = chain.send(message, mine, shared, ctx)
    return wire, stats

  @jax.jit
  def everyone(messages):
    wires, stats = jax.vmap(one)(messages, jnp.arange(senders))
    total = jax.tree.map(lambda x: jnp.sum(x, 0, dtype=x.dtype), wires)
    received, _ = chain.receive(total, shared, who, jax.random.key(0))
    return received, total, stats

  return jax.device_get(everyone(messages))


@pytest.mark.parametrize("bits", [14, 31])
def test_the_worst_weighted_messages_are_received_without_a_wrap(bits):
  plan = ranges.plan(
    senders=4,
    clip_norm=0.1,
    dimension=3,
    bits=bits,
    max_weight=20,
    total_weight=sum(WEIGHTS),
  )
  message = np.float32([0.0, -1e9, 0.0])  # clipped to the norm
  messages = {"a": jnp.asarray(np.tile(message, (4, 1)))}
  received, total, stats = exchanged(grid.links_of(plan), messages, WEIGHTS)
  np.testing.assert_allclose(
    received["a"], [0, -0.1, 0], atol=plan.step / 2, rtol=3e-6
  )
  # The modulus is the wire's here, which the plan's fits into.
  assert total.message.message["a"].dtype == (
    np.uint16 if bits == 14 else np.uint32
  )
  reached = np.int64(
    total.message.message["a"].view(np.int16 if bits == 14 else np.int32)
  )
  assert 0.99999 * plan.largest - 4 <= -reached[1] <= plan.largest
  assert stats["grid/saturated"].sum() == 0


def test_a_rotated_grid_is_finer_and_received_as_exactly():
  case = {
    "senders": 4,
    "clip_norm": 1.0,
    "dimension": 256,
    "bits": 16,
    "rotation": 256,
  }
  plan, sure = ranges.plan(**case, failure=1e-6), ranges.plan(**case)
  assert plan.levels > 2 * sure.levels
  x = np.random.default_rng(2).standard_normal((4, 200)).astype(np.float32)
  x /= np.linalg.norm(x, axis=1, keepdims=True) * np.float32(1 + 1e-6)
  got, _, _ = exchanged(grid.links_of(plan), {"a": jnp.asarray(x)}, [1] * 4)
  error = np.linalg.norm(got["a"] - x.mean(0))
  # The mean of four roundings, each by half a step at most, on 256 values; on
  # average they err by a step / sqrt(12), and half of that for a mean of four.
  assert error <= plan.step / 2 * 16 + 1e-6
  assert 0.5 < error / (plan.step / math.sqrt(12 * 4) * 16) < 1.5


@pytest.mark.parametrize("bits", [12, 32])
def test_what_no_honest_sender_says_is_cut_and_counted(bits):
  plan = ranges.plan(
    senders=9, clip_norm=0.5, dimension=4, bits=bits, max_weight=3
  )
  ctx = link.alone()._replace(weight=jnp.int32(2))
  message = jnp.array([np.inf, -1.1, 1.0, 1e-9])
  wire, _, stats = grid.grid(plan).send(message, (), (), ctx)
  sent = np.asarray(wire.message)
  sent = sent.view(sent.dtype.name[1:]).astype(np.int64)
  np.testing.assert_array_equal(sent[:2], [2 * plan.levels, -2 * plan.levels])
  assert 2 * plan.levels * (1 - 2e-6) - 1 <= sent[2] <= 2 * plan.levels
  assert stats["grid/saturated"] == 2


def test_a_message_that_the_plan_was_not_made_for_is_refused():
  plan = ranges.plan(
    senders=4,
    clip_norm=1.0,
    dimension=256,
    bits=16,
    rotation=256,
    max_weight=3,
    failure=1e-6,
  )
  a = {"a": jax.ShapeDtypeStruct((200,), jnp.float32)}
  big = {"a": jax.ShapeDtypeStruct((300,), jnp.float32)}
  clip, weigh = clipping.clip(1.0), weighing.weigh(max_weight=3)
  rotate, mask = rotating.rotate(256), masking.mask(2)
  good = grid.links_of(plan)
  good.init(link.Spec(a, senders=4))
  on = grid.grid(plan)
  for chain, message, senders, match in [
    (good, a, 5, "senders=5"),
    (good, big, 4, "dimension=512"),
    (link.chain(weigh, rotate, on, mask), a, 4, "bound of inf"),
    (link.chain(clip, weigh, on, mask), a, 4, "rotation=None"),
    (
      link.chain(clip, weighing.weigh(max_weight=4), rotate, on),
      a,
      4,
      "bound of 4",
    ),
  ]:
    with pytest.raises(ValueError, match=match):
      chain.init(link.Spec(message, senders=senders))
  with pytest.raises(ValueError, match="norm='l2'"):
    grid.links_of(
      ranges.plan(senders=4, clip_norm=1.0, dimension=3, norm="linf")
    )
