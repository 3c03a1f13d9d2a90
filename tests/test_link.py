"""How links are put together: chain, exchange, broadcast, cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_peft as fp
import laws
from fedjax_peft import link as link_lib
from fedjax_peft import reduce as reduce_lib

A, B, C = fp.clip(0.5), fp.weigh(max_weight=8), fp.fixed_point(16)


def test_chaining_is_associative_and_flattens():
  left, right = fp.chain(fp.chain(A, B), C), fp.chain(A, fp.chain(B, C))
  assert left.parts == right.parts == (A, B, C)
  assert left.name == "clip > weigh > fixed_point"
  sent = laws.messages()
  laws.same(laws.exchanged(left, sent), laws.exchanged(right, sent))


def test_chaining_nothing_changes_nothing():
  assert fp.chain(fp.chain(), A, fp.chain()).parts == (A,)
  message, ctx = laws.one(laws.messages(), 0), link_lib.alone()
  wire, _, stats = fp.chain().send(message, (), (), ctx)
  back, _ = fp.chain().receive(wire, (), ctx.roster, ctx.key)
  assert jax.tree.all(jax.tree.map(lambda x, y: x is y, back, message))
  assert stats == {}


def test_the_parts_of_a_chain_draw_from_keys_of_their_own():
  twice = fp.chain(noisy(), noisy())
  message = {"a": jnp.zeros(4)}
  wire, _, _ = twice.send(message, ((), ()), ((), ()), link_lib.alone())
  first, _, _ = fp.chain(noisy()).send(message, ((),), ((),), link_lib.alone())
  assert not np.allclose(wire["a"], 2 * first["a"])


def noisy():
  def send(message, ctx):
    draw = jax.random.normal(ctx.key, (4,))
    return jax.tree.map(lambda x: x + draw, message), {}

  return link_lib.stateless("noisy", send)


def test_memory_of_a_link_makes_up_for_what_it_did_not_send(tol):
  link = fp.chain(laws.feedback(0.5))
  like = fp.Spec(laws.SHAPES)
  mine, shared = link.init(like)
  said, meant = [], []
  for seed in range(5):
    message = laws.one(laws.messages(seed), 0)
    wire, mine, _ = link.send(message, mine, shared, link_lib.alone())
    said.append(wire)
    meant.append(message)
  total = jax.tree.map(lambda *x: sum(x[1:], x[0]), *said, mine[0])
  wanted = jax.tree.map(lambda *x: sum(x[1:], x[0]), *meant)
  laws.near(total, wanted, error=tol(jnp.float32, 5))


# Order.


@pytest.mark.parametrize("each", [fp.int8(), fp.chain(fp.clip(1.0), fp.int8())])
def test_what_needs_the_sum_cannot_stand_right_of_what_needs_each(each):
  with pytest.raises(ValueError, match="'weigh' .* 'int8' .* use fixed_point"):
    fp.chain(each, fp.weigh())
  fp.chain(fp.weigh(), each)


def test_a_reduction_that_is_not_linear_refuses_what_needs_the_sum():
  with pytest.raises(
    ValueError, match=r"'weigh' .* 'median' .* reduce.sum\(\)"
  ):
    fp.exchange(fp.chain(fp.clip(1.0), fp.weigh()), laws.median())
  with pytest.raises(ValueError, match="'weigh' .* 'median'"):
    fp.tier("cloud", link=fp.weigh(), reduce=laws.median())
  assert fp.tier("cloud", reduce=laws.median()).link.parts == ()


@pytest.mark.parametrize(
  "link",
  [
    fp.chain(),
    fp.clip(0.8),
    fp.int8(),
    fp.chain(fp.clip(0.8), fp.int8()),
    fp.chain(fp.clip(2.0), fp.fixed_point(16)),
  ],
  ids=lambda link: link.name,
)
def test_a_median_of_ones_own_is_taken_over_what_each_wire_says(link):
  crossing = laws.exchanged(link, laws.messages(), reduce=laws.median())
  wanted = jax.tree.map(lambda x: np.median(x, axis=0), crossing.said)
  laws.near(crossing.result, wanted)


def test_what_stands_left_of_an_each_link_is_received_on_the_sum():
  # The mean is over decoded wires: their weights are divided once, at the end.
  link = fp.chain(fp.weigh(max_weight=8), fp.int8(stochastic=False))
  crossing = laws.exchanged(link, laws.messages())
  said = crossing.said
  assert said.weight.tolist() == [1, 3, 8, 2, 5]
  wanted = jax.tree.map(
    lambda x: np.asarray(x).sum(0) / np.float32(19), said.message
  )
  laws.near(crossing.result, wanted)


# One sender, many receivers.


@pytest.mark.parametrize(
  "build",
  [
    fp.broadcast,
    lambda x: fp.cut(x, fp.chain()),
    lambda x: fp.cut(fp.chain(), x),
  ],
)
def test_one_sender_cannot_use_what_needs_a_sum(build):
  with pytest.raises(ValueError, match="'weigh' .* leave it out"):
    build(fp.chain(fp.clip(1.0), fp.weigh()))


def test_a_broadcast_gives_everyone_what_the_wire_says():
  link = fp.int8(stochastic=False)
  message = {"a": jnp.array([1.0, 0.3, -0.7])}
  received, _, _, wire = fp.broadcast(link)(message, (), (), link_lib.alone())
  wanted = np.asarray(wire["a"].packed, np.float32) * np.asarray(
    wire["a"].scale
  )
  np.testing.assert_array_equal(received["a"], wanted)
  assert not np.array_equal(received["a"], message["a"])


# A cut.


def network(boundary):
  """Loss of a small network, cut in the middle."""
  rng = np.random.default_rng(0)
  first = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
  second = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)
  x = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)

  def loss(first, second, key):
    middle = jnp.tanh(x @ first)
    if boundary is not None:
      middle = boundary(middle, key)
    return jnp.sum(jnp.square(middle @ second))

  return loss, (first, second, jax.random.key(3))


def test_a_cut_that_changes_nothing_is_no_cut():
  loss, args = network(None)
  cut, _ = network(fp.cut(fp.chain(), fp.chain()))
  plain = jax.value_and_grad(loss, argnums=(0, 1))(*args)
  divided = jax.value_and_grad(cut, argnums=(0, 1))(*args)
  jax.tree.map(np.testing.assert_array_equal, plain, divided)


def test_a_gradient_goes_straight_through_a_quantized_cut():
  up = fp.int8(stochastic=False)
  boundary = fp.cut(up, fp.chain())
  x = jnp.array([0.1, -0.52, 0.9, 0.333])
  key, seen = jax.random.key(0), jnp.array([1.0, 2.0, -3.0, 4.0])
  value, back = jax.vjp(lambda x: boundary(x, key), x)
  wire, _, _ = up.send(x, (), (), link_lib.alone())
  np.testing.assert_array_equal(value, up.receive(wire, (), None, None)[0])
  assert not np.array_equal(value, x)
  np.testing.assert_array_equal(back(seen)[0], seen)


def test_a_cotangent_crosses_the_link_that_goes_down():
  down = fp.int8(stochastic=False)
  x, key = jnp.array([0.1, -0.52, 0.9, 0.333]), jax.random.key(0)
  value, back = jax.vjp(lambda x: fp.cut(fp.chain(), down)(x, key), x)
  np.testing.assert_array_equal(value, x)
  seen = jnp.array([1.0, 0.21, -0.3, 0.4])
  wire, _, _ = down.send(seen, (), (), link_lib.alone())
  np.testing.assert_array_equal(
    back(seen)[0], down.receive(wire, (), None, None)[0]
  )
  assert not np.array_equal(back(seen)[0], seen)


def test_a_cut_works_under_jit_and_over_many_senders():
  boundary = fp.cut(fp.chain(fp.clip(1.0), fp.fixed_point(16)), fp.int8())
  loss, (first, second, key) = network(boundary)
  firsts = jnp.stack([first, 2 * first])
  keys = jax.random.split(key, 2)
  run = jax.jit(jax.vmap(jax.grad(loss), (0, None, 0)))
  found = run(firsts, second, keys)
  alone = [jax.grad(loss)(f, second, k) for f, k in zip(firsts, keys)]
  # At most one step of int8 on a cotangent, through one matrix product.
  np.testing.assert_allclose(found, jnp.stack(alone), atol=0.2)
  assert np.isfinite(found).all()


def test_the_sum_is_what_a_linear_reduction_is_for():
  ex = fp.exchange(fp.chain(), reduce_lib.sum())
  assert ex.reduce.linear
  assert ex.link.receive_on == "any"
