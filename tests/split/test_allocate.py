"""Joint allocation: exhaustive search, bounds, monotone descent, laws."""

import dataclasses
import itertools
import time

import hypothesis
import numpy as np
import pytest
import scipy.optimize
from hypothesis import strategies as st

import allocation_world as world
from fedjax_peft.network import channel
from fedjax_peft.split import allocate, blocks, bound, choices, finish, outcome
from fedjax_peft.split import problem as problem_lib
from tolerance import tol

NEAR = tol("float64", 256)
SOLVED = 1e-6  # what the shares of an allocation leave to be gained


@pytest.mark.parametrize("clients", [2, 3])
@pytest.mark.parametrize("weight", [0.05, 0.5, 0.95, 1.0])
def test_tiny_problems_are_solved_as_by_exhaustive_search(clients, weight):
  for seed in range(3):
    problem = world.drawn(seed, clients, weight=weight)
    found = allocate.optimize(problem).allocation.objective
    best = world.exhaustive(problem)
    assert best * (1 - SOLVED) <= found <= best * 1.02


def test_most_tiny_problems_are_solved_exactly_and_not_without_prices():
  exact = alone = 0
  for seed in range(100, 110):
    problem = world.drawn(seed, server_each=seed % 2 == 0)
    best = world.exhaustive(problem)
    found = allocate.optimize(problem).allocation
    exact += found.objective <= best * (1 + SOLVED)
    # Own choices by themselves end where no client would gain alone.
    now = outcome.settle(problem, np.full(3, 1), np.full(3, 0))
    while (then := blocks.own(problem, now, 0)) is not None:
      assert then.objective <= now.objective * (1 + SOLVED)
      if then.objective > now.objective * (1 - SOLVED):
        break
      now = then
    alone += now.objective <= best * (1 + SOLVED)
  assert exact >= 9
  assert alone <= 7


@hypothesis.given(
  st.integers(0, 10**6), st.integers(1, 8), st.booleans(), st.booleans()
)
@hypothesis.settings(deadline=None, max_examples=10)
def test_the_descent_is_monotone_and_exact_blocks_are_never_refused(
  seed, clients, server_each, divided
):
  problem = world.drawn(
    seed,
    clients,
    channels=clients + 2 if divided else None,
    server_each=server_each,
  )
  solution = allocate.optimize(problem)
  assert np.all(np.diff(solution.trace) <= 0)
  assert solution.trace[-1] == solution.allocation.objective
  before = np.inf
  for step in solution.steps:
    if step.block == "own":
      assert step.objective <= before * (1 + SOLVED)
    before = step.objective if step.kept else before


def test_no_allocation_is_below_the_bound_whatever_the_prices():
  for seed in range(3):
    problem = world.drawn(seed, 2, server_each=seed == 1)
    best = world.exhaustive(problem)
    for weight in (problem.weight, 0.3):
      priced = dataclasses.replace(problem, weight=weight)
      prices = allocate.optimize(priced).allocation
      least = bound.lower(
        problem, prices._replace(objective=2 * best), tolerance=1e-3
      )
      assert least <= best * (1 + 1e-9)
      assert least > 0.3 * best
    with pytest.raises(ValueError, match="the bound is for clients that share"):
      bound.lower(dataclasses.replace(problem, in_turn=True), prices)


def test_a_thousand_clients_are_within_a_percent_of_the_bound_in_seconds():
  problem = world.drawn(3, 1000, 6, 4)
  began = time.process_time()
  found = allocate.optimize(problem).allocation
  # Of one core, 0.4 s; others that are at work make it longer.
  assert time.process_time() - began < 5
  least = bound.lower(problem, found, tolerance=5e-3)
  assert least <= found.objective <= least * 1.01
  assert bound.lower(problem, outcome.equal(problem)) < least
  np.testing.assert_allclose(found.seconds, found.finish, rtol=1e-6)
  np.testing.assert_allclose(found.width.sum(), problem.bandwidth, rtol=NEAR)
  assert found.watts.max() <= 0.2


@pytest.mark.parametrize("server_each", [False, True])
def test_sub_channels_and_choices_together_are_as_by_exhaustive_search(
  server_each,
):
  for seed in range(3):
    problem = world.drawn(
      seed, 2, 2, 2, channels=3, server_each=server_each, weight=0.5
    )
    found = allocate.optimize(problem).allocation
    owners = [
      np.array(owner)
      for owner in itertools.product((-1, 0, 1), repeat=3)
      if {0, 1} <= set(owner)
    ]
    best = min(world.exhaustive(problem, owner) for owner in owners)
    assert best * (1 - SOLVED) <= found.objective <= best * 1.02
    np.testing.assert_allclose(found.seconds, found.finish, rtol=1e-6)


@pytest.mark.parametrize("weight", [0.1, 0.6, 1.0])
def test_taking_turns_is_solved_exactly(weight):
  problem = world.drawn(2, 3, weight=weight, in_turn=True)
  found = allocate.optimize(problem).allocation
  load = problem_lib.load(problem)
  each = []
  for place in np.ndindex(load.bits.shape):
    k = place[0]

    def cost(watts, place=place, k=k):
      rate = channel.rate(problem.bandwidth, watts, problem.gains[k])
      sent = load.bits[place] / rate
      joules = load.joules[place] + watts * sent
      seconds = load.seconds[place] + sent
      return (
        problem.seconds_weight * seconds
        + problem.joules_weight * joules
        + load.error[place]
      )

    low = scipy.optimize.minimize_scalar(
      cost, bounds=(1e-9, 0.2), method="bounded", options={"xatol": 1e-12}
    )
    each.append(min(low.fun, cost(0.2)))
  best = np.reshape(each, (3, -1)).min(1).sum()
  np.testing.assert_allclose(found.objective, best, rtol=1e-7)
  np.testing.assert_allclose(found.finish, found.seconds.sum(), rtol=NEAR)
  # Less time than they would take: all of it is used, or none is enough.
  soonest = allocate.optimize(dataclasses.replace(problem, weight=1.0))
  soonest = soonest.allocation.finish
  between = float(soonest + 0.5 * max(found.finish - soonest, 0)) * 1.0001
  held = dataclasses.replace(problem, deadline=between)
  late = allocate.optimize(held).allocation
  assert soonest <= late.finish <= between * (1 + NEAR)
  assert late.objective >= found.objective * (1 - NEAR)
  with pytest.raises(ValueError, match="clients that take turns need"):
    allocate.optimize(dataclasses.replace(problem, deadline=soonest / 2))


def least_paid(left, bits, flops, gain, weight, hertz, price):
  """The least cost of sending and server at prices, by nested searches."""

  def bounded(cost, low, high):
    options = {"xatol": 1e-10}
    found = scipy.optimize.minimize_scalar(
      cost, bounds=(low, high), method="bounded", options=options
    )
    return min(found.fun, cost(low))

  def over_band(seconds):
    least = finish.least_width(seconds, bits, 0.2, gain)
    if not np.isfinite(least):
      return np.inf

    def cost(log):
      width = least * np.exp(log)
      watts = channel.power_for(seconds, bits / 8, width, gain)
      return weight * watts * seconds + hertz * width

    return bounded(cost, 0.0, 12.0)

  if flops == 0:
    return over_band(left)

  def cost(logit):
    part = 1 / (1 + np.exp(-logit))
    return over_band(left * part) + price * flops / (left * (1 - part))

  grid = np.linspace(-12, 12, 60)
  values = [cost(x) for x in grid]
  k = int(np.argmin(values))
  if not np.isfinite(values[k]):
    return np.inf
  return bounded(cost, grid[max(k - 1, 0)], grid[min(k + 1, 59)])


def test_what_a_choice_costs_at_prices_is_the_least_over_all_shares():
  compared = 0
  for seed, weight in ((0, 0.2), (1, 0.9), (4, 1.0), (3, 0.5)):
    problem = world.drawn(seed, 2, weight=weight, server_each=seed == 3)
    now = allocate.optimize(problem).allocation
    hertz = float(now.hertz_price)
    price = max(float(now.flops_price), 1e-9 / problem.server_speed)
    time = 1.2 * float(now.finish)
    table = choices.at_prices(problem, time, problem.gains, hertz, price)
    load = problem_lib.load(problem)
    for place in itertools.islice(np.ndindex(table.shape), 0, None, 5):
      fixed, bits, flops, joules, error = (float(x[place]) for x in load)
      least = np.inf
      if time > fixed:
        terms = time - fixed, bits, flops, problem.gains[place[0]]
        with np.errstate(all="ignore"):  # searches try what cannot be
          least = least_paid(*terms, problem.joules_weight, hertz, price)
      least += problem.joules_weight * joules + error
      np.testing.assert_allclose(table[place], least, rtol=1e-8)
      compared += np.isfinite(least)
  assert compared > 8
