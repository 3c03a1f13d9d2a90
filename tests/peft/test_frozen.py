"""Frozen layers: the same values, no gradient of a kernel, one shared product.

Sizes are chosen so that a shape says what it is: 3 clients, 5 examples,
7 tokens, rank 2, kernels of 24 x 40, 40 x 56 and 56 x 24.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjax_peft import peft
from fedjax_peft.peft import frozen

KERNELS = [(24, 40), (40, 56), (56, 24)]


class Model(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.up = nnx.Linear(*KERNELS[0], rngs=rngs)
    self.mid = nnx.Linear(*KERNELS[1], rngs=rngs)
    self.down = nnx.Linear(*KERNELS[2], rngs=rngs)

  def __call__(self, x):
    return self.down(jnp.tanh(self.mid(jnp.tanh(self.up(x)))))


def adapted():
  return peft.lora(Model(), rank=2, where="up|down")


def noise(*shape, seed=1):
  return jax.random.normal(jax.random.key(seed), shape)


def traced(parts, *, full=False):
  """The gradient step of 3 clients on one shared base, traced."""

  def loss(params, base, x):
    module = peft.merge(parts.graph, params, {}, {}, base)
    return (module(x) ** 2).sum()

  argnums = (0, 1) if full else 0
  step = jax.vmap(jax.value_and_grad(loss, argnums), in_axes=(0, None, 0))
  params = jax.tree.map(lambda p: jnp.stack([p] * 3), parts.params)
  return jax.jit(step).trace(params, parts.base, noise(3, 5, 7, 24))


def dots(text):
  """(operand and result shapes, batching dimensions) of each dot_general."""
  lines = [line for line in text.splitlines() if "dot_general" in line]
  shape = lambda s: tuple(int(n) for n in re.findall(r"(\d+)x", s))  # noqa: E731
  return [
    (
      [shape(t) for t in re.findall(r"tensor<([^>]*)>", line)],
      "batching" in line,
    )
    for line in lines
  ]


def kernel_gradients(text):
  """Results of dots that have the shape of a kernel, batched or not."""
  kernels = {*KERNELS, *(k[::-1] for k in KERNELS)}
  return [s[-1] for s, _ in dots(text) if s[-1][-2:] in kernels]


@pytest.mark.parametrize("precision", ["bf16", "float32"])
@pytest.mark.parametrize("transposed", [False, True])
def test_no_product_computes_the_gradient_of_a_kernel(precision, transposed):
  """Not even where the base itself is differentiated."""
  parts = peft.split(peft.freeze(adapted(), precision, transposed))
  program = traced(parts, full=True).lower()
  assert not kernel_gradients(program.as_text())
  compiled = program.compile().as_text()
  results = re.findall(r"= \w+\[([\d,]*)\]\S* (?:dot|custom-call)\(", compiled)
  shapes = [tuple(map(int, r.split(","))) for r in results if r]
  assert shapes
  kernels = {*KERNELS, *(k[::-1] for k in KERNELS)}
  assert not [s for s in shapes if s[-2:] in kernels]


def test_the_same_search_finds_the_gradient_of_a_kernel_that_trains():
  parts = peft.split(adapted())
  assert len(kernel_gradients(traced(parts, full=True).lower().as_text())) == 3


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_frozen_products_have_no_batch_dimension_under_vmap(precision):
  parts = peft.split(peft.freeze(adapted(), precision))
  found = dots(traced(parts).lower().as_text())
  kernels = {*KERNELS, *(k[::-1] for k in KERNELS)}
  shared = [(s, batch) for s, batch in found if s[1] in kernels]
  assert len(shared) == 5  # 3 forward; 2 backward: nothing trains below "up"
  for (rows, _, result), batch in shared:
    assert not batch
    assert rows[:3] == result[:3] == (3, 5, 7)
  assert all(batch for s, batch in found if s[1] not in kernels)


class Deep(nnx.Module):
  """Four layers of two kernels, stacked and scanned over."""

  def __init__(self):
    make = lambda key: nnx.Dict(  # noqa: E731
      up=nnx.Linear(24, 40, rngs=nnx.Rngs(key)),
      down=nnx.Linear(40, 24, rngs=nnx.Rngs(key)),
    )
    self.layers = nnx.vmap(make)(jax.random.split(jax.random.key(0), 4))

  def __call__(self, x):
    graph, state = nnx.split(self.layers)

    def step(x, state):
      layer = nnx.merge(graph, state)
      return x + layer.down(jnp.tanh(layer.up(x))), None

    return jax.lax.scan(step, x, state)[0]


def test_a_scan_over_stacked_layers_shares_products_and_copies_no_kernel():
  module = peft.lora(Deep(), rank=2, where="layers/up")
  program = traced(peft.split(peft.freeze(module, "bf16", transposed=True)))
  shapes = [(24, 40), (40, 24)]
  shared = [
    (s, b) for s, b in dots(program.lower().as_text()) if s[1] in shapes
  ]
  assert len(shared) == 4  # 2 forward, 2 backward
  assert not any(batched for _, batched in shared)
  scans = [e for e in program.jaxpr.eqns if e.primitive.name == "scan"]
  assert len(scans) == 2
  for scan in scans:
    outputs = [v.aval.shape for v in scan.outvars]
    assert not [s for s in outputs if s[-2:] in shapes]


def test_float32_is_the_same_bit_for_bit():
  module, x = adapted(), noise(5, 7, 24)
  fast = peft.freeze(module, "float32")
  for run in (lambda m, x: m(x), nnx.jit(lambda m, x: m(x))):
    np.testing.assert_array_equal(run(fast, x), run(module, x))


@pytest.mark.parametrize("transposed", [False, True])
def test_float32_has_the_gradients_of_autodiff(transposed, tol):
  module, x = peft.tune(adapted(), ".*/(bias|lora_.)"), noise(5, 7, 24)

  def gradient(module):
    parts = peft.split(module)

    def loss(params, x):
      return (peft.merge(*parts._replace(params=params))(x) ** 2).sum()

    return jax.grad(loss, (0, 1))(parts.params, x)

  got = gradient(peft.freeze(module, "float32", transposed))
  want = gradient(module)
  assert "mid/bias" in want[0]

  def check(p, q):
    # through three layers, each a reduction of up to 56 terms
    atol = 3 * tol(jnp.float32, 56) * np.abs(q).max()
    np.testing.assert_allclose(p, q, rtol=0, atol=atol)

  jax.tree.map(check, got, want)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_bfloat16_product_errs_by_two_roundings_of_its_inputs(axis):
  x, w = noise(64, 300), noise(300, 32, seed=2)
  low = w.astype(jnp.bfloat16)
  low = low if axis == 0 else low.T
  y = frozen.frozen_product(None, jnp.float32, axis, x, low, None)
  assert y.dtype == jnp.float32
  exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  size = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(w, np.float64))
  error = np.abs(y - exact) / size
  assert error.max() < 0.004
  assert error.max() > 1e-5  # it is bfloat16 indeed


@pytest.mark.parametrize("transposed", [False, True])
def test_a_bfloat16_gradient_errs_by_two_roundings_too(transposed):
  g, w = noise(64, 32), noise(300, 32, seed=2)
  low = w.astype(jnp.bfloat16)
  low_t = low.T if transposed else None
  product = lambda x: frozen.frozen_product(  # noqa: E731
    None, jnp.float32, 0, x, low, low_t
  )
  (dx,) = jax.vjp(product, noise(64, 300, seed=3))[1](g)
  assert dx.dtype == jnp.float32
  exact = np.asarray(g, np.float64) @ np.asarray(w, np.float64).T
  size = np.abs(np.asarray(g, np.float64)) @ np.abs(np.asarray(w, np.float64)).T
  assert (np.abs(dx - exact) / size).max() < 0.004


def test_a_frozen_product_is_differentiable_twice():
  x, w = noise(3, 4), noise(4, 5, seed=2)

  def square(x):
    return (frozen.frozen_product(None, x.dtype, 0, x, w, None) ** 2).sum()

  got = jax.grad(lambda x: (jax.grad(square)(x) ** 2).sum())(x)
  plain = lambda x: ((x @ w) ** 2).sum()  # noqa: E731
  want = jax.grad(lambda x: (jax.grad(plain)(x) ** 2).sum())(x)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_kernels_are_stored_for_the_matrix_unit_and_biases_are_not():
  fast = peft.freeze(adapted(), "bf16", transposed=True)
  for layer in (fast.mid, fast.up.lora_base):
    assert isinstance(layer, peft.FrozenLinear)
    assert layer.kernel.dtype == layer.kernel_t.dtype == jnp.bfloat16
    assert layer.bias.dtype == jnp.float32
    np.testing.assert_array_equal(layer.kernel[...].T, layer.kernel_t[...])
  assert peft.freeze(adapted(), "bf16", transposed=False).mid.kernel_t is None
  assert peft.freeze(adapted(), "float32").mid.kernel_t is None
  assert peft.freeze(adapted()).mid.kernel_t is not None  # tests run on CPUs


def test_names_and_values_of_adapters_stay():
  module = peft.tune(adapted(), "(up|mid)/bias")
  before, after = peft.split(module), peft.split(peft.freeze(module))
  assert list(after.params) == list(before.params)
  jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
  assert before.base.keys() <= after.base.keys()


def test_a_kernel_that_trains_is_left_alone():
  fast = peft.freeze(peft.tune(adapted(), "mid/kernel"))
  assert type(fast.mid) is nnx.Linear
  assert isinstance(fast.down.lora_base, peft.FrozenLinear)


def test_full_fine_tuning_comes_back_unchanged():
  module = Model()
  clone = peft.freeze(module)
  assert clone is not module
  assert peft.split(clone).graph == peft.split(module).graph


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_outputs_have_the_dtype_of_the_layer(dtype, param_dtype, precision):
  layer = nnx.Linear(
    4, 3, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0)
  )
  module = nnx.Dict(layer=layer, head=nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
  fast = peft.freeze(peft.tune(module), precision).layer
  assert isinstance(fast, peft.FrozenLinear)
  for x in (noise(2, 4), noise(2, 4).astype(jnp.bfloat16)):
    with jax.numpy_dtype_promotion("standard"):
      want, got = layer(x), fast(x)
    assert got.dtype == want.dtype
    if precision == "float32":
      np.testing.assert_array_equal(
        got.astype(jnp.float32), want.astype(jnp.float32)
      )


def test_attention_and_einsum_are_frozen_too(tol):
  rngs = nnx.Rngs(0)
  model = nnx.Dict(
    attention=nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs),
    einsum=nnx.Einsum("btd,dhk->bhtk", (8, 2, 3), (2, 3), rngs=rngs),
  )
  x = noise(3, 5, 8)
  module = peft.lora(model, where="attention/(query|value)")
  exact, fast = peft.freeze(module, "float32"), peft.freeze(module, "bf16")
  for name in ("query", "key", "value", "out"):
    layer = getattr(exact.attention, name)
    layer = getattr(layer, "lora_base", layer)
    assert isinstance(layer, peft.FrozenLinear)
  for name in ("attention", "einsum"):
    want = model[name](x)
    scale = np.abs(want).max()
    # queries, keys, values, scores, mixing and output: six products
    atol = 6 * tol(jnp.float32, 8) * scale
    np.testing.assert_allclose(exact[name](x), want, rtol=0, atol=atol)
    np.testing.assert_allclose(fast[name](x), want, rtol=0, atol=0.03 * scale)
    assert (fast[name](x) != want).any()


def test_stacked_kernels_work_under_a_scan(tol):
  make = lambda key: nnx.Linear(6, 6, rngs=nnx.Rngs(key))  # noqa: E731
  layers = nnx.vmap(make)(jax.random.split(jax.random.key(0), 3))

  def forward(layers, x):
    graph, state = nnx.split(layers)
    step = lambda x, s: (jnp.tanh(nnx.merge(graph, s)(x)), None)  # noqa: E731
    return jax.lax.scan(step, x, state)[0]

  x = noise(4, 6)
  module = peft.lora(layers, where=".*")
  fast = peft.freeze(module, "bf16", transposed=True)
  assert fast.lora_base.kernel_t.shape == (3, 6, 6)
  # Not bit for bit: what a compiler fuses in a scan depends on the processor.
  np.testing.assert_allclose(
    forward(peft.freeze(module, "float32"), x),
    forward(layers, x),
    atol=tol(jnp.float32, 18),
    rtol=0,
  )
  np.testing.assert_allclose(forward(fast, x), forward(layers, x), atol=0.03)


def test_layers_with_their_own_arithmetic_stay_as_they_are():
  def double(*args, **options):
    return 2 * jax.lax.dot_general(*args, **options)

  class Mine(nnx.Linear):
    pass

  rngs = nnx.Rngs(0)
  module = nnx.Dict(
    double=nnx.Linear(4, 4, dot_general=double, rngs=rngs),
    mine=Mine(4, 4, rngs=rngs),
    batched=nnx.LinearGeneral(4, 4, batch_axis={0: 2}, rngs=rngs),
    expert=nnx.Einsum("ebd,edf->ebf", (2, 4, 3), rngs=rngs),
    embed=nnx.Embed(4, 4, rngs=rngs),
    head=nnx.Linear(4, 4, rngs=rngs),
  )
  fast = peft.freeze(peft.tune(module, "head/bias"))
  assert isinstance(fast.head, peft.FrozenLinear)
  for name in ("double", "mine", "batched", "expert", "embed"):
    assert type(fast[name]) is type(module[name])


def test_bad_arguments_say_what_to_write():
  with pytest.raises(ValueError, match="precision must be one of"):
    peft.freeze(adapted(), "fp16")
  fast = peft.freeze(adapted())
  with pytest.raises(ValueError, match="call freeze first and freeze last"):
    peft.freeze(fast)
  with pytest.raises(ValueError, match="call merged first"):
    peft.merged(fast)
