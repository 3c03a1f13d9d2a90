"""Biases, norms, heads and last layers: these train, and only these move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peft_worlds as worlds
from fedjax_peft import peft

WIDTH, FFN, DEPTH = worlds.WIDTH, worlds.FFN, worlds.DEPTH
BLOCK = 2 * WIDTH + 2 * WIDTH * FFN + FFN + WIDTH  # a norm, two layers


def test_each_selects_what_its_name_says():
  mlp, decoder = (worlds.world(n).module for n in ("mlp", "decoder"))
  biases = DEPTH * (WIDTH + FFN + WIDTH) + worlds.CLASSES
  for module, count, last in [
    (peft.bitfit(mlp), biases, {"bias"}),
    (peft.bitfit(mlp, "layers/up/.*"), DEPTH * FFN, {"bias"}),
    (peft.norms(mlp), DEPTH * 2 * WIDTH, {"scale", "bias"}),
    (peft.norms(decoder), (2 * DEPTH + 1) * WIDTH, {"scale"}),
    (
      peft.head(mlp),
      (WIDTH + 1) * worlds.CLASSES,
      {"kernel", "bias"},
    ),
    (peft.last(mlp, 1), BLOCK, {"kernel", "bias", "scale"}),
    (peft.last(mlp, 2), 2 * BLOCK, {"kernel", "bias", "scale"}),
  ]:
    params = peft.split(module).params
    assert peft.count(params) == count
    assert {name.rsplit("/", 1)[1] for name in params} == last
    assert all("norm" in n for n in params) or last != {"scale"}


def test_only_the_last_rows_of_a_stack_are_params_and_move():
  w = worlds.world("mlp")
  module = peft.lora(peft.last(w.module, 1), 2, "layers/up")
  parts = peft.split(module)
  assert parts.params["layers/down/kernel"].shape == (1, FFN, WIDTH)
  assert parts.base["layers/down/kernel/still"].shape == (1, FFN, WIDTH)
  assert parts.params["layers/up/lora_a"].shape == (DEPTH, WIDTH, 2)

  @jax.jit
  @jax.grad
  def slope(params):
    return (peft.merge(*parts._replace(params=params))(*w.inputs) ** 2).sum()

  moved = jax.tree.map(
    lambda p, g: p - 0.01 * g, parts.params, slope(parts.params)
  )
  after = peft.merge(*parts._replace(params=moved))
  for layer in ("up", "down"):
    new, old = (getattr(m.layers, layer) for m in (after, w.module))
    new = getattr(new, "lora_base", new).kernel[...]
    np.testing.assert_array_equal(new[0], old.kernel[...][0])
    assert (new[1] != old.kernel[...][1]).any()
  again = peft.split(after)
  assert again.graph == parts.graph
  jax.tree.map(np.testing.assert_array_equal, again.params, moved)
  jax.tree.map(np.testing.assert_array_equal, again.base, parts.base)


def test_the_same_function_until_something_moves():
  w = worlds.world("mlp")
  parts = peft.split(peft.freeze(peft.last(w.module, 1), "float32"))
  np.testing.assert_array_equal(
    worlds.call(peft.merge(*parts), w.inputs), worlds.plain("mlp")
  )


def test_no_gradient_reaches_the_rows_that_stay():
  w = worlds.world("mlp")
  parts = peft.split(peft.last(w.module, 1, "layers/up/.*"))
  still = "layers/up/kernel/still"

  def loss(rows):
    base = parts.base | {still: rows}
    return (peft.merge(*parts._replace(base=base))(*w.inputs) ** 2).sum()

  assert not np.abs(jax.grad(loss)(parts.base[still])).max()


def test_the_last_of_a_list_are_told_by_their_numbers():
  module = nnx.Dict(
    layers=nnx.List(nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(11)),
    head=nnx.Linear(3, 2, rngs=nnx.Rngs(0)),
  )
  names = set(peft.split(peft.last(module, 2)).params)
  assert names == {
    f"layers/{i}/{leaf}" for i in (9, 10) for leaf in ("kernel", "bias")
  }


def test_tuning_all_of_a_stack_undoes_the_last():
  module = peft.tune(peft.last(worlds.world("mlp").module), "layers/.*")
  assert peft.count(peft.split(module).params) == DEPTH * BLOCK
  merged = peft.merged(peft.last(worlds.world("mlp").module))
  assert (
    peft.split(merged).graph == peft.split(worlds.world("mlp").module).graph
  )


def test_clients_with_rows_of_their_own_share_those_that_stay(tol):
  w = worlds.world("mlp")
  parts = peft.split(peft.last(w.module, 1, "layers/up/kernel"))
  scales = jnp.array([1.0, 2.0])
  params = jax.tree.map(
    lambda x: x[None] * scales.reshape(2, *[1] * x.ndim), parts.params
  )
  call = lambda p, b: peft.merge(parts.graph, p, {}, {}, b)(*w.inputs)  # noqa: E731
  got = jax.jit(jax.vmap(call, (0, None)))(params, parts.base)
  for i in range(2):
    one = call(jax.tree.map(lambda x: x[i], params), parts.base)
    atol = 8 * tol(jnp.float32, FFN) * np.abs(one).max()
    np.testing.assert_allclose(got[i], one, rtol=0, atol=atol)


def test_what_has_no_last_layers_is_refused():
  module = worlds.world("mlp").module
  mixed = nnx.Dict(
    layers=nnx.Dict(
      {
        "0": nnx.Linear(3, 3, rngs=nnx.Rngs(0)),
        "x": nnx.LayerNorm(3, rngs=nnx.Rngs(0)),
      }
    )
  )
  for call, message in [
    (lambda: peft.last(module, 3), "at most the 2 that there are: layers=3"),
    (lambda: peft.last(module, 0), "layers must be an integer"),
    (lambda: peft.last(module, 1, ".*"), "stacked on one leading axis"),
    (lambda: peft.last(mixed, 1), "number in every name"),
    (lambda: peft.norms(module, "head/.*"), "matches no parameter"),
    (lambda: peft.bitfit(module, "head/kernel"), "matches no parameter"),
    (lambda: peft.head(nnx.Dict()), "names are none"),
    (lambda: peft.norms(peft.freeze(peft.head(module))), "call norms first"),
  ]:
    with pytest.raises(ValueError, match=message):
      call()
