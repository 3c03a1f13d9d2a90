"""Integer noise in rounds: the exact law of its tables, and what is drawn."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import fedjax_peft as fp
from fedjax_peft.links import masking
from fedjax_peft.privacy import grid_noise, integer_noise, noise_table

EPS = float(np.finfo(np.longdouble).eps)
KINDS = noise_table.KINDS


def probabilities(table):
  """{value: count of 2^64} that a table stands for, in whole numbers."""
  height = 2**64 // table.value.size
  found = dict.fromkeys(table.value.tolist(), 0)
  for value, other, high, low in zip(*(x.tolist() for x in table[:4])):
    threshold = (high << 32) + low
    found[value] += threshold
    found[other] += height - threshold
  return found


def gaussian(sigma, reach):
  """Exact up to the rounding of long doubles."""
  x = np.arange(-reach, reach + 1, dtype=np.longdouble)
  variance = grid_noise.rounded_variance(sigma)
  p = np.exp(-(x**2) * variance.denominator / (2 * variance.numerator))
  return p / p.sum()


def skellam(sigma, reach):
  """The law of a difference of two Poisson numbers, summed up."""
  mean = np.longdouble(sigma) ** 2 / 2
  poisson = [np.exp(-mean)]
  for n in range(1, 3 * reach + 60):
    poisson.append(poisson[-1] * mean / n)
  p = np.convolve(poisson, poisson[::-1])
  middle = len(poisson) - 1
  return p[middle - reach : middle + reach + 1]


LAWS = {"discrete_gaussian": gaussian, "skellam": skellam}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma", [0.3, 0.4, 1.0, 3.3, 20.0])
def test_a_table_is_as_near_to_its_law_as_it_says(kind, sigma):
  table = noise_table.table(kind, sigma)
  counts = probabilities(table)
  assert sum(counts.values()) == 2**64
  reach = math.ceil(15 * sigma) + 20
  values = range(-reach, reach + 1)
  assert {k for k, v in counts.items() if v} <= set(values)

  def distance(of):
    law = LAWS[kind](of, reach)
    drawn = [np.longdouble(counts.get(x, 0)) / 2**64 for x in values]
    return float(np.abs(law - np.array(drawn)).sum() / 2)

  # Beside what is stated, what long doubles round in products of `reach`.
  room = table.distance + 4 * reach * EPS
  assert distance(sigma) <= room
  assert table.distance < 1e-17
  # The control; tiny variances are rounded to 1 / 1024, hence a tenth.
  assert distance(1.1 * sigma) > 100 * room


@pytest.mark.parametrize("kind", KINDS)
def test_the_widest_table_is_near_to_its_law_too(kind):
  table = noise_table.table(kind, grid_noise.LARGEST)
  assert 0 < table.distance < 1e-15
  counts = probabilities(table)
  x = np.arange(-17000, 17001, 500)
  drawn = np.array([counts[i] / 2**64 for i in x.tolist()])
  law = gaussian(4096.0, 40000)[x + 40000].astype(float)
  if kind == "skellam":
    law = scipy.stats.skellam(2.0**23, 2.0**23).pmf(x)
  # SciPy's own errors are some 1e-10 of a probability here; in the middle one
  # law is above the other by 1 / (8 sigma^2) of it, 7e-9.
  np.testing.assert_allclose(drawn, law, rtol=1e-9)
  other = noise_table.table(KINDS[kind == KINDS[0]], grid_noise.LARGEST)
  apart = probabilities(other)[0] / counts[0] - 1
  assert abs(apart) == pytest.approx(2.0**-27, rel=0.1)


@pytest.mark.parametrize("sigma", [0.1, 2.0, 50.0])
def test_looking_up_compares_all_of_the_bits(sigma):
  table = noise_table.table("skellam", sigma)
  columns = table.value.size
  height = 2**64 // columns
  threshold = table.high.astype(object) * 2**32 + table.low.astype(object)
  rng = np.random.default_rng(1)
  column = np.concatenate([np.arange(columns)] * 5)
  rest = np.concatenate(
    [
      np.zeros(columns, object),
      np.maximum(threshold - 1, 0),
      threshold,
      np.full(columns, height - 1, object),
      rng.integers(0, height, columns, np.uint64).astype(object),
    ]
  )
  bits = column.astype(object) * height + rest
  high = (bits // 2**32).astype(np.uint32)
  low = (bits % 2**32).astype(np.uint32)
  found = jax.jit(lambda a, b: integer_noise.look_up(table, a, b))(high, low)
  below = (rest < threshold[column]).astype(bool)
  wanted = np.where(below, table.value[column], table.other[column])
  np.testing.assert_array_equal(found, wanted)
  assert {True, False} == set(below.tolist())


def sent(link, messages, weights=None, seed=0):
  """What senders with these messages send, and their noise as int64."""
  n = len(next(iter(messages.values())))
  weights = jnp.ones(n, jnp.int32) if weights is None else weights
  clients = jnp.arange(n, dtype=jnp.int32)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), clients)
  who = fp.Roster(clients, weights, jax.random.key(9))
  axes = fp.Context(0, 0, 0, None, None)
  own = ((),) * len(link.parts or ())
  send = jax.jit(
    jax.vmap(lambda m, ctx: link.send(m, own, own, ctx)[0], (0, axes))
  )
  return jax.device_get(
    send(messages, fp.Context(keys, clients, weights, {}, who))
  )


def noise_of(kind, sigma, senders, size, seed=0):
  """int64 [senders, size]."""
  link = integer_noise.integer_noise(kind, sigma)
  zeros = {"a": np.zeros((senders, size), np.uint32)}
  wires = sent(link, zeros, seed=seed)["a"]
  return wires.view(np.int32).astype(np.int64)


def p_value(drawn, x, p):
  """Of a chi-square test, over cells of at least ten expected draws."""
  wide = p * drawn.size >= 10
  want = np.append(p[wide], p[~wide].sum()) * drawn.size
  got = np.array([np.sum(drawn == v) for v in x[wide]])
  got = np.append(got, drawn.size - got.sum())
  return scipy.stats.chisquare(got, want * drawn.size / want.sum()).pvalue


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma", [0.4, 3.3])
def test_what_is_drawn_follows_the_law(kind, sigma):
  # Fixed key; p > 0.01, and < 1e-6 where sigma is a tenth larger.
  drawn = noise_of(kind, sigma, 8, 5000)
  x = np.arange(-60, 61)
  assert p_value(drawn, x, LAWS[kind](sigma, 60).astype(float)) > 0.01
  assert p_value(drawn, x, LAWS[kind](1.1 * sigma, 60).astype(float)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_of_a_sum_has_the_stated_variance(kind):
  # By the normal law of a sample variance, two-sided: p > 0.001 as stated and
  # < 1e-9 at 2/3 and 3/2 of it. Sums of 16 have no kurtosis to speak of.
  total = noise_of(kind, 5.0, 16, 4000).sum(0)

  def p_of(variance):
    score = (np.mean(total**2.0) / variance - 1) / math.sqrt(2 / total.size)
    return 2 * scipy.stats.norm.sf(abs(score))

  assert p_of(16 * 25.0) > 0.001
  assert p_of(16 * 25.0 * 2 / 3) < 1e-9
  assert p_of(16 * 25.0 * 3 / 2) < 1e-9
  assert abs(total.mean()) < 4 * math.sqrt(16 * 25 / total.size)


def test_senders_leaves_and_rounds_have_noise_of_their_own():
  link = integer_noise.integer_noise("skellam", 30.0)
  zeros = {k: np.zeros((3, 500), np.uint32) for k in "ab"}
  wires = sent(link, zeros)
  rows = [*wires["a"], *wires["b"], *sent(link, zeros, seed=1)["a"]]
  for i, one in enumerate(rows):
    for other in rows[:i]:
      # Two numbers of std 30 are the same one time in a hundred.
      assert np.mean(one == other) < 0.05
  assert (sent(link, zeros)["a"] == wires["a"]).all()


def test_whoever_is_absent_adds_nothing():
  link = integer_noise.integer_noise("discrete_gaussian", 30.0)
  messages = {"a": np.full((3, 100), 7, np.uint32)}
  wires = sent(link, messages, jnp.array([2, 0, 1]))["a"]
  assert (wires[1] == 7).all()
  assert (wires[[0, 2]] != 7).mean() > 0.9


def test_noise_is_added_modulo_every_width():
  link = integer_noise.integer_noise("skellam", 100.0)
  found = {}
  for bits in 8, 16, 32:
    dtype = np.dtype(f"uint{bits}")
    full = np.full((2, 300), 2**bits - 1, dtype)
    wires = sent(link, {"a": full})["a"]
    assert wires.dtype == dtype
    found[bits] = wires - full
  for bits in 8, 16:
    np.testing.assert_array_equal(
      found[bits], found[32].astype(np.dtype(f"uint{bits}"))
    )


def test_masks_come_off_the_sum_and_noise_does_not():
  noise = integer_noise.integer_noise("skellam", 10.0)
  rng = np.random.default_rng(2)
  messages = {"a": rng.integers(0, 2**16, (5, 64)).astype(np.uint16)}
  plain = sent(fp.chain(noise), messages)["a"]

  def total(link):
    wires = sent(link, messages)["a"]
    return wires.sum(0, dtype=np.uint16)

  np.testing.assert_array_equal(
    total(fp.chain(noise, masking.mask(4))), plain.sum(0, dtype=np.uint16)
  )
  assert (total(fp.chain(masking.mask(4))) != plain.sum(0)).any()


def test_what_has_no_grid_gets_no_noise():
  link = integer_noise.integer_noise("skellam", 1.0)
  spec = fp.Spec({"a": jax.ShapeDtypeStruct((3,), jnp.float32)})
  with pytest.raises(ValueError, match=r"unsigned .* got float32\[3\] at"):
    link.init(spec)
  with pytest.raises(ValueError, match="kind"):
    integer_noise.integer_noise("gaussian", 1.0)
  for sigma in 0.0, -1.0, math.nan, 5000.0:
    with pytest.raises(ValueError, match="coarser grid"):
      integer_noise.integer_noise("skellam", sigma)
