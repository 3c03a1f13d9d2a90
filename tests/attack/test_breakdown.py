"""Federations under attack: what a mean cannot stand and others can."""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import crowd
import fedjax_peft as fp
import toy
from fedjax_peft import attack, robust

DATA = attack.attackers(crowd.people(), [2, 7, 11])  # a fifth
EVERYONE = tuple(range(15))
REDUCTIONS = {
  "mean": None,
  "bulyan": robust.bulyan(3),
  "geometric_median": robust.geometric_median(),
  "krum": robust.krum(3),
  "median": robust.median(),
}
START = crowd.loss(toy.net().params, DATA)


def job():
  how = fp.local(optax.sgd(0.5), batch=8, epochs=3)
  return attack.sign_flip(fp.train(toy.net(), how), 10.0)


def player(name, data=DATA, **options):
  cloud = fp.tier("cloud", reduce=REDUCTIONS[name])
  algorithm = fp.federated(job(), [cloud])
  return crowd.Player(algorithm, data, toy.net().base, **options)


@functools.cache
def outcome(name):
  """The loss after ten rounds, and how many programs they took."""
  federation = player(name)
  state, _ = federation.play(*[EVERYONE] * 10)
  # The number of senders changes, the program does not.
  federation.play(EVERYONE[:13], state=state)
  return crowd.loss(state.params, DATA), federation.step.programs()


@pytest.mark.slow
@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_fifth_that_climbs_breaks_the_mean_and_no_robust_reduction(name):
  loss, _ = outcome(name)
  if name == "mean":
    assert not loss < 2 * START
  else:
    assert loss < 0.8 * START


@pytest.mark.parametrize("name", REDUCTIONS)
def test_attackers_and_missing_clients_take_no_second_program(name):
  assert outcome(name)[1] == 1


def test_without_attackers_the_mean_is_good_and_the_attack_is_why_it_broke():
  nobody = attack.attackers(DATA, [])
  state, _ = player("mean", nobody).play(*[EVERYONE] * 10)
  assert crowd.loss(state.params, DATA) < 0.8 * START


def test_executors_agree_to_the_last_bit(tol):
  # On a job of exact arithmetic.
  job = attack.sign_flip(toy.voices(), 10.0)
  algorithm = fp.federated(job, [fp.tier("cloud", reduce=robust.median())])
  cohort, params = EVERYONE[:5], []
  for settings in (toy.lanes(devices=2), toy.lanes("debug")):
    state, _ = crowd.Player(algorithm, DATA, settings=settings).play(cohort)
    params.append(state.params)
  assert toy.same_bits(*params)
  said = [toy.voice(DATA, c) for c in cohort]
  said[2] = {k: -10 * v for k, v in said[2].items()}
  for k, x in params[0].items():
    wanted = -np.median([v[k] for v in said], axis=0)
    np.testing.assert_allclose(x, wanted, atol=tol(jnp.float32, 8))


def test_edges_take_a_median_each_and_the_cloud_their_mean(tol):
  # Five clients an edge; with one hostile one at each the medians are near
  # what honest clients report, and so is the mean of the edges.
  edge = fp.tier("edge", 3, reduce=robust.median())
  algorithm = fp.federated(job(), [edge, fp.tier("cloud")])
  data = attack.attackers(crowd.people(), [0, 1, 2])
  state, _ = crowd.Player(algorithm, data, toy.net().base).play(EVERYONE)
  messages, _ = fp.for_each_client(job(), data, base=toy.net().base)
  for k, x in messages.items():
    medians = [np.median(x[e::3], axis=0) for e in range(3)]
    wanted = np.asarray(toy.net().params[k]) - np.mean(medians, axis=0)
    np.testing.assert_allclose(
      state.params[k], wanted, atol=tol(jnp.float32, 56)
    )
