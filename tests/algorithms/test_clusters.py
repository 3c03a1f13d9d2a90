"""Clusters: laws on bowls, planted kinds of clients on linear models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bowls
import fedjax_peft as fp
import toy
from fedjax_peft import link, links, preference, tree
from fedjax_peft.algorithms import clusters as clustered
from fedjax_peft.network import clustering, structure

GROUPS = np.array([0, 1, 1, 0])  # of the four bowls


def settled(player, state, table, cohort, number=1):
  """Rounds in which client i talks to node table[i]."""
  outcome = None
  for _ in range(number):
    seated = player.seat(cohort, 0, int(state.round))
    at = np.maximum(seated.clients, 0)
    nodes = np.where(seated.clients >= 0, np.asarray(table)[at], 0)
    seated = seated._replace(nodes=nodes.astype(np.int32))
    state, outcome = player.step.run(
      state, player.base, seated, jax.random.key(0)
    )
    state = jax.device_get(state)
  return state, outcome


@functools.cache
def made(shared=None, clusters=2, rate=None):
  server = None if rate is None else optax.sgd(rate, momentum=0.5)
  algorithm = clustered.clustered(
    bowls.model(),
    bowls.how(),
    clusters=clusters,
    shared=shared,
    server=server,
  )
  return bowls.player(algorithm)


def low(state, names=("body", "head")):
  """Leaves of the clusters, float64 [E, ...]."""
  parts = [np.asarray(state.nodes[0].params[k], np.float64) for k in names]
  return np.concatenate(parts, axis=-1)


def test_clusters_are_federations_of_their_own(tol):
  state, _ = settled(made(), made().start(), GROUPS, bowls.EVERYONE, 2)
  assert state.params == {}
  alone = fp.fedavg(bowls.model(), bowls.how(), lowrank=False)
  eps = tol(jnp.float32, 4 * bowls.STEPS)
  for cluster in (0, 1):
    members = np.flatnonzero(np.equal(GROUPS, cluster))
    wanted = bowls.play(alone, members, members).params
    np.testing.assert_allclose(
      low(state)[cluster], bowls.flat(wanted), rtol=eps, atol=eps
    )


def test_shared_leaves_are_averaged_over_all_and_others_over_clusters(tol):
  start = made("head").start()
  state, outcome = settled(made("head"), start, GROUPS, bowls.EVERYONE)
  went = bowls.alone(bowls.start())  # [4, 5]
  eps = tol(jnp.float32, 4 * bowls.STEPS)
  everyone = bowls.weights() @ went
  np.testing.assert_allclose(state.params["head"], everyone[3:], rtol=eps)
  assert set(state.params) == {"head"}
  assert outcome.record["cloud/synced"] == 1
  for cluster in (0, 1):
    members = np.flatnonzero(np.equal(GROUPS, cluster))
    wanted = bowls.weights(members) @ went
    found = low(state)[cluster]
    np.testing.assert_allclose(found[:3], wanted[:3], rtol=eps, atol=eps)
    np.testing.assert_allclose(found[3:], everyone[3:], rtol=eps, atol=eps)


def test_one_cluster_with_a_server_is_federated_averaging_with_it(tol):
  one = made("head", clusters=1, rate=0.5)
  state, _ = settled(one, one.start(), np.zeros(4, int), bowls.EVERYONE, 3)
  flat = fp.fedavg(
    bowls.model(),
    bowls.how(),
    lowrank=False,
    server=optax.sgd(0.5, momentum=0.5),
  )
  wanted = bowls.play(flat, *[bowls.EVERYONE] * 3).params
  eps = tol(jnp.float32, 4 * bowls.STEPS)
  found = low(state)[0]
  np.testing.assert_allclose(found, bowls.flat(wanted), rtol=eps, atol=eps)


def test_a_cluster_that_splits_hands_on_its_model_and_its_memory():
  play = made("head", rate=0.5)
  state, _ = settled(play, play.start(), GROUPS, bowls.EVERYONE)
  after = clustered.regroup(state, [0, 0])
  for x, y in zip(
    jax.tree.leaves(state.nodes[0]),
    jax.tree.leaves(after.nodes[0]),
    strict=True,
  ):
    np.testing.assert_array_equal(np.asarray(y), np.asarray(x)[[0, 0]])
  assert np.any(low(state)[0] != low(state)[1])
  assert toy.same_bits(state.nodes[1], after.nodes[1])
  with pytest.raises(ValueError, match=r"write clusters=3 for more"):
    clustered.regroup(state, [0, 1, 1])


def try_all(shared=None, downlink=None, clusters=3, **options):
  return clustered.ifca(
    bowls.model(),
    bowls.how(),
    clusters=clusters,
    spread=0.5,
    shared=shared,
    downlink=downlink,
    **options,
  )


def test_clusters_start_apart_around_the_model_and_agree_on_what_they_share():
  play = bowls.player(try_all("head", clusters=200))
  state = play.start()
  body = low(state, ["body"])
  assert len(np.unique(body, axis=0)) == 200
  noise = (body - bowls.start()[:3]).ravel()
  # Standard errors of mean and deviation over 600 draws; p-values 6e-5.
  assert abs(noise.mean()) < 4 * 0.5 / np.sqrt(600)
  assert abs(noise.std() - 0.5) < 4 * 0.5 / np.sqrt(1200)
  assert abs(noise.std() - 0.6) > 4 * 0.5 / np.sqrt(1200)
  head = np.asarray(state.nodes[0].params["head"])
  assert np.all(head == np.asarray(state.params["head"]))
  fewer = bowls.player(try_all("head", clusters=2)).start()
  np.testing.assert_array_equal(low(fewer, ["body"]), body[:2])
  other = bowls.player(try_all("head", clusters=2, seed=1)).start()
  assert np.all(low(other, ["body"]) != body[:2])


@pytest.mark.parametrize("shared", [None, "head"])
@pytest.mark.parametrize("quantized", [False, True])
def test_every_client_is_sent_the_own_leaves_of_every_cluster(
  shared, quantized
):
  downlink = links.int8(block=128) if quantized else None
  algorithm = try_all(shared, downlink)
  plain = clustered.clustered(
    bowls.model(), bowls.how(), clusters=3, shared=shared, downlink=downlink
  )
  state = algorithm.init(clients=4, cohort=4)
  down = algorithm.tiers[0].down

  def wire(leaves):
    mine, here = down.init(link.Spec(tree.spec(leaves)))
    return down.send(leaves, mine, here, link.alone())[0]

  total = 0
  for cluster in range(3):
    leaves = {k: v[cluster] for k, v in state.nodes[0].params.items()}
    if cluster and shared:
      del leaves[shared]
    total += tree.nbytes(wire(leaves))
  sizes, others = algorithm.bytes(4), plain.bytes(4)
  assert sizes["cluster/down_bytes"] == total
  assert sizes["cluster/up_bytes"] == others["cluster/up_bytes"]
  assert (
    sizes["cluster/down_bytes"] > 2 * others["cluster/down_bytes"] or shared
  )


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: try_all(".*"), "share fewer"),
    (lambda: try_all("haed"), "did you mean 'head'"),
    (lambda: try_all(clusters=0), "clusters must be an integer"),
    (
      lambda: clustered.ifca(
        bowls.model(), bowls.how(), clusters=2, spread=0.0
      ),
      "spread must be a positive number",
    ),
    (
      lambda: preference.choose(
        try_all(placement={"head": "device"}),
        bowls.model(),
        bowls.people(),
        toy.lanes(),
      ),
      "'head', which lives on the device; place it at 'cluster'",
    ),
  ],
)
def test_what_does_not_fit_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_clients_choose_the_model_of_least_loss_on_their_own_examples(tol):
  algorithm, data = try_all("head"), bowls.people()
  choose = preference.choose(algorithm, bowls.model(), data, toy.lanes())
  state = algorithm.init(clients=4, cohort=4)
  ids = [3, 0, 2]
  nodes, losses = choose(state, ids)
  models = low(state)
  wanted = np.stack([bowls.losses(x)[ids] for x in models])
  np.testing.assert_allclose(losses, wanted, rtol=tol(jnp.float32, 5 * 5))
  assert nodes.dtype == np.int32
  np.testing.assert_array_equal(nodes, wanted.argmin(axis=0))
  alike = bowls.player(made().algorithm).start()
  same = preference.choose(made().algorithm, bowls.model(), data, toy.lanes())
  assert same(alike, ids)[0].tolist() == [0, 0, 0]


def test_one_program_scores_all_models_of_all_rounds():
  traced = []

  def loss(*args):
    traced.append(args)
    return bowls.model().loss(*args)

  model = bowls.model()._replace(loss=loss)
  algorithm = try_all(clusters=5)
  choose = preference.choose(algorithm, model, bowls.people(), toy.lanes())
  state = algorithm.init(clients=4, cohort=4)
  choose(state, [0, 1, 2, 3])
  first = len(traced)
  assert first > 0
  moved = jax.tree.map(lambda x: x + 1, state.nodes[0].params)
  low = state.nodes[0]._replace(params=moved)
  choose(state._replace(nodes=(low, *state.nodes[1:])), [3, 2, 1, 0])
  assert len(traced) == first


class Line(nnx.Module):
  """A linear map of six features."""

  def __init__(self):
    self.slope = nnx.Param(jnp.zeros((6,)))


def squares(module, examples, key):
  del key
  error = jnp.matmul(examples["x"], module.slope[...]) - examples["y"]
  return error**2, {}


@functools.cache
def line():
  return fp.model(Line(), squares, precision="float32")


HOW = fp.local(optax.sgd(0.05), batch=8, epochs=2)
CLIENTS, EXAMPLES = 12, 16


@functools.cache
def world(kinds, seed=0):
  """(population, kind of every client); kinds differ by a rotation."""
  rng = np.random.default_rng([kinds, seed])
  labels = rng.permutation(np.arange(CLIENTS) % kinds)
  turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
  slopes = {1: turn[:1], 2: np.stack([turn[0], -turn[0]]), 3: turn[:3]}[kinds]
  x = rng.normal(size=(CLIENTS, EXAMPLES, 6))
  y = np.einsum("ced,cd->ce", x, 2 * slopes[labels])
  y += 0.3 * rng.normal(size=y.shape)
  owner = np.repeat(np.arange(CLIENTS), EXAMPLES)
  data = fp.data.population(
    {"x": x.reshape(-1, 6), "y": y.reshape(-1)}, owner, heldout=0.25
  )
  return data, labels


def heldout(data, slopes):
  """Mean held-out loss of every client, [N], each with its slope [N, 6]."""
  x, y = (np.asarray(data.examples[k], np.float64) for k in ("x", "y"))
  return np.array(
    [np.mean((x[r] @ s - y[r]) ** 2) for r, s in zip(data.heldout, slopes)]
  )


def everyone(data):
  return np.arange(len(data))


@functools.cache
def together(kinds, number=8):
  """Held-out losses [N] of one model for all."""
  data, _ = world(kinds)
  flat = fp.fedavg(line(), HOW, lowrank=False)
  play = toy.Player(flat, data, line().base, toy.lanes(width=4))
  state, _ = play.play(*[everyone(data)] * number)
  return heldout(data, np.broadcast_to(state.params["slope"], (CLIENTS, 6)))


def apart(algorithm, kinds, table=None, number=8):
  """(held-out losses [N], table): clusters given, or chosen every round."""
  data, _ = world(kinds)
  settings = toy.lanes(width=4)
  play = toy.Player(algorithm, data, line().base, settings)
  choose = preference.choose(algorithm, line(), data, settings)
  state, given = play.start(), table
  for _ in range(number):
    table = choose(state, everyone(data))[0] if given is None else given
    state, _ = settled(play, state, table, everyone(data))
  return heldout(data, np.asarray(state.nodes[0].params["slope"])[table]), table


def found_in_updates(kinds):
  """The clusters that updates from the common start show."""
  data, _ = world(kinds)
  job = fp.train(line(), HOW)
  updates, _ = fp.for_each_client(job, data, params=line().params, base={})
  sketch = clustering.sketch(updates, size=64)
  return structure.choose(sketch, most=5, metric="cosine").labels


@pytest.mark.parametrize("kinds", [2, 3])
def test_planted_kinds_are_found_in_updates_and_models_of_their_own_are_better(
  kinds,
):
  labels = world(kinds)[1]
  table = found_in_updates(kinds)
  assert structure.adjusted_rand_index(table, labels) > 0.9
  algorithm = clustered.clustered(line(), HOW, clusters=kinds)
  losses, _ = apart(algorithm, kinds, table)
  assert losses.mean() < together(kinds).mean() / 4
  assert np.median(losses / together(kinds)) < 0.1


# Opposite kinds part from any start; of three, two may stay with one model.
@pytest.mark.parametrize(("kinds", "seed"), [(2, 0), (2, 1), (2, 2), (3, 3)])
def test_planted_kinds_are_found_by_trying_models(kinds, seed):
  labels = world(kinds)[1]
  tried = clustered.ifca(line(), HOW, clusters=kinds, spread=0.1, seed=seed)
  losses, table = apart(tried, kinds)
  assert structure.adjusted_rand_index(table, labels) > 0.9
  assert losses.mean() < together(kinds).mean() / 4


def test_clients_who_are_alike_lose_nothing(tol):
  table = found_in_updates(1)
  assert not table.any()
  losses, _ = apart(clustered.clustered(line(), HOW, clusters=2), 1, table)
  eps = 8 * tol(jnp.float32, CLIENTS * EXAMPLES)
  np.testing.assert_allclose(losses, together(1), rtol=eps)
  tried = clustered.ifca(line(), HOW, clusters=2, spread=0.1)
  worse = apart(tried, 1)[0] - together(1)
  error = worse.std(ddof=1) / np.sqrt(CLIENTS)
  assert worse.mean() < 3 * error + 0.05 * together(1).mean()
