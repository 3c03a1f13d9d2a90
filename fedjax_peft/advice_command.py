"""The commands that advise: `fedjax-peft stages` and `fedjax-peft advise`."""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import rich.table

from fedjax_peft import advice, config, console
from fedjax_peft.split import advising, table, verdict


def stages(options: argparse.Namespace, alone: bool) -> int:
  """fedjax-peft stages."""
  run = advice.whole(config.load(options.config, options.set))
  population = advice.population_of(run)
  module = advice.adapted(run, advice.module_of(run, population), 0, "")
  inputs = {
    k: jax.ShapeDtypeStruct((run.client.batch, *v.shape), v.dtype)
    for k, v in population.spec.items()
    if k != "label"
  }
  rows = table.table(module, inputs)
  console.say(f"{run.model.name}: an example", table.format(rows))
  console.say("", "what leaves a stage, in bytes", _sizes(rows))
  return 0


def _sizes(rows: Sequence[table.Row]) -> rich.table.Table:
  """Bytes that leave each stage; of 8 bits the ranges come on top."""
  shown = rich.table.Table(box=None, pad_edge=False)
  shown.add_column("stage")
  for bits in (32, 8):
    shown.add_column(f"{bits} bits", justify="right")
  for row in rows:
    each = (row.values * bits // 8 + row.side_bytes for bits in (32, 8))
    shown.add_row(row.name, *(f"{size:,}" for size in each))
  return shown


def advise(options: argparse.Namespace, alone: bool) -> int:
  """fedjax-peft advise."""
  run = advice.whole(config.load(options.config, options.set))
  found = advice.asked(
    run,
    advising.target(
      weight=options.weight,
      deadline=options.deadline,
      memory=options.memory,
      least_cut=options.least_cut,
      error=options.error,
      coverage=options.coverage,
      values_weight=options.values_weight,
    ),
    ranks=options.ranks,
    schemes=options.schemes,
  )
  keys = advice.pasted(found, config.load(options.config, options.set))
  if options.out is not None:
    _write(options.out, found.clients)
  if options.json:
    print(json.dumps(_plain(found, keys), indent=2))
    return 0
  lines = [f"  --set '{key}={toml(value)}'" for key, value in keys.items()]
  console.say(
    verdict.format(found.rows), "", *found.sentences, "", "to train so:", *lines
  )
  return 0


def toml(value: Any) -> str:
  """A value as TOML writes it in a line.

  Example:
    >>> toml({"by": "joint", "cuts": [1, 2], "layers/0": True})
    '{by = "joint", cuts = [1, 2], "layers/0" = true}'
  """
  if isinstance(value, dict):
    items = (f"{_key(k)} = {toml(v)}" for k, v in value.items())
    return f"{{{', '.join(items)}}}"
  if isinstance(value, list | tuple):
    return f"[{', '.join(map(toml, value))}]"
  return json.dumps(value)


def _key(name: str) -> str:
  """A key, quoted if it must be."""
  bare = name.replace("_", "").replace("-", "").isalnum() and name.isascii()
  return name if bare else json.dumps(name)


def _write(path: str, columns: dict[str, np.ndarray]) -> None:
  """What every client does, as CSV or Parquet by the name."""
  suffix, rows = pathlib.Path(path).suffix, pa.table(columns)
  if suffix == ".csv":
    pyarrow.csv.write_csv(rows, path)
  elif suffix == ".parquet":
    pyarrow.parquet.write_table(rows, path)
  else:
    raise ValueError(
      f"--out must end with .csv or .parquet, got {path!r}; write "
      "--out clients.csv"
    )


def _plain(found: advising.Advice, keys: dict[str, Any]) -> dict[str, Any]:
  """The advice as JSON holds it; what is not known is null."""

  def known(x):
    return None if isinstance(x, float) and not np.isfinite(x) else x

  rows = [{k: known(v) for k, v in r._asdict().items()} for r in found.rows]
  clients = {k: v.tolist() for k, v in found.clients.items()}
  return {
    "scheme": found.scheme,
    "config": keys,
    "schemes": rows,
    "sentences": list(found.sentences),
    "clients": clients,
  }
