"""Scenarios: faults that come together, by name.

Each is a function with keyword options that returns a tuple of faults; put
them together with `fault.compose(*scenario.storm(), *scenario.drift(...))`.
"""

from collections.abc import Callable

from fedjax_peft.network import fault

Faults = tuple[fault.Fault, ...]


def clean() -> Faults:
  """Nothing goes wrong."""
  return ()


def flaky(*, rate: float = 0.1) -> Faults:
  """One client in ten vanishes in the middle of a round."""
  return (fault.dropout(rate),)


def offline(*, rate: float = 0.2, mean_rounds: float = 5.0) -> Faults:
  """One client in five is away, for five rounds on average."""
  return (fault.disconnect(rate, mean_rounds),)


def stragglers(*, fraction: float = 0.2, factor: float = 10.0) -> Faults:
  """One client in five, always the same, computes ten times as long."""
  return (fault.stragglers(fraction, factor),)


def noisy(*, rate: float = 0.1, sigma: float = 1.0) -> Faults:
  """One message in ten is half noise, one in ten is broken."""
  return (
    fault.corrupt(rate, "noise", sigma=sigma),
    fault.corrupt(rate, "nan"),
  )


def drift(*, classes: int, rounds: int = 20, fraction: float = 1.0) -> Faults:
  """Labels come to mean something else, within twenty rounds."""
  return (fault.drift_labels(rounds, classes, fraction=fraction),)


def crash(
  *, at: int = 5, every: int | None = 10, restart: float = 60.0
) -> Faults:
  """The server goes down every ten rounds, for a minute."""
  return (fault.crash(at, every, restart=restart),)


def storm() -> Faults:
  """All of it but drift, with one message in ten late and one sent twice."""
  return (
    *flaky(),
    *offline(),
    *stragglers(),
    fault.duplicates(0.1),
    fault.late(0.1, 30.0),
    *noisy(),
    *crash(),
  )


SCENARIOS: dict[str, Callable[..., Faults]] = {
  "clean": clean,
  "crash": crash,
  "drift": drift,
  "flaky": flaky,
  "noisy": noisy,
  "offline": offline,
  "storm": storm,
  "stragglers": stragglers,
}
