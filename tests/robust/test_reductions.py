"""The laws of every reduction, on every robust one; and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crowd
import laws
from fedjax_peft import link, links, robust, tree

MEMBERS = {
  "bulyan": robust.bulyan(0),
  "centered_clip": robust.centered_clip(0.5),
  "geometric_median": robust.geometric_median(),
  "krum": robust.krum(1),
  "median": robust.median(),
  "multi_krum": robust.multi_krum(0, 2),
  "norm_filter": robust.norm_filter(1.5),
  "trimmed_mean": robust.trimmed_mean(0.3),
}
EVERY = pytest.mark.parametrize("name", MEMBERS)


@pytest.mark.parametrize("law", laws.REDUCE_LAWS, ids=lambda law: law.__name__)
@EVERY
def test_the_reduction_keeps_the_law(name, law):
  law(MEMBERS[name])


def mixed(kind):
  """Honest messages around a point far from zero, and hostile ones."""
  rng = np.random.default_rng(3)
  honest = 5 + rng.normal(size=(12, 9))
  middle, spread = honest.mean(0), honest.std(0)
  hostile = {
    "far": np.full((3, 9), 1e6),
    "overflowing": np.full((3, 9), 3e38) * rng.choice([-1, 1], (3, 9)),
    "opposite": np.repeat(-20 * middle[None], 3, 0),
    "apart": np.array([[1e4], [-1e6], [1e8]]) * np.ones((1, 9)),
    "not_a_number": np.full((3, 9), np.nan),
    "infinite": np.array([[np.inf], [-np.inf], [np.nan]]) * np.ones((1, 9)),
    "a_little": np.repeat((middle - 1.2 * spread)[None], 3, 0),
  }[kind]
  return np.asarray(honest, np.float32), np.asarray(hostile, np.float32)


KINDS = (
  "far",
  "overflowing",
  "opposite",
  "apart",
  "not_a_number",
  "infinite",
  "a_little",
)
WITHSTAND = {
  "bulyan": robust.bulyan(3),
  "centered_clip": robust.centered_clip(3.0),
  "geometric_median": robust.geometric_median(),
  "krum": robust.krum(3),
  "median": robust.median(),
  "multi_krum": robust.multi_krum(3),
  "norm_filter": robust.norm_filter(1.5),
  "trimmed_mean": robust.trimmed_mean(3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WITHSTAND)
def test_three_hostile_messages_of_fifteen_stay_without_effect(name, kind):
  # The result is no further from the honest mean than an honest message is;
  # the plain mean is, but for the attack made to go unseen.
  honest, hostile = mixed(kind)
  x, present = crowd.padded(np.concatenate([honest, hostile]), 16)
  middle = honest.mean(0, dtype=np.float64)
  reach = np.linalg.norm(honest - middle, axis=1).max()
  found = crowd.combine(WITHSTAND[name], x, present)
  assert np.linalg.norm(found - middle) < reach
  with np.errstate(invalid="ignore"):  # inf - inf
    plain = np.concatenate([honest, hostile]).mean(0, dtype=np.float64)
    is_near = np.linalg.norm(plain - middle) < reach
  assert is_near == (kind == "a_little")


@pytest.mark.parametrize("name", WITHSTAND)
def test_one_program_serves_any_number_of_senders(name):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(16, 9))
  reduce = WITHSTAND[name]
  crowd.combine(reduce, x)
  before = crowd.programs(reduce)
  found = [crowd.combine(reduce, x, np.arange(16) < n) for n in range(17)]
  assert crowd.programs(reduce) == before
  assert np.isfinite(found).all()
  assert not found[0].any()
  if name != "norm_filter":  # one message is its own middle
    np.testing.assert_array_equal(found[1], np.float32(x[0]))


@EVERY
def test_a_message_without_leaves_is_left_as_it_is(name):
  reduce = MEMBERS[name]
  assert reduce.finalize(reduce.init({}, 3)) == {}


@pytest.mark.parametrize("name", ["geometric_median", "krum", "median"])
def test_half_precision_is_kept(name):
  spec = {"a": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}
  reduce = MEMBERS[name]
  rows = {"a": jnp.ones((5, 2, 3), jnp.bfloat16)}

  @jax.jit
  def run(rows, present):
    return reduce.finalize(reduce.update(reduce.init(spec, 5), rows, present))

  found = run(rows, np.ones(5, bool))
  assert found["a"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.float32(found["a"]), 1)


@EVERY
def test_integers_and_factors_are_refused_with_the_name_of_the_leaf(name):
  reduce = MEMBERS[name]
  with pytest.raises(ValueError, match=r"leaf 'step' came as int32"):
    reduce.init({"step": jax.ShapeDtypeStruct((), jnp.int32)}, 3)
  factor = jax.ShapeDtypeStruct((2, 3), jnp.float32)
  with pytest.raises(ValueError, match=r"leaf 'kernel' came as factors"):
    reduce.init({"kernel": tree.Factored(factor, factor)}, 3)


@EVERY
def test_links_that_need_a_sum_are_refused(name):
  with pytest.raises(ValueError, match="is not linear"):
    link.exchange(links.weigh(), MEMBERS[name])
  link.exchange(links.int8(), MEMBERS[name])


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: robust.trimmed_mean(0.5), r"fraction in \[0, 0.5\)"),
    (lambda: robust.trimmed_mean(-1), "trim=-1"),
    (lambda: robust.trimmed_mean(True), "trim=True"),
    (lambda: robust.krum(-1), "byzantine=-1"),
    (lambda: robust.multi_krum(1, 0), "keep=0"),
    (lambda: robust.bulyan(1.5), "byzantine=1.5"),
    (lambda: robust.norm_filter(0.5), "factor=0.5"),
    (lambda: robust.geometric_median(eps=0), "eps=0"),
    (lambda: robust.geometric_median(0), "steps=0"),
    (lambda: robust.centered_clip(0.0), "radius=0.0"),
  ],
)
def test_a_bad_argument_is_named(make, words):
  with pytest.raises(ValueError, match=words):
    make()
