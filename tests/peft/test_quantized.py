"""Quantized bases: bounded error, shared products, adapters that train."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peft_worlds as worlds
import test_lowered
from fedjax_peft import peft

QTYPES = ("int8", "int4", "nf4")
K, F, B = 24, 10, 5


def layer():
  return nnx.Linear(K, F, rngs=nnx.Rngs(0))


def noise(*shape):
  return jax.random.normal(jax.random.key(1), shape)


@functools.cache
def kernels(qtype, tile):
  """(kernel, its decoded codes, the step between levels), float64 [K, F]."""
  small = peft.quantize_base(layer(), qtype, ".*", tile=tile)
  scale = np.asarray(small.kernel_scale[...], np.float64)
  step = np.repeat(scale, K // scale.shape[0], axis=0)
  decoded = np.asarray(small.matrix(), np.float64)
  return np.asarray(layer().kernel[...], np.float64), decoded, step


@pytest.mark.parametrize("tile", [None, 8])
@pytest.mark.parametrize("qtype", QTYPES)
def test_a_code_is_the_nearest_level_of_its_entry(qtype, tile, tol):
  kernel, decoded, step = kernels(qtype, tile)
  if qtype == "nf4":  # QLoRA, appendix E: 16 quantiles, the largest entry at 1
    half = [0.0795802995, 0.1609302014, 0.2461123019, 0.3379152417]
    half += [0.4407098293, 0.562617003, 0.7229568362, 1.0]
    other = [-1.0, -0.6961928009, -0.525073051, -0.3949174881]
    other += [-0.2844413817, -0.1847734302, -0.0910500363, 0.0]
    levels = np.array([*other, *half])
    all_of_them = step[..., None] * levels
    best = np.abs(all_of_them - kernel[..., None]).min(-1)
  else:
    best = step / 2
  slack = tol(jnp.float32) * np.abs(kernel).max()
  assert (np.abs(decoded - kernel) <= best + slack).all()
  assert len(np.unique(decoded / step)) > 8


@pytest.mark.parametrize("qtype", QTYPES)
def test_an_output_errs_by_at_most_what_its_kernel_does(qtype, tol):
  kernel, decoded, _ = kernels(qtype, None)
  x = noise(B, K)
  small = peft.quantize_base(layer(), qtype, ".*")
  bound = np.abs(np.asarray(x, np.float64)) @ np.abs(decoded - kernel)
  error = np.abs(small(x) - np.asarray(layer()(x)))
  slack = 2 * tol(jnp.float32, K) * np.abs(layer()(x)).max()
  assert (error <= bound + slack).all()
  assert error.max() > 0.05 * bound.max()  # it is quantized indeed


@pytest.mark.parametrize("qtype", QTYPES)
def test_the_gradient_of_the_input_is_that_of_the_decoded_kernel(qtype, tol):
  small = peft.quantize_base(layer(), qtype, ".*")
  x, g = noise(B, K), noise(B, F)
  (got,) = jax.vjp(small, x)[1](g)
  want = g @ small.matrix().T
  atol = 2 * tol(jnp.float32, F) * np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("qtype", QTYPES)
def test_adapters_train_over_a_base_that_stays(qtype):
  w = worlds.world("mlp")
  module = peft.lora(w.module, 2, "layers/up")
  module = peft.freeze(peft.quantize_base(module, qtype))
  parts = peft.split(module)
  assert {n.rsplit("/", 1)[1] for n in parts.params} == {"lora_a", "lora_b"}
  before = jax.tree.map(np.array, parts.base)
  codes = before["layers/up/kernel"]
  assert codes.dtype in (jnp.int8, jnp.int4, jnp.uint4)

  @jax.jit
  def step(params, base):
    def loss(params):
      module = peft.merge(parts.graph, params, {}, {}, base)
      return (module(*w.inputs) ** 2).sum()

    value, slope = jax.value_and_grad(loss)(params)
    return value, jax.tree.map(lambda p, g: p - 0.02 * g, params, slope)

  params, values = parts.params, []
  for _ in range(4):
    value, params = step(params, parts.base)
    values.append(value)
  assert values[-1] < values[0]
  jax.tree.map(np.testing.assert_array_equal, parts.base, before)


@pytest.mark.parametrize("qtype", ["int8", "nf4"])
def test_clients_share_one_decoded_kernel_and_one_product(qtype):
  w = worlds.world("mlp")
  module = peft.quantize_base(peft.lora(w.module, 3, w.where), qtype)
  parts = peft.split(peft.freeze(module))

  def loss(params, base, x):
    return (peft.merge(parts.graph, params, {}, {}, base)(x) ** 2).sum()

  many = lambda x: jnp.stack([x] * 3)  # noqa: E731
  step = jax.vmap(jax.grad(loss), in_axes=(0, None, 0))
  params = jax.tree.map(many, parts.params)
  text = jax.jit(step).lower(params, parts.base, many(w.inputs[0])).as_text()
  shapes = {(12, 20), (20, 12)}
  seen = set()
  for batched, left, right, out in test_lowered.dots(text):
    for operand in (left, right):
      if operand[-2:] in shapes:
        assert not batched
        assert len(operand) == 2
        seen.add(operand)
    assert out[-2:] not in shapes
  assert seen == shapes
  floats = [x for x in parts.base.values() if x.dtype == jnp.float32]
  assert not [x for x in floats if x.shape[-2:] in shapes]  # none is stored


def test_a_residual_stays_beside_codes_that_cannot_take_it_in(tol):
  module = peft.quantize_base(layer(), "int8", ".*")
  module = peft.lora(module, 2, ".*", residual=True)
  more = 0.1 * noise(K, F)
  module.lora_residual[...] = more
  plain, residuals = peft.strip(peft.freeze(module, "float32"))
  assert not residuals
  assert "lora_residual" in peft.split(plain).params
  x = noise(B, K)
  want = peft.quantize_base(layer(), "int8", ".*")(x) + x @ more
  atol = 4 * tol(jnp.float32, K) * np.abs(want).max()
  np.testing.assert_allclose(plain(x), want, rtol=0, atol=atol)


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_freezing_sets_the_precision_of_the_product(precision):
  small = nnx.Dict(a=peft.quantize_base(layer(), "int8", ".*"), head=layer())
  fast = peft.freeze(peft.head(small), precision).a
  assert isinstance(fast, peft.QuantizedLinear)
  x = noise(B, K)
  got, want = fast(x), small.a(x)
  assert got.dtype == want.dtype == jnp.float32
  if precision == "float32":
    np.testing.assert_array_equal(got, want)
  else:
    size = np.abs(x) @ np.abs(small.a.matrix())
    error = np.abs(got - want) / size
    assert 1e-5 < error.max() < 0.004


def test_layers_of_several_axes_are_quantized_as_matrices(tol):
  module = nnx.Einsum("btd,dhk->bhtk", (6, 2, 5), (2, 1, 5), rngs=nnx.Rngs(0))
  small = peft.quantize_base(module, "int8", ".*")
  x = noise(3, 4, 6)
  exact = nnx.clone(module)
  kernel = small.matrix().reshape(6, 2, 5)
  exact.kernel[...] = kernel
  atol = tol(jnp.float32, 6) * 4
  np.testing.assert_allclose(small(x), exact(x), rtol=0, atol=atol)
  tuned = peft.lora(small, 2, ".*")
  assert tuned.lora_a.shape == (6, 2)
  np.testing.assert_array_equal(tuned(x), small(x))


def test_dora_over_codes_starts_where_they_are():
  small = peft.quantize_base(layer(), "nf4", ".*")
  x = noise(B, K)
  np.testing.assert_array_equal(peft.dora(small, 2, ".*")(x), small(x))


def test_codes_never_train():
  parts = peft.split(peft.quantize_base(layer(), "int4", ".*"))
  assert list(parts.params) == ["bias"]
  assert sorted(parts.base) == ["kernel", "kernel_scale"]


def test_what_cannot_be_quantized_or_folded_is_refused():
  module = nnx.Dict(a=layer(), b=layer())
  small = peft.quantize_base(module, where="a")
  for call, message in [
    (lambda: peft.quantize_base(module, "int5", "a"), "qtype must be one of"),
    (lambda: peft.quantize_base(module, where="c"), "names are 'a', 'b'"),
    (lambda: peft.quantize_base(small, where=".*"), "'a' is and where='.*'"),
    (lambda: peft.quantize_base(module, where="a", tile=7), "tile=24"),
    (
      lambda: peft.quantize_base(peft.tune(module, "a/.*"), where="a"),
      "kernel that trains",
    ),
    (
      lambda: peft.quantize_base(peft.freeze(peft.lora(module, where="a"))),
      "call quantize_base first",
    ),
    (lambda: peft.merged(peft.lora(small, where="a")), "'a' is quantized"),
    (lambda: peft.merged(peft.ia3(small, "a")), "'a' is quantized"),
    (lambda: peft.tune(small, "a/kernel"), "matches no parameter"),
  ]:
    with pytest.raises(ValueError, match=message):
      call()
