"""Weighted sums of wires and sums of rows: exact, streaming, in place."""

import functools
import importlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

import tolerance
from fedjax_peft.kernels import dispatch, native
from fedjax_peft.kernels.quantization import api as quantize
from fedjax_peft.kernels.summation import api, pallas_tpu, specs

BITS = (1, 2, 4, 8, 16)
UNSIGNED = (np.uint8, np.uint16, np.uint32)
IMPLEMENTATIONS = (
  "reference",
  pytest.param(
    "native",
    marks=pytest.mark.skipif(
      bool(native.missing("weighted_sum")),
      reason=native.missing("weighted_sum"),
    ),
  ),
  "interpret_tpu",
  "interpret_gpu",
)
everywhere = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
on_cpu = pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:2])
natively = pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:2])


def values(packed, size, bits, block):
  """int64 [C, D]: the wire's format, read bit by bit."""
  if bits >= 8:
    return packed.astype(np.int64)
  lay = quantize.layout(size, bits=bits, block=block)
  found = np.zeros((len(packed), size), np.int64)
  for i in range(size):
    b, within = divmod(i, lay.block)
    plane, entry = divmod(within, lay.row)
    byte = packed[:, b * lay.row + entry].astype(np.int64)
    field = byte >> plane * bits & 2**bits - 1
    found[:, i] = (
      2 * field - 1
      if bits == 1
      else np.where(field < 2 ** (bits - 1), field, field - 2**bits)
    )
  return found


def oracle(acc, packed, scale, weight, *, bits, block):
  """(the sum, the sum of the absolute contributions), in float64."""
  size = acc.size
  lay = quantize.layout(size, bits=bits, block=block)
  here = weight != 0
  by = np.where(here[:, None], weight[:, None] * scale.astype(float), 0)
  by = np.repeat(by, lay.block, axis=1)[:, :size]
  parts = by * values(packed, size, bits, block)
  return acc + parts.sum(0), np.abs(acc) + np.abs(parts).sum(0)


def add(kernel, spec, implementation, *arrays):
  fun = functools.partial(
    dispatch.call, kernel, implementation=implementation, **spec.static
  )
  return np.asarray(jax.jit(fun)(*arrays))


@functools.cache
def summed(bits, implementation, block=256):
  """One jitted function, so that what compiled once is not compiled again."""
  return jax.jit(
    functools.partial(
      api.weighted_sum, bits=bits, block=block, implementation=implementation
    )
  )


@functools.cache
def rowed(implementation):
  return jax.jit(functools.partial(api.add_rows, implementation=implementation))


def small(clients, size, bits, block=256, seed=0):
  """Drawn wires, and the static arguments."""
  draw, static = specs.wires(clients, size, bits, block)
  return draw(np.random.default_rng(seed)), static


# Every implementation is the same function.


def quick(shapes):
  return [s for s in shapes if not s.bench]


@everywhere
@pytest.mark.parametrize("spec", quick(specs.SPECS), ids=lambda s: s.name)
def test_the_sum_is_that_of_the_decoded_wires(spec, implementation, tol):
  arrays = spec.draw(np.random.default_rng(0))
  found = add(api.KERNEL, spec, implementation, *arrays)
  wanted, size = oracle(*arrays, **spec.static)
  assert found.dtype == np.float32
  clients = max(len(arrays[3]), 1)
  assert np.all(np.abs(found - wanted) <= tol(np.float32, clients) * size)


@everywhere
@pytest.mark.parametrize("bits", BITS)
def test_a_sum_of_integers_is_exact(bits, implementation):
  (acc, packed, scale, weight), static = small(6, 300, bits)
  acc, scale = np.round(acc), np.ones_like(scale)
  found = summed(bits, implementation)(acc, packed, scale, weight)
  wanted, _ = oracle(acc, packed, scale, weight, **static)
  np.testing.assert_array_equal(found, wanted)


@everywhere
@pytest.mark.parametrize("spec", quick(specs.ROWS_SPECS), ids=lambda s: s.name)
def test_rows_are_added_in_order_with_the_same_bits(spec, implementation):
  acc, rows, present = spec.draw(np.random.default_rng(0))
  wanted = acc.copy()
  for row in rows[present]:
    wanted += row  # modulo 2^bits, or float32 with one rounding
  found = add(api.ROWS, spec, implementation, acc, rows, present)
  assert found.dtype == acc.dtype
  np.testing.assert_array_equal(found.view(np.uint8), wanted.view(np.uint8))


@on_cpu
@pytest.mark.parametrize(
  "spec",
  [s for s in specs.SPECS if "76,038" in s.name],
  ids=lambda s: s.name,
)
def test_a_real_cohort_is_added(spec, implementation, tol):
  arrays = spec.draw(np.random.default_rng(0))
  found = add(api.KERNEL, spec, implementation, *arrays)
  wanted, size = oracle(*arrays, **spec.static)
  assert np.all(np.abs(found - wanted) <= tol(np.float32, 64) * size)


@natively
@hypothesis.given(
  clients=st.integers(0, 20),
  size=st.integers(0, 1500),
  bits=st.sampled_from(BITS),
  block=st.sampled_from([128, 256, 1024]),
)
@hypothesis.settings(max_examples=30, deadline=None)
def test_any_tail_is_added(implementation, clients, size, bits, block):
  arrays, static = small(clients, size, bits, block)
  found = api.weighted_sum(*arrays, **static, implementation=implementation)
  wanted, total = oracle(*arrays, **static)
  bound = tolerance.tol(np.float32, max(clients, 1)) * total
  assert np.all(np.abs(found - wanted) <= bound)


@on_cpu
@pytest.mark.parametrize("bits", [1, 4])
def test_it_is_the_sum_of_what_dequantize_returns(bits, implementation, tol):
  x = np.random.default_rng(0).normal(size=(5, 600)).astype(np.float32)
  keys = jax.random.key_data(jax.random.split(jax.random.key(0), 5))
  send = functools.partial(quantize.quantize, bits=bits)
  packed, scale = jax.vmap(send)(x, keys)
  weight = np.array([1, 7, 0, 2, 30], np.float32)
  zero = np.zeros(600, np.float32)
  found = summed(bits, implementation)(zero, packed, scale, weight)
  decode = functools.partial(quantize.dequantize, bits=bits, size=600)
  decoded = np.asarray(jax.vmap(decode)(packed, scale), float)
  bound = np.abs(weight[:, None] * decoded).sum(0) * tol(np.float32, 5)
  assert np.all(np.abs(found - weight @ decoded) <= bound)


# What the order, the cuts and the absent may change: nothing.


@everywhere
@pytest.mark.parametrize("bits", [1, 8])
def test_an_absent_client_changes_nothing_whatever_its_scales(
  bits, implementation
):
  (acc, packed, scale, weight), _ = small(10, 300, bits)
  weight[[2, 9]] = 0
  run = summed(bits, implementation)
  scale[weight == 0] = 0
  wanted = run(acc, packed, scale, weight)
  for bad in (np.nan, np.inf, -np.inf):
    scale[weight == 0] = bad
    found = run(acc, packed, scale, weight)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, wanted)
  np.testing.assert_array_equal(run(acc, packed, scale, 0 * weight), acc)


@everywhere
@pytest.mark.parametrize("dtype", [*UNSIGNED, np.float32])
def test_an_absent_row_changes_no_bit(dtype, implementation):
  acc, rows, present = specs.rows(9, 150, dtype)[0](np.random.default_rng(0))
  acc[:3] = 0
  if dtype == np.float32:
    acc[:3] = -0.0
    rows[~present] = np.nan
  present[:] = False
  out = rowed(implementation)(acc, rows, present)
  np.testing.assert_array_equal(np.asarray(out).view("u1"), acc.view("u1"))


@everywhere
@pytest.mark.parametrize("dtype", UNSIGNED)
def test_permuting_clients_changes_no_integer(dtype, implementation):
  rng = np.random.default_rng(0)
  acc, rows, present = specs.rows(19, 150, dtype)[0](rng)
  order = rng.permutation(19)
  run = rowed(implementation)
  np.testing.assert_array_equal(
    run(acc, rows, present), run(acc, rows[order], present[order])
  )


@everywhere
def test_masks_cancel_in_the_sum(implementation):
  rng = np.random.default_rng(0)
  mask = rng.integers(0, 2**32, 150, np.uint32)
  rows = np.stack([7 + mask, 2 - mask])
  out = api.add_rows(
    np.zeros(150, np.uint32), rows, [True, True], implementation=implementation
  )
  np.testing.assert_array_equal(out, 9)


def test_present_may_be_numbers_of_examples():
  acc, rows, _ = specs.rows(3, 5, np.uint32)[0](np.random.default_rng(0))
  out = api.add_rows(acc, rows, jnp.array([0, 12, 1]))
  np.testing.assert_array_equal(out, acc + rows[1] + rows[2])


@everywhere
@pytest.mark.parametrize("bits", [4, 8])
def test_several_calls_return_the_bits_of_one(bits, implementation):
  (acc, *arrays), _ = small(18, 600, bits)
  run = summed(bits, implementation)
  once, several = run(acc, *arrays), acc
  for first in (0, 9):
    several = run(several, *(x[first : first + 9] for x in arrays))
  np.testing.assert_array_equal(once, several)


@everywhere
def test_several_calls_add_the_bits_of_all_rows(implementation):
  acc, *arrays = specs.rows(18, 90, np.float32)[0](np.random.default_rng(0))
  run = rowed(implementation)
  once, several = run(acc, *arrays), acc
  for first in (0, 9):
    several = run(several, *(x[first : first + 9] for x in arrays))
  np.testing.assert_array_equal(once, several)


@on_cpu
@pytest.mark.parametrize("bits", BITS)
def test_client_after_client_returns_the_bits_of_one_call(bits, implementation):
  (acc, *arrays), _ = small(11, 300, bits)
  run = summed(bits, implementation)
  once, several = run(acc, *arrays), acc
  for c in range(11):
    several = run(several, *(x[c : c + 1] for x in arrays))
  np.testing.assert_array_equal(once, several)


# Transformations.


@everywhere
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0,), (1,), (2,), (3,)])
def test_a_batch_of_sums_is_each_sum(axes, implementation, tol):
  pairs = [small(5, 300, 4, seed=seed) for seed in range(3)]
  arrays, static = list(pairs[0][0]), pairs[0][1]
  for i in axes:
    arrays[i] = np.stack([drawn[i] for drawn, _ in pairs])
  in_axes = [0 if i in axes else None for i in range(4)]
  run = summed(4, implementation)
  found = jax.jit(jax.vmap(run, in_axes))(*arrays)
  for k in range(3):
    alone = [x[k] if i in axes else x for i, x in enumerate(arrays)]
    if implementation == "native":
      np.testing.assert_array_equal(found[k], run(*alone))
    # The compiler may fuse products and sums in one program only.
    wanted, total = oracle(*alone, **static)
    assert np.all(np.abs(found[k] - wanted) <= tol(np.float32, 5) * total)


@everywhere
@pytest.mark.parametrize("axes", [(0, 1, 2), (0,), (1,), (2,)])
def test_a_batch_of_row_sums_is_each_row_sum(axes, implementation):
  draw, _ = specs.rows(9, 130, np.uint32)
  drawn = [draw(np.random.default_rng(seed)) for seed in range(3)]
  arrays = list(drawn[0])
  for i in axes:
    arrays[i] = np.stack([d[i] for d in drawn])
  fun = rowed(implementation)
  found = jax.vmap(fun, [0 if i in axes else None for i in range(3)])(*arrays)
  for k in range(3):
    alone = [x[k] if i in axes else x for i, x in enumerate(arrays)]
    np.testing.assert_array_equal(found[k], fun(*alone))


@on_cpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1024, 1000])
def test_a_donated_accumulator_becomes_the_result(size, bits, implementation):
  arrays, static = small(3, size, bits)
  fun = functools.partial(
    api.weighted_sum, **static, implementation=implementation
  )
  acc = jnp.asarray(arrays[0])
  jitted = jax.jit(fun, donate_argnums=0)
  memory = jitted.lower(acc, *arrays[1:]).compile().memory_analysis()
  assert memory.alias_size_in_bytes == acc.nbytes
  assert implementation != "native" or memory.temp_size_in_bytes == 0
  wanted = jax.jit(fun)(*arrays)
  np.testing.assert_array_equal(jitted(acc, *arrays[1:]), wanted)
  assert acc.is_deleted()


@on_cpu
@pytest.mark.parametrize("dtype", [*UNSIGNED, np.float32])
def test_a_donated_row_becomes_the_sum(dtype, implementation):
  acc, *arrays = specs.rows(3, 100, dtype)[0](np.random.default_rng(0))
  fun = functools.partial(api.add_rows, implementation=implementation)
  jitted = jax.jit(fun, donate_argnums=0)
  memory = jitted.lower(acc, *arrays).compile().memory_analysis()
  assert memory.alias_size_in_bytes == acc.nbytes
  wanted = fun(acc, *arrays)
  np.testing.assert_array_equal(jitted(jnp.asarray(acc), *arrays), wanted)


@on_cpu
def test_an_accumulator_that_is_not_donated_keeps_its_values(implementation):
  arrays, static = small(3, 512, 8)
  acc = jnp.asarray(arrays[0])
  jax.jit(
    functools.partial(api.weighted_sum, **static, implementation=implementation)
  )(acc, *arrays[1:])
  np.testing.assert_array_equal(acc, arrays[0])


@on_cpu
def test_a_scan_over_chunks_of_clients_is_one_call(implementation):
  (acc, *arrays), static = small(12, 300, 4)
  run = functools.partial(
    api.weighted_sum, **static, implementation=implementation
  )
  chunks = [x.reshape(4, 3, *x.shape[1:]) for x in arrays]

  @jax.jit
  def streamed(acc):
    return jax.lax.scan(lambda acc, xs: (run(acc, *xs), None), acc, chunks)[0]

  np.testing.assert_array_equal(streamed(acc), jax.jit(run)(acc, *arrays))


@everywhere
def test_two_devices_add_the_clients_of_one(implementation):
  mesh = jax.make_mesh((2,), ("c",), axis_types=(jax.sharding.AxisType.Auto,))
  _, rows, present = specs.rows(8, 200, np.uint32)[0](np.random.default_rng(0))
  run = functools.partial(api.add_rows, implementation=implementation)

  def local(rows, present):
    zero = jnp.zeros(200, jnp.uint32)
    return jax.lax.psum(run(zero, rows, present), "c")

  both = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(P("c"), P("c")),
      out_specs=P(),
      check_vma=False,
    )
  )
  zero = np.zeros(200, np.uint32)
  np.testing.assert_array_equal(both(rows, present), run(zero, rows, present))


@everywhere
def test_two_devices_share_the_values(implementation):
  mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  arrays, static = small(5, 1024, 4)
  run = functools.partial(
    api.weighted_sum, **static, implementation=implementation
  )
  both = jax.jit(
    jax.shard_map(
      run,
      mesh=mesh,
      in_specs=(P("d"), P(None, "d"), P(None, "d"), P()),
      out_specs=P("d"),
      check_vma=False,
    )
  )
  np.testing.assert_array_equal(both(*arrays), jax.jit(run)(*arrays))


# Accelerators that are not there.


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize(
  ("kernel", "spec"),
  [(api.KERNEL, s) for s in quick(specs.SPECS)]
  + [(api.ROWS, s) for s in quick(specs.ROWS_SPECS)],
  ids=lambda x: x.name,
)
def test_it_lowers_for_accelerators(kernel, spec, platform):
  arrays = spec.draw(np.random.default_rng(0))
  fun = jax.jit(functools.partial(dispatch.call, kernel, **spec.static))
  text = fun.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
  target = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}[platform]
  assert (target in text) == bool(arrays[1].size)


def interpreter():
  """The interpreter with TPU semantics; where it records races."""
  return importlib.import_module(
    "jax._src.pallas.mosaic.interpret.interpret_pallas_call"
  )


def smallest_tiles(monkeypatch):
  """Makes tiles and chunks of the TPU's kernels as small as they can be."""
  monkeypatch.setattr(pallas_tpu, "VALUES", 1024)
  monkeypatch.setattr(pallas_tpu, "CLIENTS", 32)
  monkeypatch.setattr(pallas_tpu, "COLUMNS", 1024)


def test_the_tpu_kernels_have_no_races(monkeypatch, tol):
  smallest_tiles(monkeypatch)
  interpret = pltpu.InterpretParams(detect_races=True)
  arrays, static = small(64, 4096, 8, 128)  # two tiles, two chunks
  found = pallas_tpu.weighted_sum(*arrays, **static, interpret=interpret)
  assert not interpreter().races.races_found
  wanted, total = oracle(*arrays, **static)
  assert np.all(np.abs(found - wanted) <= tol(np.float32, 64) * total)
  acc, *rest = specs.rows(64, 2048, np.uint32)[0](np.random.default_rng(0))
  found = pallas_tpu.add_rows(acc, *rest, interpret=interpret)
  assert not interpreter().races.races_found
  np.testing.assert_array_equal(found, rowed("reference")(acc, *rest))


@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_and_chunks_that_are_cut_add_up_on_tpus(bits, monkeypatch, tol):
  smallest_tiles(monkeypatch)
  arrays, static = small(41, 5000, bits, 128)
  add = functools.partial(pallas_tpu.weighted_sum, **static, interpret=True)
  found = jax.jit(add)(*arrays)
  wanted, total = oracle(*arrays, **static)
  assert np.all(np.abs(found - wanted) <= tol(np.float32, 41) * total)
  acc, *rest = specs.rows(41, 1300, np.float32)[0](np.random.default_rng(0))
  found = pallas_tpu.add_rows(acc, *rest, interpret=True)
  np.testing.assert_array_equal(found, rowed("reference")(acc, *rest))


@pytest.mark.skipif(
  bool(native.missing("weighted_sum")), reason=native.missing("weighted_sum")
)
def test_the_read_probe_reads_everything():
  x = np.random.default_rng(0).integers(0, 2**32, 200_001, np.uint32)
  out = native.call(
    "weighted_sum.ReadProbe", jax.ShapeDtypeStruct((), np.uint32), x
  )
  assert out == np.bitwise_xor.reduce(x)


# Mistakes.


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"acc": np.zeros((2, 3), np.float32)}, r"acc must be float32 \[D\]"),
    ({"acc": np.zeros(300, np.int32)}, "acc must be float32"),
    (
      {"packed": np.zeros((3, 300), np.uint8)},
      r"packed must be int8 \[3, 300\]",
    ),
    ({"packed": np.zeros((3, 299), np.int8)}, r"got packed=int8 \[3, 299\]"),
    (
      {"packed": np.zeros((2, 300), np.int8)},
      r"packed must be int8 \[3, 300\]",
    ),
    (
      {"scale": np.zeros((3, 1), np.float32)},
      r"scale must be float32 \[3, 2\]",
    ),
    ({"weight": np.zeros(3, np.int32)}, "weight must be float32"),
    ({"bits": 3}, "bits must be one of"),
    ({"block": 100}, "block must be one of"),
  ],
)
def test_a_wrong_argument_is_refused(change, match):
  arguments = {
    "acc": np.zeros(300, np.float32),
    "packed": np.zeros((3, 300), np.int8),
    "scale": np.zeros((3, 2), np.float32),
    "weight": np.zeros(3, np.float32),
    "bits": 8,
  }
  with pytest.raises(ValueError, match=match):
    api.weighted_sum(**arguments | change)


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"acc": np.zeros(4, np.int32)}, "acc must be uint8 or uint16 or uint32"),
    ({"rows": np.zeros((3, 4), np.uint8)}, r"rows must be uint32 \[3, 4\]"),
    ({"rows": np.zeros((3, 5), np.uint32)}, r"got rows=uint32 \[3, 5\]"),
    ({"present": np.ones((3, 1), bool)}, r"present must be bool \[C\]"),
  ],
)
def test_a_wrong_row_is_refused(change, match):
  arguments = {
    "acc": np.zeros(4, np.uint32),
    "rows": np.zeros((3, 4), np.uint32),
    "present": np.ones(3, bool),
  }
  with pytest.raises(ValueError, match=match):
    api.add_rows(**arguments | change)
