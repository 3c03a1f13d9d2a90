"""Drawing: how a config's cohort is drawn, for whoever accounts for it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from fedjax_peft import data, sampling, schema
from fedjax_peft.privacy import cyclic, events


class Drawn(NamedTuple):
  """How the cohort of a config is drawn.

  Attributes:
    expected: clients of a round, on average.
    event: multiplier -> what a round releases; None where that is not known.
    period: rounds in which a client takes part once at most.
    varies: whether the number of clients is left to chance.
    why: why it is not known.
  """

  expected: float
  event: Callable[[float], events.Event] | None = None
  period: int = 1
  varies: bool = True
  why: str = ""


def drawn(run: schema.Config, population: data.Population) -> Drawn:
  """How the cohort is drawn, for the accountant."""
  seen, size = int(population.seen.sum()), run.cohort.size
  if run.network != schema.Network():
    select, clock = run.network.select, run.network.clock
    kind = clock.get("kind", "synchronous")
    if select.get("method") != "poisson" or kind != "synchronous":
      why = (
        "who takes part in a private round must not depend on others, but got "
        f"network.select={select} and network.clock={clock}; write "
        "--set 'network.select={method=\"poisson\", rate=0.1}' --set "
        "'network.clock={kind=\"synchronous\"}'"
      )
      return Drawn(size, why=why)
    rate = float(select["rate"])
    return Drawn(rate * seen, functools.partial(events.poisson, rate=rate))
  if run.cohort.sampler == "poisson":
    return Drawn(size, functools.partial(events.poisson, rate=size / seen))
  if run.cohort.sampler == "cyclic":
    cycle = cyclic.check(cycle_of(run, population), 1)
    event = functools.partial(events.poisson, rate=cycle.rate)
    return Drawn(size, event, cycle.period)
  fixed = functools.partial(events.fixed_size, cohort=size, population=seen)
  return Drawn(size, fixed, varies=False)


def cycle_of(
  run: schema.Config, population: data.Population
) -> sampling.Sampler:
  """The config's sampler, for noise that is correlated over rounds."""
  seen = int(population.seen.sum())
  if run.cohort.sampler != "cyclic" or run.network != schema.Network():
    raise ValueError(
      "noise that is correlated over rounds needs clients that take part once "
      f"in so many rounds: got cohort.sampler={run.cohort.sampler!r}; write "
      "--set cohort.sampler=cyclic --set cohort.period=8, and no network"
    )
  return cyclic.of_size(run.cohort.size, run.cohort.period, seen)
