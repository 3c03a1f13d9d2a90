"""Top-k and its sum: exact, and the same wherever they run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from fedjax_peft.kernels import dispatch, native
from fedjax_peft.kernels.selection import (
  api,
  pallas_gpu,
  pallas_tpu,
  specs,
  threshold,
)

needs_native = pytest.mark.skipif(
  bool(native.missing("top_k")), reason="the native kernel was not built"
)
# Names that do not depend on what is built here, and cheap to run.
IMPLEMENTATIONS = [
  "reference",
  pytest.param("native", marks=needs_native),
  None,
]
INTERPRETED = ["interpret_tpu", "interpret_gpu"]
PLATFORMS = [("tpu", "pallas_tpu"), ("cuda", "pallas_gpu")]


def named(specs_, *names):
  """Specs as parameters; those of some names, or all."""
  chosen = [s for s in specs_ if not names or s.name in names]
  assert len(chosen) == len(names or specs_)
  return pytest.mark.parametrize("spec", chosen, ids=lambda s: s.name)


def draw(spec, seed=0):
  """The arrays of a spec."""
  return spec.draw(np.random.default_rng(seed))


def normal(*shape, seed=0):
  """Normal float32 values."""
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_same_bits(got, wanted):
  """Bit for bit, nans and signs of zeros too."""
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    g, w = np.asarray(g), np.asarray(w)
    assert g.dtype == w.dtype
    np.testing.assert_array_equal(g.view(np.int32), w.view(np.int32))


def sorted_by_numpy(x, k):
  """Top-k by a stable sort of bits."""
  bits = x.view(np.int32) & 0x7FFFFFFF
  order = np.where(bits > 0x7F800000, -1, bits)
  indices = np.sort(np.argsort(-order, kind="stable")[:k]).astype(np.int32)
  return x[indices], indices


def added_by_numpy(acc, values, indices, weight):
  """The sum, entry after entry."""
  acc = acc.copy()
  for v, i, w in zip(values, indices, weight):
    inside = (i >= 0) & (i < acc.size) & (w != 0)
    np.add.at(acc, i[inside], v[inside] * w)
  return acc


@functools.partial(jax.jit, static_argnums=(0, 2))
def run(implementation, x, k):
  """Compiled top-k."""
  return api.top_k(x, k, implementation=implementation)


@functools.partial(jax.jit, static_argnums=0)
def add(implementation, *arrays):
  """Compiled sum."""
  return api.scatter_add(*arrays, implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@named(specs.SPECS)
def test_what_is_kept_is_what_a_stable_sort_puts_first(spec, implementation):
  (x,) = draw(spec)
  k = spec.static["k"]
  assert_same_bits(run(implementation, x, k), sorted_by_numpy(x, k))


@pytest.mark.parametrize("implementation", INTERPRETED)
@named(specs.SPECS, "fewer numbers than k")
def test_accelerators_keep_the_same(spec, implementation):
  (x,) = draw(spec)
  k = spec.static["k"]
  assert_same_bits(run(implementation, x, k), sorted_by_numpy(x, k))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
  hnp.arrays(np.uint32, 257, elements=st.integers(0, 2**32 - 1)),
  st.sampled_from([1, 100, 257]),
)
def test_any_bits_are_ordered(bits, k):
  x = bits.view(np.float32)
  wanted = sorted_by_numpy(x, k)
  for implementation in ("reference", None):
    assert_same_bits(run(implementation, x, k), wanted)


@needs_native
@pytest.mark.parametrize("k", [1, 700, 50000, 512 * 273])
@pytest.mark.parametrize(
  "kind", ["ascending", "periodic", "zeros", "nans", "subnormal", "wide"]
)
def test_a_bad_sample_costs_time_only(kind, k):
  width = 512 * 273  # three pieces, the last of them short
  x = normal(width)
  if kind == "ascending":
    x = np.sort(x)
  elif kind == "periodic":  # large wherever the sample looks
    x[::273] *= 1000
  elif kind == "zeros":
    x[:] = 0
  elif kind == "nans":
    x[:] = np.nan
  elif kind == "subnormal":
    x *= 1e-44
  else:
    x = np.exp(np.clip(20 * x, -80, 80))
  assert_same_bits(run("native", x, k), sorted_by_numpy(x, k))


def test_a_nan_is_kept_only_where_numbers_run_out():
  x = jnp.array([jnp.nan, 0.0, -jnp.nan, -2.0])
  assert api.top_k(x, 2)[1].tolist() == [1, 3]
  assert api.top_k(x, 3)[1].tolist() == [0, 1, 3]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("clients", [0, 1, 3, 9])
def test_a_batch_keeps_what_each_message_alone_keeps(clients, implementation):
  x = normal(clients, 2, 1001)
  one = functools.partial(api.top_k, k=37, implementation=implementation)
  values, indices = jax.jit(jax.vmap(jax.vmap(one)))(x)
  assert indices.shape == (clients, 2, 37)
  for c in range(clients):
    for i in range(2):
      wanted = sorted_by_numpy(x[c, i], 37)
      assert_same_bits((values[c, i], indices[c, i]), wanted)


def test_gpus_search_long_messages_in_tiles():
  order = threshold.order(jnp.asarray(normal(2100)))
  search = functools.partial(pallas_gpu.search, tile=1024, interpret=True)
  found = jax.jit(search, static_argnums=1)(order, 77)
  assert int(found) == jnp.sort(order)[-77]


def test_tpus_search_long_messages_in_tiles_without_a_race():
  order = threshold.order(jnp.asarray(normal(2100)))
  races = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
  found = pallas_tpu.search(order, 77, rows=16, interpret=races)
  assert int(found) == jnp.sort(order)[-77]
  assert not interpreter().races.races_found


def interpreter():
  """The interpreter with TPU semantics; where it records races."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  return interpret_pallas_call


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "implementation"), PLATFORMS)
@named(specs.SPECS)
def test_every_shape_lowers_for_accelerators(spec, platform, implementation):
  def keep(x):
    return dispatch.call(
      api.KERNEL, x, implementation=implementation, **spec.static
    )

  lowered = (
    jax.jit(keep).trace(*draw(spec)).lower(lowering_platforms=(platform,))
  )
  assert "custom_call" in lowered.as_text()


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "implementation"), PLATFORMS)
def test_batches_lower_for_accelerators(platform, implementation):
  fun = functools.partial(api.top_k, k=7, implementation=implementation)
  traced = jax.jit(jax.vmap(jax.vmap(fun))).trace(normal(3, 2, 300))
  lowered = traced.lower(lowering_platforms=(platform,))
  assert "custom_call" in lowered.as_text()


def test_the_platform_that_is_compiled_for_decides():
  traced = jax.jit(lambda x: api.top_k(x, 7)).trace(jnp.zeros(99))
  for platform, target in (("tpu", "tpu_custom_call"), ("cuda", "triton")):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert target in text


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@named(specs.SCATTER_ADD_SPECS)
def test_the_sum_goes_client_after_client(spec, implementation):
  arrays = draw(spec)
  assert_same_bits(add(implementation, *arrays), added_by_numpy(*arrays))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_absent_client_changes_nothing(implementation):
  acc = jnp.array([-0.0, 1.0, 2.0])
  values = jnp.array([[0.0, jnp.nan], [jnp.inf, 1.0]])
  indices = jnp.array([[0, 1], [1, 2]], jnp.int32)
  got = api.scatter_add(
    acc, values, indices, jnp.zeros(2), implementation=implementation
  )
  assert_same_bits(got, acc)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_weights_everyone_counts_once(implementation):
  acc, values, indices, weight = draw(specs.SCATTER_ADD_SPECS[2])
  got = api.scatter_add(acc, values, indices, implementation=implementation)
  wanted = added_by_numpy(acc, values, indices, np.ones_like(weight))
  assert_same_bits(got, wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("axes", [(0, None, None, None), (None, 0, None, None),
                                  (None, None, 0, None), (None, None, None, 0),
                                  (0, 0, 0, 0)])  # fmt: skip
def test_sums_are_batched_over_each_argument(axes, implementation):
  draws = [draw(specs.SCATTER_ADD_SPECS[2], seed) for seed in range(3)]
  arrays = [
    draws[0][i] if axis is None else np.stack([d[i] for d in draws])
    for i, axis in enumerate(axes)
  ]
  fun = functools.partial(api.scatter_add, implementation=implementation)
  got = jax.jit(jax.vmap(fun, in_axes=axes))(*arrays)
  for i in range(3):
    one = [a if axis is None else a[i] for a, axis in zip(arrays, axes)]
    assert_same_bits(got[i], added_by_numpy(*one))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_donated_accumulator_is_the_result(implementation):
  acc, *rest = map(jnp.asarray, draw(specs.SCATTER_ADD_SPECS[2]))
  wanted = added_by_numpy(*map(np.asarray, (acc, *rest)))
  fun = functools.partial(api.scatter_add, implementation=implementation)
  place = acc.unsafe_buffer_pointer()
  got = jax.jit(fun, donate_argnums=0)(acc, *rest)
  assert acc.is_deleted()
  assert got.unsafe_buffer_pointer() == place
  assert_same_bits(got, wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_accumulator_that_is_kept_stays_as_it_is(implementation):
  acc, *rest = map(jnp.asarray, draw(specs.SCATTER_ADD_SPECS[2]))
  before = np.array(acc)
  add(implementation, acc, *rest)
  assert_same_bits(acc, before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_runs_inside_of_a_scan(implementation):
  x = normal(4, 1001)

  def receive(acc, x):
    values, indices = api.top_k(x, 37, implementation=implementation)
    acc = api.scatter_add(
      acc, values[None], indices[None], implementation=implementation
    )
    return acc, indices

  start = jnp.zeros(1001)
  acc, indices = jax.jit(lambda x: lax.scan(receive, start, x))(x)
  kept = [sorted_by_numpy(row, 37) for row in x]
  values = np.stack([v for v, _ in kept])
  assert_same_bits(indices, np.stack([i for _, i in kept]))
  wanted = added_by_numpy(
    np.zeros(1001, np.float32), values, np.asarray(indices), np.ones(4)
  )
  assert_same_bits(acc, wanted)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *INTERPRETED])
def test_each_of_two_devices_keeps_its_own(implementation):
  mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  x = normal(4, 300)

  def keep(x):
    return jax.vmap(lambda x: api.top_k(x, 7, implementation=implementation))(x)

  fun = jax.shard_map(
    keep, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False
  )
  values, indices = jax.jit(fun)(x)
  for c in range(4):
    assert_same_bits((values[c], indices[c]), sorted_by_numpy(x[c], 7))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_of_two_devices_adds_up_its_own(implementation):
  mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  draws = [draw(specs.SCATTER_ADD_SPECS[2], seed) for seed in range(2)]
  arrays = [np.stack(a) for a in zip(*draws)]

  def receive(*arrays):
    mine = [a[0] for a in arrays]
    return api.scatter_add(*mine, implementation=implementation)[None]

  fun = jax.shard_map(
    receive, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False
  )
  got = jax.jit(fun)(*arrays)
  for i in range(2):
    assert_same_bits(got[i], added_by_numpy(*draws[i]))


@pytest.mark.parametrize(
  ("x", "k", "words"),
  [
    (
      np.zeros((2, 3), np.float32),
      1,
      r"x must be float32 \[D\]: got x=float32 \[2, 3\]",
    ),
    (np.zeros(3, np.int32), 1, r"got x=int32 \[3\]"),
    (np.zeros(3, np.float32), 0, "1..3, the size of x: got k=0"),
    (np.zeros(3, np.float32), 4, "got k=4"),
    (np.zeros(0, np.float32), 1, "1..0"),
    (np.zeros(3, np.float32), 1.0, "an integer"),
  ],
)
def test_what_cannot_be_kept_is_refused(x, k, words):
  with pytest.raises(ValueError, match=words):
    api.top_k(x, k)


def test_what_cannot_be_added_is_refused():
  acc, values, indices, weight = draw(specs.SCATTER_ADD_SPECS[2])
  for arrays, words in (
    ((acc[None], values, indices, weight), r"acc must be float32 \[D\]"),
    ((acc, values[0], indices, weight), r"values must be float32 \[C, K\]"),
    ((acc, values, indices[:, 1:], weight), r"indices must be int32 \[5, 37\]"),
    ((acc, values, values, weight), r"got indices=float32 \[5, 37\]"),
    ((acc, values, indices, weight[1:]), r"weight must be float32 \[5\]"),
  ):
    with pytest.raises(ValueError, match=words):
      api.scatter_add(*arrays)
  with pytest.raises(ValueError, match="one of"):
    api.scatter_add(acc, values, indices, weight, implementation="pallas_tpu")
