"""Catalog: the data sets there are, and how to get and load them by name."""

import difflib
import importlib
import inspect
import pathlib
from types import ModuleType
from typing import Any, NamedTuple

from fedjax_peft.data import check
from fedjax_peft.data.clients import Population

NAMES = ("fashion_mnist", "shakespeare", "sotu")


class Entry(NamedTuple):
  """What `fedjax-peft data list` says of a data set."""

  name: str
  licence: str
  source: str
  is_prepared: bool


def names() -> tuple[str, ...]:
  """Names of the data sets that `prepare` can get."""
  return NAMES


def entries() -> list[Entry]:
  """One entry per data set; reaches no network."""
  # Reading records imports tensorflow_datasets, which takes half a second.
  from fedjax_peft.data import records

  modules = {name: _module(name) for name in NAMES}
  return [
    Entry(name, x.LICENCE, x.SOURCE, records.is_prepared(name, x.VERSION))
    for name, x in modules.items()
  ]


def prepare(name: str):
  """Gets a data set over the network, once; what is there is kept.

  Raises:
    ValueError: for an unknown name.
    OSError: if the network or the disk fails; nothing half-written stays.
  """
  check.choice("the data set", name, NAMES)
  _module(name).prepare()


def load(name: str, *, seed: int = 0, **options: Any) -> Population:
  """A population by name; never reaches a network.

  Args:
    name: one of `names()`; or the directory or name of any other prepared
      tensorflow-datasets builder, see `fedjax_peft.data.builder.load`.
    seed: of every draw: held-out rows, partition, unseen clients.
    **options: those of the data set: see `load` in `fedjax_peft.data.sotu`,
      `shakespeare`, `fashion_mnist`.

  Raises:
    FileNotFoundError: if the data set is not prepared; says what to run.
    ValueError: for an unknown option; names the nearest.
  """
  near = difflib.get_close_matches(name, NAMES, 1)
  if near and name not in NAMES and not pathlib.Path(name).exists():
    check.choice("the data set", name, NAMES)
  loader = _module(name if name in NAMES else "builder").load
  known = [x for x in inspect.signature(loader).parameters if x != "name"]
  for option in options:
    check.choice(f"an option of {name!r}", option, known)
  named = {} if name in NAMES else {"name": name}
  return loader(seed=seed, **named, **options)


def _module(name: str) -> ModuleType:
  """The module of a data set; imported when needed, since builders are slow."""
  return importlib.import_module(f"fedjax_peft.data.{name}")
