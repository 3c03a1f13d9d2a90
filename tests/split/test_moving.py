"""Cuts that move: in one program every client is what a pipeline would be."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fedjax_peft as fp
import split_worlds as worlds
import toy
from fedjax_peft import link, links, peft, split, tree
from fedjax_peft.links.affine import nbytes

COHORT, PEOPLE = worlds.COHORT, worlds.PEOPLE
FROZEN = {"crossing/.*": "frozen"}
CUTS = (1, 2, 3)  # 3: all stages on the device
EIGHT = links.affine(8, stochastic=False)


@functools.cache
def moved(kind="net", bits=False):
  """A model whose cut moves; over eight bits, or as many as a client has."""
  module = worlds.net() if kind == "net" else worlds.zoo(kind)
  wire = split.Wire() if bits else split.Wire(EIGHT, EIGHT)
  made = split.movable(module, wire, bits=bits)
  return worlds.model(made, worlds.loss_of(kind))


@functools.cache
def hybrid(bits=False):
  model = moved(bits=bits)
  made = fp.fedavg(model, worlds.LOCAL, placement=FROZEN)
  made = split.hybrid(made, model, PEOPLE.examples)
  return toy.Player(made, PEOPLE, model.base)


def at(player, cut, bits=32):
  """The same player, whose clients are cut so."""
  other = copy.copy(player)
  everyone = np.zeros(len(PEOPLE), np.int64)
  other.data = PEOPLE.with_traits(cut=everyone + cut, bits=everyone + bits)
  return other


def net_of(state):
  """The leaves that are trained."""
  return {k: v for k, v in state.params.items() if "crossing" not in k}


MIXED = np.array([1, 2, 3, 3, 1, 1, 1, 3, 3, 1])  # by client


def test_clients_that_are_all_cut_alike_are_split_clients():
  player = hybrid()
  model = worlds.cut(split.Wire(EIGHT, EIGHT))
  fixed = toy.Player(worlds.splitfed(model), PEOPLE, model.base)
  state, _ = at(player, 1).play(COHORT)
  wanted, _ = fixed.play(COHORT)
  assert toy.same_bits(
    list(worlds.stages_of(net_of(state)).values()),
    list(worlds.stages_of(wanted.params).values()),
  )
  plain, _ = worlds.fedavg_player().play(COHORT)
  assert not toy.same_bits(net_of(state), plain.params)


def test_clients_that_are_not_cut_are_federated_ones_bit_for_bit():
  plain, outcome = worlds.fedavg_player().play(COHORT, COHORT)
  state, record = at(hybrid(), 3).play(COHORT, COHORT)
  assert toy.same_bits(net_of(state), plain.params)
  assert toy.same_bits(record, outcome)


def test_where_the_wire_changes_nothing_any_cuts_are_fedavg_bit_for_bit():
  plain, _ = worlds.fedavg_player().play(COHORT, COHORT)
  for cut in (*CUTS, MIXED):
    state, _ = at(hybrid(bits=True), cut, bits=32).play(COHORT, COHORT)
    assert toy.same_bits(net_of(state), plain.params)


def test_of_clients_cut_in_different_places_only_those_that_are_cut_differ():
  """What each client loses over its steps, and so each step that it takes."""
  assert {MIXED[c] for c in COHORT} == set(CUTS)
  losses = []
  for player in (worlds.fedavg_player(), at(hybrid(), MIXED)):
    _, outcome = player.play(COHORT)
    clients = player.seat(COHORT).clients[0]
    losses.append(dict(zip(clients, outcome.clients["loss"][0][0])))
  plain, mixed = losses
  for client in COHORT:
    assert (plain[client] == mixed[client]) == (MIXED[client] == 3)


def test_the_more_bits_a_client_has_the_closer_it_is_to_one_with_all():
  """Over ten rounds; at eight bits the loss falls as it does at 32.

  A range has one step at one bit, and 255 at eight.
  """
  models, losses = {}, {}
  for bits in (1, 2, 4, 8, 32):
    player, state, kept = at(hybrid(bits=True), 1, bits), None, []
    for _ in range(10):
      state, outcome = player.play(COHORT, state=state)
      kept.append(float(outcome.record["train/loss"]))
    models[bits] = net_of(state)
    losses[bits] = np.array(kept)
  fall = losses[32][0] - losses[32][-1]
  assert fall > 0.1
  assert np.abs(losses[8] - losses[32]).max() < 0.02 * fall
  assert np.abs(losses[1] - losses[32]).max() > 0.02 * fall
  gaps = [
    tree.norm(jax.tree.map(jnp.subtract, models[bits], models[32]))
    for bits in (1, 2, 4, 8)
  ]
  assert gaps == sorted(gaps, reverse=True)
  assert gaps[0] > 50 * gaps[-1] > 0


def test_one_program_serves_all_cuts_and_bits():
  for bits in (False, True):
    player = hybrid(bits=bits)
    for cut in (1, 3, MIXED):
      for width in (2, 32):
        at(player, cut, width).play(COHORT)
    assert player.step.programs() == 1


def gradients(model, numbers, given):
  """Of the mean loss, of a model whose numbers are these."""
  still = {f"crossing/{k}": jnp.int32(v) for k, v in numbers.items()}
  weights = {k: v for k, v in model.params.items() if k not in still}

  def loss(weights):
    params = {**weights, **still}
    return model.loss(params, model.base, given, jax.random.key(0))[0].mean()

  return jax.grad(loss)(weights)


def test_a_trait_of_so_many_bits_is_a_wire_of_so_many_bits(tol):
  """The same bits of every gradient, at every cut; its draws are the same."""
  given = worlds.examples("net", 4)

  def compiled(model):
    return jax.jit(lambda numbers: gradients(model, numbers, given))

  free, rounded = compiled(moved(bits=True)), []
  for bits in (2, 5):
    each = links.affine(bits, per="token")
    fixed = split.movable(worlds.net(), split.Wire(each, each))
    fixed = compiled(worlds.model(fixed))
    for cut in (1, 2):
      rounded.append(free({"cut": cut, "bits": bits}))
      assert toy.same_bits(rounded[-1], fixed({"cut": cut}))
  assert not toy.same_bits(rounded[0], rounded[2])
  whole = compiled(worlds.whole())({})
  for numbers in ({"cut": 3, "bits": 2}, {"cut": 1, "bits": 32}):
    for path, leaf in free(numbers).items():
      limit = tol(jnp.float32, 7)
      np.testing.assert_allclose(leaf, whole[path], rtol=0, atol=limit)


def test_at_a_cut_of_an_encoder_the_gradient_is_that_of_a_pipeline(tol):
  """Through a scan whose rows cross eight bits, if this is where the cut is."""
  given, wire = worlds.examples("encoder"), split.Wire(EIGHT, EIGHT)
  ends = {"device": 2, "server": None}
  pipe = worlds.model(split.pipeline(worlds.zoo("encoder"), ends, wire))
  wanted = jax.jit(lambda: gradients(pipe, {}, given))()
  free = jax.jit(lambda cut: gradients(moved("encoder"), {"cut": cut}, given))
  came, whole = free(2), free(4)
  # As in the test of cuts; a value between two codes may fall either way, but
  # does not here.
  limit, differs = tol(jnp.float32, 15 * 40), 0.0
  for path, leaf in whole.items():
    pieces = [wanted.get(f"{part}/{path}") for part in ("device", "server")]
    pieces = np.concatenate([piece for piece in pieces if piece is not None])
    np.testing.assert_allclose(came[path], pieces, rtol=0, atol=limit)
    differs = max(differs, np.abs(came[path] - leaf).max())
  assert differs > 100 * limit


def held(cut):
  """Leaves of the net whose stages a device with this cut has."""
  names = worlds.STAGES[:cut]
  leaves = worlds.whole().params.items()
  return {k: v for k, v in leaves if k.split("/")[0] in names}


def test_of_a_report_those_rows_count_that_a_device_holds():
  made = hybrid().algorithm
  for cut in CUTS:
    sizes = made.bytes(4, traits={"cut": cut})
    here = tree.nbytes(held(cut))
    assert sizes["cloud/down_bytes"] == here
    assert sizes["cloud/up_bytes"] == here + 4  # and the weight
  model = moved("encoder")
  tall = fp.fedavg(model, worlds.LOCAL, placement=FROZEN)
  tall = split.hybrid(tall, model, worlds.examples("encoder"))
  for cut in range(1, 5):
    here = peft.split(worlds.zoo("encoder").part(0, cut)).params
    sizes = tall.bytes(4, traits={"cut": cut})
    assert sizes["cloud/down_bytes"] == tree.nbytes(here)


@pytest.mark.parametrize("bits", [1, 3, 8, 32])
def test_a_step_takes_the_bytes_of_the_wires_at_the_clients_cut(bits):
  job = hybrid(bits=True).algorithm.work
  each, label = links.affine(bits, per="token"), 4 * 4

  def send(x):
    return each.send({"x": x}, (), (), link.alone())[0]

  messages = [jnp.ones((4, 7)), jnp.ones((4, 6))]
  wires = jax.jit(lambda xs: [send(x) for x in xs])(messages)
  for cut, x, wire in zip((1, 2), messages, wires):
    size = tree.nbytes(wire)
    assert size == nbytes(x.shape, bits, "token")
    found = job.split.bytes(4, {"cut": cut, "bits": bits})
    assert found == (size + label, size)
  assert job.split.bytes(4, {"cut": 3, "bits": bits}) == (0, 0)
  assert job.traits == ("cut", "bits")


def test_what_cannot_move_is_refused():
  with pytest.raises(ValueError, match="put its layers into split.Modules"):
    split.movable(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
  for wire in (split.Wire(down=None), split.Wire(common=True)):
    with pytest.raises(ValueError, match="use a pipeline for the others"):
      split.movable(worlds.net(), wire)
  with pytest.raises(ValueError, match="only on the sum"):
    split.movable(worlds.net(), split.Wire(fp.weigh()))
  made = fp.fedavg(worlds.whole(), worlds.LOCAL)
  with pytest.raises(ValueError, match="write split.movable\\(module\\)"):
    split.hybrid(made, worlds.whole(), PEOPLE.examples)
  loose = fp.fedavg(moved(), worlds.LOCAL, placement={"crossing/cut": "cloud"})
  with pytest.raises(
    ValueError, match='placement=\\{"crossing/.\\*": "frozen"'
  ):
    split.hybrid(loose, moved(), PEOPLE.examples)
