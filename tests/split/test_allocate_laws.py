"""Laws of allocations: constraints, baselines, trades, adapting, names."""

import dataclasses
import io

import numpy as np
import pytest
import rich.console

import allocation_world as world
from fedjax_peft.network import channel
from fedjax_peft.split import allocate, blocks, choices, explain, outcome
from fedjax_peft.split import problem as problem_lib
from tolerance import tol

NEAR = tol("float64", 256)
SOLVED = 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_is_no_worse_than_equal_shares_and_those_than_the_worst(
  seed,
):
  problem = world.drawn(seed, 6, 4, 3, in_turn=seed == 3)
  best = allocate.optimize(problem).allocation
  even, slow = outcome.equal(problem), outcome.worst(problem)
  assert best.objective <= even.objective * (1 + SOLVED)
  assert even.objective <= slow.objective
  assert even.finish <= slow.finish
  if not problem.in_turn:
    np.testing.assert_allclose(even.width, problem.bandwidth / 6)
    assert best.objective < 0.95 * even.objective


@pytest.mark.parametrize("seed", range(3))
def test_choices_with_equal_shares_are_the_best_of_all(seed):
  problem = world.drawn(seed, 3, 3, 2)
  each = [
    outcome.judge(
      problem,
      cut,
      bits,
      None,
      np.full(3, problem.bandwidth / 3),
      problem.power_max,
      np.full(3, problem.server_speed / 3),
    )
    for cut, bits in zip(*world.choices(problem), strict=True)
  ]
  found = outcome.equal(problem)
  least = min(x.objective for x in each)
  np.testing.assert_allclose(found.objective, least, rtol=NEAR)
  assert outcome.worst(problem).finish == max(x.finish for x in each)
  # With a deadline it is the best of those in time.
  times = sorted(x.finish for x in each)
  early = float(times[len(times) // 4])
  held = outcome.equal(dataclasses.replace(problem, deadline=early))
  least = min(x.objective for x in each if x.finish <= early)
  np.testing.assert_allclose(held.objective, least, rtol=NEAR)


def test_own_choices_cost_what_their_powers_say():
  problem = world.drawn(2, 3, 3, 3)
  now = allocate.optimize(problem).allocation
  finish = float(now.finish)
  table = choices.at_shares(
    problem, finish, now.width, problem.gains, now.speed
  )
  load = problem_lib.load(problem)
  for place in np.ndindex(table.shape):
    k = place[0]
    left = finish - load.seconds[place]
    if load.flops[place]:
      left -= load.flops[place] / now.speed[k]
    watts = channel.power_for(
      left, load.bits[place] / 8, now.width[k], problem.gains[k]
    )
    cost = problem.joules_weight * (load.joules[place] + watts * left)
    cost = np.inf if watts > 0.2 * (1 + 1e-8) else cost + load.error[place]
    np.testing.assert_allclose(table[place], cost, rtol=1e-7)
  assert np.isfinite(table).any()
  assert not np.isfinite(table).all()


def test_the_order_of_clients_is_no_matter():
  problem = world.drawn(5, 7, 3, 3)
  order = np.random.default_rng(0).permutation(7)
  one = allocate.optimize(problem).allocation
  other = allocate.optimize(problem.take(order)).allocation
  np.testing.assert_allclose(other.objective, one.objective, rtol=SOLVED)
  np.testing.assert_array_equal(other.cut, one.cut[order])
  np.testing.assert_array_equal(other.bits, one.bits[order])
  np.testing.assert_allclose(other.width, one.width[order], rtol=1e-3)


def test_twice_of_everything_is_the_same_allocation():
  problem = world.drawn(6, 5, 3, 3)
  one = allocate.optimize(problem).allocation
  scaled = dataclasses.replace(
    problem,
    up_bits=2 * problem.up_bits,
    bandwidth=2 * problem.bandwidth,
    noise=problem.noise / 2,
    server_flops=3 * problem.server_flops,
    server_speed=3 * problem.server_speed,
    seconds_scale=problem.seconds_scale,
  )
  other = allocate.optimize(scaled).allocation
  np.testing.assert_allclose(other.objective, one.objective, rtol=SOLVED)
  np.testing.assert_array_equal(other.cut, one.cut)
  np.testing.assert_allclose(other.width, 2 * one.width, rtol=1e-3)


def test_memory_depth_and_deadline_are_kept():
  problem = world.drawn(8, 6, 4, 1)
  free = allocate.optimize(problem).allocation
  memory = np.arange(1.0, 5.0)
  least = np.array([0, 1, 2, 3, 1, 0])
  most = np.array([4.0, 2, 3, 4, 2, 1])
  bound = dataclasses.replace(
    problem, memory=memory, memory_max=most, least_cut=least
  )
  for found in (
    allocate.optimize(bound).allocation,
    outcome.equal(bound),
    outcome.worst(bound),
    allocate.optimize(dataclasses.replace(bound, in_turn=True)).allocation,
  ):
    assert np.all(found.cut >= least)
    assert np.all(memory[found.cut] <= most)
  assert allocate.optimize(bound).allocation.objective >= free.objective * (
    1 - SOLVED
  )
  hurry = dataclasses.replace(problem, weight=1.0, error_weight=0.0)
  soonest = float(allocate.optimize(hurry).allocation.finish)
  between = soonest + 0.2 * (float(free.finish) - soonest)
  held = dataclasses.replace(problem, deadline=between)
  found = allocate.optimize(held).allocation
  assert found.finish <= between * (1 + SOLVED)
  assert found.objective >= free.objective * (1 - SOLVED)
  with pytest.raises(
    ValueError, match=r"the deadline is .* s, and the soonest"
  ):
    allocate.optimize(dataclasses.replace(problem, deadline=0.5 * soonest))


@pytest.mark.parametrize("in_turn", [False, True])
def test_the_trade_has_less_energy_the_more_time_it_takes(in_turn):
  problem = world.drawn(9, 3, 3, 2, in_turn=in_turn)
  weights = [0.02, 0.2, 0.6, 0.9, 1.0]
  points = allocate.pareto(problem, weights)
  assert len(points) >= 3
  seconds = np.array([p.allocation.finish for p in points])
  joules = np.array([p.allocation.joules.sum() for p in points])
  assert np.all(np.diff(seconds) > 0)
  assert np.all(np.diff(joules) < 0)
  # By its own weight no point is worse than another.
  for point in points:
    each = dataclasses.replace(problem, weight=point.weight)
    for other in points:
      a = other.allocation
      score = outcome.judge(
        each, a.cut, a.bits, None, a.width, a.watts, a.speed
      )
      assert point.allocation.objective <= score.objective * (1 + SOLVED)


def test_cuts_follow_the_rate_where_activations_shrink_and_not_in_a_vit():
  shrinks = [4e6, 1e6, 2.5e5, 6e4, 1.5e4]
  # Decades of the mean gain: a weak link is spared, a strong one spares work.
  depth = []
  for rate in (1e-5, 1e-3, 1.0, 1e2):
    problem = world.model(rate, shrinks)
    depth.append(allocate.optimize(problem).allocation.cut.mean())
  assert np.all(np.diff(depth) < 0)
  assert depth[0] >= 2
  assert depth[-1] == 0
  interior = [d for d in depth if 0 < d < 4]
  assert len(interior) >= 2
  # The same values everywhere: depth costs work and buys nothing.
  for rate in (1e-5, 1.0, 1e2):
    problem = world.model(rate, np.full(5, 2e5))
    assert allocate.optimize(problem).allocation.cut.max() == 0
  held = world.model(1.0, np.full(5, 2e5), least_cut=np.array([0, 1, 2, 3]))
  np.testing.assert_array_equal(
    allocate.optimize(held).allocation.cut, [0, 1, 2, 3]
  )


def test_adapting_to_a_round_is_nearly_as_good_as_anew_and_cheaper(monkeypatch):
  problem = world.model(1e-2, [4e6, 1e6, 2.5e5, 6e4, 1.5e4], clients=6)
  now = allocate.optimize(problem).allocation
  settle, settled = outcome.settle, []

  def counted(problem, cut, *rest):
    settled.append(cut.size)
    return settle(problem, cut, *rest)

  monkeypatch.setattr(outcome, "settle", counted)
  rng = np.random.default_rng(0)
  moved = 0
  for _ in range(4):
    gains = problem.gains * rng.exponential(size=6)
    faded = dataclasses.replace(problem, gains=gains)
    kept = settle(faded, now.cut, now.bits)
    settled.clear()
    found = allocate.adapt(problem, gains, now).allocation
    cheap = sum(settled)
    settled.clear()
    anew = allocate.optimize(faded).allocation
    assert cheap < 0.2 * sum(settled)
    assert found.objective <= kept.objective * (1 + NEAR)
    assert found.objective <= anew.objective * 1.02
    moved += int(np.sum(found.cut != now.cut))
    now = found
  assert moved >= 3


def test_bits_rise_with_their_weight_and_fall_with_the_load():
  base = world.drawn(3, 5, 2, 5)
  bits = np.asarray(base.bits)
  mean = []
  for weight in (0.0, 0.1, 1.0, 10.0, 1000.0):
    problem = dataclasses.replace(base, error_weight=weight * base.error_weight)
    found = allocate.optimize(problem).allocation
    mean.append(bits[found.bits].mean())
  assert np.all(np.diff(mean) >= 0)
  assert mean[0] == bits.min()
  assert mean[-1] > 2 * mean[0]


def test_an_explanation_adds_up_and_names_what_binds():
  problem = world.drawn(4, 5, 3, 3, weight=0.98)
  problem = dataclasses.replace(
    problem, memory=[1.0, 2.0, 3.0], memory_max=2.0, least_cut=1
  )
  found = allocate.optimize(problem).allocation
  rows = explain.rows(problem, found)
  total = [
    r.device_seconds + r.up_seconds + r.server_seconds + r.down_seconds
    for r in rows
  ]
  np.testing.assert_allclose(total, found.finish, rtol=SOLVED)
  joules = [r.compute_joules + r.send_joules for r in rows]
  np.testing.assert_allclose(joules, found.joules, rtol=NEAR)
  for row in rows:
    assert row.cut == "2"  # the only one that is deep and small enough
    assert {"memory", "depth"} <= set(row.limits)
    at_limit = row.watts > 0.199999
    assert ("power" in row.limits) == at_limit
  assert any("power" in row.limits for row in rows)
  text = io.StringIO()
  rich.console.Console(file=text, width=200).print(explain.format(rows))
  assert "memory, depth" in text.getvalue()
  assert f"{rows[0].watts * 1e3:.4g}" in text.getvalue()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"up_bits": np.ones((3, 2))}, r"up_bits must be \[clients, cuts, bits\]"),
    ({"memory": np.ones((2, 2))}, r"memory must be \[3, 3\] or broadcast to"),
    ({"gains": np.ones(4)}, r"gains must be \[3\] or \[3, sub-channels\]"),
    ({"gains": np.ones((3, 2))}, "every client needs a sub-channel .* got 2"),
    ({"gains": np.array([1.0, 0, 1])}, "gains must be above 0 .* client 1;"),
    ({"power_max": np.array([1.0, 1, np.inf])}, "power_max .* client 2;"),
    ({"device_seconds": -np.ones((3, 3))}, "device_seconds must be at least 0"),
    ({"weight": 1.5}, r"weight must be in \[0, 1\], got 1.5"),
    ({"weight": 0.0}, "weight=0 leaves time out"),
    ({"error_weight": -1.0}, "error_weight must be at least 0"),
    ({"deadline": 0.0}, "deadline must be above 0"),
    ({"bandwidth": 0.0}, "bandwidth must be a positive number"),
    ({"memory": 9.0, "memory_max": [9, 8, 9]}, "client 1 has no cut to choose"),
    ({"least_cut": [0, 1, 3]}, "client 2 has no cut to choose"),
  ],
)
def test_a_problem_that_makes_no_sense_is_refused(change, message):
  problem = world.drawn(0, 3, 3, 3)
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(problem, **change)


def test_a_move_for_nothing_is_not_made():
  # Two cuts that are alike: nobody changes between them.
  problem = world.model(1.0, [2e5, 2e5])
  twin = dataclasses.replace(
    problem,
    device_seconds=np.full((4, 2), 10.0),
    compute_joules=10.0,
    server_flops=1e12,
  )
  cut = np.array([0, 1, 0, 1])
  now = outcome.settle(twin, cut, np.zeros(4, int))
  for block in (blocks.own, blocks.prices, blocks.some):
    assert block(twin, now, 0) is None


@pytest.mark.parametrize("speed", [1e11, np.inf])
def test_who_has_a_server_of_its_own_has_all_of_its_speed(speed):
  problem = dataclasses.replace(
    world.drawn(1, 4), server_each=np.isfinite(speed), server_speed=speed
  )
  for found in (
    allocate.optimize(problem).allocation,
    outcome.equal(problem),
    outcome.worst(problem),
  ):
    np.testing.assert_array_equal(found.speed, speed)
    row = explain.rows(problem, found)[0]
    fixed = problem.device_seconds[0, found.cut[0]]
    served = problem.server_flops[0, found.cut[0]] / speed
    np.testing.assert_allclose(row.device_seconds, fixed + served, rtol=NEAR)
