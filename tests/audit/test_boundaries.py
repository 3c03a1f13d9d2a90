"""Boundaries: what is attacked is what the library sends, no more, no less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import audit_world as world
from fedjax_peft import audit, link, links
from fedjax_peft.audit import boundaries, crossing, deal, table, voice
from fedjax_peft.privacy import accounting, events
from tolerance import tol

KEY = jax.random.key(5)
ROWS = [0, 3, 7]  # of the crowd, who else is in the cohort


def flat(tree):
  leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
  return np.concatenate([x.reshape(len(x), -1) for x in leaves], 1)


def crossed(name, messages, here=True, seed=0, rows=ROWS):
  """What is seen of messages that all have the same companions and key."""
  seen = world.seen(name)
  count = len(jax.tree.leaves(messages)[0])
  rows = [] if seen.crowd is None else rows
  others = np.tile(np.asarray(rows, np.int32), (count, 1))
  keys = jax.random.split(jax.random.key(seed), count)
  return flat(
    boundaries.cross_many(seen, messages, others, np.full(count, here), keys)
  )


def clipped(rows):
  norm = np.linalg.norm(rows, axis=1, keepdims=True)
  return rows * np.minimum(1, world.subject().clip_norm / norm)


def said(count, seed=0):
  return voice.of_many(world.subject().full, world.clients(count, seed=seed))


def test_the_full_message_is_the_gradient_of_the_mean_loss():
  seen, examples = world.seen("full_gradient"), world.clients(2)
  params, base = seen.voice.weights

  def mean_loss(params, rows):
    each, _, _ = seen.voice.model.loss(params, base, rows, KEY)
    return jnp.mean(each)

  want = jax.vmap(jax.grad(mean_loss), (None, 0))(params, examples)
  got = audit.observe(seen, examples, KEY)
  for name, grad in want.items():
    # The message is params - (params - grad), rounded as params are.
    near = tol("float32", 400) * max(1, float(jnp.max(jnp.abs(params[name]))))
    np.testing.assert_allclose(got[name], grad, atol=near)


def test_adapters_say_nothing_of_the_base():
  seen = world.seen("adapters")
  got = audit.observe(seen, world.clients(1), KEY)
  assert set(got) == set(seen.voice.model.params)
  assert all("lora" in name or "head" in name for name in got)


def test_what_crosses_a_cut_is_the_output_of_the_first_part():
  examples = world.clients(2)
  device = world.subject().device.model.origin.parts()[0]
  got = audit.observe(world.seen("split"), examples, KEY)["x"]
  want = [device(image=x)["x"] for x in examples["image"]]
  np.testing.assert_allclose(got, want, atol=tol("float32", 25))


def test_a_secure_sum_is_the_mean_of_clipped_messages():
  seen, messages = world.seen("secure_sum"), said(2)
  got = crossed("secure_sum", messages)
  rest = clipped(flat(seen.crowd))[ROWS].sum(0)
  want = (clipped(flat(messages)) + rest) / seen.cohort
  # Each of four is rounded to a grid of at least 2^28 steps to its bound.
  near = world.subject().clip_norm * (2.0**-28 + tol("float32", 4))
  np.testing.assert_allclose(got, want, atol=near)


def test_who_is_absent_says_nothing_and_leaves_nothing():
  messages = said(2)
  got = crossed("secure_sum", messages, here=False)
  seen = world.seen("secure_sum")
  want = clipped(flat(seen.crowd))[ROWS].sum(0) / seen.cohort
  near = world.subject().clip_norm * (2.0**-28 + tol("float32", 4))
  np.testing.assert_allclose(got, [want, want], atol=near)


def uniform(values):
  """p-value of a chi-square test that values are uniform in their range."""
  reach = np.abs(values).max()
  counts, _ = np.histogram(values, 64, (-reach, reach))
  return scipy.stats.chisquare(counts).pvalue


def test_a_masked_wire_is_uniform_and_an_open_one_is_not():
  # Fixed key; p > 0.01, and < 1e-9 of the same integers without a mask.
  wires = crossed("secure_wire", said(2))
  subject = world.subject()
  # One of four, modulo 2^32, on the grid of the sum.
  assert uniform(wires[0]) > 0.01
  assert uniform(wires[1]) > 0.01
  plain = link.chain(links.clip(subject.clip_norm), links.fixed_point(32))
  one = jax.tree.map(lambda x: x[0], said(1))
  open_ = crossing.alone(plain, one, KEY)
  assert uniform(flat(jax.tree.map(lambda x: x[None], open_))[0]) < 1e-9


def rounded(noise_size):
  """How much further a message reaches once it is rounded to the grid.

  Half a step to either side of each value, which is 1 / 436 of the clip norm
  with the bits that are chosen for this noise.
  """
  return 1 + np.sqrt(noise_size) / 2 / 436


@pytest.mark.parametrize("name", ["client_dp", "local_dp", "distributed_dp"])
def test_the_noise_is_that_which_is_accounted(name):
  # Chi-square law of a sample variance, two-sided: p > 0.01 as accounted, and
  # < 1e-9 at 2/3 and 3/2 of it. `multiplier` is std / how far neighbours are
  # apart: a clip norm in a sum, two where a message is replaced.
  seen, subject = world.seen(name), world.subject()
  messages = said(2)
  clean = clipped(flat(messages))
  apart = subject.clip_norm / seen.cohort
  if name != "local_dp":
    rest = clipped(flat(seen.crowd))[ROWS].sum(0)
    clean = (clean + rest) / seen.cohort
  else:
    apart *= 2
  if name == "distributed_dp":
    apart *= rounded(noise_size=clean.shape[1])
  noise = crossed(name, messages) - clean
  scale = (noise**2).sum() / (seen.multiplier * apart) ** 2

  def p_value(ratio):
    below = scipy.stats.chi2.cdf(scale / ratio, noise.size)
    return 2 * min(below, 1 - below)

  assert p_value(1) > 0.01
  assert p_value(2 / 3) < 1e-9
  assert p_value(3 / 2) < 1e-9


def test_noise_by_every_client_is_accounted_as_the_same_noise_on_the_sum():
  """A discrete Gaussian of many steps: within 0.1 of a normal's epsilon."""
  seen = world.seen("distributed_dp")
  normal = accounting.epsilon(
    events.poisson(seen.multiplier, 1.0), table.DELTA, accountant="rdp"
  )
  assert seen.multiplier >= world.subject().multiplier * (1 - 1e-6)
  assert abs(table.epsilon_accounted(seen) - normal) < 0.1
  twice = accounting.epsilon(
    events.poisson(2 * seen.multiplier, 1.0), table.DELTA, accountant="rdp"
  )
  assert abs(table.epsilon_accounted(seen) - twice) > 0.1


def test_a_client_of_a_distributed_sum_that_says_nothing_adds_its_noise():
  """Sample variances of both worlds alike: F test, p > 0.01 and < 1e-9."""
  messages, seen = said(2), world.seen("distributed_dp")
  rest = clipped(flat(seen.crowd))[ROWS].sum(0) / seen.cohort
  there = crossed("distributed_dp", messages) - rest
  there -= clipped(flat(messages)) / seen.cohort
  away = crossed("distributed_dp", messages, here=False, seed=1) - rest
  ratio = np.var(there) / np.var(away)

  def p_value(ratio):
    below = scipy.stats.f.cdf(ratio, there.size, away.size)
    return 2 * min(below, 1 - below)

  assert p_value(ratio) > 0.01
  # As if the noise of one of four were missing.
  assert p_value(ratio * 4 / 3) < 1e-9


def test_cohorts_are_of_different_clients_drawn_anew():
  seats = boundaries.seats(world.seen("secure_sum"), jax.random.split(KEY, 20))
  assert seats.shape == (20, 3)
  assert all(len(set(row)) == 3 for row in seats.tolist())
  assert len({tuple(row) for row in seats.tolist()}) > 10
  assert boundaries.seats(world.seen("adapters"), KEY[None]).shape == (1, 0)


@pytest.mark.parametrize("count", [1, voice.CHUNK, voice.CHUNK + 3])
def test_chunks_give_every_row_once(count):
  rows = np.arange(count * 2).reshape(count, 2)
  found = voice.in_chunks(lambda x: {"a": x * 2}, (rows,))
  np.testing.assert_array_equal(found["a"], rows * 2)


def test_later_boundaries_join_by_their_name(monkeypatch):
  @audit.boundary("half")
  def half(subject):
    def cross(message, around):
      return jax.tree.map(lambda x: x / 2, message)

    return audit.Boundary("half", subject.full, cross)

  try:
    examples = world.clients(2)
    whole = audit.observe(world.seen("full_gradient"), examples, KEY)
    seen = audit.observe(audit.find("half", world.subject()), examples, KEY)
    np.testing.assert_array_equal(flat(seen), flat(whole) / 2)
    with pytest.raises(ValueError, match="'half' is there already"):
      audit.boundary("half")
  finally:
    del audit.BOUNDARIES["half"]


def test_what_cannot_be_audited_is_refused():
  with pytest.raises(ValueError, match="did you mean 'secure_sum'"):
    audit.find("secure_sums", world.subject())
  with pytest.raises(ValueError, match="use cohort=13 or a larger crowd"):
    audit.find("client_dp", world.subject()._replace(cohort=20))
  with pytest.raises(ValueError, match="model cut once: got a CNN"):
    voice.activations(world.subject().full.model)


def test_most_examples_of_a_dealt_client_are_of_its_class():
  rng = np.random.default_rng(1)
  majority = np.arange(40) % world.CLASSES
  rows = deal.rows(world.pool(), majority, 8, rng)
  same = (world.pool().label[rows] == majority[:, None]).sum(1)
  assert rows.shape == (40, 8)
  assert (same >= 6).all()
  assert (same < 8).any()  # the others are of any
  assert all(len(set(row)) == 8 for row in rows.tolist())
  with pytest.raises(ValueError, match="use a larger pool"):
    deal.rows(world.pool(), majority, 500, rng)


def test_shrunk_images_keep_their_mean():
  image = world.pool().image[:3]
  small = deal.shrunk(image, 2)
  assert small.shape == (3, 5, 5, 1)
  np.testing.assert_allclose(
    small.mean((1, 2, 3)), image.mean((1, 2, 3)), atol=tol("float32", 100)
  )
  with pytest.raises(ValueError, match="factor=3 for 10 x 10"):
    deal.shrunk(image, 3)
