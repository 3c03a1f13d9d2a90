"""Data: clients and their examples, from packages, builders or memory."""

from fedjax_peft.data import partition
from fedjax_peft.data.catalog import Entry, entries, load, names, prepare
from fedjax_peft.data.clients import Population
from fedjax_peft.data.memory import population
from fedjax_peft.data.planted import planted
from fedjax_peft.data.ragged import Ragged

__all__ = [
  "Entry",
  "Population",
  "Ragged",
  "entries",
  "load",
  "names",
  "partition",
  "planted",
  "population",
  "prepare",
]
