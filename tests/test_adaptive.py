"""Server optimizers against the updates of their papers."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_peft as fp
import toy
from fedjax_peft import adaptive

RATE, TAU, B1, B2 = 0.1, 1e-2, 0.9, 0.99


def deltas(steps=5):
  """params - new, as clients report it; large and small values."""
  rng = np.random.default_rng(0)
  return [
    {
      "a": rng.normal(size=(3, 2)) * 10.0 ** rng.integers(-3, 2),
      "b": rng.normal(size=4),
    }
    for _ in range(steps)
  ]


def path(server, messages):
  """Where a server's model goes from zero."""
  params = {k: jnp.zeros(v.shape) for k, v in messages[0].items()}
  state, seen = server.init(params), []
  for message in messages:
    message = {k: jnp.asarray(v, jnp.float32) for k, v in message.items()}
    updates, state = server.update(message, state, params)
    params = optax.apply_updates(params, updates)
    seen.append({k: np.asarray(v) for k, v in params.items()})
  return seen


def of_paper(messages, second, b1, v0):
  """Algorithm 2 of Reddi et al.; their Delta is new - params."""
  x = {k: np.zeros(v.shape) for k, v in messages[0].items()}
  m = {k: np.zeros(v.shape) for k, v in messages[0].items()}
  v = {k: np.full(y.shape, v0) for k, y in messages[0].items()}
  seen = []
  for message in messages:
    for k in x:
      delta = -message[k]
      m[k] = b1 * m[k] + (1 - b1) * delta
      v[k] = second(v[k], delta**2)
      x[k] = x[k] + RATE * m[k] / (np.sqrt(v[k]) + TAU)
    seen.append(dict(x))
  return seen


def server_of(alias, **options):
  how = fp.local(optax.sgd(0.1), batch=4)
  return alias(toy.net(), how, **options).tiers[0].server


@pytest.mark.parametrize(
  ("alias", "second", "b1"),
  [
    (fp.fedadam, lambda v, d: B2 * v + (1 - B2) * d, B1),
    (fp.fedyogi, lambda v, d: v - (1 - B2) * d * np.sign(v - d), B1),
    (fp.fedadagrad, lambda v, d: v + d, 0.0),
  ],
  ids=["adam", "yogi", "adagrad"],
)
def test_an_adaptive_server_takes_the_steps_of_its_paper(alias, second, b1):
  server = server_of(alias, learning_rate=RATE, eps=TAU)
  messages = deltas()
  for found, wanted in zip(
    path(server, messages), of_paper(messages, second, b1, TAU**2)
  ):
    for k, x in wanted.items():
      np.testing.assert_allclose(found[k], x, rtol=1e-5, atol=1e-7)


def test_momentum_at_the_server_is_that_of_hsu_et_al():
  # v <- beta v + delta, w <- w - rate v; Hsu et al. 2019, arXiv 1909.06335.
  server = server_of(fp.fedavgm, learning_rate=0.5, momentum=0.8)
  w, v = 0.0, 0.0
  messages = deltas()
  for message, found in zip(messages, path(server, messages)):
    v = 0.8 * v + message["b"]
    w = w - 0.5 * v
    np.testing.assert_allclose(found["b"], w, rtol=1e-5, atol=1e-6)


def test_momentum_of_zero_and_a_plain_server_apply_the_mean_as_it_is():
  messages = deltas()
  for server in (
    server_of(fp.fedavg),
    server_of(fp.fedavg, server=optax.sgd(1.0)),
    server_of(fp.fedavgm, learning_rate=1.0, momentum=0.0),
  ):
    total = 0.0
    for message, found in zip(messages, path(server, messages)):
      total = np.float32(total) - message["b"].astype(np.float32)
      np.testing.assert_array_equal(found["b"], total)


def test_adam_that_hardly_adapts_is_averaging_scaled():
  # beta1 = 0 and tau >> sqrt(v): the step is rate / tau times the delta, up
  # to sqrt(v) / tau, and sqrt(v) - tau is at most the largest delta.
  messages = deltas()
  tau = 1e6 * max(np.abs(m["b"]).max() for m in messages)
  server = adaptive.adam(2 * tau, b1=0.0, eps=tau)
  before = 0.0
  for n, found in enumerate(path(server, messages), start=1):
    scale = 2 / (1 + 0.99 ** (n / 2))  # sqrt(v) starts at tau and decays
    step, before = found["b"] - before, found["b"]
    wanted = -scale * messages[n - 1]["b"]
    np.testing.assert_allclose(step, wanted, rtol=1e-5, atol=1e-5)


def test_a_rate_may_be_a_schedule_of_the_rounds():
  server = adaptive.adagrad(optax.linear_schedule(1.0, 0.0, 2), eps=1e-3)
  first, second, third = path(server, deltas(3))
  assert not np.array_equal(first["b"], second["b"])
  np.testing.assert_array_equal(second["b"], third["b"])
