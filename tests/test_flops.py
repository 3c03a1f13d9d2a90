"""FLOPs counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from fedjax_peft import flops


def test_a_product_is_two_operations_for_each_term():
  x, y = jnp.ones((7, 4, 3)), jnp.ones((7, 3, 5))
  assert flops.count(jnp.matmul, x, y) == 2 * 7 * 4 * 3 * 5


def test_loops_count_as_often_as_they_run():
  w = jnp.ones((6, 3, 3))

  def outer(x):
    def inner(x, w):
      return jax.lax.fori_loop(0, 5, lambda _, x: x @ w, x), None

    return jax.lax.scan(inner, x, w)[0]

  assert flops.count(outer, jnp.ones((2, 3))) == 6 * 5 * 2 * 2 * 3 * 3


def test_a_gradient_costs_twice_the_forward_pass_more():
  w = jnp.ones((8, 8))

  def loss(w, x):
    return jnp.sum((x @ w) @ w)

  x = jnp.ones((4, 8))
  forward = 2 * 2 * 4 * 8 * 8
  # The first product needs no gradient of its input.
  assert flops.count(jax.grad(loss), w, x) == forward + 3 * forward // 2


def test_what_is_compiled_inside_and_checkpointed_counts():
  @jax.jit
  def inner(x):
    return jax.checkpoint(lambda x: x @ x)(x)

  assert flops.count(inner, jnp.ones((3, 3))) == 2 * 27


def test_a_convolution_counts_its_kernel_for_every_output():
  x, k = jnp.ones((1, 9, 9, 2)), jnp.ones((3, 3, 2, 4))

  def conv(x, k):
    return jax.lax.conv_general_dilated(
      x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  assert flops.count(conv, x, k) == 2 * (7 * 7 * 4) * (3 * 3 * 2)


def test_the_dearest_branch_counts():
  def fun(x, which):
    return jax.lax.cond(which, lambda x: x @ x, lambda x: x, x)

  assert flops.count(fun, jnp.ones((3, 3)), True) == 2 * 27


def test_an_unknown_length_is_refused():
  def fun(x, n):
    return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

  with pytest.raises(ValueError, match="length"):
    flops.count(fun, jnp.ones((3, 3)), 4)


def test_custom_derivatives_count_once():
  @jax.custom_vjp
  def f(x):
    return x @ x

  f.defvjp(lambda x: (f(x), x), lambda x, g: (g @ x.T + x.T @ g,))
  x = jnp.ones((3, 3))
  assert flops.count(f, x) == 2 * 27
  assert flops.count(jax.grad(lambda x: f(x).sum()), x) == 3 * 2 * 27
