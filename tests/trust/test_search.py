"""A search: every usual cast of a canary is found anywhere, nothing else is."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import fedjax_peft as fp
import toy
from fedjax_peft import trust
from fedjax_peft.trust import canary, pattern, search

rng = np.random.default_rng(0)
K, N = 3, 301
OWNER = np.repeat(np.arange(6), 10)
TABLES = {
  "real": rng.normal(size=(60, 8, 8)).astype(np.float32),
  "pixels": rng.integers(0, 256, (60, 8, 8)).astype(np.uint8),
  "tokens": rng.integers(0, 30000, (60, 64)).astype(np.int32),
}


def planted(kind, count=2):
  label = np.arange(60, dtype=np.int32) % 3
  people = fp.data.population({"x": TABLES[kind], "label": label}, OWNER)
  return trust.plant(people, count, seed=1)


FOUND = {kind: planted(kind) for kind in TABLES}
LOOK = {
  kind: jax.jit(search.searcher(trust.patterns(found)))
  for kind, (_, found) in FOUND.items()
}


def code(row, low, high):
  """The usual 8-bit code of values, of a range that may be wider."""
  row = row.astype(np.float64)
  return np.rint((row - low) / (high - low) * 255).astype(np.uint8)


def signed(row):
  row = row.astype(np.float64)
  return np.rint(row / np.abs(row).max() * 127).astype(np.int8)


FLOATS = {
  "float32": lambda x: x.astype(np.float32),
  "bfloat16": lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16)),
  "rounded": lambda x: np.asarray(
    jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)
  ),
  "affine": lambda x: code(x, x.min(), x.max()),
  "wider": lambda x: code(x, float(x.min()) - 1, float(x.max()) * 1.5 + 1),
  "signed": signed,
}
CASTS = {
  "real": FLOATS
  | {
    "float16": lambda x: x.astype(np.float16),
    "bits": lambda x: x.view(np.int32),
    "bytes": lambda x: np.ascontiguousarray(x).view(np.uint8),
  },
  "pixels": FLOATS
  | {
    "uint8": lambda x: x,
    "int32": lambda x: x.astype(np.int32),
    "uint16": lambda x: x.astype(np.uint16),
    "unit": lambda x: x.astype(np.float32) / np.float32(255),
  },
  "tokens": FLOATS
  | {
    "int32": lambda x: x,
    "uint32": lambda x: x.astype(np.uint32),
    "uint16": lambda x: x.astype(np.uint16),
    "low bytes": lambda x: x.astype(np.uint8),
  },
}
EVERY = [(kind, name) for kind, some in CASTS.items() for name in some]


DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "uint16")
DTYPES += ("uint8", "int8")


def noise(dtype, size, seed=1):
  draw = np.random.default_rng(seed)
  if np.dtype(dtype).kind in "iu":
    top = np.iinfo(dtype)
    return draw.integers(top.min, top.max, size, dtype, endpoint=True)
  return draw.normal(size=size).astype(dtype)


@functools.cache
def quiet():
  """A leaf of each dtype, that hold no canary."""
  leaves = {dtype: noise(jnp.dtype(dtype), (K, N)) for dtype in DTYPES}
  return {"_first": np.zeros((K, 4), np.float32), **leaves}


@pytest.mark.parametrize(("kind", "cast"), EVERY)
def test_a_cast_of_a_canary_is_found_at_any_place_of_its_leaf(kind, cast):
  rows = FOUND[kind][1].examples["x"].reshape(2, -1)
  assert not LOOK[kind](quiet()).any()
  for q, place in ((0, 0), (1, 17), (0, -1)):
    words = CASTS[kind][cast](rows[q])
    dtype = str(words.dtype)
    leaf = quiet()[dtype].copy()
    start = N - words.size if place < 0 else place
    leaf[1, start : start + words.size] = words
    found = LOOK[kind](quiet() | {dtype: leaf})
    number = 1 + sorted(quiet()).index(dtype)
    assert found.tolist() == [[0, 0], [number, q], [0, 0]]


@pytest.mark.parametrize("kind", TABLES)
def test_no_other_example_of_the_data_is_found(kind):
  people, canaries = FOUND[kind]
  others = people.examples["x"][:60]
  assert not LOOK[kind]({"x": jnp.asarray(others)}).any()
  assert not LOOK[kind]({"x": jnp.asarray(others.astype(np.float32))}).any()
  assert canaries.rows.tolist() == [60, 61]
  for q, (client, row) in enumerate(
    zip(canaries.clients, canaries.rows, strict=True)
  ):
    assert row in people.train[client]
    assert (people.examples["x"][row] == canaries.examples["x"][q]).all()


def test_half_a_canary_is_found_and_one_value_changed_in_each_window_is_not():
  canaries = FOUND["real"][1]
  row = canaries.examples["x"][0].reshape(-1)
  half = {"x": jnp.asarray(row[None, row.size // 2 - 4 :])}
  assert LOOK["real"](half).tolist() == [[1, 0]]
  worn = row.copy()
  worn[::3] = np.nextafter(worn[::3], np.float32(9))
  assert not LOOK["real"]({"x": jnp.asarray(worn[None])}).any()


@pytest.mark.parametrize("bits", [6, 8])
def test_false_alarms_are_as_many_as_is_said_and_not_twice_as_many(bits):
  """Words of random bits: binomial, two-sided p below 1e-6."""
  canaries = FOUND["pixels"][1]
  made = trust.patterns(canaries, bits=bits)
  words = np.unique(made.words[8][:, :1])  # 8 bits are one pixel
  assert (made.lengths[8] == math.ceil(bits / 7)).any()
  draws = np.random.default_rng(2).integers(0, 256, 200_000).astype(np.uint8)
  hits = int(np.isin(draws, words).sum())
  chance = len(words) / 256
  assert stats.binomtest(hits, draws.size, chance).pvalue > 1e-6
  assert stats.binomtest(hits, draws.size, 2 * chance).pvalue < 1e-6


def test_the_chance_of_a_code_bounds_what_is_drawn():
  """Where it can be counted: runs of few values, one-sided p below 1e-6."""
  draw = np.random.default_rng(3)
  for run in (5, 6):
    wire = draw.normal(size=run)
    wire = (wire - wire.mean()) / np.std(wire) / math.sqrt(run)
    values = draw.uniform(size=(400_000, run))
    values -= values.mean(1, keepdims=True)
    likes = (values @ wire) ** 2 / (values**2).sum(1)
    hits, bound = int((likes > 0.99).sum()), pattern.code_chance(run)
    test = stats.binomtest(hits, 400_000, bound, "greater")
    assert test.pvalue > 1e-6
    wrong = pattern.code_chance(run, 0.9999)  # a radius without its root
    test = stats.binomtest(hits, 400_000, wrong, "greater")
    assert test.pvalue < 1e-6


@pytest.mark.parametrize("run", [5, 16, 48, 60])
def test_the_chance_of_a_code_is_above_that_of_normal_values(run):
  normal = stats.beta(0.5, (run - 2) / 2).sf(pattern.LIKE)
  assert normal < pattern.code_chance(run)
  assert pattern.code_chance() < 2.0**-canary.BITS


def test_a_run_of_a_million_reports_gives_no_false_alarm_but_in_a_billion():
  for _, found in FOUND.values():
    made = trust.patterns(found)
    wire = {"a": jax.ShapeDtypeStruct((10**6,), jnp.float32)}
    wire |= {"b": jax.ShapeDtypeStruct((10**6,), jnp.int8)}
    assert trust.false_alarm(made, pattern.sizes(wire)) * 1e6 < 1e-9
    assert trust.false_alarm(made, {32: 10**6}) > 0


def test_constants_and_steps_are_no_codes():
  look = LOOK["real"]
  for leaf in (np.zeros((K, N)), np.full((K, N), 7), np.arange(K * N) % 2):
    leaf = np.asarray(leaf, np.uint8).reshape(K, N)
    assert not look({"x": jnp.asarray(leaf)}).any()


def test_leaves_that_are_no_numbers_are_passed_over():
  keys = jax.random.split(jax.random.key(0), K)
  tree = {"key": keys, "flag": jnp.ones((K, 9), bool), "x": jnp.ones((K, 0))}
  assert not LOOK["real"](tree).any()


def test_what_cannot_be_told_from_others_is_refused():
  few = fp.data.population({"x": np.arange(20) % 2}, np.arange(20) % 4)
  with pytest.raises(ValueError, match="at least 96 random bits: got"):
    trust.plant(few, 1)
  with pytest.raises(ValueError, match="of whom there are 10: got 11"):
    trust.plant(toy.people(), 11)
  with pytest.raises(ValueError, match="an integer of at least 1"):
    trust.plant(toy.people(), 0)
  with pytest.raises(ValueError, match="must have a leaf"):
    search.searcher(trust.patterns(FOUND["real"][1]))({})


def test_what_is_planted_depends_on_the_seed_alone():
  people = toy.people()
  first, again = (trust.plant(people, 3, seed=5) for _ in range(2))
  assert first[0].fingerprint == again[0].fingerprint
  assert trust.plant(people, 3, seed=6)[0].fingerprint != first[0].fingerprint
  assert len(set(first[1].clients)) == 3
  low, high = people.examples["x"].min(), people.examples["x"].max()
  assert (first[1].examples["x"] >= low).all()
  assert (first[1].examples["x"] <= high).all()
  assert (people.train.sizes != first[0].train.sizes).sum() == 3
