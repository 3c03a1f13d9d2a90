"""Any function over clients, without aggregation."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_peft as fp
import toy

DATA = toy.people()


def statistics() -> fp.Work:
  """Sum and largest value of the features of a client, and its examples."""

  def init(sent, base, local, client):
    return {"sum": jnp.zeros(5), "top": jnp.full(5, -jnp.inf)}

  def step(carry, sent, base, batch):
    here, x = (batch.mask > 0)[:, None], batch.examples["x"]
    total = carry["sum"] + jnp.where(here, x, 0).sum(0)
    top = jnp.maximum(carry["top"], jnp.where(here, x, -jnp.inf).max(0))
    count = batch.mask.sum()
    return {"sum": total, "top": top}, {"examples": (count, jnp.ones(()))}

  how = fp.local(optax.identity(), batch=4)
  return fp.Work(init, step, lambda c, sent: (c, {}), {}, {}, how)


def check(found, stats, ids):
  assert stats["examples"][0].tolist() == DATA.train.sizes[ids].tolist()
  for i, client in enumerate(ids):
    x = DATA.examples["x"][DATA.train[client]]
    np.testing.assert_allclose(found["sum"][i], x.sum(0), atol=1e-5)
    np.testing.assert_array_equal(found["top"][i], x.max(0))


def test_statistics_of_every_client_are_those_of_numpy():
  found, stats = fp.for_each_client(statistics(), DATA)
  assert found["sum"].shape == (10, 5)
  check(found, stats, np.arange(10))


def test_the_rows_follow_the_ids_that_were_asked_for():
  ids = np.array([7, 0, 9, 3])
  settings = toy.lanes(width=2, segment=2)
  found, stats = fp.for_each_client(statistics(), DATA, ids, settings=settings)
  check(found, stats, ids)


def test_a_client_without_examples_gets_zeros():
  rows = fp.data.Ragged.of([[1, 2], [], [5]])
  found, stats = fp.for_each_client(
    statistics(), DATA, np.array([1, 2, 0]), rows=rows
  )
  assert np.all(found["sum"][0] == 0)
  assert stats["examples"][0].tolist() == [0, 1, 2]
  np.testing.assert_allclose(found["sum"][1], DATA.examples["x"][5], atol=1e-6)


def test_what_clients_say_is_what_they_say_in_a_round():
  found, _ = fp.for_each_client(toy.voices(), DATA, seed=3, round=2)
  for client in range(10):
    wanted = toy.voice(DATA, client, seed=3, round=2)
    np.testing.assert_array_equal(found["noise"][client], wanted["noise"])
    np.testing.assert_allclose(found["sum"][client], wanted["sum"], atol=1e-5)


def test_a_client_that_does_not_exist_is_refused():
  with pytest.raises((ValueError, IndexError), match="client|index"):
    fp.for_each_client(statistics(), DATA, np.array([3, 10]))
