"""Building: what a config says is what the functions get."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_peft import build, compose, config

TINY = {"model": {"name": "encoder"}, "data": {"name": "sotu"}}


def first_rates(**client):
  """The size of a client's step in every round of ten, from a unit gradient."""
  run = config.parse({**TINY, "rounds": 10, "client": client})
  optimizer = build._rates(run)

  def step(number):
    one = optimizer(jnp.int32(number))
    update, _ = one.update(jnp.ones(()), one.init(jnp.zeros(())))
    return -float(update)

  return np.array([step(number) for number in range(10)])


def test_a_constant_rate_stays():
  np.testing.assert_allclose(first_rates(learning_rate=0.3), 0.3, rtol=1e-6)


def test_a_linear_rate_falls_to_nothing():
  expected = 0.3 * (1 - np.arange(10) / 10)
  found = first_rates(learning_rate=0.3, schedule="linear")
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_cosine_rate_falls_to_nothing():
  expected = 0.15 * (1 + np.cos(np.pi * np.arange(10) / 10))
  found = first_rates(learning_rate=0.3, schedule="cosine")
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_rate_rises_before_it_falls():
  found = first_rates(learning_rate=1.0, warmup=4, schedule="linear")
  expected = [0.2, 0.4, 0.6, 0.8] + [1 - i / 6 for i in range(6)]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_every_rate_is_above_zero_from_the_first_round():
  for schedule in ("constant", "linear", "cosine"):
    assert np.all(first_rates(schedule=schedule, warmup=3) > 0)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
  ("name", "reference"),
  [
    ("sgd", optax.sgd(0.1)),
    ("momentum", optax.sgd(0.1, momentum=0.8)),
    ("adam", optax.adam(0.1, b1=0.7, b2=0.6, eps=0.01)),
    ("yogi", optax.yogi(0.1, b1=0.7, b2=0.6, eps=0.01)),
    (
      "adagrad",
      optax.adagrad(0.1, initial_accumulator_value=1e-4, eps=0.01),
    ),
  ],
)
def test_a_server_optimizer_is_the_one_named(name, reference):
  how = {"optimizer": name, "learning_rate": 0.1, "momentum": 0.8}
  how |= {"b1": 0.7, "b2": 0.6, "eps": 0.01}
  found = build._server(config.parse({**TINY, "server": how}).server, 10)
  params = jnp.array([1.0, -2.0])
  states = [x.init(params) for x in (found, reference)]
  for gradient in (jnp.array([0.5, 2.0]), jnp.array([-0.1, 0.3])):
    (a, states[0]), (b, states[1]) = (
      x.update(gradient, state, params)
      for x, state in zip((found, reference), states, strict=True)
    )
    np.testing.assert_array_equal(a, b)


def test_links_are_chained_in_order():
  tables = [{"link": "clip", "clip_norm": 1.0}, {"link": "weigh"}]
  assert compose.chain_of(tables, "uplink").name == "clip > weigh"
  assert compose.chain_of([], "downlink").name == "identity"
