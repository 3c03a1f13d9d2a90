"""Laws of gossip: the mean stays, neighbours agree, the absent keep theirs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bowls
import fedjax_peft as fp
from fedjax_peft import tree
from fedjax_peft.algorithms import peers as gossip
from fedjax_peft.network import topology

N = 6
EVERYONE = tuple(range(N))
DATA = bowls.people((3,) * N, (0, 1, 2, 3, 0, 1))
GRAPHS = {
  "ring": topology.ring(N),
  "star": topology.star(N),
  "torus": topology.torus(N),
}
STILL = bowls.how(optimizer=optax.sgd(0.0), steps=1)


@functools.cache
def player(graph="ring", still=True):
  how = STILL if still else bowls.how()
  mixing = topology.metropolis(GRAPHS.get(graph, topology.complete(N)))
  made = gossip.gossip(bowls.model(), how, mixing=mixing)
  return bowls.player(made, DATA)


def scattered(start, direction=None, seed=0):
  """The state with rows of its own for everyone, along a direction [N]."""
  rng = np.random.default_rng(seed)

  def one(x):
    if direction is None:
      return rng.normal(size=x.shape).astype(np.float32)
    along = rng.normal(size=x.shape[1:])
    return np.multiply.outer(direction, along).astype(np.float32)

  rows = {k: one(v) for k, v in start.clients.local.items()}
  return start._replace(clients=start.clients._replace(local=rows))


def rows(state):
  return bowls.flat(state.clients.local)  # [N, 5]


@pytest.mark.parametrize("graph", sorted(GRAPHS))
@pytest.mark.parametrize("cohort", [EVERYONE, (0, 1, 2, 4)])
def test_the_mean_of_all_stays_and_the_present_come_nearer(graph, cohort, tol):
  state = scattered(player(graph).start())
  after, outcome = player(graph).play(cohort, state=state)
  eps = tol(jnp.float32, N)
  np.testing.assert_allclose(
    rows(after).mean(0), rows(state).mean(0), rtol=eps, atol=eps
  )
  record = outcome.record
  assert record["consensus/distance"] < record["consensus/distance_before"]


@pytest.mark.parametrize("graph", sorted(GRAPHS))
def test_the_second_eigenvector_shrinks_by_its_eigenvalue(graph, tol):
  mixing = topology.metropolis(GRAPHS[graph])
  values, vectors = np.linalg.eigh(mixing - 1 / N)
  second = np.argmax(np.abs(values))
  state = scattered(player(graph).start(), vectors[:, second])
  squares = []
  for _ in range(3):
    state, outcome = player(graph).play(EVERYONE, state=state)
    squares.append(outcome.record["consensus/distance"] ** 2)
  factor = topology.second_eigenvalue(mixing) ** 2
  assert 0.1 < factor < 1
  found = np.array(squares[1:]) / squares[:-1]
  np.testing.assert_allclose(found, factor, rtol=8 * tol(jnp.float32, N))


@pytest.mark.parametrize("graph", sorted(GRAPHS))
@pytest.mark.parametrize("seed", [1, 2])
def test_no_start_shrinks_more_slowly_than_the_second_eigenvalue(
  graph, seed, tol
):
  state = scattered(player(graph).start(), seed=seed)
  _, outcome = player(graph).play(EVERYONE, state=state)
  mixing = topology.metropolis(GRAPHS[graph])
  most = topology.second_eigenvalue(mixing) * (1 + tol(jnp.float32, 5 * N))
  record = outcome.record
  before = record["consensus/distance_before"]
  assert record["consensus/distance"] <= most * before


def test_the_recorded_distance_is_the_root_mean_square_to_the_mean(tol):
  state = scattered(player().start())
  cohort = [0, 2, 3]
  after, outcome = player().play(cohort, state=state)
  for name, x in {"distance_before": state, "distance": after}.items():
    here = rows(x)[cohort]
    wanted = np.sqrt(np.mean(np.sum((here - here.mean(0)) ** 2, axis=1)))
    found = outcome.record[f"consensus/{name}"]
    np.testing.assert_allclose(found, wanted, rtol=tol(jnp.float32, 5 * N))


def test_a_complete_graph_is_federated_averaging_of_equal_weights(tol):
  uniform = gossip.gossip(
    bowls.model(), bowls.how(), mixing=np.full((N, N), 1 / N)
  )
  mixed = bowls.play(uniform, EVERYONE, EVERYONE, data=DATA)
  averaged = bowls.play(
    fp.fedavg(bowls.model(), bowls.how(), lowrank=False),
    EVERYONE,
    EVERYONE,
    data=DATA,
  )
  eps = tol(jnp.float32, 2 * N * bowls.STEPS)
  wanted = np.broadcast_to(bowls.flat(averaged.params), (N, 5))
  np.testing.assert_allclose(rows(mixed), wanted, rtol=eps, atol=eps)


def test_a_round_is_training_and_then_mixing(tol):
  start = player("torus", still=False).start()
  after, _ = player("torus", still=False).play(EVERYONE, state=start)
  which = [0, 1, 2, 3, 0, 1]
  wanted = (
    topology.metropolis(GRAPHS["torus"]) @ bowls.alone(bowls.start())[which]
  )
  eps = tol(jnp.float32, N * bowls.STEPS)
  np.testing.assert_allclose(rows(after), wanted, rtol=eps, atol=eps)


def test_the_absent_keep_every_bit_and_nobody_hears_them():
  state = scattered(player("ring").start())
  other = jax.tree.map(np.copy, state)
  for x in other.clients.local.values():
    x[3] += 100
  cohort = (0, 1, 2)  # 3 is a neighbour of 2
  one, _ = player("ring").play(cohort, state=state)
  two, _ = player("ring").play(cohort, state=other)
  for k, x in state.clients.local.items():
    assert x[3:].tobytes() == one.clients.local[k][3:].tobytes()
    assert np.any(x[:3] != one.clients.local[k][:3])
    assert (
      one.clients.local[k][:3].tobytes() == two.clients.local[k][:3].tobytes()
    )


def test_a_client_whose_training_fails_does_not_mix():
  b = np.array(DATA.examples["b"])
  b[DATA.train[2]] = np.inf
  broken = player("ring", still=False).over(b=b)
  state = scattered(broken.start())
  after, outcome = broken.play(EVERYONE, state=state)
  assert outcome.record["train/nonfinite"] == 1
  for k, x in after.clients.local.items():
    assert np.isfinite(x).all()
    assert x[2].tobytes() == state.clients.local[k][2].tobytes()
  assert outcome.record["cloud/messages"] == 8  # a path of five


@pytest.mark.parametrize("graph", sorted(GRAPHS))
@pytest.mark.parametrize("cohort", [EVERYONE, (0, 1, 2, 4), (5,)])
def test_bytes_are_those_of_the_models_sent_to_neighbours(graph, cohort):
  play = player(graph)
  _, outcome = play.play(cohort)
  each = gossip.messages(topology.metropolis(GRAPHS[graph]), cohort)
  neighbours = GRAPHS[graph][np.ix_(cohort, cohort)].sum(axis=1)
  np.testing.assert_array_equal(each, neighbours)
  assert outcome.record["cloud/messages"] == each.sum()
  one = tree.nbytes(bowls.model().params)
  assert play.algorithm.bytes(N) == {
    "cloud/up_bytes": one,
    "cloud/down_bytes": one,
  }


@pytest.mark.parametrize("seed", range(4))
def test_mixing_among_some_stays_doubly_stochastic(seed, tol):
  rng = np.random.default_rng(seed)
  graph = topology.erdos_renyi(12, probability=0.5, seed=seed)
  mixing = jnp.asarray(topology.metropolis(graph), jnp.float32)
  present = rng.random(12) < 0.6
  found = np.asarray(gossip.among(mixing, jnp.asarray(present)))
  topology.check(found)
  np.testing.assert_array_equal(found[~present], np.eye(12)[~present])
  off = np.ix_(present, present)
  np.testing.assert_array_equal(
    found[off][~np.eye(present.sum(), dtype=bool)],
    np.asarray(mixing)[off][~np.eye(present.sum(), dtype=bool)],
  )


def test_a_matrix_that_does_not_fit_is_refused():
  skewed = np.array([[0.5, 0.5], [0.25, 0.75]])
  with pytest.raises(ValueError, match=r"asymmetry.*topology\.metropolis"):
    gossip.gossip(bowls.model(), STILL, mixing=skewed)
  with pytest.raises(ValueError, match=r"each of 7 clients: got \[6, 6\]"):
    player().algorithm.init(clients=7, cohort=7)


def test_gossip_runs_and_its_clients_are_evaluated_on_their_own_models():
  data = bowls.people((4,) * N, (0, 1, 2, 3, 0, 1))
  split = fp.data.population(
    dict(data.examples), np.repeat(np.arange(N), 4), heldout=0.25
  )
  mixing = topology.metropolis(topology.ring(N))
  made = gossip.gossip(bowls.model(), bowls.how(), mixing=mixing)
  score = fp.evaluation(made, bowls.model(), split)
  *_, (state, record) = fp.run(
    made,
    bowls.model(),
    split,
    cohort=fp.sample.uniform(4),
    rounds=2,
    evaluate=score,
  )
  a, b = (x[[0, 1, 2, 3, 0, 1]] for x in bowls.curves())
  own = rows(jax.device_get(state))
  losses = 0.5 * np.sum(a * (own - b) ** 2, axis=1)
  assert record["eval/loss"] == pytest.approx(losses.mean(), rel=1e-5)
