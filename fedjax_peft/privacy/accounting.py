"""Accounting: what a run has told about one client, as epsilon at a delta.

Numbers come from dp-accounting. Renyi accounting is quick enough for the
record of every round; privacy loss distributions are tighter.

Abadi et al., Deep Learning with Differential Privacy, 2016,
https://arxiv.org/abs/1607.00133; Mironov, Renyi Differential Privacy, 2017,
https://arxiv.org/abs/1702.07476; Koskela et al., Computing Tight Differential
Privacy Guarantees Using FFT, 2020, https://arxiv.org/abs/1906.03049
"""

import functools
import logging
import math
from typing import Literal

import numpy as np
from dp_accounting import pld
from dp_accounting.rdp import rdp_privacy_accountant as rdp

from fedjax_peft import validate
from fedjax_peft.privacy import events, grid_events, ledger

Accountant = Literal["pld", "rdp"]

_ORDERS = tuple(rdp.DEFAULT_RDP_ORDERS)


def epsilon(
  spent: ledger.Ledger | events.Event,
  delta_dp: float,
  *,
  rounds: int = 1,
  accountant: Accountant = "pld",
) -> float:
  """The epsilon of what was released, at a delta.

  Args:
    spent: a ledger, or an event that happens `rounds` times.
    delta_dp: in (0, 1); well below 1 / population.
    rounds: of an event.
    accountant: "pld", privacy loss distributions on a grid of 1e-4, from above
      and tight (coarser where epsilon is above 10); "rdp", Renyi, quicker and
      often a tenth to a quarter larger.

  Returns:
    Epsilon >= 0; infinity where a round had no noise; 0 of an empty ledger.

  Raises:
    ValueError: if `delta_dp` is not in (0, 1), or "pld" is asked for an event
      of which only a Renyi bound is known (all but `events.poisson`).

  Example:
    >>> event = events.poisson(multiplier=1.0, rate=0.05)
    >>> round(epsilon(event, 1e-5, rounds=100, accountant="rdp"), 2)
    4.04
  """
  check_delta(delta_dp)
  validate.one_of(["pld", "rdp"], accountant=accountant)
  if not isinstance(spent, ledger.Ledger):
    spent = ledger.charge(ledger.Ledger(), spent, rounds)
  elif rounds != 1:
    raise ValueError(
      f"a ledger knows its rounds: got {rounds=}; use charge() to add some"
    )
  if accountant == "pld":
    for event, _ in spent.entries:
      if not isinstance(event, events.Poisson):
        raise ValueError(
          "privacy loss distributions are known of Poisson sampling only: "
          f"got {accountant=} for {event}; use accountant='rdp', or "
          "Poisson sampling and Gaussian noise"
        )
  if any(events.is_noiseless(event) for event, _ in spent.entries):
    return math.inf
  if not spent.entries:
    return 0.0
  return (_epsilon_rdp if accountant == "rdp" else _epsilon_pld)(
    spent, float(delta_dp)
  )


@functools.lru_cache(maxsize=256)
def _divergences(event: events.Event) -> np.ndarray:
  """Renyi divergences of one round, one an order."""
  if isinstance(event, events.Skellam):
    return grid_events.divergences(event, _ORDERS)
  accountant = rdp.RdpAccountant(
    list(_ORDERS), neighboring_relation=events.relation(event)
  )
  # It warns of every order that it leaves out; others take their place.
  absl = logging.getLogger("absl")
  absl.addFilter(_is_error)
  try:
    return accountant.compose(events.dp_event(event)).rdp
  finally:
    absl.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
  """True for what is worse than a warning."""
  return record.levelno > logging.WARNING


def _epsilon_rdp(spent: ledger.Ledger, delta_dp: float) -> float:
  """Renyi: divergences add up over rounds, and the best order counts."""
  parts = [rounds * _divergences(event) for event, rounds in spent.entries]
  total = np.sum(parts, axis=0)
  return float(rdp.compute_epsilon(_ORDERS, total, delta_dp)[0])


@functools.lru_cache(maxsize=64)
def _epsilon_pld(spent: ledger.Ledger, delta_dp: float) -> float:
  """Privacy loss distributions, on a grid that a large epsilon makes coarse."""
  # From above whatever the grid; finer than this would fill the memory.
  interval = max(1e-4, _epsilon_rdp(spent, delta_dp) / 1e5)
  accountant = pld.PLDAccountant(
    events.relation(spent.entries[0][0]), value_discretization_interval=interval
  )
  for event, rounds in spent.entries:
    assert isinstance(event, events.Poisson)  # the others were refused
    accountant.compose(events.dp_event(event), rounds)
  return float(accountant.get_epsilon(delta_dp))


def check_delta(delta_dp: float) -> None:
  """Raises ValueError unless it is a probability strictly between 0 and 1."""
  if not 0 < delta_dp < 1:
    raise ValueError(
      f"delta_dp must be in (0, 1), got {delta_dp=}; use well below 1 / "
      "population, for example 1e-6"
    )
