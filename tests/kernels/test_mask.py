"""Masks: the keystream of RFC 8439, added and taken away again."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from fedjax_peft.kernels import chacha, native
from fedjax_peft.kernels.mask import (
  api,
  layout,
  pallas_gpu,
  pallas_tpu,
  specs,
)

HERE = [
  "reference",
  pytest.param(
    "native",
    marks=pytest.mark.skipif(
      bool(native.missing("mask")), reason=native.missing("mask")
    ),
  ),
]
INTERPRETED = ["interpret_tpu", "interpret_gpu"]
KEY = np.frombuffer(bytes(range(32)), np.uint32)


@functools.partial(jax.jit, static_argnames="implementation")
def mask_add(*arrays, implementation=None):
  return api.mask_add(*arrays, implementation=implementation)


def draw(spec):
  return spec.draw(np.random.default_rng(8439))


def openssl(key, nonce, counter, words):
  ciphers = pytest.importorskip(
    "cryptography.hazmat.primitives.ciphers", reason="OpenSSL is the oracle"
  )
  nonce = np.uint32(counter).tobytes() + nonce.tobytes()
  cipher = ciphers.Cipher(
    ciphers.algorithms.ChaCha20(key.tobytes(), nonce), None
  )
  stream = cipher.encryptor().update(bytes(4 * words))
  return np.frombuffer(stream, np.uint32)


def by_openssl(q, keys, plus, minus, nonce):
  y, order = q.copy(), layout.order(q.shape[1])
  for key, to, from_ in zip(keys, plus, minus):
    stream = openssl(key, nonce, 0, 1 + order.max(initial=-1))[order]
    if 0 <= to < len(y):
      y[to] += stream
    if 0 <= from_ < len(y):
      y[from_] -= stream
  return y


def named(*starts):
  found = [s for s in specs.SPECS if s.name.startswith(starts)]
  assert len(found) == len(starts)
  return pytest.mark.parametrize("spec", found, ids=lambda spec: spec.name)


@pytest.mark.parametrize("unroll", [False, True])
def test_words_are_the_block_of_rfc_8439_section_2_3_2(unroll):
  nonce = np.frombuffer(bytes.fromhex("000000090000004a00000000"), np.uint32)
  with jax.disable_jit(unroll):
    words = chacha.words(KEY, jnp.uint32([1]), nonce, unroll=unroll)
  expected = """
    e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3
    466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2
  """
  assert [int(x[0]) for x in words] == [int(x, 16) for x in expected.split()]


@pytest.mark.parametrize("implementation", HERE)
def test_mask_is_the_stream_of_rfc_8439_section_2_4_2(implementation):
  plain = (
    b"Ladies and Gentlemen of the class of '99: If I could offer you only one "
    b"tip for the future, sunscreen would be it."
  )
  cipher = bytes.fromhex("""
    6e2e359a2568f98041ba0728dd0d6981 e97e7aec1d4360c20a27afccfd9fae0b
    f91b65c5524733ab8f593dabcd62b357 1639d624e65152ab8f530c359f0861d8
    07ca0dbf500d6a6156a38e088a22b65e 52bc514d16ccf806818ce91ab7793736
    5af90bbf74a35be6b40b8eedf2785e42 874d
  """)
  nonce = np.frombuffer(bytes.fromhex("000000000000004a00000000"), np.uint32)
  q = np.zeros((1, 2048), np.uint32)
  y = mask_add(
    q, KEY[None], *np.int32([[0], [-1]]), nonce, implementation=implementation
  )
  stream = np.empty(2048, np.uint32)
  stream[layout.order(2048)] = y[0]
  stream = stream.tobytes()[64:]  # the example begins with block 1
  assert bytes(a ^ b for a, b in zip(plain, stream)) == cipher


@pytest.mark.parametrize("spec", specs.SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("implementation", HERE)
def test_mask_is_the_keystream_of_openssl(spec, implementation):
  arrays = draw(spec)
  if implementation == "reference" and arrays[0].size > 1_000_000:
    pytest.skip("the reference is slow, and has seen all lengths before")
  y = mask_add(*arrays, implementation=implementation)
  np.testing.assert_array_equal(y, by_openssl(*arrays))


@named("one value after five", "nobody", "no key", "no client", "no value")
@pytest.mark.parametrize("implementation", INTERPRETED)
def test_pallas_kernels_are_openssl_too(spec, implementation, monkeypatch):
  for module in (pallas_tpu, pallas_gpu):
    monkeypatch.setattr(module, "_KEYS", 4)  # so that there are several blocks
  arrays = draw(spec)
  fun = functools.partial(api.mask_add, implementation=implementation)
  np.testing.assert_array_equal(jax.jit(fun)(*arrays), by_openssl(*arrays))


def test_tpu_kernel_has_no_race(monkeypatch):
  monkeypatch.setattr(pallas_tpu, "_ROWS", 2)
  monkeypatch.setattr(pallas_tpu, "_KEYS", 2)
  # Whole blocks: this interpreter returns those that are cut as a whole.
  pairs = specs.ring(4, 1)
  arrays = specs.arguments(np.random.default_rng(0), 4, 2_048, *pairs)
  y = pallas_tpu.mask_add(
    *arrays, interpret=pltpu.InterpretParams(detect_races=True)
  )
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  assert not interpret_pallas_call.races.races_found
  np.testing.assert_array_equal(y, by_openssl(*arrays))


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@named(
  "a LoRA leaf",
  "the message of a round, one",
  "the message of a round, 16",
  "a head",
  "one value after five",
  "nobody",
)
def test_kernel_is_lowered_without_the_hardware(spec, platform):
  traced = jax.jit(lambda *arrays: api.mask_add(*arrays)).trace(*draw(spec))
  lowered = traced.lower(lowering_platforms=(platform,)).as_text()
  call = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}[platform]
  assert call in lowered


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("axes", ["00000", "0----", "-0-0-"])
def test_vmapped_kernel_is_lowered_without_the_hardware(axes, platform):
  axes = [0 if axis == "0" else None for axis in axes]
  arrays = specs.arguments(np.random.default_rng(0), 3, 20_000, [0], [1])
  arrays = [
    np.stack([x] * 3) if axis == 0 else x for x, axis in zip(arrays, axes)
  ]
  fun = jax.jit(jax.vmap(api.mask_add, in_axes=axes))
  fun.trace(*arrays).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("axis", range(5))
@pytest.mark.parametrize("implementation", HERE)
def test_vmap_over_an_argument_is_a_loop_over_it(axis, implementation):
  rng = np.random.default_rng(axis)
  arrays = list(specs.arguments(rng, 3, 300, [0, 1, -1], [1, 2, 0]))
  other = list(specs.arguments(rng, 3, 300, [2, -1, 0], [-1, 1, 2]))
  mapped = list(arrays)
  mapped[axis] = np.stack([arrays[axis], other[axis]])
  y = jax.jit(
    jax.vmap(
      functools.partial(api.mask_add, implementation=implementation),
      in_axes=[0 if i == axis else None for i in range(5)],
    )
  )(*mapped)
  arrays_1 = [other[i] if i == axis else x for i, x in enumerate(arrays)]
  np.testing.assert_array_equal(y[0], by_openssl(*arrays))
  np.testing.assert_array_equal(y[1], by_openssl(*arrays_1))


@pytest.mark.parametrize("implementation", INTERPRETED)
def test_vmap_of_a_pallas_kernel_is_a_loop(implementation):
  draws = [
    specs.arguments(np.random.default_rng(i), 2, 130, [0, i], [1 - i, -1])
    for i in range(2)
  ]
  y = jax.jit(
    jax.vmap(functools.partial(api.mask_add, implementation=implementation))
  )(*map(np.stack, zip(*draws)))
  for i in range(2):
    np.testing.assert_array_equal(y[i], by_openssl(*draws[i]))


@pytest.mark.skipif(bool(native.missing("mask")), reason=native.missing("mask"))
def test_a_donated_vector_is_masked_where_it_is():
  q, *others = map(jnp.asarray, draw(specs.SPECS[0]))
  at, expected = q.unsafe_buffer_pointer(), mask_add(q, *others)
  fun = jax.jit(
    functools.partial(api.mask_add, implementation="native"), donate_argnums=0
  )
  y = fun(q, *others)
  assert q.is_deleted()
  assert y.unsafe_buffer_pointer() == at
  np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("implementation", HERE)
def test_devices_with_some_rows_each_mask_as_one_device(implementation):
  arrays = specs.arguments(np.random.default_rng(1), 4, 300, *specs.ring(4, 2))
  mesh = jax.make_mesh(
    (2,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  rows, everywhere = (
    jax.sharding.PartitionSpec(*axes) for axes in (("clients",), ())
  )

  def local(q, keys, plus, minus, nonce):
    begin = jax.lax.axis_index("clients") * q.shape[0]
    return api.mask_add(
      q, keys, plus - begin, minus - begin, nonce, implementation=implementation
    )

  y = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(rows, *[everywhere] * 4),
      out_specs=rows,
      check_vma=False,
    )
  )(*arrays)
  np.testing.assert_array_equal(y, by_openssl(*arrays))


@pytest.mark.parametrize("implementation", HERE)
def test_rounds_in_a_scan_are_rounds_one_by_one(implementation):
  q, *pairs, nonce = specs.arguments(np.random.default_rng(2), 2, 300, [0], [1])
  nonces = nonce + np.arange(3, dtype=np.uint32)[:, None]

  def step(q, nonce):
    return api.mask_add(q, *pairs, nonce, implementation=implementation), None

  y, _ = jax.jit(lambda q: jax.lax.scan(step, q, nonces))(q)
  for nonce in nonces:
    q = by_openssl(q, *pairs, nonce)
  np.testing.assert_array_equal(y, q)


@settings(max_examples=25, deadline=None)
@given(
  C=st.integers(1, 4),
  D=st.sampled_from([1, 127, 2047, 2048, 2049, 16_385]),
  pairs=st.lists(
    st.tuples(st.integers(-2, 4), st.integers(-2, 4)), min_size=2, max_size=2
  ),
)
def test_any_rows_and_lengths_are_masked_as_by_openssl(C, D, pairs):
  arrays = specs.arguments(np.random.default_rng(D), C, D, *zip(*pairs))
  implementation = "reference" if native.missing("mask") else "native"
  y = mask_add(*arrays, implementation=implementation)
  np.testing.assert_array_equal(y, by_openssl(*arrays))


@pytest.mark.parametrize("D", [0, 1, 2_047, 16_384, 16_385, 76_038])
def test_every_value_has_a_word_of_its_own(D):
  order = layout.order(D)
  assert len(np.unique(order)) == D
  if D:
    assert 0 <= order.min() <= order.max() < D + 2_047 + layout.WORDS


def everyone(C):
  return np.triu_indices(C, 1)


def test_masks_cancel_in_the_sum():
  arrays = specs.arguments(np.random.default_rng(3), 5, 2_500, *everyone(5))
  y = mask_add(*arrays)
  assert np.mean(np.asarray(y) == arrays[0]) < 1e-3
  np.testing.assert_array_equal(y.sum(0), arrays[0].sum(0, dtype=np.uint32))


def test_unmasking_the_dropped_leaves_the_sum_of_the_others():
  q, keys, plus, minus, nonce = specs.arguments(
    np.random.default_rng(4), 5, 2_500, *everyone(5)
  )
  y = np.asarray(mask_add(q, keys, plus, minus, nonce))
  dropped = 2
  left = np.delete(y, dropped, 0).sum(0, dtype=np.uint32)
  # What the others have added for the pairs with the dropped one is taken off:
  # the roles of the two ends change.
  ours = (plus == dropped) | (minus == dropped)
  take_off = np.where(minus == dropped, -1, 0)[ours].astype(np.int32)
  add = np.where(minus == dropped, 0, -1)[ours].astype(np.int32)
  y = mask_add(left[None], keys[ours], take_off, add, nonce)
  np.testing.assert_array_equal(
    y[0], np.delete(q, dropped, 0).sum(0, dtype=np.uint32)
  )


def test_a_client_alone_masks_as_in_the_simulation_of_all():
  q, keys, plus, minus, nonce = specs.arguments(
    np.random.default_rng(5), 4, 300, *everyone(4)
  )
  y = mask_add(q, keys, plus, minus, nonce)
  for c in range(4):
    to, from_ = (
      np.where(x == c, 0, -1).astype(np.int32) for x in (plus, minus)
    )
    mine = mask_add(q[c : c + 1], keys, to, from_, nonce)
    np.testing.assert_array_equal(mine[0], y[c])


def p_uniform(x):
  """The p-value of chi-square for bytes that are uniform."""
  counts = np.bincount(
    np.ascontiguousarray(x).view(np.uint8).ravel(), None, 256
  )
  return scipy.stats.chisquare(counts).pvalue


def test_all_masked_rows_but_one_are_uniform_and_independent():
  # Each row and sums and differences of the three: p > 0.001, with this key.
  _, keys, plus, minus, nonce = specs.arguments(
    np.random.default_rng(6), 4, 0, *everyone(4)
  )
  q = np.full((4, 20_000), 7, np.uint32)
  y = np.asarray(mask_add(q, keys, plus, minus, nonce))
  for left_out in range(4):
    rows = np.delete(y, left_out, 0)
    for mix in itertools.product([0, 1, -1], repeat=3):
      if any(mix):
        mixed = np.array(mix).astype(np.uint32) @ rows
        assert p_uniform(mixed) > 1e-3
  assert p_uniform(y.sum(0, dtype=np.uint32)) < 1e-9  # nothing hides the sum


def test_a_nonce_that_comes_again_shows_the_difference():
  # p > 0.001 with new nonces, with this key; the control is the same nonce.
  q, keys, plus, minus, nonce = specs.arguments(
    np.random.default_rng(7), 2, 20_000, [0], [1]
  )
  q = q % 256
  first = np.asarray(mask_add(q, keys, plus, minus, nonce))
  for part in range(3):
    new = nonce + np.eye(3, dtype=np.uint32)[part]
    second = np.asarray(mask_add(q[::-1], keys, plus, minus, new))
    assert p_uniform(first - second) > 1e-3
  again = np.asarray(mask_add(q[::-1], keys, plus, minus, nonce))
  assert p_uniform(first - again) < 1e-9
  np.testing.assert_array_equal(first - again, q - q[::-1])


@pytest.mark.parametrize(
  ("name", "change"),
  [
    ("q", lambda q, k, p, m, n: (q.astype(np.int32), k, p, m, n)),
    ("q", lambda q, k, p, m, n: (q[0], k, p, m, n)),
    ("keys", lambda q, k, p, m, n: (q, k[:, :7], p, m, n)),
    ("plus", lambda q, k, p, m, n: (q, k, p[:-1], m, n)),
    ("minus", lambda q, k, p, m, n: (q, k, p, m.astype(np.uint32), n)),
    ("nonce", lambda q, k, p, m, n: (q, k, p, m, n[:2])),
  ],
)
def test_a_wrong_argument_is_named(name, change):
  arrays = specs.arguments(np.random.default_rng(0), 2, 10, [0, 1], [1, 0])
  with pytest.raises(ValueError, match=f"^{name} must be"):
    api.mask_add(*change(*arrays))


def test_a_vector_longer_than_the_counter_is_refused():
  spec = jax.ShapeDtypeStruct((1, layout.MAX_D + 1), jnp.uint32)
  arrays = specs.arguments(np.random.default_rng(0), 1, 1, [0], [-1])
  with pytest.raises(ValueError, match="nonce is good for at most"):
    jax.eval_shape(api.mask_add, spec, *arrays[1:])
