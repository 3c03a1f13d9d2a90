"""Modules taken apart and put together, also under transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjax_peft import peft


class Model(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0, dropout=1)
    self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(12)])
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.norm = nnx.BatchNorm(6, rngs=rngs)
    self.head = nnx.Linear(6, 2, rngs=rngs)
    self.table = jnp.arange(6.0)

  def __call__(self, x):
    for layer in self.layers[:2]:
      x = jax.nn.relu(layer(x))
    return self.head(self.norm(self.dropout(x + self.table.reshape(1, 6))))


def adapted():
  return peft.tune(peft.lora(Model(), rank=2, where="layers/1"))


def assert_equal(got, want):
  """Asserts that two trees of arrays are equal bit for bit."""

  def check(a, b):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)

  jax.tree.map(check, got, want)


def apply(parts, x):
  return peft.merge(*parts)(x)


def test_each_array_is_in_one_part_by_what_it_is():
  parts = peft.split(adapted())
  assert sorted(parts.params) == [
    "head/bias",
    "head/kernel",
    "layers/1/lora_a",
    "layers/1/lora_b",
  ]
  assert sorted(parts.rng) == ["dropout/rngs/count", "dropout/rngs/key"]
  assert sorted(parts.mutable) == ["norm/mean", "norm/var"]
  names = {f"layers/{i}/{n}" for i in range(12) for n in ("bias", "kernel")}
  assert parts.base.keys() == names | {"norm/bias", "norm/scale", "table"}


def test_a_module_without_adapters_trains_every_param():
  parts = peft.split(Model())
  assert len(parts.params) == 12 * 2 + 4
  assert list(parts.base) == ["table"]


def test_merge_undoes_split():
  module = adapted()
  parts = peft.split(module)
  again = peft.split(peft.merge(*parts))
  assert again.graph == parts.graph
  assert hash(again.graph) == hash(parts.graph)
  assert_equal(again[1:], parts[1:])
  x = jnp.ones((3, 6))
  np.testing.assert_array_equal(apply(parts, x), module(x))


def test_a_split_passes_through_jit_as_a_pytree():
  parts = peft.split(adapted())
  x = jnp.ones((3, 6))
  module = peft.merge(*parts)
  np.testing.assert_allclose(
    jax.jit(apply)(parts, x), module(x), rtol=1e-5, atol=1e-6
  )


def test_what_a_call_changed_is_read_back_by_split():
  parts = peft.split(adapted())

  @jax.jit
  def step(parts, x):
    module = peft.merge(*parts)
    module(x)
    return peft.split(module)

  after = step(parts, jnp.ones((3, 6)))
  assert after.graph == parts.graph
  assert (after.mutable["norm/mean"] != parts.mutable["norm/mean"]).any()
  assert after.rng["dropout/rngs/count"] == 1
  assert parts.rng["dropout/rngs/count"] == 0
  assert_equal(after.params, parts.params)
  assert_equal(after.base, parts.base)


def train(parts, x, y, clients=3):
  """One step of every client: new params, per client, and gradients."""

  def loss(params, rng, mutable, base, x, y):
    module = peft.merge(parts.graph, params, rng, mutable, base)
    error = ((module(x) - y) ** 2).mean()
    return error, peft.split(module).mutable

  def step(params, rng, mutable, base, x, y):
    grad = jax.value_and_grad(loss, has_aux=True)
    (_, mutable), grads = grad(params, rng, mutable, base, x, y)
    new = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    return new, grads, mutable

  spread = lambda tree: jax.tree.map(  # noqa: E731
    lambda leaf: jnp.broadcast_to(leaf, (clients, *leaf.shape)), tree
  )
  key = parts.rng["dropout/rngs/key"]
  rng = spread(parts.rng) | {"dropout/rngs/key": jax.random.split(key, clients)}
  step = jax.jit(jax.vmap(step, in_axes=(0, 0, 0, None, 0, 0)))
  return step(
    spread(parts.params), rng, spread(parts.mutable), parts.base, x, y
  )


@pytest.mark.parametrize("precision", [None, "bf16", "float32"])
def test_adapters_learn_and_the_base_does_not(precision):
  module = adapted() if precision is None else peft.freeze(adapted(), precision)
  parts = peft.split(module)
  before = jax.tree.map(np.array, parts.base)
  x = jax.random.normal(jax.random.key(1), (3, 8, 6))
  new, grads, mutable = train(parts, x, x[..., :2])
  assert new.keys() == grads.keys() == parts.params.keys()
  for name, grad in grads.items():
    moves = name != "layers/1/lora_a"  # B = 0 hides A for one step
    assert np.any(grad != 0) == moves
    assert np.array_equal(new[name][0], parts.params[name]) != moves
    assert grad.dtype == jnp.float32
  assert (mutable["norm/mean"][0] != mutable["norm/mean"][1]).any()
  assert_equal(parts.base, before)


def test_each_client_has_its_own_dropout_mask():
  parts = peft.split(adapted())
  same = jnp.ones((3, 8, 6))
  _, grads, _ = train(parts, same, same[..., :2])
  grad = grads["head/kernel"]
  assert (grad[0] != grad[1]).any()
  assert (grad[1] != grad[2]).any()


def test_params_of_a_full_fine_tuning_receive_gradients():
  parts = peft.split(Model())
  x = jax.random.normal(jax.random.key(1), (3, 8, 6))
  _, grads, _ = train(parts, x, x[..., :2])
  assert np.any(grads["layers/0/kernel"] != 0)
  assert not np.any(grads["layers/11/kernel"])


def test_missing_and_unknown_names_are_refused():
  parts = peft.split(adapted())
  params = dict(parts.params)
  params["layers/1/lora_c"] = params.pop("layers/1/lora_a")
  with pytest.raises(ValueError, match="did you mean 'layers/1/lora_a'"):
    peft.merge(*parts._replace(params=params))
  base = {k: v for k, v in parts.base.items() if k != "table"}
  with pytest.raises(ValueError, match=r"missing=\['table'\]"):
    peft.merge(*parts._replace(base=base))


def test_names_that_stand_for_two_arrays_are_refused():
  module = nnx.Dict({"a/b": nnx.Param(jnp.zeros(1))})
  module.a = nnx.Dict(b=nnx.Param(jnp.zeros(1)))
  with pytest.raises(ValueError, match=r"names must be unique: \['a/b'\]"):
    peft.split(module)
