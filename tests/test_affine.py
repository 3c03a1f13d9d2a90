"""Affine: codes between the least and the largest value of a group.

The numeric laws are those of `rounded`, one program for every width, and one
test says that the packed link decodes to the same bits.
"""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import fedjax_peft as fp
import laws
from fedjax_peft import compose, links, tree
from fedjax_peft import link as link_lib
from fedjax_peft.links import bitstream, ranging
from fedjax_peft.links.affine import nbytes, rounded

PERS = ("tensor", "channel", "token")
WIDTHS = (1, 2, 3, 5, 8, 12, 16, 20, 24, 31)
EPS = 2.0**-23
KEY = jax.random.key(0)
CHECK = hypothesis.settings(deadline=None, max_examples=20, derandomize=True)


def drawn(shape=(6, 7, 40), seed=0, loc=0.5):
  """Values that are not centred, with axes of other sizes."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1:])) + loc
  return x.astype(np.float32)


@functools.partial(jax.jit, static_argnames=("per", "stochastic"))
def through(x, bits, key=KEY, per="tensor", stochastic=True):
  """`rounded`; one program for all widths."""
  return rounded(x, bits, key, per=per, stochastic=stochastic)


@functools.partial(jax.jit, static_argnames="link")
def cross(link, message, key=KEY):
  """(wire, what the receiver makes of it)."""
  ctx = link_lib.alone()._replace(key=key)
  mine, shared = link.init(fp.Spec(tree.spec(message)))
  wire, _, _ = link.send(message, mine, shared, ctx)
  return wire, link.receive(wire, shared, ctx.roster, key)[0]


def ends(x, per):
  """(m, M) of every group in float64, of shapes that broadcast."""
  x = np.asarray(x, np.float64)
  axis = {"tensor": None, "token": -1, "channel": tuple(range(x.ndim - 1))}
  low = x.min(axis[per], keepdims=True)
  return low, x.max(axis[per], keepdims=True)


def step(x, bits, per="tensor"):
  """Delta of every group, in float64."""
  low, high = ends(x, per)
  return (high - low) / (2.0**bits - 1)


# Packing.


@jax.jit
def packed(codes):
  """What every width makes of codes, and what is unpacked from that."""
  found = {}
  for bits in range(1, 33):
    wire = bitstream.pack(codes, bits)
    found[bits] = wire, bitstream.unpack(wire, bits, codes.shape)
  return found


@hypothesis.given(seed=st.integers(0, 2**32 - 1), top=st.integers(0, 2**32 - 1))
@CHECK
def test_codes_of_any_width_are_packed_without_a_gap_and_restored(seed, top):
  # Of 12 codes 2 or 4 planes can be cut; 8 planes need all rows as one, and
  # leave a rest.
  rng = np.random.default_rng(seed)
  codes = rng.integers(0, top, (3, 12), np.uint32, endpoint=True)
  for bits, (wire, back) in packed(codes).items():
    held = [np.asarray(x).tobytes() for x in jax.tree.leaves(wire)]
    assert sum(map(len, held)) == math.ceil(codes.size * bits / 8)
    np.testing.assert_array_equal(back, codes & np.uint32(2**bits - 1))


def test_bits_above_whole_bytes_lie_as_the_docstring_says():
  # 13 bits: a byte and 5 bits, 8 planes of 2; the oracle is Python's integers.
  codes = np.arange(16, dtype=np.uint32) * 523 % 8192
  packed = bitstream.pack(jnp.asarray(codes[None]), 13)
  np.testing.assert_array_equal(packed.whole[0][0], codes % 256)
  assert packed.rest is None
  for place in range(2):
    number = sum(int(c) // 256 << 5 * i for i, c in enumerate(codes[place::2]))
    found = [int(byte) for byte in packed.shared[0, place::2]]
    assert bytes(found) == number.to_bytes(5, "little")


@pytest.mark.parametrize("shape", [(), (1,), (13,), (3, 5), (2, 3, 64), (0, 4)])
@pytest.mark.parametrize("per", PERS)
def test_a_wire_has_the_bytes_of_its_codes_and_eight_a_group(shape, per):
  size, groups = math.prod(shape), 1
  if len(shape) > 1:
    lead = math.prod(shape[:-1])
    groups = {"tensor": 1, "token": lead, "channel": shape[-1]}[per]
  like = jax.ShapeDtypeStruct(shape, jnp.float32)
  for bits in range(1, 33):
    wanted = math.ceil(size * bits / 8) + 8 * groups
    if bits == 32 or not size:
      wanted = 4 * size
    assert nbytes(shape, bits, per) == wanted
    if bits in (1, 8, 13, 31, 32):
      wire = links.affine(bits, per=per).after(fp.Spec(like)).message
      assert tree.nbytes(wire) == wanted


# Rounding.


@pytest.mark.parametrize(
  ("per", "stochastic"),
  [("tensor", True), ("channel", False), ("token", True)],
)
def test_the_link_and_rounded_decode_to_the_same_bits(per, stochastic):
  x = drawn((4, 3, 32))
  widths = (1, 3, 8, 12, 31, 32)

  @jax.jit
  def sent(x):
    ctx = link_lib.alone()._replace(key=KEY)
    found = []
    for bits in widths:
      link = links.affine(bits, per=per, stochastic=stochastic)
      wire, _, _ = link.send({"n": jnp.arange(3), "x": x}, (), (), ctx)
      found.append(link.receive(wire, (), ctx.roster, KEY)[0]["x"])
    return jnp.stack(found)

  own = jax.random.fold_in(KEY, 1)  # x is the second leaf
  many = jax.vmap(through, in_axes=(None, 0, None, None, None))
  wanted = many(x, np.array(widths), own, per, stochastic)
  np.testing.assert_array_equal(sent(x), wanted)
  for i, bits in enumerate(widths):
    np.testing.assert_array_equal(
      through(x, bits, own, per, stochastic), wanted[i]
    )
  np.testing.assert_array_equal(wanted[-1], x)
  assert np.any(np.asarray(wanted[2]) != x)


def test_alone_jit_and_vmap_decode_to_the_same_bits():
  link = links.affine(6, per="token")
  x = drawn((3, 8, 48))
  together = jax.jit(jax.vmap(lambda x: cross(link, x)[1]))(x)
  np.testing.assert_array_equal(cross(link, x[1])[1], together[1])
  eager = cross.__wrapped__(link, jnp.asarray(x[1]))[1]
  np.testing.assert_array_equal(eager, together[1])


@pytest.mark.parametrize("per", PERS)
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("size", [1e-10, 1.0, 1e30])
def test_a_value_errs_by_less_than_a_step_of_its_group(per, stochastic, size):
  x = (drawn() * size).astype(np.float32)
  low, high = ends(x, per)
  part = 1 if stochastic else 0.5
  for bits in WIDTHS:
    found = np.asarray(through(x, bits, KEY, per, stochastic), np.float64)
    lost = 4 * EPS * (high - low) + EPS * np.maximum(-low, high)
    assert np.all(np.abs(found - x) <= part * step(x, bits, per) + lost)
    np.testing.assert_array_equal(ends(found, per)[0], low)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_narrow_leaf_keeps_its_dtype_and_its_own_rounding(dtype):
  x = jnp.asarray(drawn()).astype(dtype)
  wide = np.asarray(x.astype(jnp.float32))
  for bits in (3, 8, 16):
    found = through(x, bits)
    assert found.dtype == dtype
    found = np.asarray(found.astype(jnp.float32))
    lost = float(jnp.finfo(dtype).eps) * np.abs(found)
    assert np.all(np.abs(found - wide) <= step(wide, bits) + lost)
  assert tree.nbytes(cross(links.affine(32), x)[0]) == 2 * x.size
  assert nbytes(x.shape, 32, dtype=dtype) == 2 * x.size


def test_stochastic_rounding_is_unbiased():
  # 48 values: one is 4.6 standard errors off with p = 48 * 4.2e-6 = 2e-4.
  message = {"a": laws.messages()["kernel"][0], "b": np.linspace(-1, 1, 18)}
  message["b"] = message["b"].astype(np.float32)
  assert laws.bias(links.affine(3), message, 4000) < 4.6
  assert laws.bias(links.affine(3, per="token"), message, 4000) < 4.6
  assert laws.bias(links.affine(3, stochastic=False), message, 40) > 4.6
  assert laws.bias(late(links.affine(3), 0.03), message, 4000) > 4.6


def late(link, part):
  """The link, all that is decoded a part of a step too low."""

  def receive(wire, shared, roster, key):
    return {
      k: x.decode() - part * jnp.squeeze(x.step) for k, x in wire.items()
    }, shared

  return link._replace(receive=receive)


SPREAD = np.random.default_rng(0).uniform(0, 1, 65536).astype(np.float32)


def mean_square(x, bits, stochastic=True):
  """Mean squared error of a value, in steps."""
  found = np.asarray(through(x, bits, KEY, "tensor", stochastic), np.float64)
  return np.mean(np.square((found - x) / step(x, bits)))


@pytest.mark.parametrize("bits", [4, 8])
def test_spread_values_err_by_a_sixth_of_a_squared_step(bits):
  # With a fraction f, uniform, a squared error has the mean f (1 - f), on
  # average 1/6, and the variance 1/15 - 1/36; to the nearest it has the mean
  # 1/12 and the variance 1/80 - 1/144. Beyond 4 standard errors: p = 6.3e-5.
  for stochastic, mean, variance in (
    (True, 1 / 6, 1 / 15 - 1 / 36),
    (False, 1 / 12, 1 / 80 - 1 / 144),
  ):
    far = 4 * math.sqrt(variance / SPREAD.size)
    found = mean_square(SPREAD, bits, stochastic)
    assert abs(found - mean) < far
    assert abs(found - 1.05 * mean) > far  # a constant 5 % too large fails


def test_no_values_err_by_more_than_a_quarter_of_a_squared_step():
  x = np.arange(255, dtype=np.float32) + np.float32(0.5)  # all in the middle
  x = np.concatenate([x, np.float32([0, 255])])
  found = mean_square(x, 8) * x.size
  assert found == pytest.approx(255 / 4, rel=1e-4)  # the bound is reached
  for seed in range(5):
    for bits in (1, 4, 8):
      few = drawn((40,), seed)
      # A mean over 400 keys, of terms of at most 1: within 0.1 of its
      # expectation but with p = 2 exp(-2 * 400 * 0.01) = 7e-4 (Hoeffding).
      keys = jax.random.split(jax.random.key(seed), 400)
      many = jax.vmap(through, in_axes=(None, None, 0))(few, bits, keys)
      error = (np.asarray(many, np.float64) - few) / step(few, bits)
      assert np.mean(np.square(error)) <= 1 / 4 + 0.1


def test_a_bit_is_worth_six_decibel():
  # Against log2 of the steps in a range, which for 2 bits are 3 and not 4; in
  # bits as such it is 6.02 where the one that is missing counts for little.
  def decibel(bits):
    error = mean_square(SPREAD, bits) * step(SPREAD, bits) ** 2
    return float(10 * np.log10(SPREAD.var() / error).squeeze())

  bits = np.arange(2, 13)
  found = [decibel(int(b)) for b in bits]
  wanted = 20 * math.log10(2)
  steps = np.log2(2.0**bits - 1)
  assert abs(np.polyfit(steps, found, 1)[0] - wanted) < 0.1
  assert abs(np.polyfit(bits[4:], found[4:], 1)[0] - wanted) < 0.1
  assert abs(np.polyfit(bits, found, 1)[0] - wanted) > 0.1


def test_ranges_of_their_own_err_less_on_values_of_other_sizes():
  x = drawn((8, 16, 32), loc=0.0)
  channels = x * 10 ** np.linspace(-2, 0, 32, dtype=np.float32)
  tokens = x * 10 ** np.linspace(-2, 0, 16, dtype=np.float32)[None, :, None]

  def error(x, per):
    return laws.norm(np.asarray(through(x, 4, KEY, per)) - x)

  assert error(channels, "channel") < 0.7 * error(channels, "tensor")
  assert error(tokens, "token") < 0.7 * error(tokens, "tensor")
  assert error(tokens, "token") < error(tokens, "channel")


# What groups have to do with each other.


def test_per_token_examples_do_not_depend_on_their_companions():
  x, other = drawn((4, 5, 24)), drawn((4, 5, 24), seed=1)
  other[0] = x[0]
  other[1], other[2, :, 3] = np.nan, 1e37
  for stochastic in (True, False):
    mine = through(x, 4, KEY, "token", stochastic)[0]
    theirs = through(other, 4, KEY, "token", stochastic)[0]
    fewer = through(x[:2], 4, KEY, "token", stochastic)[0]
    np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(mine, fewer)
    shared = through(x, 4, KEY, "tensor", stochastic)[0]
    assert np.any(shared != through(other, 4, KEY, "tensor", stochastic)[0])


@pytest.mark.parametrize("per", PERS)
def test_what_is_not_finite_is_cut_to_the_range_of_the_rest(per):
  x = np.ascontiguousarray(np.abs(drawn((6, 32)))) + 1
  x[2, 3], x[2, 4], x[2, 5], x[2, 6] = np.nan, np.inf, -np.inf, 1e38
  seen = np.where(np.isfinite(x) & (np.abs(x) < 1e38), x, np.nan)
  axis = {"tensor": None, "token": -1, "channel": 0}[per]
  low = np.broadcast_to(np.nanmin(seen, axis, keepdims=True), x.shape)
  high = np.broadcast_to(np.nanmax(seen, axis, keepdims=True), x.shape)
  wanted = np.where(np.isnan(x), 0, x).clip(low, high)
  found = np.asarray(through(x, 8, KEY, per, False))
  most = (high - low) * (0.5 / 255 + 5 * EPS) + EPS * high
  assert np.all(np.abs(found - wanted) <= most)
  if per != "tensor":  # other groups are as if it had not been there
    clean = np.asarray(through(wanted, 8, KEY, per, False))
    np.testing.assert_array_equal(found, clean)


def test_a_group_without_any_value_decodes_to_zeros():
  x = drawn((4, 9))
  x[1] = np.nan, *[np.inf, -np.inf] * 4
  found = np.asarray(through(x, 5, KEY, "token"))
  np.testing.assert_array_equal(found[1], np.zeros(9))
  np.testing.assert_array_equal(
    found[2:], through(np.where(np.isfinite(x), x, 0), 5, KEY, "token")[2:]
  )


@pytest.mark.parametrize("value", [0.0, 0.1, -1e-30, 3e37])
def test_a_group_of_equal_values_decodes_exactly(value):
  x = np.full((3, 4), value, np.float32)
  x[1] = 7 * np.arange(4)
  for bits in (1, 2, 8, 31):
    found = through(x, bits, KEY, "token")
    np.testing.assert_array_equal(found[::2], x[::2])
    one = np.float32(value)
    np.testing.assert_array_equal(through(one, bits, KEY, "channel"), one)


def test_a_range_too_narrow_for_steps_decodes_to_its_least_value():
  x = np.float32([2e-32, 3e-32, 5e-32])
  np.testing.assert_array_equal(through(x, 31), np.full(3, x[0]))
  assert np.all(np.abs(through(x, 1) - x) <= 3e-32)


@pytest.mark.parametrize("per", PERS)
def test_leaves_without_two_axes_have_one_range(per):
  x = drawn((50,))
  found = through(x, 4, KEY, per)
  np.testing.assert_array_equal(found, through(x, 4, KEY, "tensor"))
  assert np.unique(found).size > 4


def test_integers_and_empty_leaves_pass_unchanged():
  message = {
    "length": np.array([3, -2], np.int32),
    "none": np.zeros((0, 4), np.float32),
  }
  for per in PERS:
    wire, back = cross(links.affine(3, per=per), message)
    jax.tree.map(np.testing.assert_array_equal, back, message)
    assert tree.nbytes(wire) == tree.nbytes(message)
  assert through(message["none"], 3).shape == (0, 4)


def test_widths_outside_of_the_range_count_as_its_ends():
  x = drawn((9, 4))
  np.testing.assert_array_equal(through(x, 0), through(x, 1))
  np.testing.assert_array_equal(through(x, 33), x)


# Together with others.


def test_gradients_pass_straight_through_and_cross_the_other_link():
  x, pull = jnp.asarray(drawn((4, 16))), jnp.asarray(drawn((4, 16), seed=1))
  link = links.affine(4)

  def back(up, down):
    boundary = fp.cut(up, down)
    return jax.jit(jax.grad(lambda x: jnp.sum(pull * boundary(x, KEY))))(x)

  np.testing.assert_array_equal(back(link, fp.chain()), pull)
  said = cross(link, pull, jax.random.fold_in(KEY, 1))[1]
  np.testing.assert_array_equal(back(fp.chain(), link), said)
  assert np.any(np.asarray(said) != pull)
  value = jax.jit(fp.cut(link, fp.chain()))(x, KEY)
  said = cross(link, x, jax.random.fold_in(KEY, 0))[1]
  np.testing.assert_array_equal(value, said)


def test_a_rotation_makes_the_range_of_a_spike_smaller():
  message = {"a": np.full(256, 0.01, np.float32)}
  message["a"][7] = 4.0
  message["a"][::2] *= -1

  def error(link):
    back = cross(link, message)[1]
    return laws.norm(jax.tree.map(np.subtract, back, message))

  turned = fp.chain(fp.rotate(256), links.affine(4))
  assert error(turned) < 0.8 * error(links.affine(4))


def test_the_values_that_top_k_keeps_are_rounded_and_their_places_are_not():
  message = {"a": drawn((30, 10))}
  link = fp.chain(fp.top_k(0.1), links.affine(6))
  sparse, kept = cross(fp.top_k(0.1), message)
  wire, back = cross(link, message)
  values = np.asarray(sparse.values)
  assert tree.nbytes(wire) == nbytes((30,), 6) + 4 * 30
  np.testing.assert_array_equal(wire.indices, sparse.indices)
  error = np.abs(np.asarray(back["a"]) - kept["a"])
  assert error.max() < step(values, 6) * (1 + 1e-5)
  assert error.max() > 0
  assert np.all(error[np.asarray(kept["a"]) == 0] == 0)


@pytest.mark.parametrize("stochastic", [True, False])
def test_what_two_bits_could_not_say_is_said_later(stochastic, tol):
  link = fp.error_feedback(links.affine(2, stochastic=stochastic))
  like = {"a": jax.ShapeDtypeStruct((12, 16), jnp.float32)}
  mine, shared = link.init(fp.Spec(like))
  send = jax.jit(link.send)
  heard, meant = np.zeros((12, 16)), np.zeros((12, 16))
  for seed in range(6):
    ctx, x = link_lib.alone(seed=seed), drawn((12, 16), seed)
    wire, mine, _ = send({"a": x}, mine, shared, ctx)
    heard += link.receive(wire, shared, ctx.roster, ctx.key)[0]["a"]
    meant += x
  (held,) = mine[0]
  scale = np.abs(heard).max()
  np.testing.assert_allclose(
    heard + held, meant, rtol=0, atol=scale * tol(np.float32, 6)
  )
  assert np.abs(heard - meant).max() > 100 * scale * tol(np.float32, 6)


def test_the_bound_is_reached_within_a_factor_and_never_passed():
  # Half of the values just below the middle of a range, and rounded up.
  x = np.float32([-1, 1] + [0.01] * 62)
  link = links.affine(1)
  bound = link.after(fp.Spec(tree.spec(x), laws.norm(x))).bound
  said = laws.norm(cross(link, x)[1])
  assert laws.norm(x) < said <= bound <= 8 * said
  exact = links.affine(32).after(fp.Spec(tree.spec(x), 3.0))
  assert exact.bound == 3.0


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"bits": 0}, "bits must be an integer of at least 1, got bits=0"),
    ({"bits": 33}, r"bits must be at most 32, got bits=33; affine\(32\) sends"),
    ({"bits": 4, "per": "tokens"}, "did you mean 'token"),
  ],
)
def test_arguments_out_of_range_are_refused_when_the_link_is_built(
  options, words
):
  with pytest.raises(ValueError, match=words):
    links.affine(**options)
  with pytest.raises(ValueError, match="bits must be"):
    bitstream.pack(jnp.zeros((1, 1), jnp.uint32), 33)
  with pytest.raises(ValueError, match="per must be one of"):
    rounded(jnp.ones(3), 4, KEY, per="row")


def test_a_config_can_say_it():
  table = {"link": "affine", "bits": 3, "per": "token", "stochastic": False}
  link = compose.chain_of([table], "uplink")
  assert link.name == "affine(3)"
  x = drawn((4, 8))
  wanted = cross(fp.chain(links.affine(3, per="token", stochastic=False)), x)
  np.testing.assert_array_equal(cross(link, x)[1], wanted[1])
  with pytest.raises(ValueError, match=r"uplink\.0\.per must be"):
    compose.chain_of([table | {"per": "row"}], "uplink")


def test_above_24_bits_codes_are_counted_by_floats():
  # The largest code is a float32 and an int32, and no larger than 2^b - 1.
  for bits in range(1, 32):
    levels = ranging.levels(bits)
    assert levels == np.float32(levels)
    assert 0 <= 2**bits - 1 - int(levels) < 2 ** max(bits - 24, 0)


def test_no_code_is_larger_than_its_bits_can_say():
  # Of 2,000 ranges many have a step whose inverse was rounded up.
  x = drawn((2000, 3))
  encode = jax.jit(ranging.encode, static_argnums=3)
  for bits in WIDTHS:
    found = np.asarray(encode(x, bits, KEY, "token")[0])
    assert found.min() == 0
    assert found.max() == ranging.levels(bits)
