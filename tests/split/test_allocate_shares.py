"""Shares: one convex problem, against SciPy, its conditions and its dual."""

import dataclasses

import numpy as np
import pytest
import scipy.optimize

import allocation_world as world
from fedjax_peft.network import channel
from fedjax_peft.split import choices, finish, outcome, shares
from tolerance import tol

NEAR = tol("float64", 256)
TIGHT = 1e-6  # interior points stop 1e-9 of the first objective from the last


def drawn(seed, clients, **options):
  """A problem without a choice, its shares at the optimum, its loads."""
  problem = world.drawn(seed, clients, 1, 1, **options)
  none = np.zeros(clients, int)
  return problem, outcome.settle(problem, none, none)


def whole(problem, width, watts, speed):
  """The objective of any shares and powers, by its definition."""
  sent = problem.up_bits[:, 0, 0] / channel.rate(width, watts, problem.gains)
  fixed = problem.device_seconds[:, 0] + problem.down_seconds[:, 0, 0]
  seconds = fixed + sent + problem.server_flops[:, 0] / speed
  joules = problem.compute_joules[:, 0] + watts * sent
  return (
    problem.weight * seconds.max() / problem.seconds_scale
    + (1 - problem.weight) * joules.sum() / problem.joules_scale
    + problem.error_weight * problem.error.sum()
  )


def optimizer(problem, found):
  """SciPy's optimum over widths, powers and speeds, from three starts."""
  clients = len(problem)

  def unpack(x):
    x = np.exp(x).reshape(3, clients)
    width = problem.bandwidth * x[0] / x[0].sum()
    speed = problem.server_speed * x[2] / x[2].sum()
    return width, np.minimum(x[1], 1) * problem.power_max, speed

  # The maximum is no smooth function: the finish is a variable, as a bound.
  fixed = problem.device_seconds[:, 0] + problem.down_seconds[:, 0, 0]
  base = float(found.finish)

  def late(x):
    width, watts, speed = unpack(x[:-1])
    sent = problem.up_bits[:, 0, 0] / channel.rate(width, watts, problem.gains)
    done = fixed + sent + problem.server_flops[:, 0] / speed
    return x[-1] - done / base

  def cost(x):
    width, watts, _ = unpack(x[:-1])
    sent = problem.up_bits[:, 0, 0] / channel.rate(width, watts, problem.gains)
    joules = (problem.compute_joules[:, 0] + watts * sent).sum()
    return (
      problem.seconds_weight * x[-1] * base + problem.joules_weight * joules
    )

  best = np.inf
  at = np.concatenate([found.width, found.watts, found.speed])
  rng = np.random.default_rng(0)
  for spread in (0.0, 0.3, 1.0):
    unit = [problem.bandwidth] * clients + [0.2] * clients
    unit += [problem.server_speed] * clients
    start = np.log(at / unit) + spread * rng.normal(size=at.size)
    result = scipy.optimize.minimize(
      cost,
      [*start, 1.0 + 2 * spread],
      constraints=[{"type": "ineq", "fun": late}],
      method="SLSQP",
      options={"maxiter": 300, "ftol": 1e-13},
    )
    width, watts, speed = unpack(result.x[:-1])
    best = min(best, whole(problem, width, watts, speed))
  return best


@pytest.mark.parametrize("clients", [2, 3])
@pytest.mark.parametrize("weight", [0.1, 0.5, 0.95])
def test_no_optimizer_finds_better_shares_and_powers(clients, weight):
  for seed in range(2):
    problem, found = drawn(seed, clients, weight=weight)
    best = optimizer(problem, found)
    assert found.objective <= best * (1 + TIGHT)
    assert found.objective >= best * (1 - 1e-3)  # SLSQP's own, it may stop
    again = whole(problem, found.width, found.watts, found.speed)
    np.testing.assert_allclose(found.objective, again, rtol=NEAR)


@pytest.mark.parametrize("clients", [1, 2, 5, 30, 1000])
@pytest.mark.parametrize("weight", [0.02, 0.5, 1.0])
def test_all_finish_together_with_the_whole_band_within_their_power(
  clients, weight
):
  problem, found = drawn(clients, clients, weight=weight)
  np.testing.assert_allclose(found.seconds, found.finish, rtol=TIGHT)
  np.testing.assert_allclose(found.width.sum(), problem.bandwidth, rtol=NEAR)
  np.testing.assert_allclose(found.speed.sum(), problem.server_speed, rtol=NEAR)
  assert np.all(found.watts <= problem.power_max)
  assert np.all(found.watts > 0)


@pytest.mark.parametrize("clients", [2, 10, 200])
def test_with_time_alone_it_is_the_equal_finish_at_full_power(clients):
  problem, found = drawn(7, clients, weight=1.0, server_each=True)
  served = problem.server_flops[:, 0] / problem.server_speed
  fixed = problem.device_seconds[:, 0] + problem.down_seconds[:, 0, 0] + served
  exact = finish.band(
    fixed,
    problem.up_bits[:, 0, 0],
    problem.power_max,
    problem.gains,
    problem.bandwidth,
  )
  np.testing.assert_allclose(found.finish, exact.finish, rtol=TIGHT)
  np.testing.assert_allclose(found.width, exact.share, rtol=1e-3)


def dual(problem, found, price=1.0):
  """The best bound at the prices of an allocation, over finishes nearby.

  Weak duality: at any prices the least payments, for the best finish, minus
  what the band and the server bring in, are below all allocations.
  """
  hertz = max(price * float(found.hertz_price), 1e-300)
  flops = max(float(found.flops_price), 1e-300)
  brought = hertz * problem.bandwidth
  if not problem.server_each:
    brought += flops * problem.server_speed

  def below(log):
    time = float(found.finish) * np.exp(log)
    paid = choices.at_prices(problem, time, problem.gains, hertz, flops)
    return problem.seconds_weight * time + paid.sum() - brought

  options = {"xatol": 1e-9}
  with np.errstate(invalid="ignore"):  # sooner, some cannot at any price
    best = scipy.optimize.minimize_scalar(
      below, bounds=(-1e-3, 1e-3), method="bounded", options=options
    )
  return min(best.fun, below(0.0))


@pytest.mark.parametrize("clients", [2, 3, 20, 1000])
@pytest.mark.parametrize("server_each", [False, True])
def test_the_dual_proves_the_optimum(clients, server_each):
  for seed in range(3):
    problem, found = drawn(seed, clients, server_each=server_each)
    best = dual(problem, found)
    assert best <= found.objective * (1 + 1e-9)
    assert best >= found.objective * (1 - TIGHT)
    # At other prices the bound is true, but does not prove it.
    assert dual(problem, found, 1.5) < found.objective * (1 - TIGHT)


@pytest.mark.parametrize("weight", [1e-6, 0.5, 0.999, 1.0])
def test_needs_that_are_decades_apart_are_served_too(weight):
  for seed in range(12):
    problem = world.wide(seed, weight)
    none = np.zeros(len(problem), int)
    found = outcome.settle(problem, none, none)
    assert dual(problem, found) >= found.objective * (1 - 1e-5)
    even = outcome.equal(problem)
    assert found.objective <= even.objective * (1 + TIGHT)
    sends = problem.up_bits[:, 0, 0] > 0
    np.testing.assert_allclose(found.seconds[sends], found.finish, rtol=TIGHT)


def test_prices_are_what_a_little_more_is_worth():
  for seed in range(4):
    problem, found = drawn(seed, 5, weight=0.6)
    none, more = np.zeros(5, int), 1e-4
    for name, price in (
      ("bandwidth", found.hertz_price),
      ("server_speed", found.flops_price),
    ):
      total = getattr(problem, name)
      grown = dataclasses.replace(problem, **{name: total * (1 + more)})
      gained = found.objective - outcome.settle(grown, none, none).objective
      # Second differences are of the order of `more`, the solver's error of
      # 1e-9 / more.
      np.testing.assert_allclose(
        gained, price * total * more, rtol=1e-3, atol=1e-8 * found.objective
      )


def test_the_last_hertz_is_worth_the_same_to_all_who_have_power_left():
  problem, found = drawn(3, 40, weight=0.1)
  free = found.watts < 0.99 * problem.power_max
  assert free.sum() > 10
  served = problem.server_flops[:, 0] / found.speed
  fixed = problem.device_seconds[:, 0] + problem.down_seconds[:, 0, 0]
  left = found.finish - fixed - served

  def joules(width):
    bits = problem.up_bits[:, 0, 0]
    return left * channel.power_for(left, bits / 8, width, problem.gains)

  step = 1e-5
  slope = joules(found.width * (1 + step)) - joules(found.width * (1 - step))
  worth = -slope / (2 * step * found.width) * problem.joules_weight
  np.testing.assert_allclose(worth[free], found.hertz_price, rtol=1e-4)
  assert np.all(worth[~free] < found.hertz_price * (1 + 1e-4))


def test_a_deadline_that_binds_is_met_exactly_and_one_that_cannot_is_reported():
  for seed in range(4):
    problem, found = drawn(seed, 4, weight=0.3)
    none = np.zeros(4, int)
    hurry = dataclasses.replace(problem, weight=1.0)
    soonest = outcome.settle(hurry, none, none).finish
    between = float(soonest + 0.3 * (found.finish - soonest))
    bound_ = dataclasses.replace(problem, deadline=between)
    held = outcome.settle(bound_, none, none)
    np.testing.assert_allclose(held.finish, between, rtol=TIGHT)
    assert held.objective > found.objective
    loose = dataclasses.replace(problem, deadline=float(found.finish * 1.01))
    np.testing.assert_allclose(
      outcome.settle(loose, none, none).objective, found.objective, rtol=TIGHT
    )
    never = dataclasses.replace(problem, deadline=float(soonest * 0.999))
    assert outcome.settle(never, none, none).objective == np.inf
    # Energy alone: it takes all the time there is.
    lazy = dataclasses.replace(problem, weight=0.0, deadline=between)
    np.testing.assert_allclose(
      outcome.settle(lazy, none, none).finish, between, rtol=TIGHT
    )


def test_problems_in_a_batch_are_solved_as_each_alone():
  problem = world.drawn(5, 3, 3, 3)
  cut, bits = (x[::50] for x in world.choices(problem))
  together = outcome.settle(problem, cut, bits)
  for i in range(len(cut)):
    alone = outcome.settle(problem, cut[i], bits[i])
    # They take the same steps, but sums are in another order.
    np.testing.assert_allclose(
      together.objective[i], alone.objective, rtol=1e-9
    )
    np.testing.assert_allclose(together.width[i], alone.width, rtol=1e-4)


def test_a_given_division_of_the_band_leaves_powers_and_server_to_be_found():
  rng = np.random.default_rng(0)
  gains = world.links(rng, 3)
  width, bits = np.array([1e6, 2e6, 3e6]), np.array([1e7, 1e7, 4e7])
  seconds, flops = np.array([1.0, 0.5, 2.0]), np.array([1e12, 2e12, 5e11])
  found = shares.solve(
    seconds,
    bits,
    flops,
    gains,
    0.2,
    bandwidth=6e6,
    speed=1e12,
    seconds_weight=0.01,
    joules_weight=0.3,
    width=width,
  )
  np.testing.assert_array_equal(found.width, width)

  def cost(x):
    speed = 1e12 * np.exp(x[:3]) / np.exp(x[:3]).sum()
    left = x[3] - seconds - flops / speed
    if np.any(left <= bits / channel.rate(width, 0.2, gains)):
      return np.inf
    watts = channel.power_for(left, bits / 8, width, gains)
    return 0.01 * x[3] + 0.3 * (watts * left).sum()

  speed = np.log(found.speed / 1e12)
  mine = cost([*speed, found.finish * (1 + 1e-9)])
  rng = np.random.default_rng(1)
  for spread in np.geomspace(1e-3, 1, 6).repeat(100):
    moved = speed + spread * rng.normal(size=3)
    late = found.finish * np.exp(spread * rng.normal())
    assert cost([*moved, late]) >= mine * (1 - TIGHT)
  # The slope by T is zero, as far as a difference can say.
  step = 1e-4 * found.finish
  ahead, behind = (cost([*speed, found.finish + s]) for s in (step, 2 * step))
  assert 0 <= ahead - mine < 0.3 * (behind - mine)


def test_units_are_no_matter():
  problem, found = drawn(11, 6, weight=0.4)
  none = np.zeros(6, int)
  # Kilobits over kilohertz with the same power to noise; kiloseconds and so on.
  scaled = dataclasses.replace(
    problem,
    up_bits=problem.up_bits * 1e3,
    bandwidth=problem.bandwidth * 1e3,
    noise=problem.noise / 1e3,
    server_flops=problem.server_flops * 1e3,
    server_speed=problem.server_speed * 1e3,
  )
  again = outcome.settle(scaled, none, none)
  np.testing.assert_allclose(again.objective, found.objective, rtol=1e-9)
  np.testing.assert_allclose(again.watts, found.watts, rtol=1e-4)


def test_clients_without_a_message_or_without_a_server_take_no_share():
  given = {
    "bandwidth": 1e6,
    "speed": 1e12,
    "seconds_weight": 1.0,
    "joules_weight": 1.0,
  }
  found = shares.solve(
    [1.0, 2.0, 9.0], [1e6, 0.0, 0.0], [0.0, 1e12, 0.0], 1e-10, 0.2, **given
  )
  np.testing.assert_array_equal(found.width, [1e6, 0, 0])
  np.testing.assert_array_equal(found.speed, [0, 1e12, 0])
  np.testing.assert_allclose(found.finish, 9.0, rtol=TIGHT)
