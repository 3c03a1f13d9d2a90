"""LoRA's product: the plain expression, its gradients, wherever it runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from fedjax_peft.kernels import dispatch
from fedjax_peft.kernels.lora import api, pallas_tpu, specs
from fedjax_peft.peft import frozen, lowrank

INTERPRETED = ["interpret_tpu", "interpret_gpu"]
IMPLEMENTATIONS = ["reference", None, *INTERPRETED]
SMALL = {s.name: s for s in specs.SPECS if not s.bench}
ODD = SMALL["odd widths, x bfloat16"]


def draw(spec, seed=0):
  """The arrays of a spec, on the device."""
  return [jnp.asarray(a) for a in spec.draw(np.random.default_rng(seed))]


def exact(x, w, a, b, scale, flip):
  """The plain expression in float64; x meets w in the dtype of w."""
  low = np.asarray(x.astype(w.dtype), np.float64)
  x, w, a, b = (np.asarray(v, np.float64) for v in (x, w, a, b))
  return low @ (w.T if flip else w) + scale * (x @ a) @ b


def bound(x, w, a, b, scale, flip):
  """What the plain expression is with all its terms made positive."""
  return exact(*map(abs, (x, w, a, b)), abs(scale), flip)


def assert_close(got, arrays, static, tol):
  """Within 4 eps sqrt(n) of the sum of all terms' sizes."""
  error = np.abs(np.asarray(got, np.float64) - exact(*arrays, **static))
  width, rank = arrays[2].shape[1:]
  limit = tol(jnp.float32, width + rank) * bound(*arrays, **static)
  assert (error <= limit).all()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(implementation, scale, flip, *arrays):
  """The compiled kernel."""
  return dispatch.call(
    api.KERNEL,
    *arrays,
    implementation=implementation,
    scale=scale,
    flip=flip,
  )


def loss(product, x, a, b, g):
  """A scalar whose gradient by the product is g."""
  return jnp.sum(product(x, a, b) * g)


def plain(w, scale, x, a, b):
  """The expression that is differentiated by JAX, all of it in float32.

  Without a cast of x, whose derivative would round a part of the gradient.
  """
  return x @ w.astype(jnp.float32) + scale * (x @ a) @ b


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_every_implementation_computes_the_expression(
  spec, implementation, tol
):
  arrays, static = draw(spec), spec.static
  y = run(implementation, static["scale"], static["flip"], *arrays)
  assert y.dtype == jnp.float32
  assert_close(y, arrays, static, tol)


@pytest.mark.parametrize("spec", specs.SPECS, ids=lambda s: s.name)
def test_real_layers_compute_the_expression(spec, tol):
  arrays, static = draw(spec), spec.static
  y = run(None, static["scale"], static["flip"], *arrays)
  assert_close(y, arrays, static, tol)


def test_a_frozen_layer_with_an_adapter_computes_the_same(tol):
  x, w, a, b = arrays = draw(SMALL["odd tails"])
  wide = frozen.frozen_product(None, jnp.float32, 0, x[0], w, None)
  theirs = wide + lowrank.side_product(2.0, x[0], a[0], b[0])
  ours = api.lora_matmul(*arrays, 2.0)[0]
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=tol(jnp.float32, 200))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_those_of_the_expression(
  dtype, stored, implementation, tol
):
  x, w, a, b = draw(ODD)
  x, w = x.astype(jnp.float32), w.astype(dtype)
  g = draw(ODD, 1)[0].astype(jnp.float32)[:, :, : w.shape[1]]
  # The casts to the dtype of w lose nothing.
  x, g = (v.astype(jnp.bfloat16).astype(jnp.float32) for v in (x, g))

  def product(x, a, b):
    return api.lora_matmul(
      x,
      w,
      a,
      b,
      0.5,
      w_t=w.T if stored else None,
      implementation=implementation,
    )

  gradient = functools.partial(jax.grad, argnums=(1, 2, 3))
  got = jax.jit(gradient(loss), static_argnums=0)(product, x, a, b, g)
  wide = functools.partial(plain, w, 0.5)
  wanted = jax.jit(gradient(loss), static_argnums=0)(wide, x, a, b, g)
  sizes = jax.jit(gradient(loss), static_argnums=0)(
    functools.partial(plain, abs(w), 0.5), *map(abs, (x, a, b, g))
  )
  # Sums over N, M and R, or M, K and N: n is the longest.
  for one, other, size in zip(got, wanted, sizes):
    assert one.dtype == other.dtype
    assert (abs(one - other) <= tol(jnp.float32, 100) * size).all()


@pytest.mark.parametrize("implementation", ["reference", *INTERPRETED])
def test_gradients_stay_in_the_dtype_of_their_arguments(implementation):
  x, w, a, b = draw(SMALL["one client, one row"])
  x = x.astype(jnp.bfloat16)

  def product(x, w, a, b):
    y = api.lora_matmul(x, w, a, b, 2.0, implementation=implementation)
    return jnp.sum(y)

  dx, dw, da, db = jax.grad(product, argnums=(0, 1, 2, 3))(x, w, a, b)
  assert dx.dtype == jnp.bfloat16
  assert da.dtype == db.dtype == jnp.float32
  assert not dw.any()


@pytest.mark.parametrize("implementation", [None, *INTERPRETED])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_zero_adapter_leaves_the_frozen_product_bit_for_bit(
  dtype, implementation
):
  x, w, a, b = draw(ODD)
  x = x.astype(jnp.float32).at[0, 0].set(-0.0)  # a row of zeros keeps its sign
  w = w.astype(dtype)
  with_zero = run(implementation, 2.0, False, x, w, a, 0 * b)
  # Another way to say it to the same implementation: no narrow product at all.
  alone = run(implementation, 2.0, False, x, w, 0 * a, b)
  np.testing.assert_array_equal(with_zero, alone)
  if implementation is None:
    alone = lax.dot_general(
      x.astype(dtype),
      w,
      (((2,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    np.testing.assert_array_equal(with_zero, alone)
    assert (jnp.signbit(with_zero) == jnp.signbit(alone)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_client_has_no_result_and_no_gradient(implementation):
  x, w, a, b = draw(SMALL["no client"])

  def product(x, a, b):
    y = api.lora_matmul(x, w, a, b, 2.0, implementation=implementation)
    return jnp.sum(y)

  value, grads = jax.value_and_grad(product, argnums=(0, 1, 2))(x, a, b)
  assert value == 0
  assert [g.shape for g in grads] == [x.shape, a.shape, b.shape]


@pytest.mark.parametrize("implementation", ["reference", "interpret_tpu"])
@pytest.mark.parametrize(
  "axes",
  [
    (0, None, None, None),
    (None, 0, None, None),
    (None, None, 0, None),
    (None, None, None, 0),
    (1, None, 1, 1),
    (0, 0, 0, 0),
  ],
)
def test_products_are_batched_over_each_argument(axes, implementation, tol):
  draws = [draw(SMALL["one client, one row"], seed) for seed in range(2)]
  arrays = [
    draws[0][i] if axis is None else jnp.stack([d[i] for d in draws], axis)
    for i, axis in enumerate(axes)
  ]
  fun = functools.partial(
    api.lora_matmul, scale=2.0, implementation=implementation
  )
  y = jax.jit(jax.vmap(fun, in_axes=axes))(*arrays)
  for i in range(2):
    one = [draws[0 if axis is None else i][j] for j, axis in enumerate(axes)]
    assert_close(y[i], one, {"scale": 2.0, "flip": False}, tol)


@pytest.mark.parametrize("implementation", ["reference", "interpret_gpu"])
def test_clients_may_be_an_axis_that_is_mapped(implementation, tol):
  x, w, a, b = arrays = draw(ODD)

  def one(x, a, b):
    return api.lora_matmul(
      x[None], w, a[None], b[None], 2.0, implementation=implementation
    )[0]

  assert_close(jax.jit(jax.vmap(one))(x, a, b), arrays, ODD.static, tol)


@pytest.mark.parametrize("implementation", [None, *INTERPRETED])
def test_each_of_two_devices_has_its_own_clients(implementation, tol):
  mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  fun = jax.shard_map(
    lambda *arrays: run(implementation, 2.0, False, *arrays),
    mesh=mesh,
    in_specs=(P("d"), P(), P("d"), P("d")),
    out_specs=P("d"),
    check_vma=False,
  )
  arrays = draw(ODD)
  assert_close(jax.jit(fun)(*arrays), arrays, ODD.static, tol)


def test_steps_in_a_scan_with_donated_adapters_go_downhill():
  x, w, a, b = draw(SMALL["odd tails"])
  wanted = draw(SMALL["odd tails"], 1)[0][:, :, :1] + jnp.zeros((1, 1, 300))

  def error(adapter):
    return jnp.mean((api.lora_matmul(x, w, *adapter, 2.0) - wanted) ** 2)

  def step(adapter, _):
    value, grads = jax.value_and_grad(error)(adapter)
    return jax.tree.map(lambda p, g: p - 0.1 * g, adapter, grads), value

  train = jax.jit(lambda p: lax.scan(step, p, length=5), donate_argnums=0)
  values = train((a, b))[1]
  assert (jnp.diff(values) < 0).all()


def test_a_tile_that_waits_for_its_parts_has_no_race(tol):
  rng = np.random.default_rng(0)
  arrays = [
    jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for shape in ((2, 8, 200), (200, 300), (2, 200, 2), (2, 2, 300))
  ]
  static = {"scale": 2.0, "flip": False}
  races = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
  y = pallas_tpu.lora_matmul(*arrays, **static, depth=128, interpret=races)
  assert_close(y, arrays, static, tol)
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  assert not interpret_pallas_call.races.races_found


@pytest.mark.slow
@pytest.mark.parametrize(
  ("platform", "implementation"),
  [("tpu", "pallas_tpu"), ("cuda", "pallas_gpu")],
)
@pytest.mark.parametrize("spec", specs.SPECS, ids=lambda s: s.name)
def test_every_shape_lowers_for_accelerators(spec, platform, implementation):
  static = spec.static
  traced = run.trace(
    implementation, static["scale"], static["flip"], *draw(spec)
  )
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert ("custom_call" in text) == (spec.name != "no client")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("platform", "implementation"),
  [("tpu", "pallas_tpu"), ("cuda", "pallas_gpu")],
)
def test_gradients_lower_for_accelerators(platform, implementation):
  x, w, a, b = draw(specs.SPECS[1])

  def product(x, a, b):
    y = api.lora_matmul(x, w, a, b, 2.0, implementation=implementation)
    return jnp.sum(y**2)

  traced = jax.jit(jax.grad(product, argnums=(0, 1, 2))).trace(x, a, b)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert text.count("stablehlo.custom_call") >= 2


def test_xla_is_left_in_charge_until_it_is_beaten():
  traced = jax.jit(functools.partial(api.lora_matmul, scale=2.0)).trace(
    *draw(ODD)
  )
  for platform in ("tpu", "cuda"):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "custom_call" not in text


def test_what_does_not_fit_together_is_refused():
  x, w, a, b = draw(ODD)
  for arrays, words in (
    ((x[0], w, a, b), r"x must be float32 or bfloat16 \[C, M, K\]"),
    ((x, w[None], a, b), r"w must be float32 or bfloat16 \[100, N\]"),
    ((x, w[1:], a, b), r"got w=bfloat16 \[99, 70\]"),
    ((x, w, a[:1], b), r"a must be float32 \[2, 100, R\]: got a=float32 \[1,"),
    ((x, w, a, b[:, 1:]), r"b must be float32 \[2, 5, 70\]"),
    ((x, w, a.astype(w.dtype), b), "got a=bfloat16"),
    ((x, w, a[:, :, :0], b[:, :0]), "at least 1: got K=100, R=0"),
  ):
    with pytest.raises(ValueError, match=words):
      api.lora_matmul(*arrays, 2.0)
  with pytest.raises(ValueError, match=r"w_t must be bfloat16 \[70, 100\]"):
    api.lora_matmul(x, w, a, b, 2.0, w_t=w)
  with pytest.raises(ValueError, match="scale must be a finite Python number"):
    api.lora_matmul(x, w, a, b, jnp.float32(2))
  with pytest.raises(ValueError, match="one of"):
    api.lora_matmul(x, w, a, b, 2.0, implementation="native")
