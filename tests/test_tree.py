"""Arithmetic on pytrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_peft import tree


@pytest.mark.parametrize("size", [1e-36, 1e-20, 1.0, 1e20, 1e37])
def test_a_norm_neither_overflows_nor_vanishes(size, tol):
  rng = np.random.default_rng(0)
  drawn = {"a": rng.normal(size=(8, 3)) * size, "b": rng.normal(size=4) * size}
  message = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn)
  wanted = np.sqrt(
    sum(np.sum(np.asarray(x, np.float64) ** 2) for x in message.values())
  )
  np.testing.assert_allclose(
    tree.norm(message), wanted, rtol=tol(jnp.float32, 28)
  )


def test_a_norm_sees_float_leaves_only_and_is_zero_without_any():
  assert float(tree.norm({"n": jnp.arange(5)})) == 0
  assert float(tree.norm({})) == 0
  message = {"n": jnp.arange(5), "x": jnp.array([3.0, -4.0])}
  np.testing.assert_allclose(tree.norm(message), 5.0, rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_norm_of_what_is_not_finite_is_not_finite(bad):
  assert not np.isfinite(
    tree.norm({"a": jnp.array([1.0, bad]), "b": jnp.ones(2)})
  )
  assert not bool(tree.is_finite({"a": jnp.array([1.0, bad])}))
  assert bool(tree.is_finite({"a": jnp.ones(2), "n": jnp.arange(2)}))
  assert bool(tree.is_finite({}))


def test_the_norm_of_a_product_is_that_of_its_factors(tol):
  rng = np.random.default_rng(1)
  left = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)
  right = jnp.asarray(rng.normal(size=(7, 4)), jnp.float32)
  product = tree.Factored(left, right)
  dense = np.asarray(left, np.float64).T @ np.asarray(right, np.float64)
  np.testing.assert_allclose(product.expand(), dense, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    tree.norm({"w": product}), np.linalg.norm(dense), rtol=tol(jnp.float32, 63)
  )


def test_scaling_keeps_dtypes_and_scales_a_product_once():
  message = {
    "half": jnp.ones(2, jnp.bfloat16),
    "n": jnp.array([1, 2], jnp.int32),
    "w": tree.Factored(jnp.ones((3, 2)), jnp.ones((3, 4))),
  }
  scaled = tree.scale(message, jnp.int32(3))
  assert tree.spec(scaled) == tree.spec(message)
  np.testing.assert_array_equal(scaled["n"], [3, 6])
  np.testing.assert_array_equal(scaled["w"].expand(), 3 * message["w"].expand())


def test_where_picks_along_the_leading_axes():
  yes, no = {"a": jnp.ones((3, 2))}, {"a": jnp.zeros((3, 2))}
  found = tree.where(jnp.array([True, False, True]), yes, no)
  np.testing.assert_array_equal(found["a"][:, 0], [1, 0, 1])


def test_bytes_and_sizes_are_those_of_the_arrays():
  message = {"a": jnp.ones((3, 5), jnp.bfloat16), "b": jnp.array(1, jnp.int8)}
  held = jax.tree.leaves(message)
  for what in (message, tree.spec(message)):
    assert tree.nbytes(what) == sum(x.nbytes for x in held) == 31
    assert tree.size(what) == 16
