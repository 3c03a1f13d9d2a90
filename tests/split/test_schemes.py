"""Schemes against plain loops that compute every client's steps in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_peft as fp
import split_worlds as worlds
import toy
from fedjax_peft import algorithm, links, peft, split
from fedjax_peft import settings as settings_lib

COHORT, PEOPLE, RATE = worlds.COHORT, worlds.PEOPLE, worlds.RATE
ROUNDS = (COHORT, (0, 2, 4, 8))  # of as many steps, in the same order
STEPS, NOBODY = 3, -1
STEPPED = fp.local(optax.sgd(RATE), batch=worlds.BATCH, steps=STEPS)
# A leaf moves by steps of order RATE whose float32 sums are of 7 terms.
LIMIT = 4 * float(jnp.finfo(jnp.float32).eps) * 20**0.5


def same_leaves(cut, whole):
  """Whether leaves of the cut model have the bits of those of the whole one."""
  found = {}
  for path, leaf in whole.items():
    names = path.split("/")
    place = next(i for i, name in enumerate(names) if name in worlds.STAGES)
    names.insert(place, "device" if names[place] == "a" else "server")
    found["/".join(names)] = leaf
  return toy.same_bits(dict(cut), found)


def test_with_wires_that_change_nothing_splitfed_is_fedavg_bit_for_bit():
  """With plain SGD in the first round and with momentum in the second."""
  state, outcome = worlds.fedavg_player().play(*ROUNDS)
  cut, cut_outcome = worlds.splitfed_player().play(*ROUNDS)
  assert same_leaves(cut.params, state.params)
  assert toy.same_bits(outcome, cut_outcome)
  assert worlds.distance(state.params, worlds.start()) > 0.01


def test_split_clients_run_scaffold_bit_for_bit():
  local = fp.local(optax.sgd(RATE), batch=worlds.BATCH)
  players = []
  for model in (worlds.whole(), worlds.plain()):
    made = fp.algorithms.scaffold(model, local, clients=len(PEOPLE))
    if model is worlds.plain():
      made = split.splitfed(made, model, PEOPLE.examples)
    players.append(toy.Player(made, PEOPLE, model.base))
  (whole, _), (cut, _) = (player.play(*ROUNDS) for player in players)
  assert same_leaves(cut.params, whole.params)
  one, two = (player.algorithm.bytes(4) for player in players)
  # Of the device's leaf both the change and the control variate cross, twice,
  # and of the servers' leaves neither.
  leaf = 4 * 5 * 7
  servers = 4 * (7 * 6 + 6 * 3)
  assert two["cloud/down_bytes"] == 2 * leaf
  for way in ("up", "down"):
    key = f"cloud/{way}_bytes"
    assert one[key] - two[key] == 2 * servers


def test_one_client_with_one_step_a_round_is_centralized_sgd():
  client = 2  # its three examples are one batch
  state, _ = worlds.splitfed_player().play([client], [client], [client])
  wanted = worlds.start()
  for number in range(3):
    (rows,) = worlds.batches(client, round=number)
    assert len(rows) == 3
    grads = worlds.slope(wanted, rows).kernels
    wanted = {k: v - RATE * grads[k] for k, v in wanted.items()}
  assert worlds.distance(state.params, wanted) < LIMIT


def one_lane():
  return toy.lanes(width=1, segment=2)


@functools.cache
def relay():
  made = split.in_turn(worlds.plain(), worlds.LOCAL, PEOPLE.examples)
  return toy.Player(made, PEOPLE, worlds.plain().base, one_lane())


def walked(kernels, clients, number, handed=True):
  """One model that goes from client to client, its momentum with it."""
  moving = {k: 0 * v for k, v in kernels.items()}
  for client in clients:
    if not handed:
      moving = {k: 0 * v for k, v in kernels.items()}
    for rows in worlds.batches(client, round=number):
      grads = worlds.slope(kernels, rows).kernels
      decay = worlds.momentum(number)
      moving = {k: grads[k] + decay * v for k, v in moving.items()}
      kernels = {k: v - RATE * moving[k] for k, v in kernels.items()}
  return kernels


def test_in_turn_clients_are_one_loop_in_the_order_of_the_cohort():
  wanted = worlds.start()
  for number, clients in enumerate(ROUNDS):
    state, outcome = relay().play(*ROUNDS[: number + 1])
    alone = walked(wanted, clients, number, handed=False)
    wanted = walked(wanted, clients, number)
    assert worlds.distance(state.params, wanted) < LIMIT
    lost = worlds.distance(state.params, alone)
    assert (lost > 1e-3) == (number > 0)  # SGD has no momentum to hand over
  assert outcome.record["train/clients"] == 4


def test_in_turn_the_order_of_the_cohort_matters():
  state, _ = relay().play(COHORT)
  back, _ = relay().play(COHORT[::-1])
  wanted = walked(worlds.start(), COHORT[::-1], 0)
  assert worlds.distance(back.params, wanted) < LIMIT
  assert worlds.distance(state.params, wanted) > 1e-3


def test_in_turn_a_run_goes_on_where_it_was_saved(tmp_path):
  once, _ = relay().play(*ROUNDS)
  state, _ = relay().play(ROUNDS[0])
  leaves, treedef = jax.tree.flatten(state)
  np.savez(tmp_path / "state.npz", *leaves)
  with np.load(tmp_path / "state.npz") as saved:
    leaves = [saved[name] for name in saved.files]
  again, _ = relay().play(ROUNDS[1], state=jax.tree.unflatten(treedef, leaves))
  assert toy.same_bits(once, again)


def test_in_turn_one_client_after_another_is_the_same_in_the_debugger(tol):
  made = relay().algorithm
  names = ("init", "handover", "step", "finish")  # each as one program
  job = made.work._replace(**{k: jax.jit(getattr(made.work, k)) for k in names})
  made = algorithm.extended(made, job=job)
  settings = toy.lanes("debug", width=1, segment=2)
  player = toy.Player(made, PEOPLE, worlds.plain().base, settings)
  few = COHORT[:2]
  state, outcome = player.play(few)
  wanted, record = relay().play(few)
  # Eager and compiled products of 7 terms, in two steps.
  limit = tol(jnp.float32, 2 * 7)
  for path, leaf in wanted.params.items():
    np.testing.assert_allclose(state.params[path], leaf, rtol=0, atol=limit)
  assert outcome.record["train/loss"] == pytest.approx(
    record.record["train/loss"], rel=limit
  )


def test_what_lives_on_a_device_is_not_handed_on():
  made = split.in_turn(
    worlds.plain(),
    fp.local(optax.sgd(RATE, momentum=0.9), batch=worlds.BATCH),
    PEOPLE.examples,
    placement={"device/.*": "device"},
  )
  job = made.work
  sent = fp.work.Sent(dict(worlds.plain().params), {"round": jnp.int32(0)})
  rows = {k: v for k, v in sent.params.items() if k.startswith("device/")}
  fresh = job.init(sent, {}, rows, toy.client())
  before = jax.tree.map(lambda x: x + 1, fresh)
  after = job.handover(fresh, before)
  for path in sent.params:
    came = fresh if path.startswith("device/") else before
    np.testing.assert_array_equal(after.params[path], came.params[path])
    assert toy.same_bits(after.opt[0].trace[path], came.opt[0].trace[path])
  first = job.handover(fresh, jax.tree.map(jnp.zeros_like, fresh))
  assert toy.same_bits(first, fresh)


ADAM = {"b1": 0.9, "b2": 0.99, "eps": 1e-2}  # smooth, where gradients vanish


class Adam:
  """Adam with bias correction, of some leaves, in float64."""

  def __init__(self):
    self.m, self.v, self.count = {}, {}, 0

  def step(self, kernels, grads):
    self.count += 1
    new = {}
    for k, g in grads.items():
      self.m[k] = 0.9 * self.m.get(k, 0) + 0.1 * g
      self.v[k] = 0.99 * self.v.get(k, 0) + 0.01 * g * g
      m = self.m[k] / (1 - 0.9**self.count)
      v = self.v[k] / (1 - 0.99**self.count)
      new[k] = kernels[k] - 0.01 * m / (np.sqrt(v) + 1e-2)
    return new


def shared_server(kernels, clients, *, fresh_server=False, old_device=False):
  """Every client its own first stage, all one server and its Adam."""
  server, reports = Adam(), []
  device = Adam()
  here = dict(kernels)
  for client in clients:
    here = here | {"a": kernels["a"]}
    server = Adam() if fresh_server else server
    device = device if old_device else Adam()
    for rows in worlds.batches(client):
      grads = worlds.slope(here, rows).kernels
      mine = {"a": grads.pop("a")}
      here = {**server.step(here, grads), **device.step(here, mine)}
    reports.append(here)
  wanted = worlds.mean(reports, clients)
  return here | {"a": wanted["a"]}


@pytest.mark.usefixtures("standard_promotion")
def test_a_shared_server_goes_on_while_the_devices_are_averaged():
  local = fp.local(optax.adam(0.01, **ADAM), batch=worlds.BATCH)
  made = split.in_turn(worlds.plain(), local, PEOPLE.examples, shared="server")
  player = toy.Player(made, PEOPLE, worlds.plain().base, one_lane())
  state, _ = player.play(COHORT)
  start = worlds.start()
  wanted = shared_server(start, COHORT)
  # A root, and quotients of values that are far from zero.
  assert worlds.distance(state.params, wanted) < 10 * LIMIT
  for wrong in ({"fresh_server": True}, {"old_device": True}):
    other = shared_server(start, COHORT, **wrong)
    assert worlds.distance(state.params, other) > 1e-3


def lockstep(common=False):
  model = worlds.cut(split.Wire(common=common))
  made = split.lockstep(model, STEPPED, PEOPLE.examples)
  settings = toy.lanes(width=4, segment=4)
  return toy.Player(made, PEOPLE, model.base, settings)


@functools.cache
def together():
  return lockstep()


def stepped(kernels, clients, number=0, common=False):
  """All step side by side; the server along the mean of their gradients."""
  devices = dict.fromkeys(clients, kernels["a"])
  server = {k: kernels[k] for k in ("b", "head")}
  plans = {c: worlds.batches(c, STEPPED, number) for c in clients}
  for step in range(STEPS):
    rows = {c: plans[c][step] for c in clients}
    total = sum(map(len, rows.values()))
    share = {c: len(rows[c]) / total for c in clients}
    models = {c: {"a": devices[c], **server} for c in clients}
    slopes = {c: worlds.slope(models[c], rows[c]) for c in clients}
    if common:
      back = np.zeros((worlds.BATCH, worlds.WIDTHS[1]))
      for c in clients:
        back[: len(rows[c])] += share[c] * slopes[c].crossing
      for c in clients:
        here = back[: len(rows[c])]
        slopes[c] = worlds.slope(models[c], rows[c], here)
    for k in server:
      mean = sum(share[c] * slopes[c].kernels[k] for c in clients)
      server[k] = server[k] - RATE * mean
    for c in clients:
      devices[c] = devices[c] - RATE * slopes[c].kernels["a"]
  reports = [{"a": devices[c], **server} for c in clients]
  return worlds.mean(reports, clients)


def test_in_lockstep_the_server_takes_the_mean_of_batches_of_any_fill():
  fills = {len(rows) for c in COHORT for rows in worlds.batches(c, STEPPED)}
  assert fills == {2, 3, 4}
  state, outcome = together().play(COHORT)
  assert worlds.distance(state.params, stepped(worlds.start(), COHORT)) < LIMIT
  assert outcome.record["train/clients"] == 4


def test_lanes_without_a_client_change_nothing_in_lockstep():
  few = COHORT[:3]
  state, _ = together().play((*few, NOBODY))
  assert worlds.distance(state.params, stepped(worlds.start(), few)) < LIMIT


def test_with_one_gradient_every_device_goes_along_the_weighted_sum():
  """Row by row; rows that a client does not have get nothing."""
  player = lockstep(common=True)
  for clients in (COHORT, COHORT[:3]):
    state, _ = player.play((*clients, NOBODY)[:4])
    wanted = stepped(worlds.start(), clients, common=True)
    assert worlds.distance(state.params, wanted) < LIMIT
    own = stepped(worlds.start(), clients)
    assert np.abs(own["a"] - wanted["a"]).max() > 1e-3


def test_clients_with_different_numbers_of_steps_are_not_in_lockstep():
  with pytest.raises(ValueError, match="write local\\(..., steps=4\\)"):
    split.lockstep(worlds.plain(), worlds.LOCAL, PEOPLE.examples)


def test_one_gradient_is_for_lockstep_and_for_one_cut():
  model = worlds.cut(split.Wire(common=True))
  with pytest.raises(ValueError, match="use split.lockstep"):
    worlds.splitfed(model)
  with pytest.raises(ValueError, match="use split.lockstep"):
    split.in_turn(model, worlds.LOCAL, PEOPLE.examples)
  ends = {"device": 1, "edge": 2, "server": None}
  model = worlds.cut(split.Wire(common=True), ends)
  with pytest.raises(
    ValueError, match="device, edge, server; cut the model in"
  ):
    split.lockstep(model, STEPPED, PEOPLE.examples)


def test_lanes_are_one_or_all_where_a_scheme_says_so():
  def choose(player, **more):
    return settings_lib.choose(
      player.algorithm, {}, dict(PEOPLE.examples), 6, **more
    )

  for player, width in ((relay(), 1), (together(), 6)):
    chosen = choose(player)
    assert (chosen.devices, chosen.blocks, chosen.width) == (1, 1, width)
    assert chosen.segment >= width
    assert choose(player, width=width) == chosen
    for wrong in ({"width": 2}, {"blocks": 2}):
      with pytest.raises(ValueError, match=f"blocks=1 width={width}, or leave"):
        choose(player, **wrong)
  settings = toy.lanes("debug", width=4, segment=4)
  player = toy.Player(together().algorithm, PEOPLE, {}, settings)
  with pytest.raises(ValueError, match="hear of each other in every step"):
    player.play(COHORT)


SILENT = split.Wire(down=None)


def one_message(job, sent, batch):
  """What a client reports after one step."""

  @jax.jit
  def run(sent, batch):
    carry = job.init(sent, {}, {}, toy.client())
    carry, _ = job.step(carry, sent, {}, batch)
    return job.finish(carry, sent)[0]

  return run(sent, batch)


def one_batch(job):
  """What client 8 is sent, and its first batch."""
  sent = fp.work.Sent(dict(job.params), {"round": jnp.int32(0)})
  rows = PEOPLE.train[8][: worlds.BATCH]
  given = {k: jnp.asarray(v[rows]) for k, v in PEOPLE.examples.items()}
  batch = fp.work.Batch(given, jnp.ones(worlds.BATCH), jax.random.key(0))
  return sent, batch


def test_a_device_that_hears_nothing_keeps_its_leaves_and_no_byte_comes_back():
  local, frozen = fp.local(optax.sgd(RATE), batch=4), {"device/.*": "frozen"}
  messages = []
  for wire in (split.Wire(), SILENT):
    model = worlds.cut(wire)
    made = fp.fedavg(model, local, placement=frozen)
    job = split.splitfed(made, model, PEOPLE.examples).work
    sent, batch = one_batch(job)
    messages.append(one_message(job, sent, batch))
    up, down = job.split.bytes(4, {})
    assert up == 4 * 4 * 7 + 4 * 4
    assert down == (0 if wire.down is None else 4 * 4 * 7)
    assert job.split.waits == (wire.down is not None)
  assert set(messages[0]) == {"server/b/lin/kernel", "server/head/kernel"}
  assert toy.same_bits(*messages)
  assert all(np.abs(x).max() > 0 for x in messages[0].values())


def test_adapters_at_the_server_need_no_way_back_and_send_nothing_home():
  pipe = peft.lora(worlds.cut(SILENT).origin, 2, "server/.*")
  model = worlds.model(pipe)
  made = split.splitfed(fp.fedavg(model, worlds.LOCAL), model, PEOPLE.examples)
  assert made.work.split.bytes(4, {}) == (4 * 4 * 7 + 4 * 4, 0)
  sizes = made.bytes(4)
  assert sizes["cloud/down_bytes"] == 0
  assert sizes["cloud/up_bytes"] == 4  # how many examples it has


def test_a_part_that_would_never_learn_is_refused():
  ends = {"device": 1, "edge": 2, "server": None}
  for wires, part in (
    ([SILENT, SILENT], "device"),
    ([split.Wire(), SILENT], "device"),
  ):
    model = worlds.cut(wires, ends)
    with pytest.raises(
      ValueError, match=f"comes back to '{part}', so '{part}/"
    ):
      worlds.splitfed(model)
  model = worlds.cut([split.Wire(), SILENT], ends)
  made = fp.fedavg(model, worlds.LOCAL, placement={"device/.*": "frozen"})
  with pytest.raises(ValueError, match="to 'edge', so 'edge/b"):
    split.splitfed(made, model, PEOPLE.examples)
  for scheme in (split.in_turn, split.lockstep):
    local = STEPPED if scheme is split.lockstep else worlds.LOCAL
    with pytest.raises(ValueError, match="would never learn; freeze it"):
      scheme(worlds.cut(SILENT), local, PEOPLE.examples)
  with pytest.raises(ValueError, match="needs a model that is cut: got a Mod"):
    worlds.splitfed(worlds.whole())


def by_hand(kernels, head, rows):
  """Loss of the device's own linear head, gradients by stage a and the head."""
  x = np.asarray(PEOPLE.examples["x"][rows], np.float64)
  label = PEOPLE.examples["label"][rows]
  first = np.maximum(x @ kernels["a"], 0)
  logits = first @ head["kernel"] + head["bias"]
  likely = np.exp(logits - logits.max(1, keepdims=True))
  likely /= likely.sum(1, keepdims=True)
  by_logits = (likely - np.eye(3)[label]) / len(rows)
  back = by_logits @ head["kernel"].T * (first > 0)
  return x.T @ back, first.T @ by_logits, by_logits.sum(0)


def test_with_a_local_loss_each_end_learns_from_its_own_loss_alone():
  pipe = split.with_head(worlds.cut(SILENT).origin, 7, 3)
  model = worlds.model(pipe, split.local_loss(fp.losses.classification))
  rows = PEOPLE.train[8][: worlds.BATCH]
  given = {k: jnp.asarray(v[rows]) for k, v in PEOPLE.examples.items()}

  def loss(params):
    each, metrics, _ = model.loss(params, {}, given, jax.random.key(0))
    return each.mean(), metrics

  grads, metrics = jax.jit(jax.grad(loss, has_aux=True))(model.params)
  kernels = worlds.stages_of(model.params)
  server = worlds.slope(kernels, rows).kernels
  head = {
    k: np.asarray(model.params[f"device_head/{k}"], np.float64)
    for k in ("kernel", "bias")
  }
  a, kernel, bias = by_hand(kernels, head, rows)
  wanted = {
    "device/a/lin/kernel": a,
    "device_head/kernel": kernel,
    "device_head/bias": bias,
    "server/b/lin/kernel": server["b"],
    "server/head/kernel": server["head"],
  }
  assert set(grads) == set(wanted)
  for path, gradient in wanted.items():
    np.testing.assert_allclose(grads[path], gradient, rtol=0, atol=LIMIT)
  assert np.abs(server["a"] - a).max() > 0.01
  assert set(metrics) == {"accuracy", "device_accuracy"}
  made = split.splitfed(fp.fedavg(model, worlds.LOCAL), model, PEOPLE.examples)
  up, down = made.work.split.bytes(4, {})
  assert (up, down) == (4 * 4 * 7 + 4 * 4, 0)
  assert not made.work.split.waits
  leaves = 4 * (5 * 7 + 7 * 3 + 3)
  assert made.bytes(4)["cloud/down_bytes"] == leaves


def test_a_device_that_waits_for_a_gradient_has_no_head_of_its_own():
  with pytest.raises(ValueError, match="write Wire\\(up, down=None\\)"):
    split.with_head(worlds.plain().origin, 7, 3)


def test_rounded_activations_train_as_well_as_whole_ones():
  """Over ten rounds, at eight bits; the data are noise that has to be learned.

  The loss falls by more than ten times what rounding changes in it.
  """
  eight = links.affine(8, stochastic=False)
  model = worlds.cut(split.Wire(eight, eight))
  player = toy.Player(worlds.splitfed(model), PEOPLE, model.base)
  losses = []
  for one in (worlds.splitfed_player(), player):
    state, kept = None, []
    for _ in range(10):
      state, outcome = one.play(COHORT, state=state)
      kept.append(float(outcome.record["train/loss"]))
    losses.append(kept)
  exact, rounded = losses
  assert exact[-1] < 0.9 * exact[0]
  assert exact != rounded
  gap = np.abs(np.subtract(exact, rounded)).max()
  assert gap < 0.1 * (exact[0] - exact[-1])
