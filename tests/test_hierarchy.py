"""Tiers: edges between the clients and the cloud."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_peft as fp
import toy

DATA = toy.people(seed=2)
COHORT = (0, 1, 3, 4, 6, 9)  # even clients talk to edge 0, odd to edge 1


def voices(**placement):
  return toy.voices()._replace(placement=placement)


def tiers(period=1, edges=2, **options):
  return [
    fp.tier("edge", edges, **options),
    fp.tier("cloud", period=period, **options),
  ]


def said(cohort, edge, number):
  """Weighted mean of what an edge's clients said in a round."""
  here = {c: toy.voice(DATA, c, round=number) for c in cohort if c % 2 == edge}
  return toy.mean(here, DATA)


def test_two_tiers_that_always_talk_are_one(tol):
  how = fp.local(optax.sgd(0.2), batch=4)
  job = fp.train(toy.net(), how, tiers=("edge", "cloud"))
  two = fp.federated(job, tiers())
  one = fp.fedavg(toy.net(), how, lowrank=False)
  base = toy.net().base
  flat, _ = toy.Player(one, DATA, base).play(COHORT, COHORT)
  high, outcome = toy.Player(two, DATA, base).play(COHORT, COHORT)
  eps = tol(jnp.float32, 7 * 8)
  for k, x in flat.params.items():
    np.testing.assert_allclose(high.params[k], x, rtol=eps, atol=eps)
  assert outcome.record["cloud/synced"] == 1


@pytest.fixture(scope="module")
def rounds():
  """Two rounds; the cloud hears after the second. `sum` stays at the edge."""
  job = voices(noise="cloud", sum="edge")
  player = toy.Player(fp.federated(job, tiers(period=2)), DATA)
  first, before = player.play(COHORT)
  second, after = player.play(COHORT, state=first)
  return player, (first, before), (second, after)


def test_the_cloud_moves_only_when_it_hears(rounds):
  _, (first, before), (second, after) = rounds
  assert before.record["cloud/synced"] == 0
  assert after.record["cloud/synced"] == 1
  assert np.all(first.params["noise"] == 0)
  assert np.any(second.params["noise"] != 0)


def test_edges_differ_until_they_hear_from_the_cloud(rounds, tol):
  _, (first, _), (second, _) = rounds
  eps = tol(jnp.float32, 30)
  for edge in (0, 1):
    found = first.nodes[0].params["noise"][edge]
    wanted = -said(COHORT, edge, 0)["noise"]
    np.testing.assert_allclose(found, wanted, rtol=eps, atol=eps)
  one, two = second.nodes[0].params["noise"]
  assert one.tobytes() == two.tobytes() == second.params["noise"].tobytes()


def test_the_cloud_averages_how_far_edges_went_by_their_examples(rounds, tol):
  _, _, (second, _) = rounds
  weight = [
    2 * sum(DATA.train.sizes[c] for c in COHORT if c % 2 == e) for e in (0, 1)
  ]
  went = [
    -said(COHORT, e, 0)["noise"] - said(COHORT, e, 1)["noise"] for e in (0, 1)
  ]
  wanted = (weight[0] * went[0] + weight[1] * went[1]) / sum(weight)
  eps = tol(jnp.float32, 60)
  np.testing.assert_allclose(second.params["noise"], wanted, rtol=eps, atol=eps)


def test_a_leaf_placed_at_the_edge_never_reaches_the_cloud(rounds, tol):
  player, _, (second, _) = rounds
  assert set(second.params) == {"noise"}
  assert set(second.nodes[0].params) == {"noise", "sum"}
  assert set(second.nodes[0].anchor) == {"noise"}
  sizes = player.algorithm.bytes(6)
  assert sizes == {
    "edge/up_bytes": (6 + 5) * 4 + 4,
    "edge/down_bytes": (6 + 5) * 4,
    "cloud/up_bytes": 6 * 4 + 4,
    "cloud/down_bytes": 6 * 4,
  }
  eps = tol(jnp.float32, 60)
  for edge in (0, 1):
    wanted = -said(COHORT, edge, 0)["sum"] - said(COHORT, edge, 1)["sum"]
    found = second.nodes[0].params["sum"][edge]
    np.testing.assert_allclose(found, wanted, rtol=eps, atol=eps)


def test_an_edge_that_hears_nobody_keeps_its_own_and_weighs_nothing(
  rounds, tol
):
  player, (_first, _), _ = rounds
  alone = (0, 4, 6, 8, 2)  # all of edge 0
  state, _ = player.play(alone, alone)
  wanted = -said(alone, 0, 0)["noise"] - said(alone, 0, 1)["noise"]
  eps = tol(jnp.float32, 60)
  np.testing.assert_allclose(state.params["noise"], wanted, rtol=eps, atol=eps)
  assert np.all(state.nodes[0].params["sum"][1] == 0)
  assert state.nodes[0].params["noise"][1].tobytes() == (
    state.params["noise"].tobytes()
  )


def test_clients_of_an_edge_start_from_its_model():
  # `sent` is told apart by what it makes of the message.
  job = voices(noise="edge", sum="cloud")

  def finish(carry, sent):
    return carry | {"noise": carry["noise"] - sent.params["noise"]}, {}

  player = toy.Player(
    fp.federated(job._replace(finish=finish), tiers(period=2)), DATA
  )
  state, _ = player.play(COHORT, COHORT)
  for edge in (0, 1):
    # p1 = -m0; p2 = p1 - (m1 - p1) = -2 m0 - m1
    wanted = (
      -2 * said(COHORT, edge, 0)["noise"] - said(COHORT, edge, 1)["noise"]
    )
    np.testing.assert_allclose(
      state.nodes[0].params["noise"][edge], wanted, rtol=1e-5, atol=1e-5
    )


def test_integers_cross_every_boundary_to_the_same_bits():
  up = fp.chain(fp.clip(1.0), fp.weigh(max_weight=64), fp.fixed_point())
  job = voices(noise="cloud", sum="cloud")
  algorithm = fp.federated(job, tiers(link=up))
  player = toy.Player(algorithm, DATA)
  one, _ = player.play(COHORT, COHORT[::-1])
  two, _ = player.play(COHORT[::-1], COHORT)
  assert toy.same_bits(one.params, two.params)
  assert np.any(one.params["noise"] != 0)


# Refusals.


@pytest.mark.parametrize(
  ("build", "words"),
  [
    (list, "last tier must have one node"),
    (lambda: [fp.tier("cloud", 2)], r"last tier must have one node: .* 2\)"),
    (lambda: [fp.tier("a"), fp.tier("a")], "different names"),
    (lambda: [fp.tier("cloud", period=2)], "clients report every round"),
    (
      lambda: [fp.tier("edge", 3), fp.tier("mid", 2), fp.tier("cloud")],
      "'edge' must be a multiple of that of 'mid': got 3 and 2",
    ),
    (lambda: [fp.tier("clowd")], "did you mean 'clowd'"),
  ],
)
def test_tiers_that_do_not_fit_are_refused(build, words):
  with pytest.raises(ValueError, match=words):
    fp.federated(toy.voices(), build())


@pytest.mark.parametrize("name", ["device", "frozen"])
def test_a_tier_cannot_have_the_name_of_a_placement(name):
  with pytest.raises(ValueError, match="that is a placement"):
    fp.tier(name)


@pytest.mark.parametrize(
  "options", [{"size": 0}, {"period": 0}, {"size": 1.5}, {"period": True}]
)
def test_a_count_below_one_is_refused(options):
  with pytest.raises(ValueError, match="must be an integer of at least 1"):
    fp.tier("cloud", **options)


def test_a_downlink_that_needs_a_sum_is_refused():
  with pytest.raises(ValueError, match="one sender to many receivers"):
    fp.tier("cloud", down=fp.weigh())
