"""What every method promises, on an encoder, a decoder and a user's MLP."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_worlds as worlds
import test_lowered
from fedjax_peft import peft

MODULES = ("encoder", "decoder", "mlp")


@functools.cache
def before(name):
  """The arrays of a world's module, copied before anything is done to it."""
  parts = peft.split(worlds.world(name).module)
  return jax.tree.map(np.array, parts.params)


def bits(x):
  return np.asarray(x).view(np.uint32)


def all_at_once(module):
  """A method on each kind of layer, some on top of others."""
  module = peft.lora(module, 2, ".*/query", scaling="sqrt")
  module = peft.dora(module, 2, ".*/key")
  module = peft.ia3(peft.vera(module, 5, ".*/value"), ".*/value")
  module = peft.bottleneck(peft.core(module, 2, ".*/output"), 3, ".*/output")
  module = peft.ravan(module, 2, ".*/up", heads=2)
  module = peft.ia3(peft.sparse(module, 0.1, ".*/down"), ".*/up")
  module = peft.bottleneck(module, 3, ".*/down", parallel=True)
  return peft.ia3(module, ".*/down", side="input")


def unchanged(name, module):
  w = worlds.world(name)
  old = before(name)
  np.testing.assert_array_equal(
    bits(worlds.call(module, w.inputs)), bits(worlds.plain(name))
  )
  jax.tree.map(np.testing.assert_array_equal, peft.split(w.module).params, old)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_fresh_adapters_change_no_bit_of_the_output(name):
  old = before(name)
  module = all_at_once(worlds.world(name).module)
  kept = peft.split(module).base
  for n, value in old.items():
    np.testing.assert_array_equal(kept[n], value)
  unchanged(name, module)
  unchanged(name, peft.freeze(module, "float32"))


@pytest.mark.parametrize("method", worlds.SILENT)
def test_each_method_alone_changes_no_bit_of_the_output(method):
  before("mlp")
  unchanged("mlp", worlds.tuned(method, "mlp"))


def test_compiled_modules_agree_bit_for_bit_too():
  w = worlds.world("mlp")
  modules = {"plain": w.module}
  modules |= {method: worlds.tuned(method, "mlp") for method in worlds.SILENT}
  parts = {name: peft.split(module) for name, module in modules.items()}
  graphs = {name: p.graph for name, p in parts.items()}

  @jax.jit
  def all_of_them(arrays, x):
    return {
      name: peft.merge(graphs[name], params, {}, {}, base)(x)
      for name, (params, base) in arrays.items()
    }

  arrays = {name: (p.params, p.base) for name, p in parts.items()}
  got = all_of_them(arrays, *w.inputs)
  for value in got.values():
    np.testing.assert_array_equal(bits(value), bits(got["plain"]))


@pytest.mark.parametrize("name", ["encoder", "mlp"])
@pytest.mark.parametrize("method", worlds.SILENT)
def test_a_method_trains_as_many_entries_as_its_docstring_says(method, name):
  parts = peft.split(worlds.tuned(method, name))
  want = worlds.SILENT[method].count(worlds.world(name))
  assert peft.count(parts.params) == want
  kept = [n for n in parts.base if n in before(name)]
  assert sorted(kept) == sorted(before(name))  # names stay, none is lost
  for n in kept:
    np.testing.assert_array_equal(parts.base[n], before(name)[n])


@pytest.mark.parametrize("method", worlds.SILENT)
def test_gradients_flow_into_adapters_and_into_no_frozen_kernel(method):
  parts, step = worlds.descent(method)
  moved = peft.split(worlds.noisy(peft.merge(*parts))).params
  floats = {n: x for n, x in parts.base.items() if x.dtype == jnp.float32}
  to_params, to_base = step(moved, floats)
  assert all(np.abs(g).max() > 0 for g in to_params.values())
  frozen = [n for n in to_base if n.endswith("kernel")]
  frozen += [n for n in to_base if re.search("/(vera|core|ravan)_", n)]
  assert len(frozen) >= 3
  assert not any(np.abs(to_base[n]).max() for n in frozen)


@pytest.mark.parametrize("method", worlds.SILENT)
def test_a_fresh_adapter_can_leave_its_zero(method):
  """Writing zero as -0.0 does not stop the gradient."""
  parts, step = worlds.descent(method)
  floats = {n: x for n, x in parts.base.items() if x.dtype == jnp.float32}
  slope, _ = step(parts.params, floats)
  assert any(np.abs(g).max() > 0 for g in slope.values())
  moved = jax.tree.map(lambda p, g: p - 0.001 * g, parts.params, slope)
  module = peft.merge(*parts._replace(params=moved))
  got = worlds.call(module, worlds.world("mlp").inputs)
  assert (got**2).sum() < (worlds.plain("mlp") ** 2).sum()


@pytest.mark.parametrize("method", worlds.FOLDED)
def test_folding_adapters_into_layers_changes_nothing(method, tol):
  w = worlds.world("mlp")
  module = worlds.noisy(worlds.tuned(method, "mlp"))
  merged = peft.merged(module)
  assert peft.split(merged).graph == peft.split(w.module).graph
  want = worlds.call(module, w.inputs)
  scale = np.abs(want).max()
  assert np.abs(want - worlds.plain("mlp")).max() > 1e-3 * scale
  # four products of up to 20 terms, one after another
  atol = 4 * tol(jnp.float32, 20) * scale
  np.testing.assert_allclose(
    worlds.call(merged, w.inputs), want, rtol=0, atol=atol
  )


def test_bottlenecks_stay_where_others_fold(tol):
  w = worlds.world("mlp")
  module = peft.bottleneck(worlds.tuned("lora", "mlp"), 5, ".*/down")
  module = worlds.noisy(module)
  merged = peft.merged(module)
  assert isinstance(merged.layers.down, peft.Bottleneck)
  atol = 4 * tol(jnp.float32, 20)
  np.testing.assert_allclose(
    worlds.call(merged, w.inputs), worlds.call(module, w.inputs), atol=atol
  )


# Products of a client's own adapter that have the shape of a kernel.
OWN = {"sparse"}


@pytest.mark.parametrize("method", sorted(set(worlds.SILENT) - OWN))
def test_clients_share_the_product_with_every_frozen_matrix(method):
  w = worlds.world("mlp")
  parts = peft.split(peft.freeze(worlds.tuned(method, "mlp")))
  clients = 3

  def loss(params, base, x):
    module = peft.merge(parts.graph, params, {}, {}, base)
    return (module(x) ** 2).sum()

  step = jax.vmap(jax.value_and_grad(loss), in_axes=(0, None, 0))
  many = lambda x: jnp.stack([x] * clients)  # noqa: E731
  params = jax.tree.map(many, parts.params)
  text = jax.jit(step).lower(params, parts.base, many(w.inputs[0])).as_text()
  frozen = {x.shape[-2:] for x in parts.base.values() if x.ndim == 3}
  frozen = {s for s in frozen if 3 not in s and 6 not in s and 7 not in s}
  assert {(12, 20), (20, 12)} <= frozen
  seen = set()
  for batched, left, right, out in test_lowered.dots(text):
    for operand in (left, right):
      if operand[-2:] in frozen:
        assert not batched
        seen.add(operand[-2:])
    assert out[-2:] not in frozen  # nobody's gradient of a kernel
  assert {(12, 20), (20, 12)} <= seen


def test_two_methods_compose_by_name_in_any_order():
  w = worlds.world("encoder")
  gain = lambda m: peft.ia3(m, ".*/(query|key)")  # noqa: E731
  side = lambda m: peft.lora(m, 2, ".*/(query|value)")  # noqa: E731
  after = lambda m: peft.bottleneck(m, 4, ".*/(down|query)")  # noqa: E731
  top = lambda m: peft.head(peft.bitfit(m, "layers/.*"))  # noqa: E731
  small = lambda m: peft.quantize_base(m, "int8", ".*/(query|up)")  # noqa: E731
  steps = [gain, side, after, top, small]
  results = []
  for order in (steps, steps[::-1], [small, after, side, top, gain]):
    module = w.module
    for step in order:
      module = step(module)
    results.append(peft.split(module))
  for other in results[1:]:
    assert other.params.keys() == results[0].params.keys()
    jax.tree.map(np.testing.assert_array_equal, other.params, results[0].params)
    assert other.base.keys() == results[0].base.keys()
  names = {n for n in results[0].params if "/query/" in n}
  assert {n.rsplit("/", 1)[1] for n in names} == {
    *("ia3_gain", "lora_a", "lora_b", "bias"),
    *("bottleneck_down", "bottleneck_down_bias"),
    *("bottleneck_up", "bottleneck_up_bias"),
  }
  outputs = [worlds.call(peft.merge(*r), w.inputs) for r in results]
  for other in outputs[1:]:
    np.testing.assert_array_equal(other, outputs[0])


def test_the_table_holds_every_method_by_its_name():
  assert sorted(peft.METHODS) == sorted(
    name
    for name in dir(peft)
    if name in peft.METHODS and getattr(peft, name) is peft.METHODS[name]
  )
  assert {"lora", "dora", "vera", "core", "ravan", "ia3"} <= peft.METHODS.keys()


def test_without_a_method_everything_trains():
  for name in MODULES:
    parts = peft.split(worlds.world(name).module)
    assert not parts.base
    assert parts.params


@pytest.mark.parametrize(
  "method", ["lora", "dora", "vera", "core", "ravan", "sparse"]
)
def test_a_layer_takes_one_adapter_beside_it(method):
  module = worlds.tuned("core", "mlp")
  with pytest.raises(ValueError, match="takes one adapter: .* has Core"):
    peft.METHODS[method](module, where="layers/up")
  with pytest.raises(ValueError, match="did you mean 'layers/up'"):
    peft.METHODS[method](worlds.world("mlp").module, where="layers/upp")
  with pytest.raises(ValueError, match=f"call {method} first"):
    peft.METHODS[method](peft.freeze(module), where="layers/down")


def test_options_that_make_no_sense_are_refused():
  module = worlds.world("mlp").module
  up = "layers/up"
  fisher = {up: jnp.ones((2, 3))}
  for call, message in [
    (lambda: peft.lora(module, where=up, scaling="root"), "scaling must be"),
    (lambda: peft.lora(module, where=up, init="zero"), "init must be one of"),
    (lambda: peft.lora(module, 13, up, init="svd"), "rank must be at most 12"),
    (lambda: peft.core(module, 13, up), "rank must be at most 12"),
    (lambda: peft.core(module, 2, up, update={}), "first_update"),
    (lambda: peft.core(module, 2, up, scale=0.0), "scale must be a positive"),
    (lambda: peft.ravan(module, 4, up, heads=4), "heads . rank must be at"),
    (lambda: peft.vera(module, 0, up), "rank must be an integer"),
    (lambda: peft.sparse(module, 1.5, up), "density must be at most 1"),
    (lambda: peft.sparse(module, 0.5, up, choose="fisher"), "goes with fisher"),
    (lambda: peft.sparse(module, 0.5, up, fisher=fisher), "goes with fisher"),
    (
      lambda: peft.sparse(module, 0.5, up, choose="fisher", fisher=fisher),
      r"of shape \[2, 12, 20\] .* got one of shape \[2, 3\]",
    ),
    (lambda: peft.ia3(module, up, side="both"), "side must be one of"),
    (
      lambda: peft.ia3(peft.ia3(module, up), up),
      "takes one gain: 'layers/up' has one",
    ),
    (lambda: peft.bottleneck(module, 4, "layers"), "write width="),
    (
      lambda: peft.bottleneck(peft.bottleneck(module, 4, up), 4, up),
      "takes one bottleneck: 'layers/up'",
    ),
    (
      lambda: peft.bottleneck(module, 4, up, activation="sin"),
      "activation must be one of",
    ),
  ]:
    with pytest.raises(ValueError, match=message):
      call()
