"""Events of integer noise: against exact divergences, and dp-accounting's."""

import itertools
import json
import math

import dp_accounting as dp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from dp_accounting import pld, rdp
from scipy.special import logsumexp

from fedjax_peft.privacy import (
  accounting,
  events,
  grid_events,
  grid_noise,
  ledger,
)

ORDERS = (1.5, 2, 3, 8, 20)
ZERO, OTHER = "zero", "other"
ONE = grid_events.Apart(1, 1, 1, ZERO)  # a step, in one dimension


def gaussian_law(sigma, clients, reach=120):
  """Logs of the exact probabilities of the sum, at -reach .. reach.

  By convolution, in logs: orders of 20 look at tails that floats do not hold.
  """
  x = np.arange(-reach, reach + 1)
  one = -(x**2) / (2 * sigma**2)
  one = one - logsumexp(one)
  apart = x[:, None] - x[None]
  other = np.where(
    abs(apart) > reach, -np.inf, one[apart.clip(-reach, reach) + reach]
  )
  total = one
  for _ in range(clients - 1):
    total = logsumexp(total + other, axis=1)
  return total


def skellam_law(variance, reach=120):
  x = np.arange(-reach, reach + 1)
  return np.log(scipy.special.ive(np.abs(x), variance))


def divergence(law, move, order):
  """Renyi divergence of a law from itself moved, by the whole sum."""
  terms = order * law[move:] + (1 - order) * law[:-move]
  assert max(terms[0], terms[-1]) < terms.max() - 25  # no tail is left out
  return float(logsumexp(terms) / (order - 1))


@pytest.mark.parametrize("clients", [1, 2, 3, 5])
@pytest.mark.parametrize("sigma", [0.5, 0.7, 1.0, 2.0])
def test_no_sum_of_discrete_gaussians_tells_more_than_its_event(sigma, clients):
  law = gaussian_law(sigma, clients)
  for move, order in itertools.product((1, 2, 3), ORDERS):
    moved = grid_events.Apart(move, move, 1, ZERO)
    rho = grid_events.discrete_gaussian(sigma, clients, moved).rho
    exact = divergence(law, move, order)
    assert exact <= rho * order * (1 + 1e-9)
    if sigma >= 1:  # and the bound is tight
      assert exact >= 0.995 * rho * order


def test_a_sum_of_discrete_gaussians_tells_more_than_one_of_its_variance():
  # What would be reported without the term for not being a discrete Gaussian.
  exact = divergence(gaussian_law(0.5, 2), 1, 1.5)
  assert exact > 1.001 * 1.5 / (2 * 2 * 0.5**2)
  assert grid_events.not_gaussian(0.5, 1) == 0
  assert grid_events.not_gaussian(2.0, 1_000_000) < 1e-12
  assert grid_events.not_gaussian(0.5, 100) > 1


def test_the_noise_that_is_sampled_tells_no_more_than_was_asked_for():
  # Its variance is rounded up, to a fraction.
  for sigma in 0.51, math.pi:
    drawn = math.sqrt(grid_noise.rounded_variance(sigma))
    law = gaussian_law(drawn, 2)
    rho = grid_events.discrete_gaussian(sigma, 2, ONE).rho
    assert all(divergence(law, 1, a) <= rho * a for a in ORDERS)


@pytest.mark.parametrize("variance", [0.5, 2.0, 9.0, 60.0])
def test_no_skellam_noise_tells_more_than_its_event(variance):
  law = skellam_law(variance)
  assert logsumexp(law) == pytest.approx(0, abs=1e-12)
  for move in 1, 2, 3:
    event = grid_events.skellam(variance, move, move, ZERO)
    bounds = grid_events.divergences(event, ORDERS)
    for order, bound in zip(ORDERS, bounds, strict=True):
      # Orders between integers are answered for the next one.
      exact = divergence(law, move, order)
      assert exact <= bound
      # Were the variance a half, or the sensitivity twice as large, it would
      # be exceeded wherever the bound is near the truth.
      if variance >= 60 and order == int(order):
        assert exact > bound / 1.5
        assert divergence(skellam_law(variance / 2), move, order) > bound


def test_skellam_numbers_of_clients_add_up_to_one_of_their_variance():
  event = grid_events.skellam_sum(1.5, 4, ONE)
  assert event == events.Skellam(9.0, 1.0, 1.0, ZERO)
  one = np.exp(skellam_law(1.5**2, 60))
  four = np.convolve(np.convolve(one, one), np.convolve(one, one))
  want = scipy.stats.skellam(4.5, 4.5).pmf(np.arange(-240, 241))
  np.testing.assert_allclose(four, want, atol=1e-14)


@pytest.mark.parametrize("kind", ["gaussian", "skellam"])
def test_epsilon_covers_the_exact_one_of_the_whole_law(kind):
  # dp-accounting's privacy loss distribution of the two laws themselves.
  rounds, delta = 10, 1e-5
  if kind == "gaussian":
    law, event = (
      gaussian_law(4.0, 3, 60),
      grid_events.discrete_gaussian(4.0, 3, ONE),
    )
  else:
    law, event = skellam_law(48.0, 90), grid_events.skellam_sum(4.0, 3, ONE)
  logs = {i: float(v) for i, v in enumerate(law) if v > -70}
  exact = pld.privacy_loss_distribution.from_two_probability_mass_functions(
    logs,
    {i + 1: v for i, v in logs.items()},
    value_discretization_interval=1e-3,
  )
  want = exact.self_compose(rounds).get_epsilon_for_delta(delta)
  got = accounting.epsilon(event, delta, rounds=rounds, accountant="rdp")
  assert want <= got <= 1.25 * want
  if kind == "gaussian":  # as a Gaussian, at this sigma
    normal = dp.get_epsilon_gaussian(math.sqrt(48 / rounds), delta)
    assert want == pytest.approx(normal, rel=0.02)


@pytest.mark.parametrize("instead", [ZERO, OTHER])
def test_epsilon_is_that_of_dp_accounting(instead):
  moved = grid_events.apart(100, 500, instead=instead)
  event = grid_events.discrete_gaussian(20.0, 50, moved)
  relation = {
    ZERO: dp.NeighboringRelation.REPLACE_SPECIAL,
    OTHER: dp.NeighboringRelation.REPLACE_ONE,
  }[instead]
  oracle = rdp.RdpAccountant(neighboring_relation=relation)
  oracle.compose(dp.ZCDpEvent(event.rho), 7)
  got = accounting.epsilon(event, 1e-6, rounds=7, accountant="rdp")
  assert got == pytest.approx(oracle.get_epsilon(1e-6), abs=1e-9, rel=0)
  # A Gaussian of the same std and sensitivity, from a module of its own.
  std, far = 20 * math.sqrt(50), moved.l2
  other = rdp.RdpAccountant().compose(dp.GaussianDpEvent(std / far), 7)
  assert got == pytest.approx(other.get_epsilon(1e-6), rel=1e-9)


def test_another_message_is_twice_as_far_as_none():
  near = grid_events.apart(40, 100)
  far = grid_events.apart(40, 100, instead=OTHER)
  assert (far.l1, far.l2) == (2 * near.l1, 2 * near.l2)
  of = [grid_events.discrete_gaussian(9.0, 20, a).rho for a in (near, far)]
  assert of[1] == pytest.approx(4 * of[0])
  for make in grid_events.discrete_gaussian, grid_events.skellam_sum:
    assert "replaced by zero" in events.neighbours(make(9.0, 20, near))
    assert "data replaced" in events.neighbours(make(9.0, 20, far))


@pytest.mark.parametrize("levels", [0.3, 0.6, 1.0, 1.9, 2.5])
@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_no_message_is_rounded_beyond_its_sensitivity(levels, dimension):
  # Exhaustive: every integer point that some message of that norm rounds to,
  # that is, whose cell comes as near to the origin as the norm.
  top = math.ceil(levels) + 2
  points = np.array(
    list(itertools.product(range(top + 1), repeat=dimension)), np.float64
  )
  for rounding, half in {"nearest": 0.5, "either": 1.0}.items():
    nearest = np.maximum(points - half, 0)
    reached = points[np.linalg.norm(nearest, axis=1) <= levels + 1e-12]
    got = grid_events.apart(levels, dimension, rounding=rounding)
    assert np.linalg.norm(reached, axis=1).max() <= got.l2 + 1e-12
    assert np.abs(reached).sum(axis=1).max() <= got.l1 + 1e-12
    # By less than a step beyond what is reached, in all these cases.
    assert got.l2 < np.linalg.norm(reached, axis=1).max() + 1


def test_many_small_values_are_bounded_by_twice_the_norm():
  levels, dimension = 5, 10_000
  x = np.zeros(dimension)
  x[: 4 * levels**2] = 0.5 + 1e-9  # each rounds to 1
  rounded = np.rint(x / np.linalg.norm(x) * levels * (1 + 1e-8))
  got = grid_events.apart(levels, dimension)
  assert np.linalg.norm(rounded) == pytest.approx(got.l2)
  assert np.sum(rounded) == pytest.approx(got.l1)
  assert np.linalg.norm(x) < levels * (1 + 1e-8)


def test_a_ledger_keeps_integer_noise_and_refuses_other_neighbours():
  gaussian = grid_events.discrete_gaussian(3.0, 10, ONE)
  skellam = grid_events.skellam_sum(3.0, 10, ONE)
  spent = ledger.charge(ledger.Ledger(), gaussian, 3)
  spent = ledger.charge(spent, skellam, 2)
  again = ledger.from_dict(json.loads(json.dumps(ledger.to_dict(spent))))
  assert again == spent

  def of(it, rounds=1):
    return accounting.epsilon(it, 1e-5, rounds=rounds, accountant="rdp")

  assert of(gaussian, 3) < of(spent) < of(skellam, 5)
  assert of(events.concentrated(0.0)) == 0
  for wrong in (
    events.poisson(1.0, 0.1),
    events.fixed_size(1.0, 1, 10),
    grid_events.skellam_sum(3.0, 10, ONE._replace(instead=OTHER)),
  ):
    with pytest.raises(ValueError, match="different neighbours"):
      ledger.charge(spent, wrong)
  with pytest.raises(ValueError, match="use accountant='rdp'"):
    accounting.epsilon(spent, 1e-5)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: grid_events.discrete_gaussian(0.4, 3, ONE), "finer grid"),
    (lambda: grid_events.discrete_gaussian(math.nan, 3, ONE), "sigma"),
    (lambda: grid_events.discrete_gaussian(1.0, 0, ONE), "clients"),
    (lambda: grid_events.skellam_sum(0.0, 3, ONE), "sigma"),
    (lambda: grid_events.apart(0.0, 3), "levels"),
    (lambda: grid_events.apart(1.0, 0), "dimension"),
    (lambda: grid_events.apart(1.0, 3, rounding="up"), "rounding"),
    (lambda: grid_events.apart(1.0, 3, instead="none"), "instead"),
    (lambda: events.concentrated(math.inf), "rho must be a finite"),
    (lambda: events.concentrated(-1.0), "rho"),
    (lambda: events.concentrated(1.0, "none"), "instead"),
    (lambda: grid_events.skellam(math.inf, 1, 1, ZERO), "variance"),
  ],
)
def test_what_has_no_bound_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
