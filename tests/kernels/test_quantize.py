"""Quantizing: the same bits everywhere, unbiased, and rotation."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from fedjax_peft.kernels import dispatch, native, rotation
from fedjax_peft.kernels.quantization import api, pallas_tpu, reference, specs

BITS = api.BITS
KEY = np.array([7, 11], np.uint32)
INTERPRETED = ("interpret_tpu", "interpret_gpu")
HERE = (*INTERPRETED, *(() if native.missing("quantize") else ("native",)))


def keys(n):
  """Keys [n, 2] that differ in one word."""
  return jnp.stack(
    [jnp.full((n,), 5, jnp.uint32), jnp.arange(n, dtype=jnp.uint32)], axis=1
  )


def normal(size, seed=0):
  x = np.random.default_rng(seed).standard_normal(size)
  return jnp.asarray(x, jnp.float32)


def equal(a, b):
  """Whether two pytrees have the same dtypes, shapes and bits."""
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert x.dtype == y.dtype
    assert x.shape == y.shape
    np.testing.assert_array_equal(
      x.view(np.uint8) if x.ndim else x, y.view(np.uint8) if y.ndim else y
    )


def run(kernel, spec, implementation):
  arrays = spec.draw(np.random.default_rng(3))
  return jax.jit(
    lambda *arrays: dispatch.call(
      kernel, *arrays, implementation=implementation, **spec.static
    )
  )(*arrays)


# Every implementation against the specification.


@pytest.mark.skipif(native.missing("quantize") != "", reason="not built")
@pytest.mark.parametrize("spec", specs.SPECS, ids=lambda s: s.name)
def test_native_sends_the_bits_of_the_specification(spec):
  equal(
    run(api.KERNEL, spec, "native"),
    run(api.KERNEL, spec, "reference"),
  )


@pytest.mark.skipif(native.missing("quantize") != "", reason="not built")
@pytest.mark.parametrize("spec", specs.DEQUANTIZE_SPECS, ids=lambda s: s.name)
def test_native_decodes_to_the_bits_of_the_specification(spec):
  equal(
    run(api.DEQUANTIZE, spec, "native"),
    run(api.DEQUANTIZE, spec, "reference"),
  )


@pytest.mark.parametrize("implementation", INTERPRETED)
@pytest.mark.parametrize(
  ("bits", "size"), [*((bits, 700) for bits in BITS), (1, 100), (8, 100)]
)
def test_pallas_sends_and_decodes_the_same_bits(bits, size, implementation):
  def both(implementation):
    def fun(x):
      wire = api.quantize(x, KEY, bits=bits, implementation=implementation)
      return wire, api.dequantize(
        *wire, bits=bits, size=size, implementation=implementation
      )

    return jax.jit(fun)(normal(size))

  equal(both(implementation), both("reference"))


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("bits", [1, 16])
def test_the_nearest_on_a_given_grid_is_the_same_everywhere(
  bits, implementation
):
  @functools.partial(jax.jit, static_argnums=0)
  def fun(implementation):
    return api.quantize(
      normal(300),
      KEY,
      bits=bits,
      stochastic=False,
      scale=jnp.float32(0.03),
      implementation=implementation,
    )

  equal(fun(implementation), fun("reference"))


@pytest.mark.skipif(native.missing("quantize") != "", reason="not built")
@pytest.mark.parametrize("bits", BITS)
@hypothesis.settings(deadline=None, max_examples=30, derandomize=True)
@hypothesis.given(
  words=st.lists(st.integers(0, 2**32 - 1), min_size=256, max_size=256),
  key=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
)
def test_any_floats_give_the_same_bits(bits, words, key):
  x = np.array(words, np.uint32).view(np.float32).reshape(2, 128)
  key = np.array(key, np.uint32)
  for stochastic in (True, False):
    wires = [
      _compiled(implementation, bits, stochastic)(x, key)
      for implementation in ("native", "reference")
    ]
    equal(*wires)
    assert np.isfinite(np.asarray(wires[0][1])).all()


_CACHE: dict = {}


def _compiled(implementation, bits, stochastic):
  """The kernel, compiled once for all examples."""
  at = implementation, bits, stochastic
  if at not in _CACHE:
    _CACHE[at] = jax.jit(
      lambda x, key: dispatch.call(
        api.KERNEL,
        x,
        key,
        implementation=implementation,
        bits=bits,
        stochastic=stochastic,
      )
    )
  return _CACHE[at]


def test_the_tpu_kernels_have_no_races():
  interpret = pltpu.InterpretParams(detect_races=True)
  x = normal((9, 256))

  @jax.jit
  def there_and_back(x):
    wire = pallas_tpu.quantize(
      x, KEY, bits=8, stochastic=True, interpret=interpret
    )
    return wire, pallas_tpu.dequantize(*wire, bits=8, interpret=interpret)

  wire, decoded = there_and_back(x)
  want = reference.quantize(x, jnp.asarray(KEY), bits=8, stochastic=True)
  equal(wire, want)
  equal(decoded, reference.dequantize(*want, bits=8))
  assert not interpret_pallas_call.races.races_found


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize(
  ("bits", "nb", "block"),
  [*((bits, 9, 256) for bits in BITS), (2, 1, 104)],
)
def test_kernels_lower_for_accelerators(bits, nb, block, platform):
  row = block // reference.packing(bits)

  def shape(dims, dtype):
    return jax.ShapeDtypeStruct(dims, dtype)

  x, key = shape((nb, block), jnp.float32), shape((2,), jnp.uint32)
  scale = shape((nb,), jnp.float32)
  packed = shape((nb, row), reference.wire_dtype(bits))

  def lower(many, kernel, *arrays, **static):
    def fun(*arrays):
      return dispatch.call(
        kernel, *arrays, implementation=None, bits=bits, **static
      )

    if many:
      arrays, fun = (
        [shape((3, *a.shape), a.dtype) for a in arrays],
        jax.vmap(fun),
      )
    traced = jax.jit(fun).trace(*arrays)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("tpu_custom_call" if platform == "tpu" else "triton") in text

  lower(False, api.KERNEL, x, key, stochastic=True)
  lower(True, api.KERNEL, x, key, scale, stochastic=False)
  lower(True, api.DEQUANTIZE, packed, scale)


# Transformations.


@pytest.mark.parametrize(
  ("which", "implementation"),
  [
    *((which, "reference") for which in ("x", "key", "scale", "all")),
    *((which, None) for which in ("x", "key", "scale", "all")),
    *(("key", implementation) for implementation in INTERPRETED),
  ],
)
def test_vmap_equals_one_by_one(which, implementation):
  n = 2
  x, key = normal((n, 300)), keys(n)
  scale = jnp.array([0.02, 0.05], jnp.float32)
  axes = {a: 0 if which in (a, "all") else None for a in ("x", "key", "scale")}

  def fun(x, key, scale):
    wire = api.quantize(
      x, key, bits=4, scale=scale, implementation=implementation
    )
    return wire, api.dequantize(
      *wire, bits=4, size=300, implementation=implementation
    )

  def pick(a, name, i):
    return a[i if axes[name] == 0 else 0]

  args = [
    a if axes[name] == 0 else a[0]
    for a, name in ((x, "x"), (key, "key"), (scale, "scale"))
  ]
  many = jax.jit(jax.vmap(fun, in_axes=tuple(axes.values())))(*args)
  for i in range(n):
    one = jax.jit(fun)(
      pick(x, "x", i), pick(key, "key", i), pick(scale, "scale", i)
    )
    equal(jax.tree.map(lambda a, i=i: a[i], many), one)


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("clients", [0, 1])
def test_one_client_and_no_client(clients, implementation):
  def fun(x, key):
    wire = api.quantize(x, key, bits=2, implementation=implementation)
    return wire, api.dequantize(
      *wire, bits=2, size=130, block=256, implementation=implementation
    )

  x = normal((clients, 130)).reshape(clients, 130)
  (packed, scale), decoded = jax.jit(jax.vmap(fun))(x, keys(clients))
  assert packed.shape == (clients, 34)
  assert scale.shape == (clients, 1)
  assert decoded.shape == (clients, 130)


@pytest.mark.parametrize("implementation", [None, "reference", *HERE])
def test_an_empty_vector_is_an_empty_wire(implementation):
  wire = api.quantize(
    jnp.zeros((0,)), KEY, bits=4, implementation=implementation
  )
  assert wire.packed.shape == (0,)
  assert wire.scale.shape == (0,)
  x = api.dequantize(*wire, bits=4, size=0, implementation=implementation)
  assert x.shape == (0,)


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_donated_scanned_and_sharded_calls_agree(implementation):
  def fun(x, key):
    return api.quantize(x, key, bits=8, implementation=implementation)

  x, key = normal((4, 1000)), keys(4)
  want = jax.jit(jax.vmap(fun))(x, key)
  mesh = jax.make_mesh((2,), ("c",), axis_types=(jax.sharding.AxisType.Auto,))
  sharded = jax.shard_map(
    jax.vmap(fun), mesh=mesh, in_specs=P("c"), out_specs=P("c"), check_vma=False
  )
  equal(jax.jit(sharded)(x, key), want)
  scanned = jax.jit(
    lambda x, key: jax.lax.scan(lambda c, a: (c, fun(*a)), 0, (x, key))[1]
  )
  equal(scanned(x, key), want)
  size = 1024

  def there_and_back(x, key):
    wire = api.quantize(x, key, bits=8, implementation=implementation)
    return api.dequantize(
      *wire, bits=8, size=size, implementation=implementation
    )

  x = normal(size)
  want = jax.jit(there_and_back)(x, key[0])
  equal(jax.jit(there_and_back, donate_argnums=0)(x + 0, key[0]), want)


# What a code means.


def unpack(packed, bits, block, size):
  """Codes by the documented layout, in numpy and bit by bit."""
  per = max(8 // bits, 1)
  row, codes = block // per, np.zeros(size, np.int64)
  for at in range(size):
    b, i = divmod(at, block)
    j, byte = divmod(i, row)
    word = int(packed[b * row + byte])
    if bits >= 8:
      codes[at] = word
    else:
      code = word >> (j * bits) & (2**bits - 1)
      signed = code - 2**bits if code >= 2 ** (bits - 1) else code
      codes[at] = 2 * code - 1 if bits == 1 else signed
  return codes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [5, 100, 256, 700])
def test_the_layout_is_the_documented_one(bits, size):
  x = normal(size)
  packed, scale = api.quantize(x, KEY, bits=bits)
  lay = api.layout(size, bits=bits)
  wire = np.zeros(lay.blocks * lay.row, packed.dtype)
  wire[: lay.length] = np.asarray(packed)
  codes = unpack(wire, bits, lay.block, size)
  assert np.abs(codes).max() <= reference.levels(bits)
  steps = np.repeat(np.asarray(scale), lay.block)[:size]
  equal(
    api.dequantize(packed, scale, bits=bits, size=size),
    codes.astype(np.float32) * steps,
  )


@pytest.mark.parametrize(
  ("bits", "implementation"),
  [(bits, "reference") for bits in BITS]
  + [(4, implementation) for implementation in HERE],
)
def test_every_code_that_is_sent_arrives(bits, implementation):
  """All codes in all fields, on a grid of step 1, where nothing is rounded."""
  codes = [-1, 1] if bits == 1 else np.arange(-127, 128)
  if bits == 16:
    codes = np.linspace(-32767, 32767, 256).astype(int)
  most = reference.levels(bits)
  x = np.clip(np.resize(codes, 256), -most, most).astype(np.float32)
  x = jnp.asarray(np.concatenate([np.roll(x, n) for n in (0, 1, 3)]))

  @jax.jit
  def there_and_back(x):
    one = jnp.float32(1)
    packed, _ = api.quantize(
      x, KEY, bits=bits, scale=one, implementation=implementation
    )
    return api.dequantize(
      packed, one, bits=bits, size=x.size, implementation=implementation
    )

  equal(there_and_back(x), x)


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("bits", BITS)
@hypothesis.settings(deadline=None, max_examples=15, derandomize=True)
@hypothesis.given(data=st.data())
def test_the_error_is_below_one_step(bits, stochastic, data):
  top = float(np.finfo(np.float32).max)
  x = data.draw(
    st.lists(st.floats(-top, top, width=32), min_size=130, max_size=130)
  )
  x = jnp.asarray(x, jnp.float32)
  packed, scale = api.quantize(x, KEY, bits=bits, stochastic=stochastic)
  got = np.asarray(api.dequantize(packed, scale, bits=bits, size=130))
  assert np.isfinite(got).all()
  step = float(scale[0])
  error = np.abs(got.astype(np.float64) - np.asarray(x, np.float64))
  limit = (2 if bits == 1 else 1) * (1 if stochastic else 0.5)
  own = 2**-6 if bits == 16 else 2**-14
  # A scale of zero says that all values are below 2^-80 levels.
  assert error.max() <= max((limit + own) * step, 2.0**-64)


@pytest.mark.parametrize(
  ("bits", "implementation"),
  [(bits, "reference") for bits in (2, 4, 8, 16)]
  + [(4, implementation) for implementation in HERE],
)
def test_zeros_stay_zeros_and_what_is_not_finite_is_zero(bits, implementation):
  bad = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0], np.float32)
  x = jnp.asarray(np.concatenate([bad, [1.0], np.zeros(290)]), jnp.float32)

  @jax.jit
  def fun(x):
    wire = api.quantize(x, KEY, bits=bits, implementation=implementation)
    return wire.scale, api.dequantize(
      *wire, bits=bits, size=x.size, implementation=implementation
    )

  scale, got = fun(x)
  assert np.flatnonzero(np.asarray(got)).tolist() == [5]
  assert float(got[5]) == pytest.approx(1, rel=1e-6)
  assert float(scale[1]) == 0  # the second block holds zeros only


@pytest.mark.parametrize("bits", BITS)
def test_a_given_scale_cuts_what_is_outside(bits):
  x = jnp.array([-1e30, -3.0, 3.0, 1e30], jnp.float32)
  for scale in (jnp.float32(1e-3), jnp.array([1e-3], jnp.float32)):
    if bits == 16:
      scale = scale / 100
    packed, same = api.quantize(x, KEY, bits=bits, scale=scale)
    equal(same, scale)
    got = api.dequantize(packed, same, bits=bits, size=4)
    most = np.float32(reference.levels(bits)) * np.float32(scale.min())
    equal(got, np.array([-most, -most, most, most], np.float32))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_what_was_decoded_is_sent_unchanged(bits):
  """The nearest code of a point of the grid is its own."""
  packed, scale = api.quantize(normal(300), KEY, bits=bits)
  x = api.dequantize(packed, scale, bits=bits, size=300)
  again, _ = api.quantize(x, KEY, bits=bits, scale=scale, stochastic=False)
  equal(again, packed)


# Randomness.


def codes_of(x, bits, random):
  """Decoded codes on a grid of step 1."""
  code = reference.encode(
    x, reference.inverse(jnp.float32(1), bits), random, bits
  )
  return 2 * code - 1 if bits == 1 else code


def deviation(bits, dithered):
  """How many standard errors the mean of 2^20 rounded values is off."""
  most = min(reference.levels(bits), 100)
  x = np.random.default_rng(1).uniform(-most, most, (4096, 256))
  x = jnp.asarray(x, jnp.float32)

  @jax.jit
  def one(x, key):
    index = jnp.arange(256, dtype=jnp.uint32)
    random = reference.words(index, *reference.seeds(key))
    random = random if dithered else jnp.zeros_like(random)
    return codes_of(x, bits, random)

  got = np.asarray(jax.vmap(one)(x, keys(4096)), np.float64)
  x = np.asarray(x, np.float64)
  if bits == 1:
    variance = 1 - x**2
  else:
    fraction = x - np.floor(x)
    variance = fraction * (1 - fraction)
  return (got - x).sum() / math.sqrt(variance.sum())


@pytest.mark.parametrize("bits", BITS)
def test_stochastic_rounding_is_unbiased(bits):
  """Within 4 standard errors, p = 6e-5; truncation is not."""
  assert abs(deviation(bits, dithered=True)) < 4
  assert abs(deviation(bits, dithered=False)) > 4


def test_the_public_function_is_unbiased_for_each_value():
  """32 values, 4096 keys: p = 2e-3 that any is beyond 4 standard errors."""
  x = jnp.asarray(np.linspace(-6.9, 6.9, 32), jnp.float32)
  one = jnp.float32(1)

  def fun(key):
    packed, _ = api.quantize(x, key, bits=4, scale=one)
    return api.dequantize(packed, one, bits=4, size=32)

  got = np.asarray(jax.jit(jax.vmap(fun))(keys(4096)), np.float64)
  fraction = np.asarray(x - jnp.floor(x), np.float64)
  variance = fraction * (1 - fraction)
  error = np.abs(got.mean(axis=0) - np.asarray(x)) * 64 / np.sqrt(variance)
  assert error.max() < 4
  # 10 % of error in the variance is 8 of its standard errors at the most.
  ratio = got.var(axis=0).sum() / variance.sum()
  assert abs(ratio - 1) < 0.05
  assert abs(got.var(axis=0).sum() / (32 / 12) - 1) > 0.05  # a uniform's


def chi_square(cells, bins):
  """Standard deviations that counts are off uniform."""
  counts = np.bincount(cells.reshape(-1), minlength=bins)
  expected = counts.sum() / bins
  value = ((counts - expected) ** 2 / expected).sum()
  return (value - (bins - 1)) / math.sqrt(2 * (bins - 1))


def table(words):
  """Words of 256 keys and 4096 indices."""
  index = jnp.arange(4096, dtype=jnp.uint32)
  return np.asarray(jax.jit(jax.vmap(lambda key: words(index, key)))(keys(256)))


def hashed(index, key):
  return reference.words(index, *reference.seeds(key))


def half_mixed(index, key):
  """A hash that is too cheap: one round only."""
  x = (index + key[1]) * np.uint32(0x7FEB352D)
  return x ^ (x >> np.uint32(15))


def flaws(words):
  """Standard deviations of five statistics of the bits used."""
  w = table(words)
  top = w >> 24
  bits = (w >> 16)[..., None] >> np.arange(16) & 1
  signs = 2.0 * bits - 1
  n = math.sqrt(255 * 4095)
  return [
    chi_square(top, 256),
    # Pairs of neighbouring indices, and of neighbouring keys.
    chi_square((top[:, ::2] >> 4) * 16 + (top[:, 1::2] >> 4), 256),
    chi_square((top[::2] >> 4) * 16 + (top[1::2] >> 4), 256),
    # Each bit, and its correlation with the same bit of the neighbours.
    np.abs(signs.sum(axis=(0, 1))).max() / math.sqrt(w.size),
    np.abs((signs[:, 1:] * signs[:, :-1]).sum(axis=(0, 1))).max() / n,
    np.abs((signs[1:] * signs[:-1]).sum(axis=(0, 1))).max() / n,
  ]


def test_the_bits_are_uniform_and_neighbours_are_independent():
  """2^20 words; a hash of one round fails."""
  assert max(map(abs, flaws(hashed))) < 5
  assert max(map(abs, flaws(half_mixed))) > 5


def test_the_mixer_is_the_published_one():
  """Undone by the published inverse of lowbias32."""
  x = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, 999, np.uint32))
  y = reference.mix(x)
  y ^= y >> np.uint32(16)
  y *= np.uint32(0x43021123)
  y ^= (y >> np.uint32(15)) ^ (y >> np.uint32(30))
  y *= np.uint32(0x1D69E2A5)
  y ^= y >> np.uint32(16)
  equal(y, x)


@pytest.mark.parametrize("bits", [8, 16])
def test_the_inverse_is_rounded_as_ieee_754_says(bits):
  words = np.random.default_rng(0).integers(0, 0x7F800000, 10**6, np.uint32)
  words[:4] = [0, 0x7F7FFFFF, 0x3F800000, 0x3F7FFFFF]
  scale = words.view(np.float32)
  usable = scale >= reference.SMALLEST
  want = np.float32(2.0 ** reference.shift(bits)) / np.where(usable, scale, 1)
  got = jax.jit(lambda s: reference.inverse(s, bits))(scale)
  equal(got, np.where(usable, want, 0).astype(np.float32))


# Arguments.


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"bits": 3}, "bits must be one of"),
    ({"block": 100}, "block must be one of"),
    (
      {"x": np.zeros((2, 3), np.float32)},
      r"x must be float32 \[D\]: got x=float32 \[2, 3\]",
    ),
    ({"x": np.zeros(3, np.int32)}, "x must be float32"),
    ({"key": np.zeros(3, np.uint32)}, "key must be uint32"),
    ({"scale": np.zeros(3, np.float32)}, "scale must be float32"),
  ],
)
def test_a_wrong_argument_is_named(change, message):
  given = {"x": np.zeros(3, np.float32), "key": KEY, "bits": 8} | change
  with pytest.raises(ValueError, match=message):
    api.quantize(given.pop("x"), given.pop("key"), **given)


def test_a_wire_of_another_size_is_refused():
  packed, scale = api.quantize(normal(300), KEY, bits=4)
  with pytest.raises(ValueError, match="packed must hold"):
    api.dequantize(packed, scale, bits=4, size=700)


# Rotation.


@pytest.mark.parametrize("block", [128, 256, 4096])
def test_rotation_keeps_norms_and_is_undone(block, tol):
  x = normal(block + 77)
  y = jax.jit(lambda x: rotation.rotate(x, KEY, block=block))(x)
  assert y.shape == (2 * block,)
  for part, other in ((x[:block], y[:block]), (x[block:], y[block:])):
    norm = float(jnp.linalg.norm(part))
    limit = tol(jnp.float32, block) * norm
    assert abs(float(jnp.linalg.norm(other)) - norm) < limit
  back = jax.jit(lambda y: rotation.unrotate(y, KEY, size=x.size, block=block))(
    y
  )
  np.testing.assert_allclose(
    back, x, rtol=0, atol=tol(jnp.float32, block) * float(jnp.abs(x).max())
  )


def test_rotation_is_sylvesters_matrix_times_signs():
  h = np.ones((1, 1))
  while len(h) < 256:
    h = np.block([[h, h], [h, -h]])
  rows = jax.jit(jax.vmap(lambda x: rotation.rotate(x, KEY)))(jnp.eye(256))
  signs = np.sign(np.asarray(rows)[:, 0])
  np.testing.assert_allclose(
    np.asarray(rows), signs[:, None] * h / 16, rtol=0, atol=1e-6
  )
  assert 64 < (signs > 0).sum() < 192  # 8 standard deviations


def test_rotation_flattens_a_single_value():
  x = jnp.zeros((512,)).at[300].set(-3.0)
  y = np.abs(np.asarray(rotation.rotate(x, KEY)))
  np.testing.assert_allclose(y[256:], 3 / 16, rtol=1e-6)
  assert not y[:256].any()


def test_rotation_makes_rounding_of_skewed_values_better():
  x = normal(4096) ** 5

  @functools.partial(jax.jit, static_argnums=0)
  def error(rotated):
    y = rotation.rotate(x, KEY) if rotated else x
    packed, scale = api.quantize(y, KEY, bits=4)
    y = api.dequantize(packed, scale, bits=4, size=4096)
    z = rotation.unrotate(y, KEY, size=4096) if rotated else y
    return jnp.linalg.norm(z - x)

  assert error(True) < 0.75 * error(False)


def test_rotations_of_keys_and_under_vmap():
  x, turn = normal((2, 300)), jax.jit(rotation.rotate)
  many = jax.jit(jax.vmap(rotation.rotate))(x, keys(2))
  for i in range(2):
    one = turn(x[i], keys(2)[i])
    np.testing.assert_allclose(many[i], one, rtol=0, atol=1e-5)
  assert rotation.rotate(jnp.zeros((0,)), KEY).shape == (0,)
  other = turn(x[0], keys(2)[1])
  assert float(jnp.abs(other - many[0]).max()) > 0.1
