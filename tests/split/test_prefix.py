"""Frozen prefixes: what is remembered is what would be computed again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fedjax_peft as fp
import split_worlds as worlds
import toy
from fedjax_peft import link, links, peft, sampling, split

COHORT, PEOPLE = worlds.COHORT, worlds.PEOPLE
ROWS = 8
AT = "cut/x"


def prefix_of(made, **options):
  return split.prefix_of(made, precision="float32", rows=ROWS, **options)


@functools.cache
def prefix():
  return prefix_of(trained())


@functools.cache
def trained():
  """The cut net whose server part is trained, all of it."""
  made = split.pipeline(worlds.net(), worlds.ENDS)
  return peft.tune(made, "server/.*")


@functools.cache
def player():
  """Rounds on what is remembered."""
  model = worlds.model(prefix().rest)
  data = prefix().remembered(PEOPLE)
  made = split.splitfed(fp.fedavg(model, worlds.LOCAL), model, data.examples)
  return toy.Player(made, data, model.base)


def test_a_message_depends_on_its_example_and_on_no_other():
  examples = PEOPLE.examples
  count = len(examples["x"])
  whole = prefix().messages(examples)["x"]
  order = np.random.default_rng(0).permutation(count)
  mixed = prefix().messages({k: v[order] for k, v in examples.items()})["x"]
  assert toy.same_bits(mixed, whole[order])
  assert count % ROWS  # so that a last batch was padded
  for start in (0, count - 3):
    few = {k: v[start : start + 3] for k, v in examples.items()}
    assert toy.same_bits(prefix().messages(few)["x"], whole[start : start + 3])
  wanted = np.maximum(examples["x"] @ worlds.start()["a"], 0)
  np.testing.assert_allclose(whole, wanted, rtol=0, atol=1e-6)


def test_whether_it_is_remembered_or_computed_every_round_changes_no_bit():
  once, _ = player().play(COHORT, COHORT)
  state = None
  for _ in range(2):
    fresh = prefix_of(trained()).remembered(PEOPLE).examples
    again = player().over(**{AT: fresh[AT]})
    state, _ = again.play(COHORT, state=state)
  assert toy.same_bits(once, state)
  other = player().over(**{AT: fresh[AT] + np.float32(0.01)})
  state, _ = other.play(COHORT, COHORT)
  assert not toy.same_bits(once.params, state.params)


def test_what_is_trained_on_memories_is_what_is_trained_on_the_model(tol):
  """A plain loop, in which the first stage stays as it is."""
  state, _ = player().play(COHORT)
  reports = []
  for client in COHORT:
    kernels = worlds.start()
    for rows in worlds.batches(client):
      grads = worlds.slope(kernels, rows).kernels | {"a": 0.0}
      kernels = {k: v - worlds.RATE * grads[k] for k, v in kernels.items()}
    reports.append(kernels)
  wanted = worlds.mean(reports, COHORT)
  came = {**state.params, "device/a/lin/kernel": worlds.start()["a"]}
  assert worlds.distance(came, wanted) < tol(jnp.float32, 20)
  assert set(state.params) == {"server/b/lin/kernel", "server/head/kernel"}


def test_the_device_computes_nothing_and_sends_each_message_once():
  measured = player().algorithm.work.split
  label = 4
  assert measured.before({}) == 4 * 7 + label
  assert measured.bytes(4, {}) == (0, 0)
  assert not measured.waits
  device, server = measured.flops(4, {})
  assert device == 0
  assert server > 0
  assert worlds.splitfed(worlds.plain()).work.split.before is None


def test_what_crosses_later_wires_crosses_in_every_step():
  """To the device's own head, which keeps the labels; or on the device."""
  u_shape = {"device": 1, "server": 2, "home": None}
  measured = measure(u_shape)
  assert measured.before({}) == 4 * 7
  assert measured.bytes(3, {}) == (3 * 4 * 6, 3 * 4 * 6)
  assert measured.waits
  late = measure({"device": 1, "device_2": 2, "server": None})
  assert late.before is None
  assert late.bytes(3, {}) == (3 * (4 * 6 + 4), 3 * 4 * 6)


def measure(ends):
  """What steps behind a frozen first part cost."""
  made = peft.tune(split.pipeline(worlds.net(), ends), "(?!device/).*")
  first = prefix_of(made)
  data, model = first.remembered(PEOPLE), worlds.model(first.rest)
  made = split.splitfed(fp.fedavg(model, worlds.LOCAL), model, data.examples)
  return made.work.split


def behind(wire, rows=ROWS):
  """(prefix of the net behind a wire, its messages, the next part's)."""
  made = split.pipeline(worlds.net(), worlds.ENDS, wire)
  made = peft.tune(made, "server/.*")
  first = split.prefix_of(made, precision="float32", rows=rows)
  messages = first.messages(PEOPLE.examples)
  return first, messages["x"], first.sent(messages)["x"]


def test_messages_cross_the_wire_when_they_are_remembered_and_not_in_steps():
  times = link.stateless("times", lambda m, c: ({"x": 3 * m["x"]}, {}))
  first, before, after = behind(split.Wire(times, None))
  np.testing.assert_array_equal(after, 3 * before)
  assert np.abs(before).max() > 0.1
  given = first.remembered(PEOPLE).examples
  assert toy.same_bits(given[AT], after)
  few = {k: v[:4] for k, v in given.items() if k != "label"}
  assert toy.same_bits(np.asarray(first.rest.message(**few)["x"]), after[:4])


def test_each_example_is_rounded_alone_and_for_good():
  wire = split.Wire(links.affine(3), None)  # a range for each message
  _, before, after = behind(wire)
  step = np.ptp(before, axis=1, keepdims=True) / 7
  low = before.min(1, keepdims=True)
  place = (after - low) / np.maximum(step, 1e-6)
  np.testing.assert_allclose(place, np.rint(place), rtol=0, atol=1e-4)
  assert 0 < np.abs(after - before).max() <= step.max() * (1 + 1e-5)
  assert toy.same_bits(behind(wire, rows=16)[2], after)
  first, messages, _ = behind(wire)
  alike = np.broadcast_to(messages[:1], messages.shape)
  assert len(np.unique(first.sent({"x": alike})["x"], axis=0)) > 1


def test_a_client_pays_for_its_examples_in_its_first_round_only():
  """In a run that is stopped in between, too."""
  model, data = worlds.model(prefix().rest), prefix().remembered(PEOPLE)
  made = split.splitfed(fp.fedavg(model, worlds.LOCAL), model, data.examples)

  def run(rounds, state=None):
    return fp.run(
      made,
      model,
      data,
      cohort=fp.sample.uniform(4),
      rounds=rounds,
      settings=toy.lanes(segment=4),
      state=state,
    )

  *_, (state, _) = begun = list(run(2))
  records = [record for _, record in [*begun, *run(5, state)]]
  each, seen = 4 * 7 + 4, set()
  for number, record in enumerate(records):
    ids = sampling.cohort_of(fp.sample.uniform(4), data, 0, number)
    fresh = set(ids.tolist()) - seen
    crossed = each * int(data.train.sizes[sorted(fresh)].sum())
    assert record["cut/up_bytes"] == crossed
    assert record["cut/first_up_bytes"] == crossed
    server = record["cloud/up_bytes"]
    assert record["up_bytes_client"] == (server + crossed) / 4
    seen |= fresh
  assert len(seen) < 4 * len(records)  # some came again


def test_half_precision_is_said_to_lose_and_does():
  exact, half = prefix(), prefix_of(trained(), dtype="bfloat16")
  assert exact.is_exact
  assert not half.is_exact
  whole, rough = (x.messages(PEOPLE.examples)["x"] for x in (exact, half))
  assert rough.dtype == jnp.bfloat16
  assert 2 * rough.nbytes == whole.nbytes
  gap = np.abs(rough.astype(np.float32) - whole)
  assert 0 < gap.max() <= 2.0**-8 * whole.max()  # of 8 bits of mantissa
  model = worlds.model(half.rest)
  given = half.remembered(PEOPLE).examples
  given = {k: v[:4] for k, v in given.items()}
  each, _, _ = model.loss(model.params, model.base, given, jax.random.key(0))
  assert each.dtype == jnp.float32


def test_memories_are_known_by_what_they_depend_on():
  known = prefix().fingerprint(PEOPLE)
  assert prefix_of(trained()).fingerprint(PEOPLE) == known
  server = nnx.clone(trained())
  server.server.b.lin.kernel[...] += 1.0
  assert prefix_of(server).fingerprint(PEOPLE) == known
  device = nnx.clone(trained())
  device.device.a.lin.kernel[...] += 1.0
  x = PEOPLE.examples["x"].copy()
  x[0, 0] += 1
  others = dataclasses.replace(PEOPLE, examples={**PEOPLE.examples, "x": x})
  different = [
    prefix_of(device).fingerprint(PEOPLE),
    prefix().fingerprint(others),
    prefix_of(trained(), dtype="bfloat16").fingerprint(PEOPLE),
    split.prefix_of(trained(), rows=ROWS).fingerprint(PEOPLE),
    prefix()._replace(rows=16).fingerprint(PEOPLE),
  ]
  assert len({known, *different}) == 1 + len(different)


def test_memories_that_are_kept_are_used_again():
  kept: dict = {}
  first = prefix().remembered(PEOPLE, kept)
  (key,) = kept
  assert key == prefix().fingerprint(PEOPLE)
  kept[key] = {"x": kept[key]["x"] + 1}  # so that one sees where it is from
  again = prefix().remembered(PEOPLE, kept)
  gap = again.examples[AT] - first.examples[AT]
  np.testing.assert_allclose(gap, 1, rtol=0, atol=1e-6)
  half = prefix_of(trained(), dtype="bfloat16")
  half.remembered(PEOPLE, kept)
  assert len(kept) == 2


def test_lengths_are_remembered_beside_the_stream_of_an_encoder():
  ends = {"device": "embeddings", "server": None}
  made = split.pipeline(worlds.zoo("encoder"), ends)
  made = peft.lora(made, 2, "server/.*query")
  first = prefix_of(made)
  given = worlds.examples("encoder", 4)
  memory = first.messages(given)
  assert toy.same_bits(memory["length"], given["length"])
  data = fp.data.population(given, [0, 0, 1, 1])
  examples = first.remembered(data).examples
  losses = []
  for module, features in ((made, given), (first.rest, examples)):
    model = worlds.model(module)
    run, key = jax.jit(model.loss), jax.random.key(0)
    losses.append(run(model.params, model.base, features, key)[0])
  np.testing.assert_allclose(*losses, rtol=1e-5)


def test_what_changes_or_is_not_there_cannot_be_remembered():
  adapted = peft.lora(split.pipeline(worlds.net(), worlds.ENDS), 2, ".*/lin")
  with pytest.raises(
    ValueError, match="'device/a/lin/lora_a.* is trained; put"
  ):
    split.prefix_of(adapted)
  with pytest.raises(ValueError, match="adapters into server only"):
    split.prefix_of(worlds.plain().origin)
  with pytest.raises(ValueError, match="train on what Prefix.remembered ret"):
    prefix().rest(x=jnp.ones((2, 5)))
  with pytest.raises(ValueError, match="float64"):
    split.prefix_of(trained(), dtype="float64")
  with pytest.raises(ValueError, match="rows"):
    split.prefix_of(trained(), rows=0)
