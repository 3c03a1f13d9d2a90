"""Queues: closed forms against a server that is simulated."""

import numpy as np
import pytest

from fedjax_peft.network import queue


def simulated(arrivals, service, requests=400_000, batches=40, seed=0):
  """Response times of a queue by Lindley's recursion, in batches."""
  rng = np.random.default_rng(seed)
  gaps = rng.exponential(1 / arrivals, (batches, requests // batches))
  work = service(rng, gaps.shape)
  # W_n = max over k <= n of the sum of (service - gap) since k: Lindley.
  walk = np.cumsum(np.roll(work, 1, 1) - gaps, 1)
  walk -= walk[:, :1]
  waits = walk - np.minimum.accumulate(walk, 1)
  return (waits + work)[:, requests // batches // 5 :]


@pytest.mark.parametrize(
  ("variability", "service"),
  [
    (1.0, lambda rng, shape: rng.exponential(0.25, shape)),
    (0.0, lambda rng, shape: np.full(shape, 0.25)),
  ],
  ids=["exponential", "constant"],
)
def test_the_mean_response_is_that_of_a_simulated_queue(variability, service):
  means = simulated(2.8, service).mean(1)
  error = means.std(ddof=1) / np.sqrt(means.size)
  wanted = queue.response(2.8, 0.25, variability=variability)
  # 4 standard errors: p = 6e-5; half as much variability again fails.
  assert abs(means.mean() - wanted) < 4 * error
  other = queue.response(2.8, 0.25, variability=variability + 0.5)
  assert abs(means.mean() - other) > 4 * error


def test_the_quantile_of_the_response_is_that_of_a_simulated_queue():
  times = simulated(2.0, lambda rng, shape: rng.exponential(0.25, shape))
  within = np.mean(times <= queue.response_quantile(2.0, 0.25, 0.95), 1)
  error = within.std(ddof=1) / np.sqrt(within.size)
  assert abs(within.mean() - 0.95) < 4 * error
  assert queue.response_quantile(2.0, 0.25, 0.0) == 0


def test_an_idle_server_answers_at_once_and_a_full_one_never():
  found = queue.response(np.array([0.0, 2.0, 4.0, 9.0]), 0.25)
  np.testing.assert_array_equal(found, [0.25, 0.5, np.inf, np.inf])


def test_bad_loads_are_refused():
  for build in (
    lambda: queue.wait(-1.0, 1.0),
    lambda: queue.wait(1.0, 0.0),
    lambda: queue.wait(1.0, 1.0, variability=-1.0),
    lambda: queue.response_quantile(1.0, 0.5, 1.0),
  ):
    with pytest.raises(ValueError, match="must be .*, got "):
      build()
