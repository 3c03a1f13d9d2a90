"""Exporting: the adapter of a run, for other libraries.

What a run directory holds is enough: the config says what the adapter is, the
newest checkpoint what it has learned, for everybody or for one client. Of a
model that is cut, the parts are put together again (`split.whole`).
"""

import contextlib
import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax

from fedjax_peft import (
  build,
  checkpoint,
  config,
  experiment,
  interop,
  split,
  validate,
)
from fedjax_peft.algorithms import nearness
from fedjax_peft.data import fetch
from fedjax_peft.interop import arrays
from fedjax_peft.rules import ranking


class Found(NamedTuple):
  """What a run has learned.

  Attributes:
    round: of the checkpoint.
    name: "global", or the name of the client.
    base: name or path of the model.
    parts: of the run.
    params: {path: array}, values of `parts.model.params`.
  """

  round: int
  name: str
  base: str
  parts: build.Parts
  params: dict[str, jax.Array]


def export(
  root: str | pathlib.Path,
  *,
  client: str | None = None,
  merged: bool = False,
  out: str | pathlib.Path | None = None,
) -> tuple[pathlib.Path, Found]:
  """Writes what a run has learned in a Hugging Face layout.

  Args:
    root: the run directory.
    client: name or number of a client: its own model, that is the global
      leaves and those that live on it, cut to its rank. None is the global
      model.
    merged: write the whole model with the adapter folded in, not the adapter.
    out: directory to write; None is in the run directory.

  Returns:
    (the directory, what was written).

  Raises:
    ValueError: if there is no run or no checkpoint, the client is not known,
      or the layout cannot hold the method.
    OSError: if a file cannot be read or written.
  """
  root = pathlib.Path(root)
  found = read(root, client)
  if out is None:
    number = "" if client is None else f"-client-{_place(found.parts, client)}"
    out = root / f"{'merged' if merged else 'adapter'}{number}"
  if merged:
    path = interop.export_merged(
      found.parts.model, found.params, out, base=found.base
    )
  else:
    path = interop.export_adapter(
      found.parts.model, found.params, out, base=found.base
    )
  return path, found


def read(root: pathlib.Path, client: str | None = None) -> Found:
  """Reads what a run has learned; see `export`."""
  where = experiment.paths(root)
  if not where.config.is_file():
    raise ValueError(
      f"a run directory holds {where.config.name} and checkpoints/: "
      f"{str(root)!r} does not; give the directory that train wrote"
    )
  run = config.parse(_recorded(where.config))
  if not where.checkpoints.is_dir() or not any(where.checkpoints.iterdir()):
    raise ValueError(
      f"the run in {str(root)!r} has no checkpoint yet; train it further "
      "(--resume), or save more often (--set checkpoint.every=1)"
    )
  parts = _parts(run)
  place = None if client is None else _place(parts, client)
  saved = _saved(where, parts)
  if place is None:
    name, params = "global", _of_all(parts, saved.state)
  else:
    name = parts.data.names[place]
    params = _of_client(parts, saved, place)
  prepared = fetch.home() / "models" / run.model.name
  base = str(prepared) if prepared.is_dir() else run.model.name
  return Found(saved.step, name, base, parts, params)


def _parts(run) -> build.Parts:
  """The parts of a run, their model with what is else only remembered."""
  parts = build.build(run)
  if run.split.cache == "no":
    return parts
  table = dataclasses.replace(run.split, cache="no", gradient=False)
  computed = build.build(dataclasses.replace(run, split=table))
  return parts._replace(model=computed.model)


def _recorded(path):
  """The config that a run was started with."""
  try:
    return json.loads(path.read_text())["config"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path} must be the config that the run was started with, got "
      f"{error!r}; restore the file"
    ) from None


def _saved(where, parts) -> checkpoint.Saved:
  """The newest checkpoint; nobody may write to it meanwhile."""
  with experiment.alone(where.root):
    saves = checkpoint.Checkpoints(where.checkpoints)
    with contextlib.closing(saves):
      found = saves.latest(
        parts.state._replace(clients=()), parts.state.clients
      )
  if found is None:
    raise ValueError(
      f"the run in {str(where.root)!r} has no complete checkpoint; train it "
      "further (--resume)"
    )
  return found


def _place(parts: build.Parts, client: str) -> int:
  """The number of a client that is named or numbered."""
  names = parts.data.names
  if client in names:
    return names.index(client)
  if client.isdecimal() and int(client) < len(names):
    return int(client)
  raise ValueError(
    f"client must be a number below {len(names)} or a name, got {client!r}"
    f"{validate.near(client, names) or f'; the first is {names[0]!r}'}"
  )


def _of_all(parts, state) -> dict[str, Any]:
  """The global model."""
  held, names = state.params, _names(parts.model)
  lacking = sorted(names - held.keys())
  if lacking:
    raise ValueError(
      f"a part of the model lives on the clients: {lacking[:4]}; choose one "
      "with --client"
    )
  return {name: held[name] for name in sorted(names)}


def _names(model) -> set[str]:
  """Leaves of the model itself; of one that is cut, those of its parts."""
  if not isinstance(model.origin, split.Pipeline):
    return set(model.params)
  parts = model.origin.names
  return {k for k in model.params if k.split("/")[0] in parts}


def _of_client(parts, saved, place) -> dict[str, Any]:
  """A client's own model: as it is evaluated, cut to its rank."""
  if nearness.CENTER in parts.model.params:
    raise ValueError(
      "adapters that are mixed anew for each example are no one adapter; "
      "leave algorithm.by_example out of a run that is to be exported"
    )
  tiers, state = parts.algorithm.tiers, saved.state
  params: dict[str, Any] = {}
  edge = place % tiers[0].size
  if "nodes" in state.plan:
    edge = int(state.plan["nodes"][place])
  for node, tier in zip(state.nodes[:-1], tiers[:-1], strict=True):
    at = edge * tier.size // tiers[0].size
    params |= {name: x[at] for name, x in node.params.items()}
  params |= state.params
  params |= {name: x[place] for name, x in saved.clients.local.items()}
  seen = parts.algorithm.work.view(params)
  params = {name: seen[name] for name in _names(parts.model)}
  ranks = []
  if "rank" in parts.algorithm.work.traits:
    ranks.append(int(parts.data.traits["rank"][place]))
  if ranking.RANK in saved.clients.local:  # what it has not given up
    ranks.append(int(saved.clients.local[ranking.RANK][place]))
  return arrays.cut(params, min(ranks)) if ranks else params
