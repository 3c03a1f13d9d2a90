"""The network: where clients are, how fast their links are, what a round costs.

Everything here runs on the host, in numpy and float64, for all clients of a
round at once. Units are SI: seconds, joules, watts, hertz, metres; bytes are
integers, rates are bits per second, money is dollars, carbon is grams.
"""

import importlib

__all__ = [
  "access",
  "availability",
  "centroid",
  "channel",
  "clock",
  "clustering",
  "corruption",
  "draw",
  "drift",
  "failover",
  "fault",
  "flight",
  "ledger",
  "multi",
  "onoff",
  "phases",
  "positions",
  "profile",
  "queue",
  "radio",
  "scenario",
  "selection",
  "serving",
  "spell",
  "station",
  "steps",
  "structure",
  "table",
  "timeline",
  "together",
  "topology",
  "trace",
  "world",
]


def __getattr__(name: str):
  """Loads a module when it is first used (PEP 562)."""
  if name in __all__:
    return importlib.import_module(f"{__name__}.{name}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
